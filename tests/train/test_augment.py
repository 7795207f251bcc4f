"""Augmentation: the crops that student and refinery see, and their labels."""

import copy
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import models
from data.loader import Pairing, open_loader
from data.plan import random_mixing
from kernels.normalise import Normalise
from kernels.refinery_loss import refinery_loss
from tests.train.conftest import TINY
from train import TrainError
from train.augment import Augment, AugmentConfig, kept, partners
from train.config import OptimizerConfig, parse
from train.job import check, resolve
from train.label import label
from train.labels.category import Category
from train.labels.ground_truth import GroundTruth
from train.labels.refinery import Refinery
from train.labels.source import Targets
from train.maps import MapsOptions, make_maps
from train.step import Step
from train.student import CROPS, LOSS, TOP1, Student

IMAGENET = models.normalisation("resnet18")
CPU = torch.device("cpu")
ALL = AugmentConfig(color_jitter=0.4, lighting=0.1, cutmix=1.0)


@pytest.fixture(scope="module")
def batch(converted):
    return next(iter(open_loader(converted.beton("train"), resolution=32, batch_size=8, decoder="ffcv").epoch(0)))


def augment(config=ALL, epochs=10):
    return Augment(config, seed=5, epochs=epochs, device=CPU)


def stepped(batch, labels, config=ALL, **where):
    """The loss of a step, and a copy of the student before it."""
    torch.manual_seed(0)
    network = models.build("mobilenet0.25", 3)
    before = copy.deepcopy(network).train()
    student = Student("mobilenet0.25", network, OptimizerConfig(), normalisation=IMAGENET, device=CPU)
    step = Step([student], labels, augment=augment(config), device=CPU, autocast=None, compiled=False)
    step(batch, **where)
    return (student.sums[LOSS] / student.sums[CROPS]).float(), before, student


def pictures(batch, config=ALL, epoch=0, step=0):
    """The original, coloured and mixed crops, and the draws."""
    maker = augment(config)
    draws = maker.draw(8, 32, epoch=epoch, step=step)
    coloured = maker.colour(batch.crops, draws)
    return {"plain": batch.crops, "coloured": coloured, "mixed": maker.mix(coloured, draws)}, draws


def test_by_default_nothing_is_augmented_and_betas_are_the_papers():
    config = AugmentConfig()
    assert not config.colours
    assert not config.mixes
    assert config.describe() == ""
    # CutMix (section 3.1) and Mixup on ImageNet (section 3.1).
    assert (config.cutmix_beta, config.mixup_beta) == (1, 0.2)
    assert AugmentConfig(lighting=0.1).colours
    assert AugmentConfig(color_jitter=0.1).colours
    assert AugmentConfig(cutmix=0.1).mixes
    assert AugmentConfig(mixup=0.1).mixes


@pytest.mark.parametrize("labels", [GroundTruth(3), GroundTruth(3, 0.1), Category(torch.rand(3, 3).softmax(dim=1))])
def test_the_loss_is_the_weighted_sum_of_two(batch, labels):
    loss, student, _ = stepped(batch, labels, epoch=1, step=2)
    seen, _ = pictures(batch, epoch=1, step=2)
    mixing = random_mixing(8, 32, seed=5, epoch=1, step=2, cutmix=1)
    assert 0 < mixing.kept < 1
    logits = student(Normalise(IMAGENET)(seen["mixed"]))
    targets = labels(batch).distribution(3)
    both = mixing.kept * targets + (1 - mixing.kept) * targets[torch.from_numpy(mixing.partners)]
    # Losses of soft labels are linear in the labels, except for a constant: the same as for the mean label.
    wanted = (torch.special.xlogy(targets, targets).sum(dim=1)).mean() + F.cross_entropy(logits, both)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)


