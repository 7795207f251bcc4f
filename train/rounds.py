"""One pass over images by several processes, with the same batches as for one process.

Whole blocks of a loader (data.loader) are distributed, block k to process k mod N, so that results that depend on a
batch's composition or size are the same for any number of processes.
"""

import time
from collections.abc import Iterator

from data.loader import CropBatch, Loader
from data.progress import images_bar
from train.distributed import Group
from train.interrupt import Interrupted, Stop

_SECONDS_BETWEEN_AGREEMENTS = 0.5


def own_blocks(loader: Loader, together: Group) -> list[int]:
    """This process's blocks of each epoch."""
    return list(range(together.rank, loader.blocks, together.world))


def in_rounds(
    batches: Iterator[CropBatch], loader: Loader, together: Group, stop: Stop, *, name: str, stopped: str
) -> Iterator[CropBatch]:
    """Yields `batches`, those of this process's own blocks, one per round, with a bar that counts the crops of all.

    name: the bar's. Raises Interrupted with the message `stopped`, in all processes after the same round, if one of
    them is asked to stop before the last round; and PeerLost if one is gone.
    """
    images, copies, block = loader.num_samples, loader.copies, loader.batch_size * together.world
    rounds = -(-loader.blocks // together.world) * copies
    apart, agreed, mark = 1, 0, time.perf_counter()
    with images_bar(images * copies, name) as bar:
        for number in range(1, rounds + 1):
            batch = next(batches, None)
            # In the last round, some processes may have none.
            if batch is not None:
                yield batch
            bar.update(min(block, images - (number - 1) // copies * block))
            if number == rounds or number < agreed + apart:
                continue
            # By the first process's clock, since each exchange makes all wait for the slowest.
            took, mark = (time.perf_counter() - mark) / apart, time.perf_counter()
            agreed, wanted = number, together.first and together.world > 1
            own = [stop.requested, _SECONDS_BETWEEN_AGREEMENTS // max(took, 1e-6) if wanted else 0.0]
            stops, apart = map(int, together.largest(own))
            apart = max(apart, 1)
            if stops:
                raise Interrupted(stopped)
