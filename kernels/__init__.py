"""Operations that are worth fusing, one per file, each with a definition in plain PyTorch."""

import command  # noqa: F401  # first, so that Ctrl-C ends `python -m kernels` quietly while libraries load