def test_crops_are_coloured_and_mixed_as_drawn(batch):
    """Recomputed from the plan; without augmentation they are unchanged."""
    for config in (AugmentConfig(cutmix=1.0), AugmentConfig(mixup=1.0)):
        seen, draws = pictures(batch, config, epoch=1, step=2)
        options = {"cutmix": config.cutmix, "mixup": config.mixup}
        mixing = random_mixing(8, 32, seed=5, epoch=1, step=2, **options)
        top, left, bottom, right = mixing.box
        wanted = batch.crops.float()
        box = wanted[:, :, top:bottom, left:right]
        wanted[:, :, top:bottom, left:right] = mixing.inside * box + (1 - mixing.inside) * box[mixing.partners]
        assert seen["coloured"] is batch.crops
        assert not torch.equal(wanted, batch.crops.float())
        torch.testing.assert_close(seen["mixed"].float(), wanted, rtol=0, atol=1e-3)
        assert partners(draws).tolist() == mixing.partners.tolist()
        assert kept(draws).tolist() == pytest.approx([mixing.kept] * 8)
    for config in (AugmentConfig(color_jitter=0.4), AugmentConfig(lighting=0.1)):
        seen, _ = pictures(batch, config)
        assert (seen["coloured"] - batch.crops.float()).abs().mean(dim=(1, 2, 3)).min() > 0.5
        assert torch.equal(seen["mixed"], seen["coloured"])
    maker = augment(AugmentConfig())
    draws = maker.draw(8, 32, epoch=0, step=0)
    assert maker.colour(batch.crops, draws) is batch.crops
    assert maker.mix(batch.crops, draws) is batch.crops


@pytest.mark.parametrize("sees", ["plain", "coloured", "mixed"])
def test_the_refinery_sees_what_was_chosen(batch, sees):
    torch.manual_seed(9)
    network = models.build("resnet18", 3).eval()
    loss, student, _ = stepped(batch, Refinery(network, IMAGENET, bn="running", sees=sees))
    seen, draws = pictures(batch)
    normalise = Normalise(IMAGENET)
    logits, said = student(normalise(seen["mixed"])), network(normalise(seen[sees]))
    own = refinery_loss(logits, said)
    if sees != "mixed":
        own = kept(draws) * own + (1 - kept(draws)) * refinery_loss(logits, said[partners(draws)])
    torch.testing.assert_close(loss, own.mean(), rtol=1e-4, atol=1e-5)


def test_central_crops_are_labelled_as_they_are(batch):
    assert Refinery(models.build("resnet18", 3), IMAGENET, sees="mixed", center=Pairing("center", 32)).sees == "plain"


def test_every_form_of_targets_can_be_indexed():
    torch.manual_seed(0)
    logits, places, classes = torch.randn(5, 4), torch.tensor([3, 0, 3]), torch.tensor([[0, 2], [1, 3]])
    rows = classes[torch.tensor([0, 1, 0, 1, 1])]
    forms = [
        Targets(ids=torch.tensor([0, 1, 2, 3, 0])),
        Targets(logits=torch.randn(5, 4)),
        Targets(probabilities=torch.randn(5, 4).softmax(dim=1)),
        Targets(sparse=(rows, torch.full((5, 2), 0.4), torch.full((5,), 0.1))),
    ]
    for targets in forms:
        taken = targets.at(places)
        assert torch.equal(taken.distribution(4), targets.distribution(4)[places])
        assert torch.equal(taken.loss(logits[places]), targets.loss(logits)[places])


def test_nothing_is_mixed_in_the_last_epochs():
    maker = augment(AugmentConfig(cutmix=1.0, unmixed=0.2), epochs=10)
    shares = [kept(maker.draw(4, 32, epoch=epoch, step=0)).unique().item() for epoch in range(10)]
    assert all(share < 1 for share in shares[:8])
    assert shares[8:] == [1, 1]
    # ReLabel's 5 of 300 epochs.
    assert augment(AugmentConfig(cutmix=1.0, unmixed=1 / 60), epochs=300)._mixed_epochs == 295


def test_accuracy_counts_the_class_of_the_crops_own_image(batch):
    _, network, student = stepped(batch, GroundTruth(3))
    logits = network(Normalise(IMAGENET)(pictures(batch)[0]["mixed"]))
    assert student.sums[TOP1] == (logits.argmax(dim=1) == batch.labels).sum()


