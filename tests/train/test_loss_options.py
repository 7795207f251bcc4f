"""Options of the loss: a share of ground truth, and weights that balance classes."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import models
from data.loader import open_loader
from data.plan import random_mixing
from kernels.normalise import Normalise
from tests.pictures import write_class_folders
from tests.train.conftest import TINY
from train import TrainError
from train.augment import Augment, AugmentConfig
from train.balance import class_weights
from train.config import OptimizerConfig, parse
from train.jitter import with_jittered
from train.job import check, resolve
from train.labels.category import Category
from train.labels.ground_truth import GroundTruth
from train.labels.refinery import Refinery
from train.labels.source import LabelSource, Targets
from train.step import Step
from train.student import CROPS, LOSS, Student
from train.train import train

IMAGENET = models.normalisation("resnet18")
CPU = torch.device("cpu")
WEIGHTS = torch.tensor([0.25, 1.0, 3.0])


@pytest.fixture(scope="module")
def batch(converted):
    return next(iter(open_loader(converted.beton("train"), resolution=32, batch_size=8, decoder="ffcv").epoch(0)))


class Sparse(LabelSource):
    """Labels of a file that stores the likeliest class and the probability of the others."""

    def forward(self, batch):
        count = len(batch.labels)
        classes = torch.arange(count)[:, None] % 3
        return Targets(sparse=(classes, torch.full((count, 1), 0.8), torch.full((count,), 0.1)))


def labeller(**options):
    torch.manual_seed(9)
    return Refinery(models.build("resnet18", 3).eval(), IMAGENET, bn="running", **options)


def students(*names):
    made = []
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        sgd = OptimizerConfig(lr=1.0, momentum=0.0)
        made.append(Student(name, models.build(name, 3), sgd, normalisation=IMAGENET, device=CPU))
    return made


def divergence(p: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL from each row of p to the softmax of the logits: float [B], in plain PyTorch."""
    return (torch.special.xlogy(p, p) - p * logits.log_softmax(dim=1)).sum(dim=1)


def check_step(batch, crops, labels, wanted, *, names=("mobilenet0.25", "resnet18"), **options):
    """Checks that a step's loss and its update of the weights are those of `wanted`, a function of the logits."""
    trained = students(*names)
    before = [copy.deepcopy(student.network).train() for student in trained]
    Step(trained, labels, device=CPU, autocast=None, compiled=False, **options)(batch)
    for student, network in zip(trained, before, strict=True):
        loss = wanted(network(Normalise(IMAGENET)(crops)))
        torch.testing.assert_close((student.sums[LOSS] / student.sums[CROPS]).float(), loss, rtol=1e-4, atol=1e-5)
        loss.backward()
        for after, weight in zip(student.network.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(after, weight - weight.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
@pytest.mark.parametrize("truth", [0.0, 0.3])
@pytest.mark.parametrize(
    "labels",
    [labeller(), Sparse(), Category(torch.rand(3, 3).softmax(dim=1)), GroundTruth(3), GroundTruth(3, 0.1)],
    ids=["refinery", "sparse", "category", "ids", "smoothed"],
)
def test_the_loss_is_the_formula(batch, labels, truth, weights):
    p = labels(batch).distribution(3)

    def wanted(logits):
        own = -logits.log_softmax(dim=1)[range(8), batch.labels]
        losses = (1 - truth) * divergence(p, logits) + truth * own
        return (losses if weights is None else losses * weights[batch.labels]).mean()

    check_step(batch, batch.crops, labels, wanted, truth=truth, weights=weights)


def test_the_refined_part_alone_has_the_temperature(batch):
    labels = labeller()
    p = (labels(batch).logits / 2).softmax(dim=1)

    def wanted(logits):
        own = F.cross_entropy(logits, batch.labels)
        return 0.8 * 4 * divergence(p, logits / 2).mean() + 0.2 * own

    check_step(batch, batch.crops, labels, wanted, truth=0.2, temperature=2.0)


@pytest.mark.parametrize("sees", ["plain", "mixed"])
def test_a_mixed_crop_has_the_labels_and_weights_of_both(batch, sees):
    """Also if the refinery labels the mixture, which then has one soft label and two images' own labels."""
    augment = Augment(AugmentConfig(cutmix=1.0), seed=5, epochs=10, device=CPU)
    mixing = random_mixing(8, 32, seed=5, epoch=0, step=0, cutmix=1)
    assert 0 < mixing.kept < 1
    draws = augment.draw(8, 32, epoch=0, step=0)
    mixed = augment.mix(batch.crops, draws)
    others = torch.from_numpy(mixing.partners).long()
    labels = labeller(sees=sees)
    p = labels(batch if sees == "plain" else replace(batch, crops=mixed)).distribution(3)

    def wanted(logits):
        total = 0.0
        for share, ys, ps in (
            (mixing.kept, batch.labels, p),
            (1 - mixing.kept, batch.labels[others], p[others] if sees == "plain" else p),
        ):
            own = F.cross_entropy(logits, ys, reduction="none")
            total = total + share * WEIGHTS[ys] * (0.7 * divergence(ps, logits) + 0.3 * own)
        return total.mean()

    check_step(batch, mixed, labels, wanted, truth=0.3, weights=WEIGHTS, augment=augment)


def test_jittered_crops_have_the_class_of_their_image(batch):
    labels = labeller()
    (student,) = students("resnet18")
    both = with_jittered(batch, labels, student.network.train(), Normalise(IMAGENET), eta=1.0, autocast=None)
    p, ys = labels(both).distribution(3), torch.cat([batch.labels, batch.labels])

    def wanted(logits):
        own = F.cross_entropy(logits, ys, reduction="none")
        return (WEIGHTS[ys] * (0.6 * divergence(p, logits) + 0.4 * own)).mean()

    check_step(batch, both.crops, labels, wanted, names=["resnet18"], truth=0.4, weights=WEIGHTS, jitter=1.0)


def test_loss_options_are_compiled_into_the_same_graph(batch):
    torch._dynamo.reset()
    compiler = CompileCounter()
    augment = Augment(AugmentConfig(cutmix=0.5), seed=5, epochs=10, device=CPU)
    options = {"truth": 0.3, "weights": WEIGHTS, "augment": augment}
    step = Step(students("mobilenet0.25"), labeller(), device=CPU, autocast=None, compiled=False, **options)
    step._compute = torch.compile(step._loss_of_students, fullgraph=True, dynamic=False, backend=compiler)
    for number in range(3):
        step(batch, 0, number)
    assert compiler.frame_count == 1


@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=50).filter(any), st.floats(0, 1))
def test_weights_have_a_mean_of_one_over_the_images(counts, power):
    images = np.array(counts)
    weights = class_weights(images, power).double().numpy()
    assert (weights * images).sum() / images.sum() == pytest.approx(1, rel=1e-5)
    there = images > 0
    assert (weights[~there] == 0).all()
    # Twice the images, 2 ** -power of the weight.
    assert weights[there] * images[there].astype(float) ** power == pytest.approx(
        np.full(there.sum(), weights[there][0] * float(images[there][0]) ** power), rel=1e-5
    )


