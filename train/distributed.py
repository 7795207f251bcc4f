"""Several devices, one process each: their ranks, what they exchange, and what they decide together.

A step consists of R parts (replicas), each with its own batch statistics, as on the paper's GPUs; N devices compute
R / N parts each. Crops, labels and, up to the order of summation, weights are then the same for every N that divides R.
"""

import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store

from command import UserError, first_line
from data.progress import silence
from train import TrainError

Reduce = Literal["sum", "bf16", "tree"]

# Numbers in a message: gradients are exchanged in pieces of this size.
_BUCKET = 8 << 20
# The longest time that other processes wait for the first one, which may convert images, for example.
_PATIENCE = timedelta(hours=12)
# Seconds within which processes that fail for the same reason have all failed, and the key of their counter.
_MOMENT = 3.0
_FAILED = "label-refinery/failed"
# Set by PyTorch's launcher if one store of addresses outlives all the processes that it starts.
_SHARED_STORE = "TORCHELASTIC_USE_AGENT_STORE"

_Result = TypeVar("_Result")


class PeerLost(SystemExit):
    """Another process of the group has ended and has printed why: this one ends without a message."""

    def __init__(self) -> None:
        super().__init__(1)


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    rank: of this process. world: number of processes. local: its rank on its machine. beside: processes there.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    beside: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    @property
    def machine(self) -> int:
        """The first rank on this one's machine."""
        return self.rank - self.local

    def in_turn(self, work: Callable[[], _Result]) -> _Result:
        """The result of `work`, which may write files; run first in process 0, then in the first of each machine."""
        turn = 0 if self.rank == 0 else 1 if self.local == 0 else 2
        for now in range(3):
            if now == turn:
                result = work()
            self.wait()
        return result

    def wait(self) -> None:
        """Waits for all processes."""
        self._exchanged(lambda: dist.monitored_barrier(_control(), _PATIENCE))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, as a new tensor on the same device."""
        total = values.clone()
        self._exchanged(lambda: dist.all_reduce(total))
        return total

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, in order; waits for all of them."""
        values: list[Any] = [value] * self.world
        self._exchanged(lambda: dist.all_gather_object(values, value, _control()))
        return values

    def largest(self, values: Sequence[float]) -> list[float]:
        """The maximum of each number over all processes. Does not wait for a device."""
        found = torch.tensor(values, dtype=torch.float64)
        self._exchanged(lambda: dist.all_reduce(found, dist.ReduceOp.MAX, _control()))
        return found.tolist()

    def given(self, value: Any) -> Any:
        """The first process's value, in all processes."""
        values = [value]
        self._exchanged(lambda: dist.broadcast_object_list(values, 0, _control()))
        return values[0]

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raises TrainError, in all processes, unless all have the same values. values: by name, for the message."""
        first, *others = self.gathered(dict(values))
        for rank, theirs in enumerate(others, 1):
            for name in first | theirs:
                if theirs.get(name) != first.get(name):
                    raise TrainError(
                        f"{name}: rank {rank} has {theirs.get(name)} and rank 0 has {first.get(name)}; it must be the "
                        "same on all machines"
                    )

    def reduce_gradients(self, parts: Sequence[Sequence[Tensor]], *, how: Reduce) -> list[Tensor]:
        """The sum of gradients over all parts of a step, for each weight, in new tensors.

        parts: the gradients of all weights for each of this process's parts; with `sum` and `bf16` they may be summed
        already, as one. how: sum; bf16, rounded to bfloat16 for the transfer; tree, gathered and added in pairs, part
        by part, so that the bits are the same for any number of processes.
        """
        made: list[Tensor] = []
        buckets = _buckets(parts[0])
        # Some buckets are packed or unpacked while others are transferred. Backward is over by then: a compiled one
        # returns all gradients at its end.
        for bucket, total in zip(buckets, self._totals(parts, buckets, how), strict=True):
            sizes = [parts[0][i].numel() for i in bucket]
            # With the memory layout of the weights, as a fused optimizer requires.
            made += [
                torch.empty_like(parts[0][i]).copy_(piece.view(parts[0][i].shape))
                for i, piece in zip(bucket, total.split(sizes), strict=True)
            ]
        return made

    def _totals(self, parts: Sequence[Sequence[Tensor]], buckets: list[list[int]], how: Reduce) -> Iterator[Tensor]:
        """Each bucket's sum over all parts of a step, in one dimension."""
        if how == "tree":
            for bucket in buckets:
                yield _added_in_pairs(self._all_parts([_flat(part, bucket) for part in parts]))
            return
        travelling = []
        for bucket in buckets:
            flat = _flat(parts[0], bucket)
            sent = flat.bfloat16() if how == "bf16" else flat
            work = self._exchanged(lambda: dist.all_reduce(sent, async_op=True))  # noqa: B023
            travelling.append((sent, flat.dtype, work))
        for sent, dtype, work in travelling:
            if work:
                self._exchanged(work.wait)
            yield sent.to(dtype)

    def _all_parts(self, mine: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of all parts of a step, in order: part p is the (p // N)-th of process p mod N."""
        stacked = torch.stack(list(mine))
        gathered = [torch.empty_like(stacked) for _ in range(self.world)]
        if self.world > 1:
            self._exchanged(lambda: dist.all_gather(gathered, stacked))
        else:
            gathered = [stacked]
        return [gathered[part % self.world][part // self.world] for part in range(self.world * len(mine))]

    def share_buffers(self, modules: Iterable[nn.Module]) -> None:
        """Copies the first process's buffers to all: only its first part keeps running statistics."""
        if self.world > 1:
            for module in modules:
                for buffer in module.buffers():
                    self._exchanged(lambda: dist.broadcast(buffer, 0))  # noqa: B023

    def _exchanged(self, exchange: Callable[[], _Result]) -> _Result | None:
        """The result of the exchange; None, without one, for a single process. Raises PeerLost if another is gone."""
        if self.world == 1:
            return None
        try:
            return exchange()
        except (RuntimeError, ConnectionError) as error:
            raise PeerLost from error


ALONE = Group()
_group = ALONE
_control_group: Any = None


def group() -> Group:
    """The processes that this one works with; only itself unless `joined`."""
    return _group


@contextmanager
def joined(device: str):
    """Makes this process one of a group, if torchrun or `--gpus` has started it as such.

    device: auto, cpu or cuda, as in Config. Raises TrainError if a machine has fewer devices than processes, if they
    cannot reach each other, or if their versions differ.
    """
    global _group, _control_group
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and os.environ.get(_SHARED_STORE) == "True":
        raise TrainError(
            "max-restarts: restarted processes may use addresses of the previous ones (PyTorch issue 135712); type "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in front of torchrun"
        )
    local = int(os.environ["LOCAL_RANK"])
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if on_cuda:
        if beside > torch.cuda.device_count():
            raise TrainError(f"gpus={beside}: this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=_PATIENCE)
    except RuntimeError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise TrainError(
            f"no connection of the {world} processes at {place} ({first_line(error)}); give a port that is free, and "
            "reached from all machines"
        ) from None
    _control_group = dist.new_group(backend="gloo", timeout=_PATIENCE) if on_cuda else dist.group.WORLD
    _group = Group(dist.get_rank(), world, local, beside)
    if not _group.first:
        # Only one of them prints; errors are still printed.
        silence()
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        _group.check_same(_versions())
        yield _group
        dist.destroy_process_group()
    except PeerLost:
        _end_without_a_word()
    except UserError:
        if _all_failed() and not _group.first:
            _end_without_a_word()
        raise
    except KeyboardInterrupt:
        if not _group.first:
            sys.exit(130)
        raise
    finally:
        _group, _control_group = ALONE, None


def _end_without_a_word() -> NoReturn:
    # The process that prints the reason ends first: a launcher takes the first exit code as the cause and ends the
    # others.
    time.sleep(_MOMENT)
    # PyTorch may abort to leave a group whose other processes are gone, which would look like another cause.
    os._exit(1)


def _all_failed() -> bool:
    """Whether all processes have failed in the same way; then one line is enough."""
    # Not by an exchange, which a process that still waits in another one would never join.
    store = _get_default_store()
    began = time.monotonic()
    try:
        store.add(_FAILED, 1)
        while time.monotonic() - began < _MOMENT:
            if store.add(_FAILED, 0) == dist.get_world_size():
                return True
            time.sleep(0.05)
    except (RuntimeError, ConnectionError):
        pass
    return False


def _versions() -> dict[str, str]:
    """Values that must be equal in all processes for equal results."""
    source = hashlib.sha256()
    for room in ("data", "kernels", "models", "train"):
        folder = Path(__file__).parents[1] / room
        for file in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".yaml")):
            source.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return {
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "NumPy": np.__version__,
        "code of label-refinery": source.hexdigest()[:12],
    }


def _control() -> Any:
    """The group for exchanges on the host."""
    return _control_group


def _buckets(gradients: Sequence[Tensor]) -> list[list[int]]:
    """Which gradients are sent together: indices of neighbours of one dtype, about _BUCKET numbers."""
    found: list[list[int]] = []
    size = 0
    for i, gradient in enumerate(gradients):
        if not found or size + gradient.numel() > _BUCKET or gradients[found[-1][0]].dtype != gradient.dtype:
            found.append([])
            size = 0
        found[-1].append(i)
        size += gradient.numel()
    return found


def _flat(gradients: Sequence[Tensor], bucket: Sequence[int]) -> Tensor:
    """The gradients of a bucket, in a new tensor of one dimension."""
    return torch.cat([gradients[i].reshape(-1) for i in bucket])


def _added_in_pairs(parts: Sequence[Tensor]) -> Tensor:
    """The sum, in an order that depends only on the number of parts."""
    parts = list(parts)
    while len(parts) > 1:
        pairs = [parts[i] + parts[i + 1] for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]
