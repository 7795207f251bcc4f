"""Options, recipes and refused values."""

from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from command import exit_on_user_error
from tests.paths import ROOT
from train import TrainError, chain, label, labels, maps
from train.augment import AugmentConfig
from train.config import (
    Config,
    OptimizerConfig,
    Planned,
    ScheduleConfig,
    configure,
    option_words,
    parse,
    parse_both,
    parse_planned,
)
from train.job import growing_resolution
from train.look import command as look
from train.tables import command as tables


def refusal(capsys, *words) -> str:
    """The one line with which a command refuses these words."""
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(lambda: labels.check(parse(words)))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_defaults_are_the_quick_recipe_on_scenes():
    config = parse([])
    assert (config.data, config.recipe, config.model, config.refinery) == ("scenes", "quick", "mobilenet", None)


def test_other_data_take_the_papers_recipe():
    config = parse(["--data", "photos", "--model", "resnet50"])
    assert config.recipe == "label-refinery"
    assert (config.epochs, config.batch, config.optimizer.lr) == (200, 256, 0.1)
    assert (config.schedule.kind, config.schedule.milestones) == ("step", (0.7, 0.85))
    assert parse(["--data", "photos", "--pretrained", "w.pt"]).recipe == "fine-tune"


def test_values_without_a_recipe_are_the_papers():
    config = configure({"data": "photos", "model": "resnet50"})
    assert replace(config, recipe=None) == Config(data="photos", model="resnet50")


def test_a_batch_must_be_a_multiple_of_its_replicas(capsys):
    for batch, replicas in ((16, 5), (6, 4), (7, 8)):
        says = f"batch={batch}: is not a multiple of replicas={replicas}; take one"
        assert says in refusal(capsys, "--batch", str(batch), "--replicas", str(replicas))
    for batch, replicas in ((15, 5), (8, 8), (7, 1)):
        assert parse(["--batch", str(batch), "--replicas", str(replicas)]).replicas == replicas


def test_the_papers_recipe_has_values_for_its_networks():
    assert parse(["--data", "x", "--model", "alexnet"]).optimizer.lr == 0.01
    mobilenet = parse(["--data", "x", "--model", "mobilenet0.5"])
    assert (mobilenet.batch, mobilenet.optimizer.lr, mobilenet.optimizer.lr_batch) == (512, 0.1, 512)


def test_relabels_recipes_are_the_papers():
    plain, cutmix = (parse(["--data", "x", "--recipe", name]) for name in ("relabel", "relabel-cutmix"))
    assert (plain.epochs, plain.batch) == (cutmix.epochs, cutmix.batch) == (300, 1024)
    assert (plain.schedule.kind, plain.schedule.warmup) == (cutmix.schedule.kind, cutmix.schedule.warmup)
    assert (plain.schedule.kind, plain.schedule.warmup) == ("cosine", 5)
    assert plain.optimizer == OptimizerConfig("sgd", 0.1, 1024, 0.9, True, 1e-4)
    assert plain.augment == AugmentConfig(color_jitter=0.4, lighting=0.1)
    optimizer = cutmix.optimizer
    assert (optimizer.kind, optimizer.lr, optimizer.lr_batch, optimizer.weight_decay) == ("adamp", 0.002, 1024, 0.01)
    # In all of the run except 5 of its 300 epochs.
    assert (cutmix.augment.cutmix, cutmix.augment.cutmix_beta, round(300 * cutmix.augment.unmixed)) == (1, 1, 5)
    assert replace(cutmix.augment, cutmix=0, unmixed=0) == plain.augment
    sides = {
        name: parse(["--data", "x", "--recipe", "relabel", "--model", f"timm:{name}"]).resolution
        for name in ("resnet101", "rexnet_100", "efficientnet_b0", "efficientnet_b1", "efficientnet_b3")
    }
    assert list(sides.values()) == [None, None, None, 240, 300]


