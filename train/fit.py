"""Batch and length of a run where none was asked for: the recipe's, made to fit the number of training images.

Recipes are written for large sets. Of a small one their batches make an epoch of a step or none, and their epochs a run
of a few steps.
"""

from dataclasses import replace

from train.config import Config, is_built_in

# An epoch has at least so many steps, where crops per step can be fewer for it.
_STEPS = 16
# Crops in a part of a step, at least, for its batch statistics.
_CROPS = 8


def fitted(config: Config, images: int, replicas: int) -> Config:
    """The configuration with the batch and epochs that fit a set of so many training images.

    The recipe's batch is halved until an epoch has at least 16 steps, but not below 8 crops in each of the `replicas`
    parts of a step; below that only as far as the images make one step at all, and not below 2. The learning rate
    follows the batch, as for any other (optimizer.lr_batch). Where an epoch of the smallest batch still has fewer than
    16 steps, there are more epochs, so that the run has 16 steps for each one of the recipe. What was asked for (BATCH,
    EPOCHS, a recipe in a file of the user's) stays, and labels that were stored keep the recipe's epochs, which they
    were made for.
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
    """What `fitted` has changed, in one line; None for nothing."""
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
