"""What bounds a step: the device's matrix products and the copies of its memory, each measured as it is at its best."""

from dataclasses import replace
from functools import partial

from bench.machine import Copy, MatrixProduct
from bench.pair import Demand, Pair
from bench.record import Row
from bench.settings import Settings
from bench.turns import Contender, Runner

PRODUCTS, COPIES = "matrix products alone", "memory copies alone"


def limits(pair: Pair) -> list[Contender]:
    """Large matrix products and large copies, counted in images by what a step asks of the device for each."""
    refinery, student = pair.demands()
    demand = refinery.plus(student)
    made = [pair.contender(name, partial(_runner, name, demand), demand) for name in (PRODUCTS, COPIES)]
    return [replace(contender, beside=True) for contender in made]


def _runner(name: str, demand: Demand, pair: Pair) -> Runner:
    if name == PRODUCTS:
        return MatrixProduct(pair.settings.device, pair.settings.precision, demand.flops)
    return Copy(pair.settings.device, from_host=False, size_of_one=demand.bytes)


def limit_notes(settings: Settings) -> list[str]:
    return [
        "of products: of the rate at which this device, in turns with the rest, does the row's matrix products and "
        f"convolutions (counted by torch.utils.flop_counter) as products of large {settings.precision} matrices.",
        "of copies: of the rate at which it, in turns with the rest, copies as many bytes as the row's layers read and "
        "write (bench.traffic: convolutions, statistics, normalise and activate, residual add, pooling). Small images "
        "lie in caches, and go beyond it. The higher of the two shares says how near a row is to what bounds it.",
    ]


def demand_note(rows: dict[str, Row]) -> list[str]:
    """What a step asks of the device, and what that can do, from the rows that ran."""
    if not all(name in rows for name in (PRODUCTS, COPIES)):
        return []
    row = rows[PRODUCTS]
    products, copies = (rows[name]["rate"]["median"] for name in (PRODUCTS, COPIES))
    return [
        f"{row['flops'] / 1e9:.3g} GFLOP and {row['bytes'] / 1e6:.4g} MB an image in a step; the device does "
        f"{products * row['flops'] / 1e12:.3g} TFLOP/s, for {products:.0f} images/s, and copies "
        f"{copies * row['bytes'] / 1e9:.4g} GB/s, for {copies:.0f} images/s: at most "
        f"{min(products, copies):.0f} images/s with these operations and passes."
    ]


def with_shares(rows: list[Row]) -> list[Row]:
    """The rows of a pair, those that ask for known work each with its shares of the limits that were measured."""
    for limit, asked in ((PRODUCTS, "flops"), (COPIES, "bytes")):
        reached = next((row for row in rows if row["name"] == limit and "not_run" not in row), None)
        for row in rows:
            if reached and row["name"] not in (PRODUCTS, COPIES) and row[asked] and "not_run" not in row:
                rate = reached["rate"]["median"] * reached[asked]
                row[f"share_of_{asked}"] = row["rate"]["median"] * row[asked] / rate
    return rows
