"""Names, resolutions and normalisation, of the built-in networks and of timm's."""

import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch

import models
from models import ModelError


def message(error: pytest.ExceptionInfo[ModelError]) -> str:
    """Returns the error's text, which must be one line."""
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("resnet5", "resnet50"),
        ("ALEXNET", "alexnet"),
        ("mobilenet0.8", "mobilenet0.75"),
        ("vgg16_bn", "vgg16"),
        ("timm:vit_tiny_patch16_22", "timm:vit_tiny_patch16_224"),
        ("timm:resnet18.a1_in2k", "timm:resnet18.a1_in1k"),
        ("vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"),
    ],
)
def test_an_unknown_name_lists_the_names_and_suggests_a_near_one(name: str, suggestion: str) -> None:
    for use in (lambda: models.build(name, 10), lambda: models.normalisation(name)):
        with pytest.raises(ModelError) as error:
            use()
        text = message(error)
        assert f"unknown network '{name}'" in text
        assert suggestion in text.partition("did you mean ")[2].partition("?")[0]
        assert ", ".join(models.names()) in text


def test_no_name_is_suggested_if_none_is_similar() -> None:
    with pytest.raises(
        ModelError, match=r"^unknown network 'qqqq': take one of alexnet, .*, timm:<name> or torchvision:<name>$"
    ):
        models.check_resolution("qqqq", 224)


@pytest.mark.parametrize("name", ["timm:hf-hub:timm/resnet18.a1_in1k", "timm:", "timm:/tmp/folder", ""])
def test_only_names_that_timm_lists_are_accepted(name: str) -> None:
    with pytest.raises(ModelError, match="unknown network"):
        models.build(name, 10)


@pytest.mark.parametrize("name", ["resnet18", "timm:resnet18"])
def test_no_classes_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}: num_classes=0"):
        models.build(name, 0)


def test_timm_models_are_built_with_and_without_the_tag_of_their_weights() -> None:
    for name in ("timm:resnet10t", "timm:resnet10t.c3_in1k"):
        with torch.device("meta"):
            assert models.build(name, 7)(torch.empty(2, 3, 64, 64)).shape == (2, 7)


def test_built_in_networks_do_not_import_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it now fails
    models.build("mobilenet0.25", 2)
    models.check_resolution("resnet18", 64)
    models.normalisation("alexnet")
    with pytest.raises(ImportError):
        models.normalisation("timm:resnet18")


def test_weights_that_cannot_be_fetched_end_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as error:
        models.build("timm:resnet10t", 10, pretrained=True)
    text = message(error)
    assert text.startswith("timm:resnet10t: its pretrained weights cannot be fetched (")
    assert text.endswith("pass a file of weights instead")


def test_built_in_networks_have_no_weights_to_fetch() -> None:
    with pytest.raises(
        ModelError,
        match=r"^resnet50: has no weights to fetch; pass a file of weights instead, or take torchvision:NAME",
    ):
        models.build("resnet50", 10, pretrained=True)


@pytest.mark.parametrize(
    ("name", "smallest"),
    [("alexnet", 64), ("mobilenet0.5", 32), ("resnet34", 32), ("resnet50-xnor", 32), ("vgg19", 32)],
)
def test_crops_too_small_are_refused(name: str, smallest: int) -> None:
    models.check_resolution(name, smallest)
    with pytest.raises(ModelError) as error:
        models.check_resolution(name, smallest - 1)
    expected = f"{name}: resolution={smallest - 1} is too small; it takes {smallest} px and up"
    assert message(error) == expected


def test_timm_models_are_run_at_the_resolution() -> None:
    models.check_resolution("timm:vit_tiny_patch16_224", 224)
    models.check_resolution("timm:resnet10t", 96)
    for name, resolution, wants in (
        ("timm:vit_tiny_patch16_224", 192, "it takes 224 px only"),
        ("timm:convnext_atto", 16, "it was made for 224 px"),
    ):
        with pytest.raises(ModelError) as error:
            models.check_resolution(name, resolution)
        text = message(error)
        assert text.startswith(f"{name}: cannot take resolution={resolution} (")
        assert text.endswith(f"; {wants}")


def test_timm_models_without_a_classifier_are_refused() -> None:
    name = "qwen3_vit_88m_enc"
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with pytest.raises(ModelError, match="does not give one logit per class"):
        models.check_resolution(f"timm:{name}", 224)


def test_normalisation_is_that_of_the_network() -> None:
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert models.normalisation("alexnet") == imagenet
    assert models.normalisation("timm:resnet10t") == imagenet
    assert models.normalisation("timm:vit_tiny_patch16_224") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
