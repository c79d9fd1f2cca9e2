"""Other projects' code, imported without their factories and optional dependencies."""

from __future__ import annotations

import functools
import importlib
import sys
from importlib.metadata import files
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor, nn

_OPEN_CLIP = "open_clip_sources"
_SOURCES = "open_flamingo_sources"


def open_flamingo_source(name: str) -> ModuleType:
    """Import ``open_flamingo.src.<name>`` of open-flamingo 2.0.1, whose package needs open_clip."""
    if _SOURCES not in sys.modules:
        (path,) = (f for f in files("open-flamingo") if f.match("open_flamingo/src/helpers.py"))
        package = ModuleType(_SOURCES)
        package.__path__ = [str(path.locate().parent)]
        sys.modules[_SOURCES] = package
    return importlib.import_module(f"{_SOURCES}.{name}")


def open_flamingo_helpers() -> ModuleType:
    """Return the module with OpenFlamingo's blocks and resampler."""
    return open_flamingo_source("helpers")


@functools.cache
def open_clip_transformer() -> ModuleType:
    """Import ``open_clip.transformer`` of open-clip-torch 2.20.0, whose package needs torchvision.

    Of torchvision its towers use nothing.
    """
    (path,) = (f for f in files("open-clip-torch") if f.match("open_clip/transformer.py"))
    package, misc = ModuleType(_OPEN_CLIP), ModuleType("torchvision.ops.misc")
    package.__path__ = [str(path.locate().parent)]
    misc.FrozenBatchNorm2d = None
    absent = {name: ModuleType(name) for name in ("torchvision", "torchvision.ops")}
    absent["torchvision.ops.misc"] = misc
    with mock.patch.dict(sys.modules, {_OPEN_CLIP: package, **absent}):
        return importlib.import_module(f"{_OPEN_CLIP}.transformer")


def open_clip_tower(image_size: int = 16, width: int = 16) -> nn.Module:
    """Build a tiny ``VisionTransformer`` of open_clip with what its users' factories set."""
    torch.manual_seed(1)
    tower = open_clip_transformer().VisionTransformer(
        image_size, 8, width=width, layers=2, heads=2, mlp_ratio=2.0, output_dim=12
    )
    tower.output_tokens = True
    tower.image_mean, tower.image_std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    return tower.eval()


class OpenClipTower(nn.Module):
    """A transformers CLIP vision model with the output of open_clip's: (pooled, patch tokens)."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    @property
    def visual(self) -> nn.Module:
        return self

    def forward(self, images: Tensor) -> tuple[None, Tensor]:
        return None, self.clip(images).last_hidden_state[:, 1:]


def open_flamingo_model(
    clip: nn.Module, language_model: nn.Module, every: int, image: int, end_of_chunk: int
) -> nn.Module:
    """Build ``Flamingo`` of open-flamingo as its factory does; ``clip`` has one or two towers."""
    two_towers = hasattr(clip, "visual")
    source = open_flamingo_source("flamingo")
    lm = open_flamingo_source("flamingo_lm")
    open_flamingo_source("utils").extend_instance(language_model, lm.FlamingoLMMixin)
    blocks = {"mpt": "transformer.blocks", "gpt_neox": "gpt_neox.layers"}
    language_model.set_decoder_layers_attr_name(blocks[language_model.config.model_type])
    return source.Flamingo(
        clip if two_towers else OpenClipTower(clip),
        language_model,
        end_of_chunk,
        image,
        vis_dim=clip.visual.conv1.out_channels if two_towers else clip.config.hidden_size,
        cross_attn_every_n_layers=every,
    ).eval()
