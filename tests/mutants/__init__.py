"""Mutation testing: makes small changes in a copy of the code, one at a time, and lists those that no test detects.

The mutations are cosmic-ray's (https://cosmic-ray.readthedocs.io). Its runner changes files in place and draws no
random samples, so copying, sampling and running the tests are implemented here.
"""
