"""Problems of whole modules and models: blocks, resamplers, training and decoding steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import reference
from benchmarks.cases import BlockShape, Case, ModelShape, ResamplerShape
from benchmarks.problems import (
    Cost,
    Leaves,
    Problem,
    media_locations,
    media_spans,
    seen_pairs,
)
from flamingo_kernels import FlamingoConfig, FlamingoModel
from flamingo_kernels.nn import GatedCrossAttentionBlock, PerceiverResampler

_BLOCK_DEFAULTS = {
    "ff_mult": 4,
    "activation": "gelu",
    "media_norm": False,
    "gate": "scalar",
    "feed_forward_without_media": True,
}
PARAMETERS = "parameters."  # prefix of parameter names among the leaves


def build(case: Case, device: torch.device) -> Problem:
    """The problem of a module case."""
    builders = {
        "block": _block,
        "resampler": _resampler,
        "model_training": _model_training,
        "model_decode": _model_decode,
    }
    return builders[case.op](case, case.shape, device)


def parameters_of(module: nn.Module) -> Leaves:
    """Trainable parameters under the names they have among the leaves of a problem."""
    return {PARAMETERS + name: p for name, p in module.named_parameters() if p.requires_grad}


def load_parameters(module: nn.Module, problem: Problem) -> nn.Module:
    """``module`` with the problem's weights, dtype and device; only block and resampler."""
    module = module.to(problem.dtype).to(problem.device)
    state = {
        name.removeprefix(PARAMETERS): leaf.detach()
        for name, leaf in problem.leaves.items()
        if name.startswith(PARAMETERS)
    }
    module.load_state_dict(state, strict=True)
    return module.requires_grad_(problem.case.training)


def _random(module: nn.Module) -> nn.Module:
    """Weights of unit gain, open gates."""
    for name, parameter in module.named_parameters():
        if name.endswith("gate"):
            parameter.data.fill_(0.5)
        elif parameter.ndim > 1:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    return module


def _functional(module: nn.Module, call: Callable[..., Tensor]) -> Callable[[Leaves], Tensor]:
    """Leaves -> output of ``call(module, leaves)`` with the leaves' parameters put in."""

    def function(leaves: Leaves) -> Tensor:
        parameters = {
            name.removeprefix(PARAMETERS): leaf
            for name, leaf in leaves.items()
            if name.startswith(PARAMETERS)
        }
        wrapped = _Call(module, call)
        return torch.func.functional_call(
            wrapped, {f"module.{n}": p for n, p in parameters.items()}, (leaves,)
        )

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


def _block(case: Case, shape: BlockShape, device: torch.device) -> Problem:
    media_shape, dtype = shape.media, getattr(torch, case.dtype)
    options = {"dim_head": media_shape.head_dim, "heads": media_shape.heads}
    make = {"dim": shape.dim, "dim_visual": shape.dim_visual, **options}
    ours = _random(GatedCrossAttentionBlock(**make, kernel="torch"))
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
    problem = Problem(
        case,
        device,
        dtype,
        leaves,
        torch.randn(x.shape).to(dtype).to(device),
        _functional(theirs.to(device), lambda m, t: m(t["x"], t["media"], spans.first, spans.last)),
        _functional(ours.to(device), lambda m, t: m(t["x"], t["media"], spans=spans)),
        _block_cost(shape, dtype, seen_pairs(spans, media_shape.images)),
        {"spans": spans, "locations": locations, "options": make},
        strict=False,
        tokens=media_shape.batch * media_shape.tokens,
    )
    return _grad(problem)


def _block_cost(shape: BlockShape, dtype: torch.dtype, pairs: int) -> Cost:
    """Weights and activations once; in decoding keys and values are read, not projected."""
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


def _resampler(case: Case, shape: ResamplerShape, device: torch.device) -> Problem:
    dtype = getattr(torch, case.dtype)
    options = {
        "dim": shape.dim,
        "depth": shape.depth,
        "dim_head": shape.head_dim,
        "heads": shape.heads,
        "max_num_frames": shape.frames if shape.frames > 1 else None,
    }
    ours = _random(PerceiverResampler(**options, kernel="torch"))
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
    problem = Problem(
        case,
        device,
        dtype,
        leaves,
        torch.randn(1, shape.items, 64, shape.dim).to(dtype).to(device),
        _functional(theirs.to(device), lambda m, t: m(t["features"][0])[None]),
        _functional(ours.to(device), lambda m, t: m(t["features"])),
        _resampler_cost(shape, dtype),
        {"options": options},
        strict=False,
    )
    return _grad(problem)


