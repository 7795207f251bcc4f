"""Trains a network:  python -m train --model mobilenet --refinery resnet50"""

import sys

from command import exit_on_user_error
from train.config import Config, parse
from train.distributed import joined
from train.launch import on_devices
from train.train import train


def work(config: Config) -> None:
    with joined(config.device):
        train(config)


if __name__ == "__main__":
    exit_on_user_error(lambda: on_devices(__package__, sys.argv[1:], parse, work))
