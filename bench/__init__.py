"""Measures the speed of this project and compares it with hardware limits and other loaders."""

from command import UserError


class BenchError(UserError):
    """A bad input to the bench."""
