"""A network's predictions as rows: the most likely classes of each image, also in words, as text, CSV or JSON."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from command import printable
from models.classes import readable
from train import TrainError

# text: for people. csv: a row per image. json: one list. jsonl: one JSON object per line.
Format = Literal["text", "csv", "json", "jsonl"]

# How files of predictions begin.
BEGINS = {"text": "", "csv": "file,", "json": '[\n{"file": ', "jsonl": '{"file": '}


def format_named(out: str, option: str = "OUT") -> Format:
    """The format of a file's extension. Raises TrainError for other extensions."""
    ending = Path(out).suffix.lower().removeprefix(".")
    if ending not in BEGINS or ending == "text":
        raise TrainError(f"{option}={out}: give a name that ends in .csv, .json or .jsonl")
    found: Format = next(each for each in get_args(Format) if each == ending)
    return found


def check_choice(option: str, value: str | None, choices: Sequence[str]) -> None:
    """Raises TrainError unless the value is None or one of the choices."""
    if value not in (None, *choices):
        raise TrainError(f"{option}={value}: unknown; use {' or '.join(choices)}")


class Rows:
    """Writes rows about images, in batches. Each names the image's file and the most likely classes.

    write: called with the text. class_names: by their numbers. most: classes per row. labelled: each row also has the
    image's label, whether it is the most likely class, and its probability. In CSV and JSON probabilities have six
    digits, and a class has its name and its usual word.
    """

    def __init__(
        self, write: Callable[[str], None], format: Format, class_names: Sequence[str], *, most: int, labelled: bool
    ):
        self._write, self._format = write, format
        self._names, self._words = tuple(class_names), readable(class_names)
        self._labelled = labelled
        self._count = 0
        if format == "csv":
            columns = ["file"] + (["label", "correct", "label_probability"] if labelled else [])
            for place in range(1, most + 1):
                columns += [f"{name}{place if place > 1 else ''}" for name in ("class", "name", "probability")]
            self._write(_csv_text([columns]))

    def add(
        self,
        files: Sequence[str],
        classes: torch.Tensor,
        probabilities: torch.Tensor,
        truth: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Rows of a batch. classes: int64 [B, most], the most likely first; probabilities: float32 [B, most], theirs.
        truth: int64 [B], each image's label, and float32 [B], its probability; None unless rows are labelled.
        """
        assert (truth is not None) == self._labelled
        labels = list(zip(*(part.tolist() for part in truth), strict=True)) if truth else [None] * len(files)
        rows = list(zip(files, labels, classes.tolist(), probabilities.tolist(), strict=True))
        if self._format == "csv":
            self._write(_csv_text([self._cells(*row) for row in rows]))
            return
        for row in rows:
            if self._format == "text":
                self._write(self._text(*row))
                continue
            between = "" if self._format == "jsonl" else ",\n" if self._count else "[\n"
            self._write(between + json.dumps(self._object(*row)) + ("\n" if self._format == "jsonl" else ""))
            self._count += 1

    def close(self) -> None:
        """Writes the end of the format, after the last row."""
        if self._format == "json":
            self._write("\n]\n" if self._count else "[]\n")

    def _text(self, file: str, label: Any, classes: list[int], probabilities: list[float]) -> str:
        lines = [printable(file)]
        for index, probability in zip(classes, probabilities, strict=True):
            name, words = self._names[index], self._words[index]
            lines.append(f"  {100 * probability:5.1f} %  {printable(name if words == name else f'{name} {words}')}")
        return "\n".join(lines) + "\n"

    def _cells(self, file: str, label: Any, classes: list[int], probabilities: list[float]) -> list[str]:
        cells = [file]
        if label:
            cells += [self._names[label[0]], str(int(label[0] == classes[0])), _six_digits(label[1])]
        for index, probability in zip(classes, probabilities, strict=True):
            cells += [self._names[index], self._words[index], _six_digits(probability)]
        return cells

    def _object(self, file: str, label: Any, classes: list[int], probabilities: list[float]) -> dict[str, Any]:
        values: dict[str, Any] = {"file": file}
        if label:
            values |= {
                "label": self._names[label[0]],
                "correct": label[0] == classes[0],
                "label_probability": float(_six_digits(label[1])),
            }
        predictions = [
            {"class": self._names[index], "name": self._words[index], "probability": float(_six_digits(probability))}
            for index, probability in zip(classes, probabilities, strict=True)
        ]
        return values | {"predictions": predictions}


def _six_digits(probability: float) -> str:
    return f"{probability:.6g}"


def _csv_text(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
