"""Many devices and ImageNet's number of images, by simulation."""
