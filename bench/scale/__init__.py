"""Simulates many devices and ImageNet's number of images."""
