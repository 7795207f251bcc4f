"""The tables and the chart of bench.scale."""

from pathlib import Path
from typing import Any

from bench.record import Column, Record, Section, figure, title
from bench.scale.common_order import CACHES, GPUS, READ_AHEAD
from data.beton import PAGE_SIZE

# Crops per second of one GPU, and the number of epochs: assumptions, not measured.
RATES = (1000, 2500, 5000, 10000)
RATE = 5000
EPOCHS = 90


def _mega(head: str, key: str) -> Column:
    return Column(head, lambda row: figure(row[key] / 1e6))


def _kilo(head: str, key: str) -> Column:
    return Column(head, lambda row: figure(row[key] / 1e3))


def _seconds(head: str, key: str) -> Column:
    return Column(head, lambda row: f"{row[key]:.3g}")


def _at(rate: int) -> Column:
    return Column(f"MB/s at {rate}", lambda row: figure(row["bytes_4k"] * rate / 1e6))


def _sets_read(share: float) -> Column:
    return Column(f"sets read, cache {100 * share:.0f} %", lambda row: f"{row['read'][str(share)]:.2f}")


def _in_sum(ranks: int) -> Column:
    return Column(f"{ranks} ranks GB/s", lambda row: figure(row["bytes_4k"] * RATE * ranks / 1e9))


