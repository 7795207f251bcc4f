"""A folder of stored labels: its contents, and how it is written and read.

`labels.json` describes the labelled crops and the format of rows; `epoch-0000.labels` and so on hold a row of bytes for
each crop of an epoch, in the order of the images and of their copies. Several processes may write different epochs at
the same time, or the rows of one together; an epoch exists completely or not at all.
"""

import fcntl
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from data.beton import Beton
from data.durable import in_units, locked, sync_folder
from data.sets import ConvertedSet
from models.trained import load_trained, names_network_alone
from train import TrainError
from train.distributed import ALONE, Group
from train.labels.description import (
    PARTIAL,
    Description,
    description_file,
    differences,
    read_description,
    short,
    write_description,
)
from train.labels.source import Labels

# The lock that is held while the description is written.
_LOCK = ".lock"


@dataclass(frozen=True)
class StoredOptions:
    """Options of labels from files.

    Args:
        stored: a folder of a refinery's labels of every crop (python -m train.label) or of label maps
            (python -m train.maps), instead of the refinery
        cycle: repeat the first this many stored epochs, in a run of more epochs than are stored
        pooled: what is averaged over the cells of a label map in a crop: logits, as published, or probabilities
    """

    stored: str | None = None
    cycle: int | None = None
    pooled: Literal["logits", "probabilities"] = "logits"


