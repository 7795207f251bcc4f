"""The few operations worth fusing, one per file, each defined by plain PyTorch."""
