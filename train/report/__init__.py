"""Figures of what runs have learned: the command, its analysis, its figures, and the page around them."""
