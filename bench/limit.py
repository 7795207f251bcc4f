"""The limit of a step: the rate at which the device does its matrix products and convolutions, and nothing else."""

from bench.machine import MatrixProduct
from bench.pair import Pair
from bench.record import Row
from bench.settings import Settings
from bench.turns import Contender

LIMIT = "limit: matrix products"


class Products(MatrixProduct):
    def __init__(self, pair: Pair):
        super().__init__(pair.settings.device, pair.settings.precision, sum(pair.flops()))


def limit(pair: Pair) -> Contender:
    """Large matrix products, counted in images by the operations of a step."""
    return pair.contender(LIMIT, Products, sum(pair.flops()))


def limit_note(settings: Settings) -> str:
    return (
        "of limit: of the rate at which this device, in turns with the rest, does the row's matrix products and "
        f"convolutions (counted by torch.utils.flop_counter) as products of large {settings.precision} matrices."
    )


def with_shares(rows: list[Row]) -> list[Row]:
    """The rows of a pair, those with products each with its share of the limit, where that was measured."""
    reached = next((row for row in rows if row["name"] == LIMIT and "not_run" not in row), None)
    for row in rows:
        if reached and row is not reached and row["flops"] and "not_run" not in row:
            rate = reached["rate"]["median"] * reached["flops"]
            row["share_of_limit"] = row["rate"]["median"] * row["flops"] / rate
    return rows
