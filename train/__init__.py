"""Labels, the step, the loop, scores, runs and what commands make of them."""

from command import UserError


class TrainError(UserError):
    """A bad input to this room."""
