"""A network trained by a loop of your own, in plain PyTorch, on crops from this project's loader.

pip install path/to/the/checkout
python plain_pytorch.py path/to/images
"""

import sys

import torch
from label_refinery.data.convert import ensure_converted
from label_refinery.data.loader import open_loader
from label_refinery.data.sets import find_set
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

images = ensure_converted(find_set(sys.argv[1]))  # below converted/; done once
common = {"resolution": images.resolution, "batch_size": 32, "crop": images.crop}
loader = open_loader(images.beton("train"), **common)
val_loader = open_loader(images.beton("val"), train=False, **common)

network = resnet18(num_classes=loader.num_classes)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)


def normalised(crops):
    return crops.float() / 127.5 - 1  # crops come as uint8


for epoch in range(2):
    network.train()
    for crops, labels in loader:  # each pass other crops; batches also know their boxes, indices, ...
        loss = cross_entropy(network(normalised(crops)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.inference_mode():
        right = sum((network(normalised(crops)).argmax(1) == labels).sum().item() for crops, labels in val_loader)
    print(f"epoch {epoch + 1}: {len(loader)} steps, loss {loss.item():.3f}, top-1 {right / val_loader.num_samples:.1%}")
