"""Trains a network:  python -m train --model mobilenet --refinery resnet50"""

import sys

from command import exit_on_user_error, with_flags
from train.config import PLAN_FLAGS, Config, Planned, parse_planned
from train.distributed import joined
from train.launch import on_devices
from train.train import train


def work(asked: tuple[Config, Planned]) -> None:
    config, own = asked
    with joined(config.device):
        train(config, dry_run=own.dry_run)


if __name__ == "__main__":
    words = with_flags(sys.argv[1:], PLAN_FLAGS)
    exit_on_user_error(lambda: on_devices(__package__, words, parse_planned, work))
