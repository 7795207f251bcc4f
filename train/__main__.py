"""Trains a network:  python -m train --model mobilenet --refinery resnet50"""

# Imports wait: the processes that convert images start from this file and need none of PyTorch.
if __name__ == "__main__":
    import sys

    from command import ending
    from train.config import parse
    from train.train import train

    ending(lambda: train(parse(sys.argv[1:])))
