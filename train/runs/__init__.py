"""Runs on disk: the names of their folders, their identities and results, and finding them again."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from command import printable
from data.described import check_fields, of_type, read_json
from data.plan import seed_of_generation
from train import TrainError

# The keys that all runs have, and their valid values, in the files that describe them.
_IDENTITY = {
    "data": of_type(dict),
    "model": of_type(str),
    "refinery": of_type(dict, NoneType),
    "labels": of_type(dict),
    "crop": of_type(dict),
    "resolution": of_type(int),
    "epochs": of_type(int),
    "seed": of_type(int),
}
_NUMBER = of_type(int, float)
_RESULT = dict.fromkeys(("top1", "top5", "best_top1", "images_per_second_per_device", "seconds"), _NUMBER)
_METRICS = {"epoch": of_type(int)} | dict.fromkeys(("loss", "top1", "top5", "images_per_second_per_device"), _NUMBER)


@dataclass(frozen=True)
class Run:
    """A run folder. identity: everything that determines its final weights; result: of a finished run, else None."""

    folder: Path
    identity: dict[str, Any]
    result: dict[str, Any] | None

    @property
    def weights(self) -> Path:
        return self.folder / "last.pt"

    @property
    def crop_seed(self) -> int:
        """The seed that its training crops were drawn with (data.plan)."""
        # With stored labels, the crops are those that were labelled.
        if "crop_seed" in self.identity["labels"]:
            return int(self.identity["labels"]["crop_seed"])
        # Runs of an earlier version drew them with the user's seed itself.
        seed, generation = self.identity["seed"], self.identity.get("generation")
        return seed if generation is None else seed_of_generation(seed, generation)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of each finished epoch, from the first one on.

        Read from the checkpoint if their file is damaged or lacks epochs. Raises TrainError if that lacks them too.
        """
        lines, damage = read_metrics(self.metrics_file)
        missing = self.result is not None and len(lines) < self.identity["epochs"]
        if damage or missing or [line["epoch"] for line in lines] != list(range(1, len(lines) + 1)):
            # Imported here: a table of runs does not need PyTorch.
            from train.runs import checkpoint

            found = None
            with suppress(TrainError):
                found = checkpoint.latest(self.folder, mapped=True)
            if found and "metrics" in found[1]:
                return found[1]["metrics"]
            if damage or missing:
                raise damage or no_metrics(self.metrics_file, self.identity["epochs"])
        return lines

    @property
    def data(self) -> str | None:
        """What it was given as DATA; None if its configuration is missing or damaged."""
        try:
            said = yaml.safe_load((self.folder / "config.yaml").read_text())
        except (OSError, ValueError, yaml.YAMLError):
            return None
        data = said.get("data") if isinstance(said, dict) else None
        return data if isinstance(data, str) else None

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON, one mapping per line, without damaged ones; none if there is no such file."""
    values = []
    with suppress(FileNotFoundError):
        for line in path.read_bytes().splitlines():
            with suppress(ValueError):
                values.append(json.loads(line))
    return [value for value in values if isinstance(value, dict)]


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], TrainError | None]:
    """The lines of a file of metrics, one for each epoch that it has, in order; none if there is no such file.

    A truncated last line is dropped. Also returns an error that names the first other damage, if there is any.
    """
    try:
        lines = path.read_bytes().splitlines() if path.is_file() else []
    except OSError as error:
        return [], TrainError(f"{path}: cannot be read ({error.strerror})")
    by_epoch, damage = {}, None
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            check_fields(values, _METRICS)
            by_epoch[values["epoch"]] = values
        except ValueError:
            if number < len(lines):
                damage = damage or TrainError(
                    f"{path}:{number}: is damaged, and no checkpoint holds it; put back a copy"
                )
    return [by_epoch[epoch] for epoch in sorted(by_epoch)], damage


def no_metrics(path: Path, epoch: int) -> TrainError:
    """The error for a run whose file of metrics lacks an epoch that no checkpoint holds."""
    return TrainError(
        f"{path}: has no line of epoch {epoch}, nor has a checkpoint; put back a copy of it, or train the run again in "
        "another OUT"
    )


def key_of(identity: Any) -> str:
    """Eight hex digits that identify an identity, or any other JSON value."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def folder_name(identity: dict[str, Any]) -> str:
    """MODEL[-from-REFINERY]-KEY."""
    refinery = identity["refinery"]
    name = identity["model"] + (f"-from-{refinery['network']}" if refinery else "")
    return f"{name.replace(':', '-').replace('/', '-')}-{key_of(identity)}"


