"""A folder of stored labels: what it holds, and how it is written and read.

`labels.json` says what the labels are of and how their rows are made; `epoch-0000.labels` and so on hold a row of bytes
for each crop of an epoch, in the order of the images and of their copies. Several processes may write different epochs
at the same time; an epoch is there as a whole or not at all.
"""

import fcntl
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data.plan import CropRule
from data.sets import ConvertedSet
from models.trained import load_trained, names_network_alone
from train import TrainError
from train.labels.rows import Rows, build_rows
from train.labels.source import Labels
from train.runs import key_of

_VERSION = 1
# What is being written.
_PARTIAL = ".partial"


@dataclass(frozen=True)
class StoredOptions:
    """Options of labels from files.

    Args:
        stored: a folder of labels that a refinery gave to every crop (python -m train.label), in place of the refinery
        cycle: take the first so many stored epochs again and again, in a run of more epochs than are stored
    """

    stored: str | None = None
    cycle: int | None = None


@dataclass(frozen=True)
class Description:
    """What stored labels are of, and how they were made.

    data: name, fingerprint, images and classes of the set. refinery: its network, the digest of its weights, its
    generation, whose batch statistics it used and the resolution it saw crops at (None: as they are). plan: seed, crop
    rule and copies of an epoch, of which the crops are a function. resolution: pixels a side of the crops. precision,
    batch, order: what labels depend on by rounding, or with the batch's statistics. format, k, dtype: see
    train.labels.rows.build_rows. bytes_per_crop: of a row.

    Of label maps (format map) there is one row an image, no plan, and one file. resolution: pixels a side of the
    pictures, squashed to squares. cells: a side of a map. shift: whether the logits were moved, cell by cell, so that
    those which were left out are 0 on average.

    Of imported maps (train/trees.py), what their files do not say is None. refinery: the name that the user gave, as
    the digest of its weights the SHA-256 of all rows (None until they are finished), and generation 0.
    """

    data: dict[str, Any]
    refinery: dict[str, Any]
    plan: dict[str, Any] | None
    resolution: int | None
    precision: str | None
    batch: int | None
    order: str | None
    format: str
    k: int | None
    dtype: str | None
    bytes_per_crop: int
    cells: int | None = None
    shift: bool | None = None

    @property
    def seed(self) -> int:
        assert self.plan
        return int(self.plan["seed"])

    @property
    def copies(self) -> int:
        return int(self.plan["copies"]) if self.plan else 1

    @cached_property
    def crop(self) -> CropRule:
        assert self.plan
        rule = self.plan["crop"]
        return CropRule(**rule | {name: tuple(rule[name]) for name in ("scale", "ratio")})

    @property
    def shape(self) -> tuple[int, int]:
        """Of an epoch's rows."""
        return self.data["images"] * self.copies, self.bytes_per_crop

    @property
    def bytes_per_epoch(self) -> int:
        rows, width = self.shape
        return rows * width

    @property
    def key(self) -> str:
        """Names all of it, in eight hex digits."""
        # What only maps have is no part of the name of other labels.
        return key_of(
            {name: value for name, value in asdict(self).items() if value is not None or name in ("k", "dtype")}
        )

    @property
    def kind(self) -> str:
        """The format of the rows, in a few words."""
        if self.format == "map":
            return f"maps of {self.cells}x{self.cells} cells, top {self.k}"
        return self.format if self.k is None else f"top {self.k}"

    def file_name(self, epoch: int) -> str:
        return "train.maps" if self.format == "map" else f"epoch-{epoch:04d}.labels"

    def build_rows(self) -> Rows:
        """The format of the rows."""
        return build_rows(self.format, self.data["classes"], k=self.k, dtype=self.dtype)


