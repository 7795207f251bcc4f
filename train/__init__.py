"""Labels, the step, the loop, evaluation and runs."""


class TrainError(ValueError):
    """A bad input to this room: one line that names the option or file and says what to do."""