def sections(*, worlds: tuple[int, ...], batch: int, turns: int) -> tuple[Section, ...]:
    """Returns the tables. worlds: numbers of ranks. batch: images per step and rank of worlds[-1]. turns: of starts."""
    ranks = Column("ranks", lambda row: str(row["ranks"]))
    storage = Column("storage", lambda row: row["storage"])
    computed = "Computed from measured bytes; not measured on a file system."
    return (
        Section(
            "Order and coverage",
            "plan",
            (ranks,),
            (
                Column("images a step and rank", lambda row: str(row["batch"])),
                Column("steps", lambda row: str(row["steps"])),
                Column("left out", lambda row: str(row["left_out"])),
                _seconds("order s", "order_seconds"),
                _mega("peak MB", "order_peak_bytes"),
                _mega("kept MB", "order_kept_bytes"),
                _seconds("boxes s", "boxes_seconds"),
                _mega("boxes peak MB", "boxes_peak_bytes"),
            ),
            (
                "Checked with the order of every rank: each image is in one rank's part, once; all ranks have as many "
                "full batches as there are steps; in each step all ranks together have the same images as a single "
                "rank.",
                "left out: images of the incomplete last step; different ones in each epoch. order: one rank's order "
                "of one epoch. boxes: the boxes of its crops in one epoch, batch by batch.",
            ),
        ),
        Section(
            "One rank's start",
            "start",
            (Column("images", lambda row: str(row["images"])), Column("file", lambda row: row["cache"])),
            (
                _seconds("s to first batch", "seconds"),
                _seconds("open s", "open_seconds"),
                _seconds("batch s", "batch_seconds"),
                _mega("read MB", "asked_bytes"),
                _mega("from disk MB", "disk_bytes"),
                _mega("libraries MB", "memory_before"),
                _mega("peak MB", "memory_peak"),
                _mega("after MB", "memory_after"),
                Column(
                    "peak B an image",
                    lambda row: figure(row["memory_peak_an_image"]) if "memory_peak_an_image" in row else "–",
                ),
            ),
            (
                f"Measured: rank 7 of {worlds[-1]}, in a new process, medians of {turns} starts. s to first batch: "
                "from launch, including the interpreter and all imports. open: opening the loader. batch: from then to "
                "the first batch. read: by system calls while the loader is opened; from disk: up to the first batch, "
                "including read-ahead. MB: resident memory of the process; peak B an image: its growth per image. The "
                "images are JPEGs of 32 px, so that decoding takes almost no time.",
            ),
        ),
        Section(
            "Bytes and reads of a crop",
            "reads",
            (storage, Column("what is read", lambda row: row["what"])),
            (
                _kilo("kB", "bytes"),
                _kilo("in 4 KiB pages kB", "bytes_4k"),
                _kilo(f"in {READ_AHEAD >> 10} KiB kB", "bytes_ahead"),
                Column("reads", lambda row: f"{row['reads']:.2f}"),
                *map(_at, RATES),
                Column(f"reads/s at {RATE}", lambda row: figure(row["reads"] * RATE)),
                *(_in_sum(count) for count in worlds[1:]),
                Column(
                    f"{worlds[-1]} ranks, in {READ_AHEAD >> 10} KiB GB/s",
                    lambda row: figure(row["bytes_ahead"] * RATE * worlds[-1] / 1e9),
                ),
            ),
            (
                computed,
                "kB: mean over all crops, with the plan's boxes. The page cache holds pages of 4 KiB; Linux reads "
                f"{READ_AHEAD >> 10} KiB around a byte that is not cached. reads: runs of adjacent 4 KiB pages.",
                "MB/s: of one rank, in 4 KiB pages, at this many images per second, which is an assumption; GB/s: of "
                f"all ranks at {RATE} images per second. No page is cached.",
            ),
        ),
        Section(
            "With checksums",
            "first uses",
            (storage, ranks),
            (
                Column("first uses", lambda row: f"{100 * row['first']:.0f} %"),
                _kilo("in 4 KiB pages kB", "bytes_4k"),
                Column(f"MB/s at {RATE}", lambda row: figure(row["bytes_4k"] * RATE / 1e6)),
                Column("in sum GB/s", lambda row: figure(row["bytes_4k"] * RATE * row["ranks"] / 1e9)),
            ),
            (
                computed,
                "The first time that a process uses an image, it verifies the image's checksum and so reads the whole "
                f"image; later only the tiles or the rows of blocks. Means over {EPOCHS} epochs.",
            ),
        ),
        Section(
            "Common order and page caches",
            "order",
            (Column("machines", lambda row: str(row["machines"])), Column("order", lambda row: row["order"])),
            (
                Column("pages a step", lambda row: figure(row["pages_a_step"])),
                Column("of all machines", lambda row: figure(row["pages_of_all_a_step"])),
                Column("steps", lambda row: str(row["steps"])),
                Column("pages in these", lambda row: str(row["pages"])),
                Column("of file", lambda row: str(row["pages_of_file"])),
                Column("used", lambda row: f"{100 * row['used']:.3g} %"),
                *map(_sets_read, CACHES),
            ),
            (
                f"Simulated; not measured on a file system. Machines of {GPUS} GPUs with {batch} images per step "
                f"each, whole images of the JPEG storage, pages of {PAGE_SIZE >> 20} MiB.",
                "pages: the number of different pages that one machine uses in a step, that all machines together use "
                "in a step, and that one machine uses in the given number of steps. used: the share of the set's bytes "
                "that are images of one machine's epoch. sets read: what all machines together read from the file "
                f"system in an epoch, as multiples of the set, in units of {READ_AHEAD >> 10} KiB, once each machine's "
                "page cache, which holds the given share of the set, is full.",
                "steps dealt in file order: an alternative that the plan does not use, in which a step's images are "
                "sorted and each machine gets its part of them in turn. A machine then uses about the same part of the "
                "file in each step, which its page cache can hold.",
            ),
        ),
    )


def draw(record: Record, found: dict[str, Any], path: Path) -> None:
    """Draws the total rate that a shared file system must deliver, over the number of ranks, into the file `path`."""
    from matplotlib.figure import Figure

    ranks = [row["ranks"] for row in record.rows if row["group"] == "plan" and row["ranks"] > 1]
    sheet = Figure(figsize=(9, 4.5), layout="constrained")
    axes = sheet.subplots()
    for row in record.rows:
        if row["group"] == "reads":
            line = "-" if row["storage"] == "jpeg" else "--"
            axes.loglog(ranks, [row["bytes_4k"] * RATE * count / 1e9 for count in ranks], f"o{line}", label=row["name"])
    axes.set_xticks(ranks, [str(count) for count in ranks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("ranks")
    axes.set_ylabel(f"GB/s in sum at {RATE} images/s each (computed)")
    axes.grid(color="0.92")
    axes.legend(frameon=False)
    axes.set_title(title(record, found), fontsize=10)
    sheet.savefig(path, dpi=120)
