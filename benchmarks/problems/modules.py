"""Problems of whole modules: gated blocks and Perceiver Resamplers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import reference
from benchmarks.cases import BlockShape, Case, ResamplerShape
from benchmarks.problems.base import (
    Cost,
    Leaves,
    Problem,
    media_locations,
    media_spans,
    seen_pairs,
)
from flamingo_kernels.nn import GatedCrossAttentionBlock, PerceiverResampler

_BLOCK_DEFAULTS = {
    "kv_heads": None,
    "ff_mult": 4,
    "activation": "gelu",
    "media_norm": False,
    "gate": "scalar",
    "feed_forward_without_media": True,
}
PARAMETERS = "parameters."  # prefix of parameter names among the leaves


def parameters_of(module: nn.Module) -> Leaves:
    """Return the trainable parameters, named as among the leaves of a problem."""
    return {PARAMETERS + name: p for name, p in module.named_parameters() if p.requires_grad}


def parameters_in(leaves: Leaves) -> Leaves:
    """Return the parameters among the leaves of a problem, under their state-dict names."""
    return {n.removeprefix(PARAMETERS): t for n, t in leaves.items() if n.startswith(PARAMETERS)}


def load_parameters(module: nn.Module, problem: Problem) -> nn.Module:
    """Give ``module``, a block or resampler, the problem's weights, dtype and device."""
    module = module.to(problem.dtype).to(problem.device)
    state = {name: leaf.detach() for name, leaf in parameters_in(problem.leaves).items()}
    module.load_state_dict(state, strict=True)
    return module.requires_grad_(problem.case.training)


def randomise(module: nn.Module) -> nn.Module:
    """Draw weights of unit gain, and open the gates."""
    for name, parameter in module.named_parameters():
        if name.endswith("gate"):
            parameter.data.fill_(0.5)
        elif parameter.ndim > 1:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    return module


def functional(module: nn.Module, call: Callable[..., Tensor]) -> Callable[[Leaves], Tensor]:
    """Return leaves -> ``call(module, leaves)``, run with the parameters among the leaves."""

    def function(leaves: Leaves) -> Tensor:
        parameters = {f"module.{n}": p for n, p in parameters_in(leaves).items()}
        return torch.func.functional_call(_Call(module, call), parameters, (leaves,))

    return function


class _Call(nn.Module):
    def __init__(self, module: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, leaves: Leaves) -> Tensor:
        return self.call(self.module, leaves)


def _inputs(problem_dtype: torch.dtype, device: torch.device, module: nn.Module, **inputs: Tensor):
    leaves = {name: value.to(problem_dtype).to(device) for name, value in inputs.items()}
    for name, parameter in parameters_of(module).items():
        leaves[name] = parameter.detach().to(problem_dtype).to(device)
    return leaves


def _block(case: Case, device: torch.device) -> Problem:
    shape: BlockShape = case.shape
    media_shape, dtype = shape.media, getattr(torch, case.dtype)
    options = {"dim_head": media_shape.head_dim, "heads": media_shape.heads}
    make = {"dim": shape.dim, "dim_visual": shape.dim_visual, **options}
    ours = randomise(GatedCrossAttentionBlock(**make, kernel="torch"))
    config = SimpleNamespace(
        heads=media_shape.heads, head_dim=media_shape.head_dim, **_BLOCK_DEFAULTS
    )
    theirs = reference.GatedCrossAttentionBlock(config, shape.dim, shape.dim_visual)
    x = torch.randn(media_shape.batch, media_shape.tokens, shape.dim)
    media = torch.randn(
        media_shape.batch, media_shape.images, media_shape.latents, shape.dim_visual
    )
    leaves = _inputs(dtype, device, ours, x=x, media=media)
    locations = media_locations(media_shape).to(device)
    spans = media_spans(media_shape, locations)
    return Problem(
        case,
        device,
        dtype,
        leaves,
        torch.randn(x.shape).to(dtype).to(device),
        functional(theirs.to(device), lambda m, t: m(t["x"], t["media"], spans.first, spans.last)),
        functional(ours.to(device), lambda m, t: m(t["x"], t["media"], spans=spans)),
        _block_cost(shape, dtype, seen_pairs(spans, media_shape.images)),
        {"spans": spans, "locations": locations, "options": make},
        strict=False,
        tokens=media_shape.batch * media_shape.tokens,
    )


def _block_cost(shape: BlockShape, dtype: torch.dtype, pairs: int) -> Cost:
    """Count weights and activations once; decoding reads keys and values, and projects none."""
    media, size = shape.media, dtype.itemsize
    inner = media.heads * media.head_dim
    tokens = media.batch * media.tokens
    keys = media.batch * media.images * media.latents
    decode = media.layout == "decode"
    weights = 2 * shape.dim * inner + 8 * shape.dim**2
    project = 0 if decode else shape.dim_visual * 2 * inner
    attention = 4.0 * pairs * media.latents * inner
    linear = 2.0 * (tokens * weights + keys * project)
    source = pairs * media.latents * 2 * inner if decode else keys * shape.dim_visual
    moved = size * (weights + project + 2 * tokens * shape.dim + source)
    return Cost(moved, 2 * moved, linear + attention, 2 * linear + 2.5 * attention)


def _resampler(case: Case, device: torch.device) -> Problem:
    shape: ResamplerShape = case.shape
    dtype = getattr(torch, case.dtype)
    options = {
        "dim": shape.dim,
        "depth": shape.depth,
        "dim_head": shape.head_dim,
        "heads": shape.heads,
        "max_num_frames": shape.frames if shape.frames > 1 else None,
    }
    ours = randomise(PerceiverResampler(**options, kernel="torch"))
    config = SimpleNamespace(
        dim=shape.dim,
        depth=shape.depth,
        heads=shape.heads,
        head_dim=shape.head_dim,
        num_latents=64,
        ff_mult=4,
        activation="gelu",
        max_num_frames=options["max_num_frames"],
        final_norm=True,
        input_dim=None,
    )
    theirs = reference.PerceiverResampler(config)
    features = torch.randn(1, shape.items, shape.frames, shape.positions, shape.dim)
    leaves = _inputs(dtype, device, ours, features=features)
    return Problem(
        case,
        device,
        dtype,
        leaves,
        torch.randn(1, shape.items, 64, shape.dim).to(dtype).to(device),
        functional(theirs.to(device), lambda m, t: m(t["features"][0])[None]),
        functional(ours.to(device), lambda m, t: m(t["features"])),
        _resampler_cost(shape, dtype),
        {"options": options},
        strict=False,
    )


def _resampler_cost(shape: ResamplerShape, dtype: torch.dtype) -> Cost:
    size, inner, latents = dtype.itemsize, shape.heads * shape.head_dim, 64 * shape.items
    features = shape.items * shape.frames * shape.positions
    weights = 4 * shape.dim * inner + 8 * shape.dim**2
    linear = 2.0 * (latents * weights + features * 2 * shape.dim * inner)
    attention = 4.0 * latents * (features // shape.items + 64) * inner
    moved = size * (shape.depth * weights + (features + latents) * shape.dim)
    forward = shape.depth * (linear + attention)
    return Cost(moved, 2 * moved, forward, shape.depth * (2 * linear + 2.5 * attention))


BUILDERS = {"block": _block, "resampler": _resampler}
