"""From image files to crop batches: sources, conversion, the plan, decoders and the loader."""


class DataError(ValueError):
    """A bad input to this room: one line that names the file or option and says what to do."""
