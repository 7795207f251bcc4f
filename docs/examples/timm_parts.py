"""A student of timm on a refinery's labels, with timm's normalisation, optimizer, schedule and averaged weights.

    pip install path/to/the/checkout
    python timm_parts.py path/to/images refinery.pt

refinery.pt: a state dict of timm's resnet18 with as many classes as there are class folders.
"""

import sys

import timm
import torch
from label_refinery.data.convert import ensure_converted
from label_refinery.data.loader import open_loader
from label_refinery.data.sets import find_set
from timm.data.loader import PrefetchLoader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, accuracy

EPOCHS = 2
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

images = ensure_converted(find_set(sys.argv[1]))
common = {"resolution": images.resolution, "batch_size": 32, "crop": images.crop, "device": device}
# timm's loader normalises what it gets, by ImageNet's mean and deviation.
loader = PrefetchLoader(open_loader(images.beton("train"), **common), device=device)
val_loader = PrefetchLoader(open_loader(images.beton("val"), train=False, **common), device=device)

classes = len(images.class_names)
refinery = timm.create_model("resnet18", num_classes=classes).to(device)
refinery.load_state_dict(torch.load(sys.argv[2], weights_only=True))
refinery.train()  # as in the paper, by the statistics of the batch

student = timm.create_model("test_resnet", num_classes=classes).to(device)
average = ModelEmaV3(student, decay=0.9)
optimizer = create_optimizer_v2(student, opt="adamw", lr=2e-3, weight_decay=0.05)
scheduler = CosineLRScheduler(optimizer, t_initial=EPOCHS * len(loader), t_in_epochs=False)
compute_loss = SoftTargetCrossEntropy()

step = 0
for _ in range(EPOCHS):
    student.train()
    for crops, _ in loader:
        with torch.no_grad():
            labels = refinery(crops).softmax(dim=1)  # of these very crops
        loss = compute_loss(student(crops), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(student)
        step += 1
        scheduler.step_update(step)

average.eval()
with torch.inference_mode():
    scores, labels = zip(*((average(crops), labels) for crops, labels in val_loader), strict=True)
(top1,) = accuracy(torch.cat(scores), torch.cat(labels))
print(f"{step} steps, loss {loss.item():.3f}, top-1 of the averaged weights {top1:.1f} %")
