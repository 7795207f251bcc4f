"""Measures images per second of the training step for several batch sizes, with and without CUDA graphs."""

from dataclasses import replace
from functools import partial

from bench.chart import by_time
from bench.limit import demand_note, limit_notes, limits, with_shares
from bench.networks import Stepping, gpu_notes
from bench.pair import Pair
from bench.record import Column, Record, Row, ran, step_columns
from bench.settings import Settings
from bench.turns import Contender, in_turns

# Multiples of settings.batch: on a GPU 128 to 1024.
_SIZES = (0.5, 1, 2, 4)
_GRAPHS = ", CUDA graphs"


def measure(settings: Settings) -> Record:
    """Measures the step of the first pair at half, once, twice and four times the batch."""
    pair = Pair(*settings.pairs[0], settings)
    sizes = sorted({max(int(size * settings.batch), 1) for size in _SIZES})
    # The usual size first, in case the time limit ends the part early.
    first = sorted(sizes, key=lambda size: size != settings.batch)
    contenders = [
        *limits(pair),
        *(_contender(pair, size, cuda_graphs=graphs) for size in first for graphs in (False, True)),
    ]
    title = f"batches, {pair}"
    rows = with_shares(in_turns(contenders, **settings.pace, apart=settings.on_gpu, title=title))
    # After the two limits, ordered by size.
    rows[2:] = sorted(rows[2:], key=lambda row: row["batch"])
    return Record(
        part="batches",
        settings=settings.of_networks | {"pair": [pair.refinery, pair.student], "batches": sizes},
        notes=[
            f"Whole steps of {pair} on crops of {settings.resolution} px already on the device, {settings.computing}, "
            "random weights, and the same steps recorded and replayed as CUDA graphs. images/s of one device: median, "
            f"lowest and highest of {settings.turns} turns of {settings.seconds:g} s or more, after one untimed turn.",
            *limit_notes(settings),
            *gpu_notes(settings),
            *demand_note(ran(rows)),
            *_findings(ran(rows), sizes),
        ],
        rows=rows,
        identity=(Column("what", lambda row: row["name"]),),
        figures=step_columns(settings.device),
        chart=by_time,
    )


def _contender(pair: Pair, size: int, *, cuda_graphs: bool) -> Contender:
    settings = pair.settings
    of_size = replace(pair, settings=replace(settings, batch=size))
    forward, training = of_size.demands()
    build = partial(Stepping, networks=True, cuda_graphs=cuda_graphs)
    contender = of_size.contender(f"{size} crops{_GRAPHS if cuda_graphs else ''}", build, forward.plus(training))
    if cuda_graphs and not contender.not_run:
        why = "needs a GPU" if not settings.on_gpu else "" if settings.compiled else "needs compile=always"
        return replace(contender, not_run=why)
    return contender


def _findings(rows: dict[str, Row], sizes: list[int]) -> list[str]:
    """Returns a note for each size about the gain from CUDA graphs."""
    notes = []
    for size in sizes:
        plain, graphs = rows.get(f"{size} crops"), rows.get(f"{size} crops{_GRAPHS}")
        if plain and graphs:
            times = graphs["rate"]["median"] / plain["rate"]["median"]
            notes.append(f"{size} crops: {times:.3f} times as fast with CUDA graphs.")
    return notes
