"""The default batch and length of a run: the recipe's, adapted to the number of training images.

Recipes are written for large sets. For a small one, an epoch of their batches has one step or none, and their epochs
make a run of a few steps.
"""

from dataclasses import replace

from train.config import Config
from train.recipe import is_built_in

# An epoch has at least this many steps, if steps can be made smaller for it.
_STEPS = 16
# The fewest crops in a part of a step, for its batch statistics.
_CROPS = 8


def fitted(config: Config, images: int, replicas: int) -> Config:
    """The configuration with batch and epochs adapted to a set of this many training images.

    The recipe's batch is halved until an epoch has at least 16 steps, but not below 8 crops in each of the `replicas`
    parts of a step; further only if the images would not make a single step, and not below 2. The learning rate follows
    the batch, as always (optimizer.lr_batch). If an epoch of the smallest batch still has fewer than 16 steps, there
    are more epochs, so that the run has 16 steps for each epoch of the recipe. Values that were given (BATCH, EPOCHS, a
    recipe in the user's own file) stay, and stored labels keep the recipe's epochs, which they were made for.
    """
    if config.batch % replicas or not is_built_in(config.recipe):
        return config
    share = config.batch // replicas

    def steps() -> int:
        return images // (share * replicas) * config.copies

    while steps() < _STEPS and share // 2 >= _CROPS:
        share //= 2
    while not steps() and share // 2 >= 2:
        share //= 2
    epochs = config.epochs
    if 0 < steps() < _STEPS and not config.labels.stored:
        epochs = -(-_STEPS * epochs // steps())
    asked = config.given
    return replace(
        config,
        batch=config.batch if "batch" in asked else share * replicas,
        epochs=config.epochs if "epochs" in asked else epochs,
    )


def fit_line(asked: Config, taken: Config, images: int) -> str | None:
    """The changes made by `fitted`, in one line; None if there are none."""
    changes = []
    if taken.batch != asked.batch:
        changes.append(f"batches of {taken.batch} in place of {asked.batch}")
    if taken.epochs != asked.epochs:
        changes.append(f"{taken.epochs} epochs in place of {asked.epochs}")
    if not changes:
        return None
    return (
        f"{asked.model}: {' and '.join(changes)} of recipe {asked.recipe}, which is made for larger sets than {images} "
        "images (--batch and --epochs choose others)"
    )
