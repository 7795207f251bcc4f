"""Trained networks as folders that other programs use: ONNX, or safetensors with the layout of timm."""
