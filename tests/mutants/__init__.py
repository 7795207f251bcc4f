"""Mutation tests: plant small mistakes in a copy of the code, one at a time, and find those that no test notices.

The mutations are cosmic-ray's (https://cosmic-ray.readthedocs.io). Its own runner changes files in place and has no
random samples, so the copy, the sample and the order of the tests are made here.
"""
