"""What machines read of a shared file when all follow one common order: a simulation of orders, steps and page caches.

Nothing is read. Orders are the plan's; images lie in the file as data.beton places them.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from tqdm import tqdm

from data import plan
from data.beton import PAGE_SIZE

GPUS = 8
# What Linux reads around a byte of a mapped file that is not in its page cache.
READ_AHEAD = 128 << 10
# The page cache that a machine has for the set, as shares of the set.
CACHES = (0.1, 0.5)
STEPS = 100

# Not what the plan does.
IN_FILE_ORDER = ", steps dealt in file order"


def placed(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where images of these lengths begin, in bytes from the first one, as data.beton.write_beton places them."""
    starts = np.empty_like(lengths)
    ends = lengths.cumsum()
    first, page = 0, 0
    while first < len(lengths):
        before = ends[first] - lengths[first]
        last = int(np.searchsorted(ends, before + PAGE_SIZE, side="right"))
        starts[first:last] = page + ends[first:last] - lengths[first:last] - before
        first, page = last, page + PAGE_SIZE
    return starts


def simulate(lengths: NDArray[np.int64], *, batch: int, machines: tuple[int, ...]) -> list[dict[str, Any]]:
    """What one machine, and all of them, read in an epoch after the caches have filled.

    lengths: int64 [n], bytes of the images. batch: images a step of each of a machine's GPUs.
    Returns for each order and number of machines: pages_a_step, pages: different file pages that one machine touches in
    a step, and in STEPS steps or an epoch that is shorter, of pages_of_file; pages_of_all_a_step: that all machines
    together touch in a step. used: the share of the set that are one machine's images of an epoch. read: for each of
    CACHES the bytes that all machines together read in an epoch, as multiples of the set.
    """
    starts = placed(lengths)
    pages = starts // PAGE_SIZE
    first_units, last_units = starts // READ_AHEAD, (starts + lengths - 1) // READ_AHEAD
    unit_count, set_bytes = int(last_units.max()) + 1, int(lengths.sum())
    rows = []
    # After as many epochs, what a machine reads in them fills the largest cache that is simulated.
    epochs = {count: 2 + int(np.ceil(max(CACHES) * count)) for count in machines}
    bar = tqdm(total=2 * max(epochs.values()), desc="scale: orders", unit=" epochs", leave=False)
    for paged in (False, True):
        order_name = "quasi-random" if paged else "random"
        names = (order_name, order_name + IN_FILE_ORDER)
        seen = {(name, count): _Machine(unit_count) for name in names for count in machines}
        for epoch in range(max(epochs.values())):
            order = plan.epoch_order(len(lengths), seed=0, epoch=epoch, pages=pages if paged else None)
            for (name, count), machine in seen.items():
                if epoch >= epochs[count]:
                    continue
                steps = list(
                    steps_of_machine(order, machines=count, batch=batch, in_file_order=name.endswith(IN_FILE_ORDER))
                )
                machine.read(_units(steps, first_units, last_units))
                if epoch == 0:
                    world = np.resize(order, (len(steps), count * GPUS * batch))
                    machine.facts = {
                        "pages_of_file": int(pages.max()) + 1,
                        "pages_a_step": float(np.mean([len(np.unique(pages[step])) for step in steps])),
                        "pages_of_all_a_step": float(np.mean([len(np.unique(pages[step])) for step in world])),
                        "steps": min(STEPS, len(steps)),
                        "pages": len(np.unique(pages[np.concatenate(steps[:STEPS])])),
                        "used": float(lengths[np.concatenate(steps)].sum() / set_bytes),
                    }
            bar.update()
        rows += [
            {
                "name": f"{count} machines, {name}",
                "group": "order",
                "machines": count,
                "order": name,
                **machine.facts,
                "read": {str(share): machine.missed(share) * count * READ_AHEAD / set_bytes for share in CACHES},
            }
            for (name, count), machine in seen.items()
        ]
    bar.close()
    return sorted(rows, key=lambda row: row["machines"])


def steps_of_machine(
    order: NDArray[np.int64], *, machines: int, batch: int, in_file_order: bool
) -> Iterator[NDArray[np.int64]]:
    """The images of each full step that the machine in the middle reads: int64 [GPUS * batch].

    order: int64 [n], the common order, of which the ranks take turns; a machine's ranks follow each other.
    in_file_order: not what the plan does: a step's images are sorted, and machine m gets the m-th part of them.
    """
    world, of_machine = machines * GPUS, GPUS * batch
    machine = machines // 2
    for step in range(len(order) // (world * batch)):
        images = order[step * world * batch : (step + 1) * world * batch]
        if in_file_order:
            yield np.sort(images)[machine * of_machine : (machine + 1) * of_machine]
        else:
            yield images.reshape(batch, world)[:, machine * GPUS : (machine + 1) * GPUS].ravel()


class _Machine:
    """What one machine asks of its page cache, epoch after epoch, and what it then has to read."""

    def __init__(self, unit_count: int):
        self._unit_count = unit_count
        self._epochs: list[NDArray[np.int32]] = []
        self.facts: dict[str, Any] = {}

    def read(self, units: NDArray[np.int32]) -> None:
        self._epochs.append(units)

    def missed(self, share: float) -> int:
        """Units of READ_AHEAD that the last epoch had to read, with a cache of this share of the set."""
        before = sum(map(len, self._epochs[:-1]))
        return int(misses(np.concatenate(self._epochs), self._unit_count, int(share * self._unit_count), before))


def _units(steps: list[NDArray[np.int64]], firsts: NDArray[np.int64], lasts: NDArray[np.int64]) -> NDArray[np.int32]:
    """The units of READ_AHEAD that each step needs, each once a step, one step after the other."""
    found = []
    for step in steps:
        first, last = firsts[step], lasts[step]
        spans = [np.minimum(first + k, last) for k in range(int((last - first).max()) + 1)]
        found.append(np.unique(np.concatenate(spans)))
    return np.concatenate(found).astype(np.int32)


@njit(cache=True)
def misses(units: NDArray[np.int32], unit_count: int, capacity: int, before: int) -> int:
    """How many of the units asked for, from place `before` on, are not in a cache of the `capacity` last used ones."""
    last_use = np.full(unit_count, -1, np.int64)  # of those in the cache
    held, oldest, missed = 0, 0, 0
    for now in range(len(units)):
        unit = units[now]
        if last_use[unit] < 0:
            held += 1
            missed += now >= before
        last_use[unit] = now
        while held > capacity:
            # Uses in order of time; one that is not its unit's last says nothing.
            if last_use[units[oldest]] == oldest:
                last_use[units[oldest]] = -1
                held -= 1
            oldest += 1
    return missed