def read_run(folder: Path) -> Run | None:
    """The run in a folder, or None if there is none.

    A damaged identity is read from the checkpoint; a damaged result counts as none, and a notice is printed. Raises
    TrainError if the identity is damaged and no checkpoint holds it, unless the folder holds nothing else.
    """
    path = folder / "identity.json"
    checkpoints = [file for file in folder.glob("*.pt") if file.name in ("last.pt", "last.before.pt", "best.pt")]
    if not path.is_file() and not checkpoints:
        return None
    try:
        identity = _identity(_read_object(path))
    except ValueError as error:
        stored = _stored_identity(folder)
        if stored is None and (checkpoints or (folder / "result.json").is_file()):
            raise TrainError(
                f"{path}: is damaged ({error}), and no checkpoint says what the run is; put back a copy of it, or give "
                "another OUT"
            ) from None
        if stored is None:
            return None
        identity = stored
    return Run(folder, identity, _result(folder / "result.json"))


def run_of(weights: Path | None) -> Run | None:
    """The run that a file of weights is a checkpoint of; None for other weights. Raises as read_run does."""
    return read_run(weights.parent) if weights and weights.suffix == ".pt" else None


def _read_object(path: Path) -> Any:
    """The contents of a JSON file. Raises ValueError with the reason if it cannot be read."""
    try:
        return read_json(path)
    except OSError as error:
        raise ValueError(error.strerror) from None
    except ValueError:
        raise ValueError("not JSON") from None


def _identity(values: Any) -> dict[str, Any]:
    """An identity in this version's form. Raises ValueError, which names the first wrong key, for anything else."""
    check_fields(values, _IDENTITY)
    check_fields(values["data"], dict.fromkeys(("name", "fingerprint"), of_type(str)), of="data.")
    check_fields(values["crop"], dict.fromkeys(("scale", "ratio"), of_type(list)), of="crop.")
    if values["refinery"] is not None:
        check_fields(values["refinery"], {"network": of_type(str)}, of="refinery.")
    return _as_written_now(values)


def _stored_identity(folder: Path) -> dict[str, Any] | None:
    """The identity in a run's checkpoint; None if there is no checkpoint, or one of an earlier version without it."""
    from train.runs import checkpoint

    with suppress(TrainError, ValueError):
        found = checkpoint.latest(folder, mapped=True)
        return _identity(found[1].get("identity")) if found else None
    return None


def _result(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        result = _read_object(path)
        check_fields(result, _RESULT)
    except ValueError as error:
        print(f"warning: {path}: is damaged ({error}); the run's own command makes it again", flush=True)
        return None
    return result


def _as_written_now(identity: dict[str, Any]) -> dict[str, Any]:
    """Converts the identity of a run of an earlier version, which had no kind of labels, to the form of this one.

    It has no generation, so it never equals the identity of a new run, whose crops differ.
    """
    labels = {"per": "crop", "taxonomy": None} | identity["labels"]
    if "kind" not in labels:
        kind = "taxonomy" if labels["taxonomy"] else "refinery" if identity["refinery"] else "ground_truth"
        identity["labels"] = labels | {"kind": "category" if labels["per"] == "category" else kind}
        identity["crop"] = {name: value for name, value in identity["crop"].items() if name != "resolution"}
    return identity


def all_runs(root: Path) -> Iterator[Run]:
    """Every run below root, in the order of their paths. Skips damaged ones with a warning."""
    for path in sorted(root.rglob("identity.json")):
        try:
            run = read_run(path.parent)
        except TrainError as error:
            print(f"warning: {error}; skipped", flush=True)
        else:
            if run:
                yield run
            else:
                print(f"warning: {path}: is damaged, and there is no checkpoint; skipped", flush=True)


def finished_refinery(root: Path, wanted: dict[str, Any], recipe: str) -> tuple[Run | None, Run | None]:
    """A finished run to use as the refinery whose training would have the identity `wanted`, and another run.

    Exactly that run if it exists, else the most accurate one of the same network on the same data, crops and
    resolution, trained on the same kind of labels by the same recipe for at least as many epochs (with another seed,
    for example). None if there is none: a long run should not learn from a trial of three epochs, unless it is named.
    The other run is then the most accurate of those excluded only by recipe or length.
    """
    same = ("data", "model", "resolution", "crop", "refinery")
    candidates = [
        run
        for run in all_runs(root)
        if run.result
        and all(run.identity[key] == wanted[key] for key in same)
        and run.identity["labels"]["kind"] == wanted["labels"]["kind"]
    ]

    def best(runs: Sequence[Run]) -> Run | None:
        return max(runs, key=lambda run: run.result["top1"] if run.result else 0.0, default=None)

    for run in candidates:
        if run.identity == wanted:
            return run, None
    fitting = [run for run in candidates if run.identity["epochs"] >= wanted["epochs"] and recipe_of(run) == recipe]
    return best(fitting), None if fitting else best(candidates)


def recipe_of(run: Run) -> str | None:
    """The recipe that a run was trained with, as it was named; None if its config.yaml does not say."""
    try:
        config = yaml.safe_load((run.folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return config.get("recipe") if isinstance(config, dict) else None


def progress_of(run: Run) -> str:
    if run.result:
        return "finished"
    try:
        return f"epoch {len(run.metrics)} of {run.identity['epochs']}"
    except TrainError:
        return "damaged metrics"


def table_text(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines with aligned columns; control characters in names are escaped."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"
