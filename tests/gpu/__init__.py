"""The first command on a machine with a GPU: runs everything that needs one, in stages, with results on one page."""