def test_a_warm_up_is_no_more_than_a_quarter_of_the_run():
    schedule = ScheduleConfig(kind="cosine", warmup=5)
    assert [schedule.factor(epoch, 300) for epoch in (0, 2.5, 5)] == [0, 0.5, 1]
    assert [schedule.factor(epoch, 8) for epoch in (0, 1, 2, 5, 8)] == [0, 0.5, 1, pytest.approx(0.5), 0]
    assert ScheduleConfig(warmup=0.5).factor(0.25, 4) == 0.5


def test_options_override_recipes():
    config = parse(
        ["--recipe", "label-refinery", "--epochs", "3", "--optimizer.lr", "0.3", "--crop.scale", "[0.3, 0.9]"]
    )
    assert (config.epochs, config.optimizer.lr, config.crop.scale) == (3, 0.3, (0.3, 0.9))
    assert config.optimizer.momentum == 0.9


def test_a_file_of_options(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: resnet18\nrecipe: label-refinery\noptimizer:\n  lr: 0.7\n")
    config = parse(["--config", str(tmp_path / "mine.yaml"), "--batch", "32"])
    assert (config.model, config.batch, config.optimizer.lr, config.epochs) == ("resnet18", 32, 0.7, 200)


def test_a_recipe_by_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 5\nnetworks:\n  resnet: {batch: 8}\n  resnet50: {batch: 4}\n")
    assert parse(["--recipe", str(tmp_path / "mine.yaml"), "--model", "resnet50"]).batch == 4
    assert parse(["--recipe", str(tmp_path / "mine.yaml"), "--model", "resnet18"]).batch == 8


def test_every_recipe_is_valid_and_says_what_it_is():
    for file in (ROOT / "train" / "recipes").glob("*.yaml"):
        assert parse(["--recipe", file.stem]).epochs == yaml.safe_load(file.read_text())["epochs"]
        head = file.read_text().split("epochs:")[0]
        assert "make train" in head


def test_print_config_can_be_read_back(capsys, tmp_path):
    with pytest.raises(SystemExit):
        parse(["--model", "resnet18", "--optimizer.lr", "0.25", "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    config = parse(["--config", str(tmp_path / "printed.yaml")])
    assert (config.model, config.optimizer.lr) == ("resnet18", 0.25)


@pytest.mark.parametrize(
    ("main", "out"),
    [
        (lambda: parse_planned(["--help"]), "the run's folder"),
        (label.main, "the folder of the labels"),
        (maps.main, "the folder of the maps"),
        (tables.main, "the file of the tables"),
        (look.main, "the page, a file in .html"),
        (chain.main, None),
    ],
)
def test_help_describes_defaults_and_out_for_each_command(main, out, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["command", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "A recipe's values replace the defaults listed here; --print_config shows" in text
    assert ("--gpus N starts N processes" in text) == (main is not look.main)
    assert text.count("--out OUT") == (2 if out else 0)
    if out:
        assert f"--out OUT {out}" in text


def test_out_is_accepted_where_it_has_another_meaning():
    config, _ = parse_both(["--out", "page.html"], Planned, prog="look", about="", out="the page")
    assert config.out == "page.html"
    config, _ = parse_both([], Planned, prog="chain", about="", out="")
    assert config.out is None


def test_bad_inputs_are_refused(capsys, tmp_path):
    assert "--modle" in refusal(capsys, "--modle", "alexnet")
    assert "optimizer.lrr" in refusal(capsys, "--optimizer.lrr", "1")
    assert "epochs" in refusal(capsys, "--epochs", "many")
    assert "epochs=0" in refusal(capsys, "--epochs", "0")
    assert "epochs=1.5: give a whole number" in refusal(capsys, "--epochs", "1.5")
    assert "optimizer.lr=fast: give a number" in refusal(capsys, "--optimizer.lr", "fast")
    assert "crop.flip=maybe: give true or false" in refusal(capsys, "--crop.flip", "maybe")
    assert "resolution=large: give a whole number" in refusal(capsys, "--resolution", "large")
    assert "did you mean --model?" in refusal(capsys, "--modle", "alexnet")
    assert "did you mean --optimizer.lr" in refusal(capsys, "--optimizer.lrr", "1")
    assert "did you mean" not in refusal(capsys, "--qqqq", "1")
    assert "resolution=100000: must be at most 8192" in refusal(capsys, "--resolution", "100000")
    assert "precision" in refusal(capsys, "--precision", "fp8")
    assert "recipe=slow: neither a recipe (" in refusal(capsys, "--recipe", "slow")
    assert "labels.smoothing=2" in refusal(capsys, "--labels.smoothing", "2")
    assert "other labels are soft already" in refusal(capsys, "--labels.smoothing", "0.1", "--refinery", "resnet18")
    assert "batch=1" in refusal(capsys, "--batch", "1", "--refinery", "resnet18")
    averaged = refusal(capsys, "--batch", "1", "--refinery", "resnet18", "--labels.bn", "averaged")
    assert "needs more than one crop; use labels.bn=running" in averaged
    for share in ("0.0", "1.5", "64.0"):
        assert f"resolution_from={share}: give a share" in refusal(capsys, "--resolution_from", share)
    assert "jitter is for a refinery's labels" in refusal(capsys, "--jitter", "1")
    assert "labels.per is for a refinery's labels" in refusal(capsys, "--labels.per", "image")
    assert "labels.resolution is for a refinery's labels" in refusal(capsys, "--labels.resolution", "64")
    assert "loss.kind is for a refinery's labels" in refusal(capsys, "--loss.kind", "l2")
    assert "labels.bn is for a refinery's labels" in refusal(capsys, "--labels.bn", "running")
    assert "ema=1" in refusal(capsys, "--ema", "1")
    assert "loss.temperature=0" in refusal(capsys, "--loss.temperature", "0", "--refinery", "resnet18")
    assert "place of a refinery" in refusal(capsys, "--labels.taxonomy", "is_a.txt", "--refinery", "resnet18")
    both = ("--refinery", "resnet18", "--jitter", "1")
    assert "labels.per=category needs labels.bn=running" in refusal(capsys, *both[:2], "--labels.per", "category")
    growing = ("--labels.bn", "averaged", "--resolution_from", "0.5")
    assert "give labels.resolution" in refusal(capsys, *both[:2], *growing)
    assert "jitter is for a student that is trained already" in refusal(capsys, *both)
    assert "jitter needs a label for every crop" in refusal(capsys, *both, "--labels.per", "image")
    assert "jitter moves crops for one student" in refusal(capsys, *both, "--model", "alexnet mobilenet")
    (tmp_path / "bad.yaml").write_text("epochs: 5\nlearning_rate: 3\n")
    assert "learning_rate" in refusal(capsys, "--recipe", str(tmp_path / "bad.yaml"))
    (tmp_path / "text.yaml").write_text("just words")
    assert "text.yaml" in refusal(capsys, "--recipe", str(tmp_path / "text.yaml"))
    assert "absent.yaml" in refusal(capsys, "--config", str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("optimizer.lr", "-1.0"),
        ("optimizer.momentum", "1.0"),
        ("optimizer.weight_decay", "-0.1"),
        ("schedule.warmup", "-1.0"),
        ("crop.scale", "[0.5, 0.1]"),
        ("crop.scale", "[0.5, 2.0]"),
        ("crop.ratio", "[0.0, 1.0]"),
        ("crop.center_ratio", "1.5"),
        ("loss.temperature", "0.0"),
        ("jitter", "-1.0"),
        ("resolution", "0"),
        ("threads", "0"),
    ],
)
def test_invalid_values_are_refused(capsys, option, value):
    assert f"{option}={value}" in refusal(capsys, f"--{option}", value)


NO_MOMENTUM = ("--optimizer.kind", "sgd", "--optimizer.nesterov", "true", "--optimizer.momentum", "0")


def test_nesterov_needs_momentum(capsys):
    assert "give optimizer.momentum too" in refusal(capsys, *NO_MOMENTUM)


def test_milestones_scale_with_the_length():
    schedule = ScheduleConfig()
    for epochs, first, second in [(200, 140, 170), (20, 14, 17), (10, 7, 8)]:
        factors = [schedule.factor(epoch, epochs) for epoch in range(epochs)]
        assert factors[first - 1 : first + 1] == [1, pytest.approx(0.1)]
        assert factors[second - 1 : second + 1] == [pytest.approx(0.1), pytest.approx(0.01)]


def test_cosine_with_warm_up():
    schedule = ScheduleConfig(kind="cosine", warmup=2)
    assert [schedule.factor(epoch, 10) for epoch in (0, 1, 2, 6)] == pytest.approx([0, 0.5, 1, 0.5])
    assert schedule.factor(9.999, 10) == pytest.approx(0, abs=1e-5)


@given(st.integers(1, 60), st.floats(0.01, 1), st.integers(16, 500))
def test_crops_grow_from_a_share_of_the_resolution_to_all_of_it(epochs, share, last):
    sides = [growing_resolution(epoch, epochs, share, last) for epoch in range(epochs)]
    assert sides == sorted(sides)
    assert all(abs(side - share * last) <= 16 for side in sides[: epochs // 3])
    assert all(side == last for side in sides[-(-2 * epochs // 3) :])
    assert all(side % 16 == 0 or side == last for side in sides)


def test_another_configuration_is_made_from_the_given_options(tmp_path):
    """The recipe's values for one network are not kept for another one; the user's are."""
    (tmp_path / "mine.yaml").write_text(
        "{batch: 16, epochs: 3, networks: {mobilenet: {batch: 8, optimizer: {lr: 0.5}}, resnet: {optimizer: {lr: 2}}}}"
    )
    config = parse(["--recipe", str(tmp_path / "mine.yaml"), "--model", "mobilenet", "--epochs", "3"])
    assert (config.batch, config.optimizer.lr, config.epochs) == (8, 0.5, 3)
    other = config.replace({"model": "resnet18"})
    assert (other.batch, other.optimizer.lr, other.epochs) == (16, 2, 3)
    said = parse(["--recipe", str(tmp_path / "mine.yaml"), "--model", "mobilenet", "--batch", "8"])
    assert said.replace({"model": "resnet18"}).batch == 8
    assert config.replace({"labels.bn": "running"}).labels.bn == "running"
    # The default recipe depends on the given options.
    assert [parse([]).replace(options).recipe for options in ({}, {"data": "x"}, {"pretrained": "w.pt"})] == [
        "quick",
        "label-refinery",
        "fine-tune",
    ]


def test_a_configuration_made_without_a_recipe_keeps_all_its_values():
    config = Config(model="alexnet", data="x", epochs=7, optimizer=OptimizerConfig(lr=0.3))
    assert config.replace({"seed": 5}).epochs == 7
    assert config.replace({"model": "mobilenet"}).optimizer.lr == 0.3


REFINED = ["--refinery", "resnet18", "--labels.bn", "running", "--labels.per", "image", "--loss.kind", "hard"]


def test_variants_on_ground_truth_from_a_refinery_and_as_a_refinery():
    config = parse([*REFINED, "--pretrained", "w.pt", "--out", "here", "--seed", "3"])
    plain = config.on_ground_truth()
    assert (plain.refinery, plain.labels, plain.loss) == (None, Config().labels, Config().loss)
    assert (plain.pretrained, plain.out, plain.seed) == ("w.pt", "here", 3)
    refinery = config.as_refinery("resnet50", {"pretrained": None, "out": None})
    assert (refinery.model, refinery.refinery, refinery.pretrained, refinery.out) == ("resnet50", None, None, None)
    assert (refinery.labels, refinery.seed, refinery.recipe) == (Config().labels, 3, "quick")
    smoothed = parse(["--labels.smoothing", "0.1", "--labels.per", "image", "--loss.kind", "hard"])
    student = smoothed.learning_from("runs/a")
    assert (student.refinery, student.labels.smoothing, student.labels.per) == ("runs/a", 0, "image")
    assert student.loss.kind == "hard"
    for each in (plain, refinery, student):
        labels.check(each)


def test_a_recipe_may_have_other_values_for_refineries(tmp_path):
    (tmp_path / "mine.yaml").write_text("{epochs: 3, refineries: {optimizer: {weight_decay: 0.5}}}")
    config = parse(["--recipe", str(tmp_path / "mine.yaml"), "--refinery", "resnet18"])
    assert config.optimizer.weight_decay == config.on_ground_truth().optimizer.weight_decay == 0
    assert config.as_refinery("resnet18", {}).optimizer.weight_decay == 0.5
    said = config.replace({"optimizer.weight_decay": 0.25})
    assert said.as_refinery("resnet18", {}).optimizer.weight_decay == 0.25
    # As in the paper, whose refinery had weight decay and whose students had none.
    paper = parse(["--data", "imagenet", "--model", "alexnet", "--refinery", "resnet50"])
    assert (paper.optimizer.weight_decay, paper.as_refinery("resnet50", {}).optimizer.weight_decay) == (0, 1e-4)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "model": st.sampled_from(["alexnet", "mobilenet0.5", "resnet18"]),
            "data": st.sampled_from(["scenes", "photos", "null"]),
            "epochs": st.integers(1, 99),
            "optimizer.lr": st.floats(1e-4, 1),
            "crop.scale": st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1)),
            "crop.flip": st.booleans(),
            "refinery": st.sampled_from([None, "resnet18", "runs/a b"]),
            "labels.per": st.sampled_from(["crop", "image"]),
            "ema": st.floats(0, 0.99),
        },
    )
)
@pytest.mark.slow
def test_options_and_words_are_the_same(options):
    assert parse(option_words(options)) == configure(options)
    assert parse(option_words(options)).given == configure(options).given == options


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("{networks: {mobilenet: 3}}", "networks: mobilenet: expected a mapping, not 3"),
        ("{networks: [1]}", r"networks: expected a mapping, not \[1\]"),
        ("{networks: {alexnet: {bach: 3}}}", "unknown keys bach"),
        (
            "{networks: {alexnet: {refinery: resnet18}}}",
            "networks: alexnet: refinery must be the same for all networks",
        ),
        ("{refineries: {data: photos}}", "refineries: data must be the same for all networks"),
        ("{refineries: {epohcs: 3}}", "unknown keys epohcs"),
        ("{epochs: many}", "recipe=.*mine.yaml: epochs=many: give a whole number"),
        ("{refineries: {epohcs: 3}}", r"unknown keys epohcs; did you mean --epochs\?"),
    ],
)
def test_wrong_recipes_are_refused_even_in_unused_sections(recipe, says, tmp_path):
    (tmp_path / "mine.yaml").write_text(recipe)
    with pytest.raises(TrainError, match=says):
        parse(["--recipe", str(tmp_path / "mine.yaml")])


def test_a_recipe_may_name_a_refinery_and_leave_sections_empty(tmp_path):
    (tmp_path / "mine.yaml").write_text("{refinery: resnet18, networks: , refineries: , crop: }")
    config = parse(["--recipe", str(tmp_path / "mine.yaml")])
    assert (config.refinery, config.crop.scale) == ("resnet18", None)
    assert config.as_refinery("resnet18", {}).refinery is None


def test_an_empty_group_of_options(tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 3\ncrop:\n#  flip: false\n")
    assert parse(["--config", str(tmp_path / "mine.yaml")]).replace({"seed": 2}).epochs == 3


def test_files_that_hold_no_options_are_named(capsys, tmp_path):
    for content in ("", "[1, 2]", "just words"):
        (tmp_path / "mine.yaml").write_text(content)
        says = refusal(capsys, "--config", str(tmp_path / "mine.yaml"))
        assert f"{tmp_path / 'mine.yaml'}: expected a mapping of options to values" in says
    assert "refinery is empty: give it a value or leave it out" in refusal(capsys, "--refinery", "")


@pytest.mark.parametrize(
    "text", ["\x00", "epochs: 2001-99-99", "[" * 20_000, "epochs: !!python/object/apply:os.getpid []"]
)
def test_a_recipe_that_is_not_yaml_of_plain_values_is_refused(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(TrainError, match="recipe.yaml: not YAML"):
        parse(["--recipe", str(path)])
