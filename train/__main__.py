"""Trains a network:  python -m train --model mobilenet --refinery resnet50"""

# Imports wait: the processes that convert images start from this file and need none of PyTorch.
if __name__ == "__main__":
    from train.job import main

    main()
