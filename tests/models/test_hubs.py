"""Published weights of timm and torchvision: their properties, and loading them offline from caches."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
from timm.data import ImageNetInfo
from torchvision.models import ResNet18_Weights, get_model_weights, list_models
from torchvision.models import resnet18 as torchvision_resnet18

import models
from models import ModelError
from models.hubs import HUBS, connection_error
from models.imagenet import class_ids


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Empty caches, and hubs at an address that does not answer. Returns the folder of the caches."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "torch"))
    yield tmp_path
    torch.hub.set_dir(before)


def test_without_a_network_timm_fails_immediately_with_the_reason(no_network: Path) -> None:
    started = time.perf_counter()
    with pytest.raises(ModelError) as error:
        models.build("timm:resnet10t", 10, pretrained=True)
    assert time.perf_counter() - started < 10
    assert str(error.value) == (
        "timm:resnet10t: its pretrained weights cannot be fetched (127.0.0.1: Connection refused); "
        "pass a file of weights instead"
    )
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_timms_weights_are_found_in_its_cache_without_a_network(no_network: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=1000)
    repository = no_network / "hub" / "models--timm--resnet10t.c3_in1k"
    (repository / "snapshots" / "1").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    safetensors.torch.save_file(network.state_dict(), repository / "snapshots" / "1" / "model.safetensors")
    loaded = models.build("timm:resnet10t", 1000, pretrained=True).state_dict()
    for key, value in network.state_dict().items():
        assert torch.equal(loaded[key], value), key


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:resnet18.IMAGENET1K_V1"])
def test_torchvisions_weights_are_found_in_its_cache_without_a_network(name: str, no_network: Path) -> None:
    torch.manual_seed(0)
    network = torchvision_resnet18()
    (no_network / "torch" / "checkpoints").mkdir(parents=True)
    file = Path(ResNet18_Weights.IMAGENET1K_V1.url).name
    torch.save(network.state_dict(), no_network / "torch" / "checkpoints" / file)
    whole = models.build(name, 1000, pretrained=True).state_dict()
    torch.manual_seed(1)
    fewer = models.build(name, 3, pretrained=True).state_dict()
    torch.manual_seed(1)
    new = models.build(name, 3).state_dict()
    for key, value in network.state_dict().items():
        assert torch.equal(whole[key], value), key
        assert torch.equal(fewer[key], new[key] if key.startswith("fc.") else value), key


def test_a_server_is_reached_or_not(no_network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert connection_error(f"http://127.0.0.1:{server.getsockname()[1]}") is None
    nobody = huggingface_hub.constants.ENDPOINT
    assert "127.0.0.1: Connection refused" in str(connection_error(nobody))
    # Whether a proxy can reach a server is not known here.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert connection_error(nobody) is None


def test_properties_of_published_weights() -> None:
    tagged = models.published("timm:resnet50.a1_in1k")
    assert (tagged.num_classes, tagged.resolution, tagged.center_ratio) == (1000, 224, 0.95)
    assert models.published("timm:vit_tiny_patch16_224").takes == "it takes 224 px only"
    assert models.published("timm:volo_d5_512").center_ratio == 1  # it pads
    first, second = (models.published(f"torchvision:resnet50{tag}") for tag in (".IMAGENET1K_V1", ""))
    assert (first.resolution, first.center_ratio, second.center_ratio) == (224, 224 / 256, 224 / 232)
    assert first.normalisation == models.normalisation("resnet50")
    assert models.normalisation("torchvision:efficientnet_v2_l") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_every_name_of_torchvisions_can_be_looked_up() -> None:
    names = HUBS["torchvision"].names()
    assert len(names) > 150
    for name in names:
        assert models.published(f"torchvision:{name}").num_classes == 1000
    # These weights have no classifier.
    with pytest.raises(ModelError, match="unknown network 'torchvision:vgg16.IMAGENET1K_FEATURES'"):
        models.published("torchvision:vgg16.IMAGENET1K_FEATURES")


def test_both_order_the_classes_of_imagenet_by_their_ids() -> None:
    ids = class_ids()
    assert len(ids) == 1000
    assert list(ids) == sorted(set(ids))
    info = ImageNetInfo()
    described = [info.label_name_to_description(name).lower() for name in ids]
    for name in ("resnet50", "vit_b_16", "convnext_tiny"):
        assert name in list_models()
        words = get_model_weights(name).DEFAULT.meta["categories"]
        same = sum(word.lower().split()[-1] in text for word, text in zip(words, described, strict=True))
        assert same >= 999  # timm names "crane bird" just "crane"


def test_editions_of_imagenet_are_identified_by_size() -> None:
    assert [len(class_ids(size)) for size in (11821, 21841, 21843)] == [11821, 21841, 21843]
    assert class_ids(21841) != class_ids(1000)
    assert [class_ids(size) for size in (0, 10, 999, 1001)] == [None] * 4


def test_built_in_networks_have_nothing_published() -> None:
    with pytest.raises(
        ModelError, match=r"^resnet50: has no weights to fetch; .* or take torchvision:NAME or timm:NAME$"
    ):
        models.published("resnet50")


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_torchvisions_networks_are_built_and_run() -> None:
    with torch.device("meta"):
        assert models.build("torchvision:convnext_tiny", 7)(torch.empty(2, 3, 64, 64)).shape == (2, 7)
    models.check_resolution("torchvision:regnet_y_400mf", 64)
    with pytest.raises(ModelError, match=r"cannot take resolution=96 .*; it was made for 224 px$"):
        models.check_resolution("torchvision:vit_b_16", 96)
    with pytest.raises(ModelError, match="does not give one logit per class"):
        models.check_resolution("torchvision:googlenet", 224)
