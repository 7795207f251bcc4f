"""The networks: properties given by the papers and published files, and that they train."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import models

# At 1000 classes. AlexNet: arXiv 1805.02641; MobileNet: arXiv 1704.04861 (4.2, 2.6, 1.3 and 0.5 million); the
# ResNets and VGGs: torchvision's documentation; Darknet-19: the published file, darknet19.weights, has 80 MB.
# The binary ResNet-50 has the convolutions and the classifier of the real one (25,503,912) and 45,568 weights of
# batch normalisation, 2 for each channel that enters a convolution (three to a block) or the last ReLU.
PARAMETERS = {
    "alexnet": 62_396_480,
    "mobilenet": 4_231_976,
    "mobilenet0.75": 2_585_560,
    "mobilenet0.5": 1_331_592,
    "mobilenet0.25": 470_072,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet50-xnor": 25_549_480,
    "vgg16": 138_365_992,
    "vgg19": 143_678_248,
    "darknet19": 20_842_376,
}
SMALLEST = {name: 64 if name == "alexnet" else 32 for name in PARAMETERS}


def shapes_only(name: str, num_classes: int = 1000) -> nn.Module:
    """Returns the network on the meta device."""
    with torch.device("meta"):
        return models.build(name, num_classes)


def test_every_name_has_a_known_number_of_parameters() -> None:
    counts = {name: sum(p.numel() for p in shapes_only(name).parameters()) for name in models.names()}
    assert counts == PARAMETERS


@pytest.mark.parametrize("name", PARAMETERS)
def test_one_logit_per_class_at_any_resolution(name: str) -> None:
    network = shapes_only(name, num_classes=7)
    for resolution in (SMALLEST[name], 97, 224):
        models.check_resolution(name, resolution)
        logits = network(torch.empty(2, 3, resolution, resolution, device="meta"))
        assert logits.shape == (2, 7), resolution


def input_of(module: nn.Module, run: Callable[[], object]) -> torch.Size:
    seen: list[torch.Size] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    run()
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(("resolution", "side"), [(64, 1), (160, 4), (224, 6), (256, 7)])
def test_6x6x256_enters_alexnets_first_linear_layer(resolution: int, side: int) -> None:
    network = shapes_only("alexnet")
    crops = torch.empty(2, 3, resolution, resolution, device="meta")
    features = nn.Sequential(*[network.get_submodule(f"conv{i}") for i in range(1, 6)])
    assert features(crops).shape == (2, 256, side, side)
    assert input_of(network.get_submodule("fc6"), lambda: network(crops)) == (2, 256 * 6 * 6)


def test_alexnet_needs_no_adaptive_pool_at_224(monkeypatch: pytest.MonkeyPatch) -> None:
    network = shapes_only("alexnet")

    def refused(*args: object) -> Tensor:
        raise AssertionError("the pool ran")

    monkeypatch.setattr(F, "adaptive_avg_pool2d", refused)
    network(torch.empty(2, 3, 224, 224, device="meta"))
    with pytest.raises(AssertionError, match="the pool ran"):
        network(torch.empty(2, 3, 256, 256, device="meta"))


def test_alexnet_has_the_names_of_the_published_files() -> None:
    bn = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    convs = [f"conv{i}.{key}" for i in range(1, 6) for key in ["conv.weight", "conv.bias", *(f"bn.{b}" for b in bn)]]
    fcs = [f"fc{i}.{key}" for i in (6, 7) for key in ["linear.weight", "linear.bias", *(f"bn.{b}" for b in bn)]]
    network = shapes_only("alexnet")
    assert list(network.state_dict()) == [*convs, *fcs, "fc8.weight"]


def test_alexnet_computes_conv_bn_pool_relu_and_linear_bn_relu() -> None:
    torch.manual_seed(0)
    network = models.build("alexnet", 10).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            # Negative scales distinguish BN -> pool from pool -> BN.
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    s = network.state_dict()

    def bn(x: Tensor, block: str) -> Tensor:
        stats = [s[f"{block}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *stats)

    crops = torch.randn(2, 3, 224, 224)
    x = crops
    for block, stride, padding, pooled in (
        ("conv1", 4, 2, True),
        ("conv2", 1, 2, True),
        ("conv3", 1, 1, False),
        ("conv4", 1, 1, False),
        ("conv5", 1, 1, True),
    ):
        x = bn(F.conv2d(x, s[f"{block}.conv.weight"], s[f"{block}.conv.bias"], stride, padding), block)
        x = F.relu(F.max_pool2d(x, 2) if pooled else x)
    x = x.flatten(1)
    for block in ("fc6", "fc7"):
        x = F.relu(bn(F.linear(x, s[f"{block}.linear.weight"], s[f"{block}.linear.bias"]), block))
    with torch.no_grad():
        torch.testing.assert_close(network(crops), F.linear(x, s["fc8.weight"]), rtol=1e-4, atol=1e-4)


def test_resnet50_is_torchvisions_with_its_stride_in_the_3x3() -> None:
    network = shapes_only("resnet50")
    block = network.get_submodule("layer2.0")
    assert block.get_submodule("conv1").stride == (1, 1)
    assert block.get_submodule("conv2").stride == (2, 2)
    assert block.get_submodule("conv2").kernel_size == (3, 3)
    keys = list(network.state_dict())
    assert len(keys) == 320
    assert keys[:3] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert keys[-2:] == ["fc.weight", "fc.bias"]
    assert {"layer1.0.downsample.0.weight", "layer3.5.bn3.running_var", "layer4.2.conv3.weight"} <= set(keys)


def test_mobilenet_halves_the_resolution_five_times_in_28_layers() -> None:
    network = shapes_only("mobilenet0.5")
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) + 1 == 28
    assert [conv.groups for conv in convs[1::2]] == [conv.in_channels for conv in convs[1::2]]
    assert {conv.kernel_size for conv in convs[2::2]} == {(1, 1)}
    assert math.prod(conv.stride[0] for conv in convs) == 32
    assert [conv.out_channels for conv in convs[2::2]] == [32, 64, 64, 128, 128] + [256] * 6 + [512, 512]
    # As in Table 1 of the paper: a 7x7 map of the last channels is averaged.
    assert network.get_submodule("features")(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 512, 7, 7)


def test_darknet19_alternates_3x3_and_1x1_at_six_resolutions() -> None:
    network = shapes_only("darknet19")
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 19
    assert {conv.stride for conv in convs} == {(1, 1)}
    assert [conv.kernel_size[0] for conv in convs] == [3, 3, 3, 1, 3, 3, 1, 3, 3, 1, 3, 1, 3, 3, 1, 3, 1, 3, 1]
    assert [conv.bias is not None for conv in convs] == [False] * 18 + [True]
    slopes = [module.negative_slope for module in network.modules() if isinstance(module, nn.LeakyReLU)]
    assert slopes == [0.1] * 18
    assert network.get_submodule("features")(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1024, 7, 7)


def test_darknet19_takes_5_58_billion_operations() -> None:
    # arXiv 1612.08242, section 3; a multiplication and an addition count as two. Only the right channels at the right
    # resolutions give this number.
    with FlopCounterMode(display=False) as counter:
        shapes_only("darknet19")(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == pytest.approx(5.58e9, abs=0.005e9)


@pytest.mark.parametrize(("name", "blocks"), [("vgg16", (2, 2, 3, 3, 3)), ("vgg19", (2, 2, 4, 4, 4))])
def test_vgg_has_torchvisions_names_batch_normalisation_and_dropout(name: str, blocks: tuple[int, ...]) -> None:
    bn = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    keys, at = [], 0
    for convs in blocks:
        for _ in range(convs):
            keys += [f"features.{at}.{key}" for key in ("weight", "bias")]
            keys += [f"features.{at + 1}.{key}" for key in bn]
            at += 3  # convolution, normalisation, ReLU
        at += 1  # pool
    keys += [f"classifier.{i}.{key}" for i in (0, 3, 6) for key in ("weight", "bias")]
    network = shapes_only(name)
    assert list(network.state_dict()) == keys
    assert [module.p for module in network.modules() if isinstance(module, nn.Dropout)] == [0.5, 0.5]


def test_initial_weights_have_the_variance_of_their_fan_out() -> None:
    torch.manual_seed(0)
    features = models.build("mobilenet", 10).get_submodule("features")
    depthwise, pointwise = features.get_submodule("13.0.0"), features.get_submodule("13.1.0")
    assert isinstance(depthwise, nn.Conv2d)
    assert isinstance(pointwise, nn.Conv2d)
    assert depthwise.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    assert pointwise.weight.std().item() == pytest.approx(math.sqrt(2 / 1024), rel=0.05)


# Hand-written networks train at the learning rates of their papers.
@pytest.mark.parametrize(
    ("name", "resolution", "lr"),
    [
        ("alexnet", 64, 0.01),
        ("mobilenet0.25", 64, 0.1),
        ("resnet18", 32, 0.01),
        ("resnet50-xnor", 32, 0.1),
        ("darknet19", 32, 0.01),
        # A batch of a few crops of a few classes is too unbalanced for 0.1 without normalisation in the classifier.
        pytest.param("vgg16", 32, 0.01, marks=pytest.mark.slow),
    ],
)
def test_untrained_networks_learn(name: str, resolution: int, lr: float) -> None:
    torch.manual_seed(0)
    classes = 10
    network = models.build(name, classes)
    assert network.training
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    crops, labels = torch.randn(4, 3, resolution, resolution), torch.arange(4)
    losses = []
    for _ in range(2):
        loss = F.cross_entropy(network(crops), labels)
        optimizer.zero_grad()
        loss.backward()
        gradients = {key: p.grad for key, p in network.named_parameters()}
        assert all(g is not None and g.isfinite().all() for g in gradients.values())
        optimizer.step()
        losses.append(loss.item())
    # Biases before a batch normalisation are the only parameters without gradient in the second step (in the first one,
    # also parameters whose output is multiplied by the residual blocks' zero scales).
    idle = [key for key, g in gradients.items() if g is not None and not g.any()]
    in_front = {"alexnet": ("conv.bias", "linear.bias"), "vgg16": ("bias",)}.get(name, ())
    assert all(key.endswith(in_front) for key in idle)
    # Initially no class is strongly preferred; one step then improves the loss on the same crops.
    assert losses[0] == pytest.approx(math.log(classes), abs=1)
    assert losses[1] < losses[0]


def test_a_seed_fixes_the_initial_weights() -> None:
    def first(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return next(models.build("mobilenet0.25", 10).parameters()).detach()

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
