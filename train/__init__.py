"""Labels, the step, the loop, scores, runs and the commands that use them."""

from command import UserError


class TrainError(UserError):
    """A bad input to this room."""
