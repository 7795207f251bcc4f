"""How fast, against what limit and which peers."""

from command import UserError


class BenchError(UserError):
    """A bad input to this room."""