@pytest.mark.slow
def test_draws_do_not_cause_recompilation(batch):
    """Otherwise each step or epoch would be compiled again."""
    torch._dynamo.reset()
    compiler = CompileCounter()
    config = AugmentConfig(color_jitter=0.4, cutmix=0.5, mixup=0.4, unmixed=0.5)
    network = models.build("mobilenet0.25", 3)
    student = Student("mobilenet0.25", network, OptimizerConfig(), normalisation=IMAGENET, device=CPU)
    labels = Refinery(models.build("mobilenet0.25", 3), IMAGENET, sees="coloured")
    step = Step([student], labels, augment=augment(config), device=CPU, autocast=None, compiled=False)
    step._compute = torch.compile(step._loss_of_students, fullgraph=True, dynamic=False, backend=compiler)
    for epoch in (0, 1, 9):
        for number in range(3):
            step(replace(batch, epoch=epoch), epoch, number)
    assert compiler.frame_count == 1


def test_runs_with_every_kind_of_labels(run, converted, refinery, tmp_path, capsys):
    mixed = ["--augment.cutmix", "0.5", "--augment.mixup", "0.5", "--augment.color_jitter", "0.4", "--epochs", "1"]
    common = [*TINY, "--data", str(converted.folder), "--refinery", str(refinery), "--epochs", "1"]
    label(parse([*common, "--out", str(tmp_path / "stored")]))
    make_maps(parse([*common, "--out", str(tmp_path / "maps")]), MapsOptions(96))
    capsys.readouterr()
    online = ["--refinery", str(refinery)]
    kinds = [
        ([], "augment colour jitter 0.4, CutMix 0.5, Mixup 0.5\n"),
        (online, "Mixup 0.5; the refinery labels what the student sees\n"),
        (
            [*online, "--augment.refinery_sees", "coloured", "--augment.unmixed", "0.6"],
            "Mixup 0.5, nothing mixed in the last 1 epochs; the refinery labels the coloured crop; labels are mixed\n",
        ),
        ([*online, "--labels.per", "image"], "augment colour jitter 0.4, CutMix 0.5, Mixup 0.5\n"),
        (["--labels.stored", "stored"], "augment colour jitter 0.4, CutMix 0.5, Mixup 0.5\n"),
        (["--labels.stored", "maps"], "augment colour jitter 0.4, CutMix 0.5, Mixup 0.5\n"),
    ]
    folders = set()
    for words, says in kinds:
        found = run(*mixed, *words)
        assert says in capsys.readouterr().out
        assert found.identity["augment"]["cutmix"] == 0.5
        folders.add(found.folder)
    assert len(folders) == len(kinds)
    assert "augment" not in run("--epochs", "1").identity


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--augment.cutmix", "1.5"], "augment.cutmix=1.5: must be 0 to 1"),
        (["--augment.mixup", "-0.1"], "augment.mixup=-0.1: must be 0 to 1"),
        (["--augment.cutmix", "0.6", "--augment.mixup", "0.6"], "must not be above 1 in sum"),
        (["--augment.cutmix_beta", "0"], "augment.cutmix_beta=0: must be above 0"),
        (["--augment.lighting", "-1"], "augment.lighting=-1: must not be below 0"),
        (["--jitter", "1", "--augment.cutmix", "1"], "jitter=1: moves crops as they were cut; leave out CutMix 1"),
        (["--jitter", "1", "--augment.lighting", "0.1"], "leave out lighting 0.1"),
        (["--augment.refinery_sees", "plain"], "augment.refinery_sees is for a refinery's labels; give a refinery too"),
        (
            ["--refinery", "resnet18", "--labels.per", "image", "--augment.refinery_sees", "plain"],
            "augment.refinery_sees=plain: the labels of labels.per=image are of central crops",
        ),
    ],
)
def test_options_without_effect_are_refused(converted, words, says):
    with pytest.raises(TrainError, match=says):
        check([parse([*TINY, "--data", str(converted.folder), *words])])


def test_a_run_augments_by_its_own_seed(converted):
    def drawn(*words):
        config = parse([*TINY, "--data", str(converted.folder), "--augment.cutmix", "1", *words])
        data, (labels,) = check([config])
        return resolve(config, data, labels).augment.draw(8, 32, epoch=0, step=0)

    assert torch.equal(drawn(), drawn("--model", "resnet18"))
    assert not torch.equal(drawn(), drawn("--seed", "1"))
