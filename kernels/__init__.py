"""The few operations worth fusing, one a file, each defined by plain PyTorch."""
