from __future__ import annotations

import dataclasses
import json
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from flamingo_kernels.vision import (
    HuggingFaceVisionConfig,
    HuggingFaceVisionEncoder,
    VisionEncoder,
    build_vision_encoder,
    wrap_vision_encoder,
)
from testing.peers import open_clip_tower

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def config(**changes) -> HuggingFaceVisionConfig:
    values = {
        "model_type": "clip_vision_model",
        "options": SIZES,
        "image_size": 32,
        "output_dim": 32,
        "drop_class_token": True,
    }
    return HuggingFaceVisionConfig(**{**values, **changes})


@pytest.mark.parametrize(
    "model_type, drop_class_token, tokens",
    [
        ("clip_vision_model", True, 16),
        ("clip_vision_model", False, 17),
        ("siglip_vision_model", False, 16),
    ],
)
def test_features_of_transformers_models(model_type, drop_class_token, tokens):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    encoder = build_vision_encoder(
        config(model_type=model_type, drop_class_token=drop_class_token)
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    features = encoder(images)
    assert isinstance(encoder, VisionEncoder)
    assert features.shape == (2, tokens, 32)
    everything = encoder.module(images).last_hidden_state
    assert torch.equal(features, everything[:, 1:] if drop_class_token else everything)
    assert len(encoder.image_mean) == len(encoder.image_std) == 3


def test_clip_vit_l_14_on_meta():
    pytest.importorskip("transformers")
    options = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    with torch.device("meta"):
        encoder = build_vision_encoder(config(options=options, image_size=224, output_dim=1024))
        features = encoder(torch.empty(1, 3, 224, 224))
    assert features.shape == (1, 256, 1024)
    assert {p.device.type for p in encoder.parameters()} == {"meta"}


class Patches(nn.Module):
    """A vision model without a config that returns the tensor itself."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, 6, 8, stride=8)

    def forward(self, images):
        return self.project(images).flatten(2).transpose(1, 2)


def test_any_module_with_tokens():
    encoder = HuggingFaceVisionEncoder(
        Patches(), drop_class_token=False, output_dim=6, image_size=32
    )
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 16, 6)
    assert (encoder.output_dim, encoder.image_size, encoder.image_mean) == (6, 32, None)
    assert set(encoder.state_dict()) == {"module.project.weight", "module.project.bias"}


@pytest.mark.parametrize(
    ("model_type", "options", "tokens", "kept"),
    [
        ("clip_vision_model", {}, 17, 16),
        ("siglip_vision_model", {"vision_use_head": False}, 16, 16),
        ("vit", {}, 17, 16),
        ("deit", {}, 18, 17),
        ("dinov2", {"mlp_ratio": 2}, 17, 16),
        ("dinov2_with_registers", {"mlp_ratio": 2, "num_register_tokens": 3}, 20, 19),
        ("aimv2_vision_model", {"use_head": True}, 16, 16),
    ],
)
def test_class_tokens_of_transformers_towers(model_type, options, tokens, kept):
    """Patches, registers and distillation tokens stay; what the output tells is decided by it."""
    transformers = pytest.importorskip("transformers")
    options = transformers.AutoConfig.for_model(model_type, **{**SIZES, **options})
    tower = transformers.AutoModel.from_config(options).eval()
    encoder = wrap_vision_encoder(tower)
    for height, width in ((32, 32), (16, 48)):
        images = torch.randn(2, 3, height, width)
        if (height, width) != (32, 32) and model_type != "dinov2":
            continue  # of other sizes than theirs only some take pictures
        everything = tower(images).last_hidden_state
        assert everything.shape[1] == tokens - 16 + height * width // 64
        features = encoder(images)
        assert torch.equal(features, everything[:, tokens - 16 and 1 :])
        assert features.shape[1] == kept - 16 + height * width // 64
    recorded = encoder.config.drop_class_token
    assert recorded is (False if model_type == "siglip_vision_model" else None)


class Tower(nn.Module):
    """A module that has a class token; its output leaves out or adds what ``kind`` says."""

    def __init__(self, kind: str = "patches", name: str = "class_embedding") -> None:
        super().__init__()
        self.kind = kind
        self.register_parameter(name, nn.Parameter(torch.randn(6)))
        self.project = nn.Conv2d(3, 6, 8, stride=8)

    def forward(self, images):
        patches = self.project(images).flatten(2).transpose(1, 2)
        first = patches.mean(1, keepdim=True)
        return {
            "patches": patches,
            "class token": torch.cat((first, patches), 1),
            "pooled and tokens": (first[:, 0], patches),
            "two more": torch.cat((first, first, patches), 1),
            "fewer": patches[:, :5],
            "pooled": first[:, 0],
        }[self.kind]


@pytest.mark.parametrize("name", ["class_embedding", "cls_token", "class_token"])
@pytest.mark.parametrize("kind", ["patches", "class token", "pooled and tokens"])
def test_the_output_tells_whether_a_class_token_is_in_it(kind, name):
    tower, images = Tower(kind, name), torch.randn(2, 3, 32, 24)
    patches = tower.project(images).flatten(2).transpose(1, 2)
    assert torch.equal(wrap_vision_encoder(tower, image_size=32)(images), patches)
    whole = tower(images)[1] if kind == "pooled and tokens" else tower(images)
    for drop in (True, False):
        encoder = wrap_vision_encoder(tower, image_size=32, drop_class_token=drop)
        assert torch.equal(encoder(images), whole[:, 1:] if drop else whole)
        assert encoder.config.drop_class_token is drop


@pytest.mark.parametrize(("kind", "tokens"), [("two more", 18), ("fewer", 5)])
def test_an_unclear_number_of_tokens_is_asked_about(kind, tokens):
    images = torch.randn(1, 3, 32, 32)
    message = rf"gives {tokens} tokens for pictures of 16 patches.*drop_class_token=True or False"
    with pytest.raises(ValueError, match=message):
        wrap_vision_encoder(Tower(kind), image_size=32)(images)
    encoder = wrap_vision_encoder(Tower(kind), image_size=32, drop_class_token=True)
    assert encoder(images).shape == (1, tokens - 1, 6)
    with pytest.raises(ValueError, match=r"drop_class_token given, but .* VisionEncoder already"):
        wrap_vision_encoder(encoder, drop_class_token=False)


@pytest.mark.skipif(find_spec("open_clip") is None, reason="needs open-clip-torch")
def test_towers_of_open_clip():
    tower, images = open_clip_tower(), torch.randn(2, 3, 16, 16)
    encoder = wrap_vision_encoder(tower)
    assert (encoder.output_dim, encoder.image_size) == (16, 16)
    assert torch.equal(encoder(images), tower(images)[1]) and encoder(images).shape[1] == 4
    tower.output_tokens = False
    with pytest.raises(ValueError, match=r"got shape \(2, 12\): set its output_tokens to True"):
        encoder(images)


def test_sizes_must_be_known():
    with pytest.raises(ValueError, match=r"output_dim must be given: .* no config.hidden_size"):
        HuggingFaceVisionEncoder(Patches(), drop_class_token=False)
    with pytest.raises(ValueError, match=r"image_size must be given: .* no config.image_size"):
        HuggingFaceVisionEncoder(Patches(), drop_class_token=False, output_dim=6)


def test_output_is_checked():
    images = torch.randn(2, 3, 32, 32)
    encoder = HuggingFaceVisionEncoder(Patches(), False, output_dim=7, image_size=32)
    with pytest.raises(
        ValueError, match=r"Patches must return \[N, S, 7\], got shape \(2, 16, 6\)"
    ):
        encoder(images)

    class Pair(Patches):
        def forward(self, images):
            return super().forward(images), None

    with pytest.raises(TypeError, match=r"Pair must return a tensor, .*, got tuple"):
        HuggingFaceVisionEncoder(Pair(), False, output_dim=6, image_size=32)(images)


def test_declared_sizes_must_be_the_models():
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"config declares output_dim=64, but .* has 32"):
        build_vision_encoder(config(output_dim=64))
    with pytest.raises(ValueError, match=r"config declares image_size=64, but .* has 32"):
        build_vision_encoder(config(image_size=64))


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "flamingo_kernels\[hf\]"'):
        build_vision_encoder(config())


def test_config_round_trips_through_json():
    values = json.loads(json.dumps(dataclasses.asdict(config())))
    assert values.pop("kind") == "huggingface"
    assert HuggingFaceVisionConfig(**values) == config()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": ""}, "model_type must name an architecture, got ''"),
        ({"image_size": 0}, "image_size must be positive, got 0"),
        ({"output_dim": -1}, "output_dim must be positive, got -1"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
