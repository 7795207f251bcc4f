"""The default batch and length of a run for a set."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import Config, configure
from train.fit import fit_line, fitted


def of(images: int, *, replicas: int = 1, **options) -> Config:
    return fitted(configure({"data": "photos", "model": "resnet50"} | options), images, replicas)


@pytest.mark.parametrize(
    ("images", "batch", "epochs"),
    [
        (1_281_167, 256, 200),  # ImageNet: as in the paper
        (4096, 256, 200),
        (4095, 128, 200),
        (300, 16, 200),
        (100, 8, 267),  # 12 steps an epoch
        (20, 8, 1600),
        (7, 4, 3200),
        (2, 2, 3200),
    ],
)
def test_small_sets_take_smaller_batches_and_more_epochs(images, batch, epochs):
    config = of(images)
    assert (config.batch, config.epochs) == (batch, epochs)
    assert config.optimizer == configure({"data": "photos", "model": "resnet50"}).optimizer
    line = fit_line(configure({"data": "photos", "model": "resnet50"}), config, images)
    assert (line is None) == (images >= 4096)
    assert line is None or (f"batches of {batch} in place of 256" in line and f"than {images} images" in line)


def test_given_values_are_not_fitted(tmp_path):
    assert (of(300, batch=256).batch, of(300, batch=256).epochs) == (256, 200)
    assert (of(20, epochs=3).batch, of(20, epochs=3).epochs) == (8, 3)
    assert fitted(Config(), 20, 1) == Config()
    # A user's own recipe is not adapted.
    own = tmp_path / "own.yaml"
    own.write_text("epochs: 3\nbatch: 16\n")
    assert (of(40, recipe=str(own)).batch, of(40, recipe=str(own)).epochs) == (16, 3)
    # Stored labels were made for the recipe's epochs.
    assert of(20, **{"labels.stored": "labels"}).epochs == 200


@given(
    st.integers(2, 3_000_000),
    st.sampled_from([1, 2, 3, 8]),
    st.integers(1, 3),
    st.sampled_from(["label-refinery", "quick", "fine-tune", "relabel"]),
)
def test_steps_of_every_set_divide_evenly_among_replicas(images, replicas, copies, recipe):
    asked = configure({"data": "photos", "recipe": recipe, "copies": copies})
    config = fitted(asked, images, replicas)
    steps = images // config.batch * copies
    assert config.batch <= asked.batch
    assert config.epochs >= asked.epochs
    if asked.batch % replicas:
        assert config == asked
        return
    assert config.batch % replicas == 0
    assert config.batch // replicas >= min(2, asked.batch)
    # Otherwise the batch is as small as allowed.
    assert steps or images < 2 * replicas or config.batch // replicas < 4
    assert not steps or config.epochs * steps >= 16 * asked.epochs
    if steps < 16:
        assert config.batch < 16 * replicas
    if images >= 16 * asked.batch:
        assert config == asked
