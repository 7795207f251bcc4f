"""From image files to crop batches: sources, conversion, the plan, decoders and the loader."""

from command import UserError


class DataError(UserError):
    """A bad input to this room."""
