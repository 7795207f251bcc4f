"""How fast, against what limit and which peers."""


class BenchError(ValueError):
    """A bad input to this room: one line that names the option and says what to do."""
