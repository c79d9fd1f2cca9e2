"""Other projects' code, imported without their factories and optional dependencies."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import files
from types import ModuleType

from torch import Tensor, nn

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
    """Build ``Flamingo`` of open-flamingo as its factory does."""
    source = open_flamingo_source("flamingo")
    lm = open_flamingo_source("flamingo_lm")
    open_flamingo_source("utils").extend_instance(language_model, lm.FlamingoLMMixin)
    blocks = {"mpt": "transformer.blocks", "gpt_neox": "gpt_neox.layers"}
    language_model.set_decoder_layers_attr_name(blocks[language_model.config.model_type])
    return source.Flamingo(
        OpenClipTower(clip),
        language_model,
        end_of_chunk,
        image,
        vis_dim=clip.config.hidden_size,
        cross_attn_every_n_layers=every,
    ).eval()