class Store:
    """The labels in a folder, as returned by `open_store` and `create_store`."""

    def __init__(self, folder: Path, description: Description):
        self.folder, self.description = folder, description

    @property
    def finished(self) -> dict[int, dict[str, Any]]:
        """For each finished epoch (0, 1, ...): crc32 of its file, and the seconds it took."""
        done, size = read_description(self.folder)[1], self.description.bytes_per_epoch
        return {epoch: made for epoch, made in done.items() if _size_of(self._file(epoch)) == size}

    @property
    def epochs(self) -> int:
        """How many epochs are finished, from the first on and without a gap."""
        done = self.finished
        return next(epoch for epoch in range(len(done) + 1) if epoch not in done)

    def check_sizes(self) -> None:
        """Raises TrainError if the file of a finished epoch no longer has the size it was written with."""
        for epoch in read_description(self.folder)[1]:
            self._check_size(epoch)

    def _check_size(self, epoch: int) -> None:
        found, size = _size_of(self._file(epoch)), self.description.bytes_per_epoch
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
        """Raises TrainError unless the labels are of these data. Raises DataError as Beton does."""
        there = self.description.data["fingerprint"]
        if data.fingerprint != there:
            raise TrainError(
                f"LABELS={self.folder}: are of other data, with fingerprint {short(there)} and not "
                f"{short(data.fingerprint)} as {data.folder}"
            )
        counted = {"images": Beton(data.beton("train")).num_samples, "classes": len(data.class_names)}
        for what, count in counted.items():
            if self.description.data[what] != count:
                raise TrainError(
                    f"LABELS={self.folder}: are of {self.description.data[what]} {what}, and {data.folder} has {count}"
                )

    def check_refinery(self, asked: str, class_names: Sequence[str]) -> None:
        """Raises TrainError unless the labels are those of the refinery that was also given."""
        if names_network_alone(asked):
            found, there = asked, self.network["network"]
        else:
            found, there = load_trained(asked, class_names=class_names).digest, self.network["weights"]
        if found != there:
            raise TrainError(
                f"REFINERY={asked}: LABELS={self.folder} were made by another one, {short(there)} and not "
                f"{short(found)}; leave one of them out"
            )

    def rows(self, epoch: int) -> NDArray[np.uint8]:
        """The rows of an epoch, [crops, bytes_per_crop], mapped from its file. Raises TrainError for damage."""
        path = self._file(epoch)
        self._check_size(epoch)
        try:
            mapped = np.memmap(path, np.uint8, "r", shape=self.description.shape)
        except OSError as error:
            raise TrainError(f"{path}: cannot be read ({error.strerror}); label again with the same command") from None
        if zlib.crc32(mapped.data) != read_description(self.folder)[1][epoch]["crc32"]:
            raise TrainError(
                f"{path}: is damaged (its checksum is not that in labels.json); remove the file and label again with "
                "the same command, which writes what is missing"
            )
        return np.asarray(mapped)

    def check_room(self, epochs: int) -> None:
        """Raises TrainError unless the disk has space for those of this many epochs that are missing."""
        missing = set(range(epochs)) - set(self.finished)
        # Space allocated for an epoch that is being written is no longer free.
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
    def writing(self, epoch: int, together: Group = ALONE) -> Iterator[NDArray[np.uint8] | None]:
        """Yields rows to fill, [crops, bytes_per_crop]; they become the epoch's when the context ends without an error.

        together: the processes that fill them, each its own rows; all enter and leave the context. Yields None if the
        epoch is finished, or if a process outside of these is writing it. Raises TrainError if the disk is full, and if
        machines see different folders.
        """
        # Network file systems write back whole pages of a mapped file, overwriting data written by other machines
        # since: each machine fills its own file.
        partial = self._partial(epoch, together.machine)
        with self._cannot_write(partial):
            file = self._claimed(epoch) if together.first else None
        if not together.given(file is not None):
            yield None
            return
        started = time.perf_counter()
        try:
            rows = together.in_turn(lambda: self._mapped(partial, file, together))
            partials = dict.fromkeys(together.gathered(partial.name))
            self._check_shared(partials)
            yield rows
            with self._cannot_write(partial):
                rows.flush()
            together.wait()
            if file:
                with self._cannot_write(partial):
                    self._finish(epoch, file, rows, list(partials)[1:], started)
            together.wait()
        finally:
            if together.local == 0:
                partial.unlink(missing_ok=True)
            if file:
                file.close()

    def _mapped(self, partial: Path, claimed: BinaryIO | None, together: Group) -> np.memmap:
        """The rows in a file that is being written; the first process of each machine makes it, full of zeros."""
        with self._cannot_write(partial), ExitStack() as stack:
            new = together.local == 0
            file = claimed or stack.enter_context(open(partial, "w+b" if new else "r+b"))
            if new:
                file.truncate(0)
                file.truncate(self.description.bytes_per_epoch)
                # Allocated now: if the disk is full, writing to a mapped page ends the process.
                os.posix_fallocate(file.fileno(), 0, self.description.bytes_per_epoch)
            return np.memmap(file, np.uint8, "r+", shape=self.description.shape)

    def _check_shared(self, partials: Iterable[str]) -> None:
        if not all((self.folder / name).is_file() for name in partials):
            raise TrainError(f"OUT={self.folder}: is another folder on each machine; give one that all machines see")

    def _finish(self, epoch: int, file: BinaryIO, rows: np.memmap, others: Sequence[str], started: float) -> None:
        """Makes the rows those of the epoch. file: of the rows. others: the files of other machines."""
        for name in others:
            # Rows written by one machine are zeros in the others' files.
            np.bitwise_or(rows, np.memmap(self.folder / name, np.uint8, "r", shape=rows.shape), out=rows)
        rows.flush()
        os.fsync(file.fileno())
        # In this order: if both exist, the epoch is finished, and no other process can have claimed it before.
        self._add(epoch, {"crc32": zlib.crc32(rows.data), "seconds": time.perf_counter() - started})
        os.replace(self._partial(epoch), self._file(epoch))
        sync_folder(self.folder)

    def _claimed(self, epoch: int) -> BinaryIO | None:
        """The open file that only this process may write, or None. It is unlocked however the process ends."""
        partial = self._partial(epoch)
        while epoch not in self.finished:
            file = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The process that had it until now may have finished the epoch, or removed the file after an error.
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
            write_description(self.folder, self.description, read_description(self.folder)[1] | {epoch: made})

    @contextmanager
    def _cannot_write(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = f"; {len(self.finished)} finished epochs are kept, and the same command continues with the others"
            raise TrainError(
                f"{path}: cannot be written ({error.strerror}){'' if self.description.format == 'map' else kept}"
            ) from None

    def _file(self, epoch: int) -> Path:
        return self.folder / self.description.file_name(epoch)

    def _partial(self, epoch: int, machine: int = 0) -> Path:
        return self.folder / f".{self._file(epoch).stem}{f'.{machine}' if machine else ''}{PARTIAL}"


@dataclass(frozen=True)
class LabelsFromStore(Labels):
    """Labels from files, of any kind: their refinery and their data."""

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
    """The labels in a folder. Raises TrainError if there are none, or if their description is damaged."""
    return Store(Path(folder), read_description(Path(folder))[0])


def check_folder(folder: Path) -> None:
    """Raises TrainError if labels cannot be written to a folder, which may not exist yet. Nothing is written."""
    try:
        if description_file(folder).is_file():
            return
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        writable = existing.is_dir() and os.access(existing, os.W_OK)
        # Files left by a kill are ignored.
        others = (
            writable
            and existing == folder
            and any(path.name != _LOCK and not path.name.endswith(PARTIAL) for path in folder.iterdir())
        )
    except OSError as error:
        raise TrainError(f"OUT={folder}: labels cannot be written there ({error.strerror})") from None
    if not writable:
        raise TrainError(
            f"OUT={folder}: labels cannot be written there ({existing} is not a folder that can be written)"
        )
    if others:
        raise TrainError(f"OUT={folder}: holds other files; give a new folder, or one of such labels")


def existing_store(folder: Path) -> Store | None:
    """The labels, finished or not, in a folder to write to. Raises TrainError as check_folder and open_store do."""
    check_folder(folder)
    return open_store(folder) if description_file(folder).is_file() else None


def check_asked(refinery: str | None, out: str | None, what: str) -> None:
    """Raises TrainError unless a refinery and a folder are given. what: labels or maps, for messages."""
    if not refinery:
        raise TrainError(f"REFINERY is missing: name the network that is to make the {what}, as in REFINERY=resnet50")
    if not out:
        raise TrainError(f"OUT is missing: name the folder for the {what}, as in OUT={what}/resnet50")


def create_store(folder: Path, description: Description) -> Store:
    """Opens a folder to write labels to, which may already hold some of them.

    Raises TrainError if it holds other labels or other files, or cannot be written.
    """
    # As read back from JSON, so that it compares equal with the stored one.
    description = Description(**json.loads(json.dumps(asdict(description))))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            check_folder(folder)
            if not description_file(folder).is_file():
                write_description(folder, description, {})
    except OSError as error:
        raise TrainError(f"OUT={folder}: labels cannot be written there ({error.strerror})") from None
    store = open_store(folder)
    others = differences(description, store.description)
    if others:
        raise TrainError(f"OUT={folder}: holds other labels ({'; '.join(others)}); give another folder")
    return store


def _size_of(path: Path) -> int | None:
    """Bytes of a file, or None if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _locked(folder: Path) -> AbstractContextManager[bool]:
    """A lock on the description."""
    return locked(folder / _LOCK, f"{folder}: is in use by another process; waiting for it")
