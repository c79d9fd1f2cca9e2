"""Blocks and resamplers: ours and those of other packages."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

from benchmarks import gate
from benchmarks.peers import Implementation, UnavailableError, peer, require
from benchmarks.peers.attention import compiled, helpers
from benchmarks.peers.ours import kernels_used, register
from benchmarks.problems import Leaves, Problem
from benchmarks.problems.modules import (
    PARAMETERS,
    load_parameters,
    parameters_in,
    parameters_of,
)
from flamingo_kernels.nn import GatedCrossAttentionBlock, MediaKeyValue, PerceiverResampler

BLOCK, RESAMPLER = "block", "resampler"


def _leaves(problem: Problem, module: nn.Module, *inputs: str) -> Leaves:
    return {name: problem.leaves[name] for name in inputs} | parameters_of(module)


def _ours(kernel: str, problem: Problem) -> Implementation:
    options, leaves = problem.fixed["options"], problem.leaves
    if problem.case.op == RESAMPLER:
        module = load_parameters(PerceiverResampler(**options, kernel=kernel), problem)
        return Implementation(
            lambda: module(leaves["features"]),
            _leaves(problem, module, "features"),
            kernels_used(kernel, problem),
            ours=True,
        )
    module = load_parameters(GatedCrossAttentionBlock(**options, kernel=kernel), problem)
    spans = problem.fixed["spans"]
    cached = None
    if problem.case.shape.media.layout == "decode":
        with torch.no_grad():
            cached = MediaKeyValue(*module.project_media(leaves["media"]))

    def forward() -> Tensor:
        if cached is not None:
            return module(leaves["x"], spans=spans, media_kv=cached)
        # The model masks unseen slots once per forward, so the block does not.
        return module(leaves["x"], spans=spans, media_kv=module.project_media(leaves["media"]))

    return Implementation(
        forward,
        _leaves(problem, module, "x", "media"),
        f"{kernels_used(kernel, problem)}{', cached media' if cached else ''}",
        ours=True,
    )


register(
    "module",
    "This library's `GatedCrossAttentionBlock` or `PerceiverResampler`",
    _ours,
    BLOCK,
    RESAMPLER,
    auto=True,
)


def _open_flamingo(compile: bool, problem: Problem) -> Implementation:
    code, options, leaves = helpers(), problem.fixed["options"], problem.leaves
    name = "inductor" if compile else "eager"
    if problem.case.op == RESAMPLER:
        module = load_parameters(code.PerceiverResampler(**options), problem)
        call = compiled(module) if compile else module
        return Implementation(
            lambda: call(leaves["features"]), _leaves(problem, module, "features"), name
        )
    module = load_parameters(code.GatedCrossAttentionBlock(**options), problem)
    call = compiled(module) if compile else module
    return _their_block(problem, module, call, name)


def _their_block(problem: Problem, module: nn.Module, call, name: str) -> Implementation:
    leaves, locations = problem.leaves, problem.fixed["locations"]
    decode = problem.case.shape.media.layout == "decode"
    cached = {"use_cached_media": True} if decode else {}
    return Implementation(
        lambda: call(leaves["x"], leaves["media"], media_locations=locations, **cached),
        _leaves(problem, module, "x", "media"),
        f"{name}{', projects all media again' if decode else ''}",
    )


peer(
    "openflamingo-module",
    "`GatedCrossAttentionBlock` or `PerceiverResampler` of open-flamingo 2.0.1 with the same "
    "weights; a decoding step projects all media again.",
    BLOCK,
    RESAMPLER,
)(functools.partial(_open_flamingo, False))
peer(
    "openflamingo-module-compile",
    "`openflamingo-module` under `torch.compile`.",
    BLOCK,
    RESAMPLER,
    compiled=True,
    quick=False,
)(functools.partial(_open_flamingo, True))


@peer(
    "flamingo-pytorch-module",
    "`GatedCrossAttentionBlock` of flamingo-pytorch with the same weights.",
    BLOCK,
)
def _flamingo_pytorch(problem: Problem) -> Implementation:
    shape = problem.case.shape
    if shape.media.layout == "decode":
        raise UnavailableError("has no cached decoding")
    if shape.dim != shape.dim_visual:
        raise UnavailableError("needs text and media of one width")
    package = require("flamingo_pytorch", "flamingo-pytorch").flamingo_pytorch
    options = {k: v for k, v in problem.fixed["options"].items() if k != "dim_visual"}
    module = load_parameters(package.GatedCrossAttentionBlock(**options), problem)
    return _their_block(problem, module, module, "eager")


class _StockBlock(nn.Module):
    """The gated block with ``torch.nn.MultiheadAttention`` and a boolean mask of tokens x keys."""

    def __init__(self, state: Leaves, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.ff_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, bias=False, batch_first=True)
        self.expand = nn.Linear(dim, 4 * dim, bias=False)
        self.project = nn.Linear(4 * dim, dim, bias=False)
        self.gates = nn.Parameter(torch.cat((state["attn_gate"], state["ff_gate"])))
        with torch.no_grad():
            q, kv = state["attn.to_q.weight"], state["attn.to_kv.weight"]
            self.attention.in_proj_weight.copy_(torch.cat((q, kv)))
            self.attention.out_proj.weight.copy_(state["attn.to_out.weight"])
            self.expand.weight.copy_(state["ff.1.weight"])
            self.project.weight.copy_(state["ff.3.weight"])

    def forward(self, x: Tensor, media: Tensor, hidden: Tensor) -> Tensor:
        keys = media.flatten(1, 2)
        out, _ = self.attention(self.norm(x), keys, keys, attn_mask=hidden, need_weights=False)
        x = x + out * self.gates[0].tanh()
        update = self.project(nn.functional.gelu(self.expand(self.ff_norm(x))))
        return x + update * self.gates[1].tanh()


@peer(
    "torch-mha",
    "A gated block of stock parts with the same weights: `torch.nn.MultiheadAttention` with a "
    "boolean mask, `LayerNorm`, `Linear` and GELU.",
    BLOCK,
)
def _multihead(problem: Problem) -> Implementation:
    shape, leaves = problem.case.shape, problem.leaves
    media = shape.media
    if not shape.dim == shape.dim_visual == media.heads * media.head_dim:
        raise UnavailableError("needs text, media and heads x head dim of one width")
    state = {name: leaf.detach() for name, leaf in parameters_in(leaves).items()}
    module = _StockBlock(state, shape.dim, media.heads).to(problem.dtype).to(problem.device)

    def mask() -> Tensor:
        visible = problem.fixed["spans"].visible(media.images)
        hidden = ~visible.repeat_interleave(media.latents, -1)
        return hidden.repeat_interleave(media.heads, 0)

    hidden = mask()
    return Implementation(
        lambda: module(leaves["x"], leaves["media"], hidden),
        _leaves(problem, module, "x", "media"),
        "torch.nn.MultiheadAttention",
        prepare=mask,
        rename=lambda gradients: {n: gradients[n] for n in ("x", "media")},
    )


def _idefics() -> tuple:
    modeling = require("transformers.models.idefics.modeling_idefics", "transformers")
    perceiver = require("transformers.models.idefics.perceiver", "transformers")
    configuration = require("transformers.models.idefics.configuration_idefics", "transformers")
    return modeling, perceiver, configuration


def _own_truth(problem: Problem, module: nn.Module, call) -> gate.Truth:
    """Run their own code in fp64, because Idefics computes another function."""
    copies = []
    for dtype in (torch.float64, problem.dtype):
        twin = copy.deepcopy(module).to(dtype)
        inputs = {
            n: t.detach().to(dtype).requires_grad_(problem.case.training)
            for n, t in problem.leaves.items()
            if not n.startswith(PARAMETERS)
        }
        copies.append(
            Implementation(
                functools.partial(call, twin, inputs), inputs | parameters_of(twin)
            ).results(problem)
        )
    return gate.Truth(*copies)


@peer(
    "hf-idefics",
    "`IdeficsGatedCrossAttentionLayer` or `IdeficsPerceiverResampler` of transformers in the same "
    "sizes; they compute another function (RMSNorm and SwiGLU, ReLU) and are checked against "
    "themselves in fp64.",
    BLOCK,
    RESAMPLER,
)
def _hf_idefics(problem: Problem) -> Implementation:
    modeling, perceiver, configuration = _idefics()
    shape = problem.case.shape
    if problem.case.op == RESAMPLER:
        config = configuration.IdeficsConfig(
            vision_config={"embed_dim": shape.dim},
        )
        module = perceiver.IdeficsPerceiverResampler(
            config, shape.dim, shape.depth, shape.heads, shape.head_dim, 64
        )
        inputs = ("features",)

        def call(module: nn.Module, leaves: Leaves) -> Tensor:
            return module(leaves["features"][0].flatten(1, 2))[None]

    else:
        media = shape.media
        if shape.dim != media.heads * media.head_dim:
            raise UnavailableError("needs text as wide as heads x head dim")
        config = configuration.IdeficsConfig(
            hidden_size=shape.dim,
            num_attention_heads=media.heads,
            intermediate_size=max(64, 8 * shape.dim // 3 // 64 * 64),
            vision_config={"embed_dim": shape.dim_visual},
        )
        config._attn_implementation = "sdpa"
        module = modeling.IdeficsGatedCrossAttentionLayer(config, 0)
        for name in ("alpha_cross_attn", "alpha_dense"):
            getattr(module, name).data.fill_(0.5)
        visible = problem.fixed["spans"].visible(media.images)
        seen = visible.any(-1).to(problem.dtype)
        allowed = visible.repeat_interleave(media.latents, -1)[:, None]
        inputs = ("x", "media")

        def call(module: nn.Module, leaves: Leaves) -> Tensor:
            x = leaves["x"]
            bias = torch.zeros_like(allowed, dtype=x.dtype)
            bias = bias.masked_fill(~allowed, torch.finfo(x.dtype).min)
            return module(
                x,
                image_hidden_states=leaves["media"].flatten(1, 2),
                image_attention_mask=bias,
                cross_attention_gate=seen.to(x.dtype),
            )

    module = module.to(problem.dtype).to(problem.device)
    module.eval().requires_grad_(problem.case.training)
    return Implementation(
        lambda: call(module, problem.leaves),
        _leaves(problem, module, *inputs),
        "transformers",
        exact=lambda: _own_truth(problem, module, call),
    )