def test_class_weights_at_both_ends():
    assert class_weights(np.array([10, 30]), 0).tolist() == [1, 1]
    assert class_weights(np.array([10, 30]), 1).tolist() == pytest.approx([2, 2 / 3])


def identity(converted, *words):
    config = parse([*TINY, "--data", str(converted.folder), *words])
    data, (labels,) = check([config])
    return resolve(config, data, labels).identity


def test_loss_options_are_part_of_the_identity_only_if_given(converted, refinery):
    of = lambda *words: identity(converted, "--refinery", str(refinery), *words)  # noqa: E731
    plain = of()
    # Runs of earlier versions keep their folders.
    assert plain["loss"] == {"kind": "soft", "temperature": 1.0}
    assert plain == of("--loss.truth", "0", "--loss.balance", "0")
    assert of("--loss.truth", "0.1")["loss"] == plain["loss"] | {"truth": 0.1}
    assert identity(converted, "--loss.balance", "0.5")["loss"] == plain["loss"] | {"balance": 0.5}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss.truth", "0.1"], "loss.truth is for a refinery's labels; give a refinery too"),
        (["--loss.truth", "1"], "loss.truth=1: give a share from 0 to below 1; for the ground truth alone, leave out"),
        (["--loss.truth", "-0.1"], "loss.truth=-0.1: give a share from 0 to below 1"),
        (["--loss.truth", ".nan"], "loss.truth=nan: give a share"),
        (["--loss.balance", "1.5"], "loss.balance=1.5: must be 0 to 1"),
        (["--loss.balance", ".nan"], "loss.balance=nan: must be 0 to 1"),
    ],
)
def test_bad_values(converted, words, message):
    with pytest.raises(TrainError, match=re.escape(message)):
        identity(converted, *words)


def test_a_refinery_by_name_is_trained_without_the_mixture(run, capsys):
    """It learns from the ground truth already; the balance of classes applies to both."""
    words = ["--refinery", "mobilenet0.25", "--epochs", "1", "--loss.truth", "0.25", "--loss.balance", "1"]
    student = run(*words)
    loss = {"kind": "soft", "temperature": 1.0, "balance": 1.0}
    assert student.identity["loss"] == loss | {"truth": 0.25}
    found = [json.loads(path.read_text()) for path in Path("runs").rglob("identity.json")]
    (teacher,) = (each for each in found if each["refinery"] is None)
    assert teacher["loss"] == loss
    out = capsys.readouterr().out
    assert out.count("classes weigh 1 to 1 (balance 1)") == 2
    assert out.count("with batch statistics; 25 % ground truth in the loss; classes weigh") == 1


def test_a_skewed_set_is_balanced(tmp_path, monkeypatch, capsys):
    """The printed and used weights are those of the actual numbers of images."""
    monkeypatch.chdir(tmp_path)
    for part, counts in (("train", (24, 12, 4)), ("val", (2, 2, 2))):
        write_class_folders(Path("set") / part, 3, max(counts), seed=len(part))
        for label, count in enumerate(counts):
            for file in sorted((Path("set") / part / f"class{label}").iterdir())[count:]:
                file.unlink()
    runs = [
        train(parse([*TINY, "--data", "set", "--epochs", "1", *words]))[0]
        for words in ([], ["--loss.balance", "1"], ["--loss.balance", "0.5"])
    ]
    # 40 images: 40 / (3 * 24) and 40 / (3 * 4).
    assert "classes weigh 0.56 to 3.3 (balance 1)" in capsys.readouterr().out
    losses = [run.metrics[0]["loss"] for run in runs]
    assert len({run.folder for run in runs}) == len(set(losses)) == 3