def _resampler_cost(shape: ResamplerShape, dtype: torch.dtype) -> Cost:
    size, inner, latents = dtype.itemsize, shape.heads * shape.head_dim, 64 * shape.items
    features = shape.items * shape.frames * shape.positions
    weights = 4 * shape.dim * inner + 8 * shape.dim**2
    linear = 2.0 * (latents * weights + features * 2 * shape.dim * inner)
    attention = 4.0 * latents * (features // shape.items + 64) * inner
    moved = size * (shape.depth * weights + (features + latents) * shape.dim)
    forward = shape.depth * (linear + attention)
    return Cost(moved, 2 * moved, forward, shape.depth * (2 * linear + 2.5 * attention))


def _grad(problem: Problem) -> Problem:
    if problem.case.training:
        for leaf in problem.leaves.values():
            leaf.requires_grad_()
    return problem


def model_config(name: str) -> FlamingoConfig:
    """``tiny`` of the package, or ``medium``: the same parts, 512 wide and 8 deep."""
    config = FlamingoConfig.from_name("tiny")
    if name == "tiny":
        return config
    replace = dataclasses.replace
    return replace(
        config,
        name=name,
        language=replace(config.language, dim=512, depth=8, heads=8, head_dim=64),
        resampler=replace(config.resampler, dim=512, heads=8, head_dim=64, num_latents=64),
        cross_attention=replace(config.cross_attention, heads=8, head_dim=64),
    )


def make_model(problem: Problem, kernel: str) -> FlamingoModel:
    """A model with the problem's weights."""
    model = FlamingoModel(problem.fixed["config"], kernel)
    model.load_state_dict(problem.fixed["state"])
    return model.to(problem.dtype).to(problem.device)


def _model(case: Case, shape: ModelShape, device: torch.device) -> Problem:
    config = model_config(shape.model)
    model = FlamingoModel(config, "torch")
    _random(model.perceiver)
    _random(model.gated_cross_attn_layers)
    ids = torch.randint(0, 256, (shape.batch, shape.tokens))
    places = torch.arange(shape.images) * (shape.tokens - 1) // shape.images
    ids[:, places] = config.image_token_id
    size = config.vision.image_size
    pixels = torch.randn(shape.batch, shape.images, 1, 3, size, size)
    return Problem(
        case,
        device,
        getattr(torch, case.dtype),
        {},
        None,
        lambda leaves: torch.empty(0),
        lambda leaves: torch.empty(0),
        fixed={
            "config": config,
            "state": model.state_dict(),
            "input_ids": ids.to(device),
            "pixel_values": pixels.to(device),
        },
        strict=False,
    )


def _reference_model(problem: Problem) -> nn.Module:
    model = reference.Flamingo(problem.fixed["config"]).double()
    model.load_state_dict(problem.fixed["state"])
    return model.to(problem.device)


def _model_training(case: Case, shape: ModelShape, device: torch.device) -> Problem:
    """Loss and gradients of the trainable parameters; no optimiser step."""
    problem = _model(case, shape, device)
    problem.leaves = {
        name: leaf.detach().clone().requires_grad_()
        for name, leaf in parameters_of(make_model(problem, "torch")).items()
    }
    problem.seed = torch.ones((), device=device)
    ids, pixels = problem.fixed["input_ids"], problem.fixed["pixel_values"]
    problem.exact = _functional(
        _reference_model(problem), lambda m, t: m(ids, pixels.double(), labels=ids).loss
    )
    problem.plain = _functional(
        make_model(problem, "torch"), lambda m, t: m(ids, pixels, labels=ids).loss
    )
    problem.tokens = shape.batch * shape.tokens
    return problem


def _model_decode(case: Case, shape: ModelShape, device: torch.device) -> Problem:
    """The step that extends the prompt by its last token; exact recomputes the whole prompt."""
    problem = _model(case, shape, device)
    ids, pixels = problem.fixed["input_ids"], problem.fixed["pixel_values"]
    problem.exact = lambda leaves: _reference_model(problem)(ids, pixels.double()).logits[:, -1:]
    problem.plain = lambda leaves: make_model(problem, "torch")(ids, pixels).logits[:, -1:]
    problem.tokens = shape.batch
    return problem
