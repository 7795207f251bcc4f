"""An online refinery: a trained network that labels the very crop the student sees (Label Refinery, section 3)."""

from copy import deepcopy

from torch import nn

from data.loader import CropBatch
from kernels.normalise import Normalisation, Normalise
from train import TrainError
from train.labels import LabelSource, Targets

BN_CHOICES = ("batch", "running")


class Refinery(LabelSource):
    """The network's logits for each crop. Its weights and running statistics stay as they are; dropout is off.

    bn: "batch" normalises with the statistics of the current batch, as the network itself was trained, which the
    paper found to label more accurately (section 3); "running" uses the stored ones.
    normalisation: mean and std of its input.
    """

    def __init__(self, network: nn.Module, normalisation: Normalisation, *, bn: str = "batch"):
        super().__init__()
        self.network = deepcopy(network).requires_grad_(False)
        self.normalise = Normalise(normalisation)
        self.bn = bn
        if bn == "batch":
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    # Without running statistics, batch normalisation uses the batch's own, in evaluation mode too.
                    module.track_running_stats = False
                    module.running_mean = module.running_var = module.num_batches_tracked = None
        self.eval()

    def train(self, mode: bool = True) -> "Refinery":
        # A refinery never trains: its dropout stays off.
        return super().train(False)

    def forward(self, batch: CropBatch) -> Targets:
        if self.bn == "batch" and batch.crops.shape[0] == 1:
            raise TrainError(
                "batch=1: batch statistics of a single crop mean nothing; use a larger batch or bn=running"
            )
        return Targets(logits=self.network(self.normalise(batch.crops)))
