"""Simulates what machines read from a shared file if all follow one common order: orders, steps and page caches.

Nothing is read. Orders are those of data.plan; images are placed in the file as by data.beton.
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
# Bytes that Linux reads around a byte of a mapped file that is not in the page cache.
READ_AHEAD = 128 << 10
# Sizes of a machine's page cache, as shares of the set.
CACHES = (0.1, 0.5)
STEPS = 100

# An alternative that the plan does not use.
IN_FILE_ORDER = ", steps dealt in file order"


def placed(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the offsets of images from the first one, int64 [n] in bytes, as data.beton.write_beton places them.

    lengths: int64 [n], bytes of the images.
    """
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
    """Returns what one machine, and all machines together, read in an epoch once the page caches are full.

    lengths: int64 [n], bytes of the images. batch: images per step and GPU. machines: numbers of machines of GPUS GPUs.

    A row for each order and number of machines has: pages_a_step and pages, the number of different file pages that one
    machine uses in a step, and in `steps` steps (STEPS, or an epoch if it is shorter); pages_of_file, the pages of the
    file; pages_of_all_a_step, the pages that all machines together use in a step; used, the share of the set's bytes
    that are images of one machine's epoch; read, for each of CACHES the bytes that all machines together read in an
    epoch, as multiples of the set.
    """
    starts = placed(lengths)
    pages = starts // PAGE_SIZE
    first_units, last_units = starts // READ_AHEAD, (starts + lengths - 1) // READ_AHEAD
    unit_count, set_bytes = int(last_units.max()) + 1, int(lengths.sum())
    rows = []
    # So many that a machine's reads fill the largest simulated cache before the last epoch.
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
    """Yields the images that the middle machine reads in each full step: int64 [GPUS * batch].

    order: int64 [n], the common order, dealt to the ranks in turn; a machine's ranks are consecutive.
    in_file_order: an alternative that the plan does not use: a step's images are sorted, and machine m gets the m-th
    part of them.
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
    """The reads of one machine, epoch by epoch, and its misses in the page cache."""

    def __init__(self, unit_count: int):
        self._unit_count = unit_count
        self._epochs: list[NDArray[np.int32]] = []
        self.facts: dict[str, Any] = {}

    def read(self, units: NDArray[np.int32]) -> None:
        self._epochs.append(units)

    def missed(self, share: float) -> int:
        """Returns the number of READ_AHEAD units that miss a cache of this share of the set in the last epoch."""
        before = sum(map(len, self._epochs[:-1]))
        return int(misses(np.concatenate(self._epochs), self._unit_count, int(share * self._unit_count), before))


def _units(steps: list[NDArray[np.int64]], firsts: NDArray[np.int64], lasts: NDArray[np.int64]) -> NDArray[np.int32]:
    """Returns the units of READ_AHEAD that the steps need, in the order of the steps and once per step: int32 [m]."""
    found = []
    for step in steps:
        first, last = firsts[step], lasts[step]
        spans = [np.minimum(first + k, last) for k in range(int((last - first).max()) + 1)]
        found.append(np.unique(np.concatenate(spans)))
    return np.concatenate(found).astype(np.int32)


@njit(cache=True)
def misses(units: NDArray[np.int32], unit_count: int, capacity: int, before: int) -> int:
    """Returns how many of units[before:] are not in a cache that keeps the `capacity` most recently used units."""
    last_use = np.full(unit_count, -1, np.int64)  # index of the last use; -1 if not in the cache
    held, oldest, missed = 0, 0, 0
    for now in range(len(units)):
        unit = units[now]
        if last_use[unit] < 0:
            held += 1
            missed += now >= before
        last_use[unit] = now
        while held > capacity:
            # Uses are visited in order of time; only a unit's last use matters.
            if last_use[units[oldest]] == oldest:
                last_use[units[oldest]] = -1
                held -= 1
            oldest += 1
    return missed