class Store:
    """The labels in a folder, which `open_store` and `create_store` give. description: what they are of."""

    def __init__(self, folder: Path, description: Description):
        self.folder, self.description = folder, description

    @property
    def finished(self) -> dict[int, dict[str, Any]]:
        """Of each epoch (0, 1, ...) that is labelled: crc32 of its file, and the seconds it took."""
        done, size = _read(self.folder)[1], self.description.bytes_per_epoch
        return {epoch: made for epoch, made in done.items() if _size_of(self._file(epoch)) == size}

    @property
    def epochs(self) -> int:
        """How many epochs are labelled, from the first on and without a gap."""
        done = self.finished
        return next(epoch for epoch in range(len(done) + 1) if epoch not in done)

    def check_sizes(self) -> None:
        """Raises TrainError for the file of a finished epoch that no longer has the size it was written with."""
        size = self.description.bytes_per_epoch
        for epoch in _read(self.folder)[1]:
            found = _size_of(self._file(epoch))
            if found not in (None, size):
                raise TrainError(
                    f"{self._file(epoch)}: has {found} bytes and should have {size}; label again with the same "
                    "command, which writes it again"
                )

    @property
    def network(self) -> dict[str, str]:
        """network, weights (a digest): of the refinery."""
        return {name: self.description.refinery[name] for name in ("network", "weights")}

    def check_data(self, data: ConvertedSet) -> None:
        """Raises TrainError unless the labels are of these data."""
        there = self.description.data["fingerprint"]
        if data.fingerprint != there:
            raise TrainError(
                f"LABELS={self.folder}: are of other data, with fingerprint {_short(there)} and not "
                f"{_short(data.fingerprint)} as {data.folder}"
            )

    def check_refinery(self, asked: str, class_names: Sequence[str]) -> None:
        """Raises TrainError unless the labels are those of the refinery that was named beside them."""
        if names_network_alone(asked):
            found, there = asked, self.network["network"]
        else:
            found, there = load_trained(asked, class_names=class_names).digest, self.network["weights"]
        if found != there:
            raise TrainError(
                f"REFINERY={asked}: LABELS={self.folder} were made by another one, {_short(there)} and not "
                f"{_short(found)}; leave one of them out"
            )

    def rows(self, epoch: int) -> NDArray[np.uint8]:
        """The rows of an epoch, [crops, bytes_per_crop], mapped from its file. Raises TrainError for damage."""
        path = self._file(epoch)
        self.check_sizes()
        try:
            mapped = np.memmap(path, np.uint8, "r", shape=self.description.shape)
        except OSError as error:
            raise TrainError(f"{path}: cannot be read ({error.strerror}); label again with the same command") from None
        if zlib.crc32(mapped.data) != self.finished[epoch]["crc32"]:
            raise TrainError(
                f"{path}: is damaged (its checksum is not that in labels.json); remove the file and label again with "
                "the same command, which writes what is missing"
            )
        return np.asarray(mapped)

    def check_room(self, epochs: int) -> None:
        """Raises TrainError unless the disk has room for what is missing of so many epochs."""
        missing = set(range(epochs)) - set(self.finished)
        # What an epoch that is being written has been given is no longer free.
        given = sum(_size_of(self._partial(epoch)) or 0 for epoch in missing)
        needed, free = len(missing) * self.description.bytes_per_epoch - given, shutil.disk_usage(self.folder).free
        if needed > free:
            smaller = {
                "packed": "fewer EPOCHS or a smaller --k",
                "exact": "fewer EPOCHS or --format packed",
                "map": "a smaller --map_resolution",
            }
            imported = self.description.resolution is None
            what = "the maps" if self.description.format == "map" else f"{len(missing)} epochs of labels"
            raise TrainError(
                f"OUT={self.folder}: {what} take {in_units(needed)}, and {in_units(free)} are free; take another disk"
                f"{'' if imported else f', or {smaller[self.description.format]}'}"
            )

    @contextmanager
    def writing(self, epoch: int) -> Iterator[NDArray[np.uint8] | None]:
        """Rows to be filled, [crops, bytes_per_crop]; those of the epoch, once the context ends without an error.

        None where the epoch is finished, or where another process is writing it. Raises TrainError where the disk is
        full.
        """
        partial = self._partial(epoch)
        with self._cannot_write(partial):
            file = self._claimed(epoch)
        if file is None:
            yield None
            return
        started = time.perf_counter()
        try:
            with self._cannot_write(partial):
                file.truncate(self.description.bytes_per_epoch)
                # Asked for now: where the disk is full, writing to a mapped page ends the process.
                os.posix_fallocate(file.fileno(), 0, self.description.bytes_per_epoch)
                rows = np.memmap(file, np.uint8, "r+", shape=self.description.shape)
            yield rows
            with self._cannot_write(partial):
                rows.flush()
                os.fsync(file.fileno())
                # In this order: where both are there, the epoch is finished, and nobody else has claimed it before.
                self._add(epoch, {"crc32": zlib.crc32(rows.data), "seconds": time.perf_counter() - started})
                os.replace(partial, self._file(epoch))
        finally:
            partial.unlink(missing_ok=True)
            file.close()

    def _claimed(self, epoch: int) -> BinaryIO | None:
        """The open file that this process alone is to write, or None. It is unlocked however the process ends."""
        partial = self._partial(epoch)
        while epoch not in self.finished:
            file = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever had it until now may have finished the epoch, or have given up and removed the file.
                if epoch not in self.finished and os.path.samestat(os.fstat(file.fileno()), os.stat(partial)):
                    return file
            except FileNotFoundError:
                pass
            except BlockingIOError:
                file.close()
                return None
            except BaseException:
                file.close()
                raise
            file.close()
        return None

    def _add(self, epoch: int, made: dict[str, Any]) -> None:
        with _locked(self.folder):
            _write(self.folder, self.description, _read(self.folder)[1] | {epoch: made})

    @contextmanager
    def _cannot_write(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = f"; {len(self.finished)} finished epochs are kept, and the same command goes on with the others"
            raise TrainError(
                f"{path}: cannot be written ({error.strerror}){'' if self.description.format == 'map' else kept}"
            ) from None

    def _file(self, epoch: int) -> Path:
        return self.folder / self.description.file_name(epoch)

    def _partial(self, epoch: int) -> Path:
        return self.folder / f".{self._file(epoch).stem}{_PARTIAL}"


@dataclass(frozen=True)
class LabelsFromStore(Labels):
    """Labels from files, of whichever kind: what they say of the refinery that gave them, and of the data."""

    store: Store

    elsewhere = "is for stored labels; give labels.stored too"

    @property
    def generation(self) -> int:
        return int(self.store.description.refinery["generation"]) + 1

    @property
    def refinery(self) -> dict[str, str]:
        return self.store.network

    def check_data(self, data: ConvertedSet) -> None:
        self.store.check_data(data)


def open_store(folder: str | Path) -> Store:
    """The labels in a folder. Raises TrainError where there are none, or where their description is damaged."""
    return Store(Path(folder), _read(Path(folder))[0])


def check_folder(folder: Path) -> None:
    """Raises TrainError where labels could not be written to a folder that may not be there yet. Nothing is written."""
    try:
        if _described(folder).is_file():
            return
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        writable = existing.is_dir() and os.access(existing, os.W_OK)
        others = writable and existing == folder and any(not path.name.endswith(_PARTIAL) for path in folder.iterdir())
    except OSError as error:
        raise TrainError(f"OUT={folder}: labels cannot be written there ({error.strerror})") from None
    if not writable:
        raise TrainError(f"OUT={folder}: labels cannot be written there ({existing} is no folder that can be written)")
    if others:
        raise TrainError(f"OUT={folder}: holds other files; give a new folder, or one of such labels")


def create_store(folder: Path, description: Description) -> Store:
    """Labels that are to be written into a folder, where some may be already.

    Raises TrainError where it holds other labels or other files, or cannot be written.
    """
    # As JSON gives it back, so that it compares equal with what was read.
    description = Description(**json.loads(json.dumps(asdict(description))))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            check_folder(folder)
            if not _described(folder).is_file():
                _write(folder, description, {})
    except OSError as error:
        raise TrainError(f"OUT={folder}: labels cannot be written there ({error.strerror})") from None
    store = open_store(folder)
    others = differences(description, store.description)
    if others:
        raise TrainError(f"OUT={folder}: holds other labels ({'; '.join(others)}); give another folder")
    return store


def differences(asked: Description, found: Description) -> list[str]:
    """In what two descriptions differ, as phrases."""
    here, there = _flat(asdict(asked)), _flat(asdict(found))
    return [
        f"{name} is {_short(there.get(name))} there and {_short(here.get(name))} here"
        for name in here | there
        if here.get(name) != there.get(name)
    ]


def in_units(size: int) -> str:
    """A number of bytes, as people read it."""
    value, units = float(size), ["bytes", "kB", "MB", "GB", "TB", "PB", "EB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{name}.{key}" if name else key)
    return flat


def _short(value: Any) -> str:
    """A value as messages show it: of a digest, what tells two apart."""
    return value[:16] if isinstance(value, str) and len(value) == 64 else str(value)


def _described(folder: Path) -> Path:
    return folder / "labels.json"


def _size_of(path: Path) -> int | None:
    """Bytes of a file, or None where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _read(folder: Path) -> tuple[Description, dict[int, dict[str, Any]]]:
    """What labels.json says: the description, and the epochs that were finished."""
    path = _described(folder)
    try:
        said = json.loads(path.read_text())
        if said["version"] != _VERSION:
            raise TrainError(f"{path}: written by another version of this program; label again")
        if said.pop("checksum") != key_of(said):
            raise ValueError
        epochs = {int(epoch): made for epoch, made in said.pop("epochs").items()}
        return Description(**{name: value for name, value in said.items() if name != "version"}), epochs
    except TrainError:
        raise
    except OSError as error:
        raise TrainError(f"{path}: cannot be read ({error.strerror}); is {folder} a folder of stored labels?") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise TrainError(f"{path}: is damaged; label again, into another folder") from None


def _write(folder: Path, description: Description, epochs: dict[int, dict[str, Any]]) -> None:
    path = _described(folder)
    partial = path.with_suffix(_PARTIAL)
    numbered = {str(epoch): made for epoch, made in sorted(epochs.items())}
    said = {"version": _VERSION} | asdict(description) | {"epochs": numbered}
    with open(partial, "w") as file:
        file.write(json.dumps(said | {"checksum": key_of(said)}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The description for one process at a time."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)
