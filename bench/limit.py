"""The two limits of a step: the device's rates of large matrix products and of large memory copies."""

from dataclasses import replace
from functools import partial

from bench.machine import Copy, MatrixProduct
from bench.pair import Demand, Pair
from bench.record import Row
from bench.settings import Settings
from bench.turns import Contender, Runner

PRODUCTS, COPIES = "matrix products alone", "memory copies alone"


def limits(pair: Pair) -> list[Contender]:
    """Returns contenders for large matrix products and large copies, in images/s by a step's operations and bytes."""
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
        "of products: the row's rate as a share of the rate that its matrix products and convolutions (counted by "
        f"torch.utils.flop_counter) would have as products of large {settings.precision} matrices, measured in turns "
        "with the row.",
        "of copies: the row's rate as a share of the rate that the bytes its layers read and write (counted by "
        "bench.traffic: convolutions, statistics, normalise and activate, residual add, pooling) would have as large "
        "copies, measured in turns with the row. It can exceed 100 % with small images, which fit in caches. The "
        "higher of the two shares tells how close a row is to its limit.",
    ]


def demand_note(rows: dict[str, Row]) -> list[str]:
    """Returns a note on the operations and bytes of a step and the limits that follow; [] unless both limits ran."""
    if not all(name in rows for name in (PRODUCTS, COPIES)):
        return []
    row = rows[PRODUCTS]
    products, copies = (rows[name]["rate"]["median"] for name in (PRODUCTS, COPIES))
    return [
        f"{row['flops'] / 1e9:.3g} GFLOP and {row['bytes'] / 1e6:.4g} MB per image in a step; the device does "
        f"{products * row['flops'] / 1e12:.3g} TFLOP/s, for {products:.0f} images/s, and copies "
        f"{copies * row['bytes'] / 1e9:.4g} GB/s, for {copies:.0f} images/s: at most "
        f"{min(products, copies):.0f} images/s with these operations and passes."
    ]


def with_shares(rows: list[Row]) -> list[Row]:
    """Returns the rows of a pair, with share_of_flops and share_of_bytes added to rows with known work."""
    for limit, asked in ((PRODUCTS, "flops"), (COPIES, "bytes")):
        reached = next((row for row in rows if row["name"] == limit and "not_run" not in row), None)
        for row in rows:
            if reached and row["name"] not in (PRODUCTS, COPIES) and row[asked] and "not_run" not in row:
                rate = reached["rate"]["median"] * reached[asked]
                row[f"share_of_{asked}"] = row["rate"]["median"] * row[asked] / rate
    return rows
