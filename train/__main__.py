"""Trains a network:  python -m train --model mobilenet --refinery resnet50"""

# Imports wait: the processes that convert images start from this file and need none of PyTorch.
if __name__ == "__main__":
    import sys

    from command import exit_on_user_error
    from train.config import parse
    from train.train import train

    exit_on_user_error(lambda: train(parse(sys.argv[1:])))
