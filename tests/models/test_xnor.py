"""The binary ResNet-50: its binary convolutions and their gradients, and its real layers."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from models.xnor import _BinaryConv2d, _Bottleneck, binary_weights


def meta_network() -> nn.Module:
    with torch.device("meta"):
        return models.build("resnet50-xnor", 7)


def by_hand(weights: Tensor) -> Tensor:
    """Returns sign(w) times the filter's mean |w|, computed weight by weight."""
    rows = []
    for row in weights.flatten(1).tolist():
        scale = sum(abs(w) for w in row) / len(row)
        rows.append([scale if w >= 0 else -scale for w in row])
    return torch.tensor(rows).reshape(weights.shape)


def test_binary_weights_are_the_signs_times_the_mean_of_each_filter() -> None:
    torch.manual_seed(0)
    weights = torch.randn(5, 4, 3, 3)
    weights[2, 0] = 0.0
    binary = binary_weights(weights)
    torch.testing.assert_close(binary, by_hand(weights))
    for one in binary:
        low, high = one.unique().tolist()
        assert low == -high
    assert (binary[2, 0] > 0).all()


def test_no_other_scale_is_closer_to_the_weights() -> None:
    torch.manual_seed(0)
    weights = torch.randn(1, 8, 3, 3)
    binary = binary_weights(weights)
    distances = [(weights - factor * binary).square().sum().item() for factor in (0.9, 0.99, 1.0, 1.01, 1.1)]
    assert min(distances) == distances[2]


def test_a_convolution_uses_its_binary_weights_and_keeps_the_real_ones() -> None:
    torch.manual_seed(0)
    conv = _BinaryConv2d(6, 4, 3, stride=2, padding=1, bias=False)
    before = conv.weight.detach().clone()
    x = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(conv(x), F.conv2d(x, by_hand(before), stride=2, padding=1))

    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    conv(x).square().mean().backward()
    assert conv.weight.grad is not None
    gradient = conv.weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(conv.weight.detach(), before - 0.1 * gradient)
    assert conv.weight[0].unique().numel() == conv.weight[0].numel()


def test_the_gradient_of_the_binary_weights_is_that_of_the_real_ones() -> None:
    """Compared with central differences of the loss with respect to the binary weights."""
    torch.manual_seed(0)
    conv = _BinaryConv2d(3, 2, 3, bias=False).double()
    x, target = torch.randn(2, 3, 5, 5, dtype=torch.float64), torch.randn(2, 2, 3, 3, dtype=torch.float64)
    F.mse_loss(conv(x), target).backward()

    used = binary_weights(conv.weight.detach())
    expected = torch.empty_like(used)
    step = 1e-6
    for i in range(used.numel()):
        moved = torch.zeros_like(used).flatten()
        moved[i] = step
        moved = moved.reshape(used.shape)
        up, down = (F.mse_loss(F.conv2d(x, used + sign * moved), target) for sign in (1, -1))
        expected.view(-1)[i] = (up - down) / (2 * step)
    assert conv.weight.grad is not None
    torch.testing.assert_close(conv.weight.grad, expected, rtol=1e-6, atol=1e-9)


def test_every_inner_convolution_is_binary_and_the_first_and_last_layer_are_real() -> None:
    network = meta_network()
    real = [key for key, module in network.named_modules() if type(module) in (nn.Conv2d, nn.Linear)]
    binary = [key for key, module in network.named_modules() if isinstance(module, _BinaryConv2d)]
    assert real == ["conv1", "fc"]
    assert len(binary) == 16 * 3 + 4


def test_convolutions_have_the_names_and_shapes_of_the_real_resnet50() -> None:
    with torch.device("meta"):
        real, network = models.build("resnet50", 7), meta_network()
    for key, module in real.named_modules():
        if isinstance(module, nn.Conv2d):
            own = network.get_submodule(key)
            assert isinstance(own, nn.Conv2d)
            made = [(m.weight.shape, m.bias, m.stride, m.padding) for m in (module, own)]
            assert made[0] == made[1], key
    keys, own_keys = set(real.state_dict()), set(network.state_dict())
    # Normalisation is before the convolutions: shortcuts share their block's first one, and the last one is added.
    assert {key.rpartition(".")[0] for key in own_keys - keys} == {"bn2"}
    assert {key.rpartition(".")[0] for key in keys - own_keys} == {f"layer{i}.0.downsample.1" for i in range(1, 5)}
    assert {"fc.weight", "fc.bias"} <= own_keys


# The first block of a network, the first of a later stage, and one with an identity shortcut.
@pytest.mark.parametrize(("channels", "width", "stride"), [(64, 64, 1), (256, 128, 2), (256, 64, 1)])
def test_a_block_is_bn_sign_convolution_three_times_and_its_shortcut(channels: int, width: int, stride: int) -> None:
    torch.manual_seed(0)
    block = _Bottleneck(channels, width, stride).eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    s = block.state_dict()

    def signs(x: Tensor, bn: str) -> Tensor:
        x = F.batch_norm(x, *[s[f"{bn}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")])
        return torch.where(x >= 0, 1.0, -1.0)

    x = torch.randn(2, channels, 8, 8)
    entering = signs(x, "bn1")
    y = F.conv2d(entering, by_hand(s["conv1.weight"]))
    y = F.conv2d(signs(y, "bn2"), by_hand(s["conv2.weight"]), stride=stride, padding=1)
    y = F.conv2d(signs(y, "bn3"), by_hand(s["conv3.weight"]))
    if channels == 4 * width:
        shortcut = x
    else:
        shortcut = F.conv2d(entering, by_hand(s["downsample.0.weight"]), stride=stride)
    with torch.no_grad():
        torch.testing.assert_close(block(x), y + shortcut)


def test_the_gradient_enters_a_block_where_its_normalised_input_is_within_1() -> None:
    torch.manual_seed(0)
    # With a convolution in its shortcut, so that everything passes through the sign; new running statistics are 0 and
    # 1.
    block = _Bottleneck(64, 64, 1).eval()
    x = torch.randn(2, 64, 4, 4, requires_grad=True)
    block(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, (x.detach() / (1 + 1e-5) ** 0.5).abs() < 1)


def test_the_network_pools_before_the_first_sign_and_ends_in_bn_relu_mean() -> None:
    torch.manual_seed(0)
    network = models.build("resnet50-xnor", 7).eval()
    crops = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        stem = F.relu(network.get_submodule("bn1")(network.get_submodule("conv1")(crops)))
        x = F.max_pool2d(stem, 3, 2, 1)
        for i in range(1, 5):
            x = network.get_submodule(f"layer{i}")(x)
        assert x.min() < 0  # the sums are real, of both signs
        features = F.relu(network.get_submodule("bn2")(x)).mean((2, 3))
        torch.testing.assert_close(network(crops), network.get_submodule("fc")(features))


def test_a_block_compiles_as_one_graph() -> None:
    torch.manual_seed(0)
    block = _Bottleneck(64, 64, 1)
    x = torch.randn(2, 64, 8, 8)
    gradients = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        block.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad for p in block.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])
