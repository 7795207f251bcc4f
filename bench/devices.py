"""Measures images per second of training on several devices: each alone, all at once independently, and all together.

Each device runs the training loop of bench.loop in a separate process. The cost of exchanging gradients is measured
without timers within a step: by the difference to the same processes on the same devices without the exchange, each
training a separate network.
"""

import contextlib
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import models
from bench import images
from bench.compiler import compiler_note
from bench.loop import Looping, config_of, write_inputs
from bench.pair import CLASSES, Pair
from bench.process import CallFailed, Process, answers
from bench.record import DEVICE_MEMORY, GPU_COLUMNS, MEMORY, Column, Record, Row, figure, optional, ran, rate_columns
from bench.settings import Settings
from bench.turns import Contender, Runner, Work, in_turns
from data.processors import processors
from train.config import Config
from train.distributed import PeerLost, Reduce, joined
from train.launch import share_processors

APART, TOGETHER, TOGETHER_BF16 = "all at once, no exchange", "together", "together, bf16"


class Devices(Runner):
    """Runs epochs of the training loop on several devices at once; an epoch ends when the last device has finished.

    numbers: indices of the devices that are used, below settings.gpus. reduce: how gradients are added; each step has
    one batch per device. None: no exchange, each device trains a separate network. folder: holds the converted set.
    """

    def __init__(self, pair: Pair, folder: Path, threads: int, numbers: Sequence[int], reduce: Reduce | None):
        world = len(numbers) if reduce else 1
        config = config_of(pair, folder, threads)
        config = replace(config, batch=config.batch * world, replicas=world, reduce=reduce or "sum")
        share_processors(pair.settings.gpus)
        port = _free_port()
        # These processes end with this one.
        self._processes = [Process() for _ in numbers]
        for place, (number, process) in enumerate(zip(numbers, self._processes, strict=True)):
            its = replace(config, device=f"cuda:{number}" if config.device == "cuda" else config.device)
            process.begin(_open, its, _environment(place, world, port) if reduce else {})
        answers(self._processes)

    def run(self) -> Work:
        for process in self._processes:
            process.begin(_epoch)
        amounts, waits, _ = zip(*answers(self._processes), strict=True)
        return Work(sum(amounts), sum(waits) / len(waits))

    def facts(self) -> dict[str, Any]:
        """Returns the first device's facts; on a GPU, peak_device_memory_bytes is the largest of all devices."""
        for process in self._processes:
            process.begin(_facts)
        found = answers(self._processes)
        peaks = [each["peak_device_memory_bytes"] for each in found if "peak_device_memory_bytes" in each]
        # Per image of the whole group, of which each device trains on an equal share.
        busy = found[0].get("busy_seconds")
        shared = {"busy_seconds": busy / len(found)} if busy is not None else {}
        return found[0] | shared | ({"peak_device_memory_bytes": max(peaks)} if peaks else {})


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    """Returns the environment variables that torchrun would set."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# ---- functions that run in the process of a device

_looping: Looping
_membership = contextlib.ExitStack()


def _open(config: Config, environment: dict[str, str]) -> None:
    global _looping
    os.environ.update(environment)
    if config.device != "cpu":
        torch.cuda.set_device(config.device)
    _membership.enter_context(joined(config.device))
    _looping = Looping(config)


def _epoch() -> Work:
    try:
        work = _looping.run()
    except PeerLost:
        raise RuntimeError("the process of another device has ended") from None
    if _looping.device != "cpu":
        torch.cuda.synchronize()
    return work


def _facts() -> dict[str, Any]:
    memory = {"peak_device_memory_bytes": torch.cuda.max_memory_reserved()} if _looping.device != "cpu" else {}
    return memory | _looping.facts()


# ---- the part


def why_not(settings: Settings) -> str:
    """Returns why the part cannot be measured, or ""."""
    if settings.gpus > 1:
        return ""
    if settings.device == "cuda" and torch.cuda.device_count() == 1:
        return "needs several devices, and this machine has one GPU; GPUS=2 ARGS='--device cpu' uses processes instead"
    return "needs several devices; give GPUS=2 or more (on a CPU: processes)"


def measure(settings: Settings) -> Record:
    """Measures the first pair on settings.gpus devices, at least 2. Raises BenchError as images.find."""
    pair = Pair(*settings.pairs[0], settings)
    threads = max(max(settings.threads) // settings.gpus, 1)
    count = settings.steps * settings.batch * settings.gpus
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        found = images.find(settings.data, folder, most=count)
        contenders = _contenders(pair, images.spread(found, count), folder, threads)
        rows = in_turns(contenders, **settings.pace, apart=settings.on_gpu, title=f"devices, {pair}")
    add_efficiency(rows)
    used = min(len(found), count)
    return Record(
        part="devices",
        settings=settings.of_networks
        | {
            "gpus": settings.gpus,
            "data": settings.source or f"{len(found)} drawn images",
            "images": used,
            "pair": [pair.refinery, pair.student],
            "threads": threads,
            "steps": settings.steps,
        },
        notes=_notes(pair, used, threads, rows),
        rows=rows,
        identity=(Column("what", lambda row: row["name"]), Column("devices", lambda row: str(row["devices"]))),
        figures=(
            *rate_columns("images/s"),
            Column("per device", lambda row: figure(row["rate"]["median"] / row["devices"])),
            Column("ms a step", lambda row: figure(1000 * row["batch"] / row["rate"]["median"])),
            optional("efficiency", "efficiency", lambda share: f"{100 * share:.1f} %"),
            optional("exchange", "exchange", lambda share: f"{100 * share:.1f} %"),
            Column("waiting", lambda row: f"{100 * row['waiting']:.1f} %"),
            MEMORY,
            *((DEVICE_MEMORY, *GPU_COLUMNS) if settings.on_gpu else ()),
        ),
    )


def _contenders(pair: Pair, files: list[str], folder: Path, threads: int) -> list[Contender]:
    """Returns contenders for each device alone, all without exchange, and all together."""
    numbers = list(range(pair.settings.gpus))
    # An epoch has the same number of steps in all contenders.
    sets = {folder / "each": files[:: len(numbers)], folder / "all": files}
    failed = ""
    if not pair.why_not():
        try:
            for place, members in sets.items():
                place.mkdir()
                with Process() as process:
                    process.call(write_inputs, pair, members, place)
        except CallFailed as error:
            failed = str(error)
    planned: list[tuple[str, list[int], Reduce | None]] = [
        *((f"device {number} alone", [number], None) for number in numbers),
        (APART, numbers, None),
        (TOGETHER, numbers, "sum"),
        (TOGETHER_BF16, numbers, "bf16"),
    ]
    made = []
    for name, its, reduce in planned:
        build = partial(
            Devices, folder=folder / ("all" if reduce else "each"), threads=threads, numbers=its, reduce=reduce
        )
        each = pair.contender(name, build)
        row = each.row | {"devices": len(its), "batch": len(its) * pair.settings.batch}
        made.append(Contender(each.build, row, each.not_run or failed))
    return made


def add_efficiency(rows: list[Row]) -> None:
    """Adds `efficiency` and `exchange` to rows of several devices, if the rows that they are computed from ran.

    efficiency: the rate divided by the sum of the rates of each device alone. exchange: the share of a step that is
    saved without the exchange; noise can make it negative.
    """
    measured = ran(rows)
    rates = {name: row["rate"]["median"] for name, row in measured.items()}
    alone = [row["name"] for row in rows if row["devices"] == 1]
    for name, row in measured.items():
        if row["devices"] > 1 and all(each in rates for each in alone):
            row["efficiency"] = rates[name] / sum(rates[each] for each in alone)
        if name in (TOGETHER, TOGETHER_BF16) and APART in rates:
            row["exchange"] = 1 - rates[name] / rates[APART]


def _notes(pair: Pair, count: int, threads: int, rows: list[Row]) -> list[str]:
    settings = pair.settings
    on_cpu = (
        f"A device is a process on the CPU with {max(processors() // settings.gpus, 1)} of its "
        "processors, unless OMP_NUM_THREADS says otherwise. "
    )
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in models.build(pair.student, CLASSES).parameters())
    return [
        f"Training {pair.student} from {pair.refinery}, both with random weights, on random crops of "
        f"{images.described(settings.data, count)}, resized to {settings.resolution} px, from the page cache, in "
        f"batches of {settings.batch} per device (weak scaling), {settings.computing}, decoding threads per device: "
        f"{threads}. images/s of all devices of a row: median, lowest and highest of {settings.turns} epochs of "
        f"{settings.steps} steps, measured in turns, after one untimed epoch.",
        f"{on_cpu if settings.device == 'cpu' else ''}alone: the other devices are idle. {APART}: an independent "
        f"training on each device at the same time, until the last one ends. {TOGETHER}: one training on all devices, "
        f"whose {weights:,} gradients are added in each step, 4 bytes each (in {TOGETHER_BF16}: 2).",
        "efficiency: the rate divided by the sum of the rates of each device alone. exchange: the share of a step that "
        f"is saved without the exchange (1 - rate / rate of {APART}): packing, sending, adding, and waiting for the "
        "slowest device in each step.",
        *_findings(rows),
    ]


def _findings(rows: list[Row]) -> list[str]:
    measured = ran(rows)
    notes = []
    for name in (APART, TOGETHER, TOGETHER_BF16):
        row = measured.get(name, {})
        if "efficiency" in row:
            gain = row["devices"] * row["efficiency"]
            notes.append(
                f"{row['devices']} devices {name}: {gain:.2f} times the rate of one alone (efficiency "
                f"{100 * row['efficiency']:.1f} %)."
            )
        if "exchange" in row:
            notes.append(f"The exchange takes {100 * row['exchange']:.1f} % of a step {name}.")
    if "compiler" in measured.get(TOGETHER, {}):
        notes.append(compiler_note(measured[TOGETHER]["compiler"]).capitalize())
    return notes
