"""The baseline that the loop is compared with: the training of the Label Refinery authors' code, reimplemented.

Pillow in the worker processes of a DataLoader; torchvision's transforms; float32 with PyTorch's defaults (on a GPU,
convolutions in TF32, with cuDNN's fastest algorithms); eager; NCHW; a refinery in training mode under no_grad, whose
batch normalisation uses batch statistics and updates its running statistics; KL divergence of softmax outputs; SGD with
momentum; the loss and the number of correct predictions are read after every batch.
"""

import time

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import models
from bench.pair import CLASSES, Pair
from bench.turns import Runner, Work
from data.pixels import open_image


class Baseline(Runner):
    """Trains a pair for one epoch per turn on image files; the class of file i is i modulo CLASSES."""

    def __init__(self, pair: Pair, files: list[str], workers: int):
        settings = pair.settings
        self.device = settings.device
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        self._refinery = models.build(pair.refinery, CLASSES).to(self.device).train()
        self._student = models.build(pair.student, CLASSES).to(self.device).train()
        self._optimizer = torch.optim.SGD(self._student.parameters(), lr=1e-3, momentum=0.9)
        mean, std = models.normalisation(pair.student)
        transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(settings.resolution),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )
        self._loader = DataLoader(
            _Files(files, transform),
            batch_size=settings.batch,
            shuffle=True,
            num_workers=workers,
            pin_memory=self.device == "cuda",
            persistent_workers=True,
            drop_last=True,
        )

    def run(self) -> Work:
        crops, waited, mark = 0, 0.0, time.perf_counter()
        losses, hits = 0.0, 0
        for images, labels in self._loader:
            waited += time.perf_counter() - mark
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            with torch.no_grad():
                targets = F.softmax(self._refinery(images), dim=1)
            output = self._student(images)
            loss = F.kl_div(F.log_softmax(output, dim=1), targets, reduction="batchmean")
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            losses += loss.item() * len(images)
            hits += int((output.topk(5, dim=1).indices == labels[:, None]).sum())
            crops += len(images)
            mark = time.perf_counter()
        return Work(crops, waited)


class _Files(Dataset):
    def __init__(self, files: list[str], transform: transforms.Compose):
        self._files, self._transform = files, transform

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(open_image(self._files[index]).convert("RGB")), index % CLASSES
