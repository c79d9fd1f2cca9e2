"""The model, and the ablations, each of which changes one thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from examples.fast_binding import text, vision
from examples.fast_binding.text import TOKENS
from flamingo_kernels import FlamingoConfig, FlamingoModel
from flamingo_kernels.language.decoder import Decoder
from flamingo_kernels.model.config import CrossAttentionConfig, ResamplerConfig
from flamingo_kernels.train import Trainer
from flamingo_kernels.vision import NFNet

CONFIG = FlamingoConfig(
    name="fast-binding",
    vision=vision.CONFIG,
    language=text.CONFIG,
    resampler=ResamplerConfig(
        dim=vision.CONFIG.output_dim,
        depth=2,
        heads=4,
        head_dim=32,
        num_latents=4,
        max_num_frames=None,
        final_norm=True,
    ),
    cross_attention=CrossAttentionConfig(every=1, heads=4, head_dim=32),
    image_token_id=TOKENS.image_token_id,
    end_of_chunk_token_id=TOKENS.end_of_chunk_token_id,
    bos_token_id=TOKENS.bos_token_id,
    eos_token_id=TOKENS.eos_token_id,
    pad_token_id=TOKENS.pad_token_id,
)
# Small latents: what leaves the resampler is of the picture from the start, not of the latents.
_LATENT_SCALE = 0.05
# tanh(20) is 1 in float32, so a gate that is held there is no gate.
_NO_GATE = 20.0


class FeatureMLP(nn.Module):
    """An MLP on each feature, in place of the resampler; it neither drops nor mixes features."""

    def __init__(self, config: FlamingoConfig, positions: int) -> None:
        super().__init__()
        width, inner = config.vision.output_dim, 4 * config.vision.output_dim
        # FlamingoModel takes the shape of one media item from this parameter.
        self.latents = nn.Parameter(torch.zeros(positions, config.resampler.dim))
        self.layers = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, inner),
            nn.GELU(),
            nn.Linear(inner, config.resampler.dim),
            nn.LayerNorm(config.resampler.dim),
        )

    def forward(self, features: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Map features [B, I, 1, S, D] to [B, I, S, dim]; the latents are position embeddings."""
        return self.layers(features[:, :, 0]) + self.latents


class RoundRobin(Trainer):
    """Each update takes a batch of one dataset alone, in turn."""

    def step(self) -> dict[str, Any]:
        everything = self.config
        section = everything.datasets[self.step_number % len(everything.datasets)]
        self.config = replace(everything, datasets=(section,))
        try:
            return super().step()
        finally:
            self.config = everything


def _without_gates(model: FlamingoModel) -> None:
    for layer in model.gated_cross_attn_layers:
        for gate in (layer.attn_gate, layer.ff_gate):
            gate.data.fill_(_NO_GATE)
            gate.requires_grad_(False)


def _mlp(model: FlamingoModel) -> None:
    positions = model.vision_encoder(torch.zeros(1, 3, vision.SIZE, vision.SIZE)).shape[1]
    model.perceiver = FeatureMLP(model.config, positions)


@dataclass(frozen=True)
class Variant:
    """What an ablation changes; the defaults are the baseline's.

    Attributes
    ----------
    title : str
        As in the report.
    paper : float
        The overall score of the same change in the paper (arXiv 2204.14198v2, tables 3 and 10).
    cross_attention : dict, optional
        Changes to the cross-attention part of the configuration.
    change : callable, optional
        Changes the model in place.
    datasets : tuple of str
        What it is trained on.
    trainer : type
        How it is trained.
    """

    title: str
    paper: float
    cross_attention: dict[str, Any] | None = None
    change: Callable[[FlamingoModel], None] | None = None
    datasets: tuple[str, ...] = ("documents", "pairs")
    trainer: type[Trainer] = Trainer

    def build(self, encoder: NFNet, language_model: Decoder, seed: int) -> FlamingoModel:
        """Build a model around the frozen parts, with newly initialised trainable parts."""
        torch.manual_seed(seed)
        placement = replace(CONFIG.cross_attention, **(self.cross_attention or {}))
        config = replace(CONFIG, cross_attention=placement)
        model = FlamingoModel(config, vision_encoder=encoder, language_model=language_model)
        with torch.no_grad():
            model.perceiver.latents.mul_(_LATENT_SCALE)
        if self.change is not None:
            self.change(model)
        return model


BASELINE = Variant("baseline", 70.7)
ABLATIONS = {
    "no-gate": Variant("no tanh gate", 66.5, change=_without_gates),
    "pairs-only": Variant("pairs only, nothing interleaved", 53.4, datasets=("pairs",)),
    "attend-previous": Variant("attend to all previous images", 63.5, {"attend": "previous"}),
    "mlp": Variant("resampler replaced by an MLP", 66.6, change=_mlp),
    "one-layer": Variant(
        "cross-attention in one layer only",
        59.8,
        {"every": text.CONFIG.depth, "offset": text.CONFIG.depth // 2},
    ),
    "round-robin": Variant("round-robin, gradients not accumulated", 62.9, trainer=RoundRobin),
}
