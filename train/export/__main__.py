"""Writes a trained network as a folder that other programs use: ONNX, or safetensors with the layout of timm.

python -m train.export --checkpoint runs/scenes/... --format onnx
make export CHECKPOINT=runs/scenes/... FORMAT=onnx INT8=1
"""

import sys

from command import run_command, with_flags
from train.export.command import FLAGS, export

if __name__ == "__main__":
    run_command(export, prog="python -m train.export", words=with_flags(sys.argv[1:], FLAGS))
