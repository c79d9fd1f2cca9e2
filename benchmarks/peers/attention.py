"""Peers on the keys of all images: OpenFlamingo, flamingo-pytorch, SDPA, FlexAttention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import RANGES
from benchmarks.peers import Implementation, UnavailableError, peer, require
from benchmarks.problems import Leaves, Problem
from benchmarks.problems.base import flat_keys, item_spans, visible_keys
from benchmarks.problems.ops import concatenated, textbook_attention, textbook_pointwise
from testing.peers import open_flamingo_helpers

MEDIA, LATENT = "media_cross_attention", "latent_attention"
_MOST_SCORES = 2**30  # bytes; a training step holds several copies
POINTWISE = ("layer_norm", "gated_residual", "gated_activation")
_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}


def compiled(function: Callable) -> Callable:
    """Compile ``function`` for exactly the shapes that it is called with."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def helpers() -> object:
    """Return the module with OpenFlamingo's blocks."""
    try:
        return open_flamingo_helpers()
    except Exception as error:
        raise UnavailableError(f"open-flamingo's code does not import: {error}") from None


def _bare(module: nn.Module) -> nn.Module:
    """Strip norm and projections, so that the module maps q and [k | v] to the output."""
    module.norm = module.to_q = module.to_kv = module.to_out = nn.Identity()
    return module


def _their_attention(problem: Problem, module_class: type, options: dict, compile: bool):
    shape = problem.case.shape
    if shape.attend == "last_group":
        raise UnavailableError("has no attend mode last_group")
    module = _bare(
        module_class(
            dim=shape.heads * shape.head_dim,
            dim_head=shape.head_dim,
            heads=shape.heads,
            only_attend_immediate_media=shape.attend == "last",
            **options,
        )
    )
    leaves = {"q": problem.leaves["q"].detach(), "kv": problem.fixed["fused"].detach().clone()}
    if problem.case.training:
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    cached = {"use_cached_media": True} if shape.layout == "decode" else {}
    call = compiled(module) if compile else module

    def forward() -> Tensor:
        out = call(
            leaves["q"].flatten(2),
            leaves["kv"].flatten(3),
            media_locations=problem.fixed["locations"],
            **cached,
        )
        return out.unflatten(-1, (shape.heads, shape.head_dim))

    def rename(gradients: Leaves) -> Leaves:
        d_kv = gradients["kv"]
        return {"q": gradients["q"], "k": d_kv[..., 0, :, :], "v": d_kv[..., 1, :, :]}

    return Implementation(
        forward, leaves, backend="inductor" if compile else "eager", rename=rename
    )


def _open_flamingo(compile: bool, problem: Problem) -> Implementation:
    if problem.case.op == LATENT:
        return _open_flamingo_latent(compile, problem)
    module_class = helpers().MaskedCrossAttention
    return _their_attention(problem, module_class, {"dim_visual": 1}, compile)


def _open_flamingo_latent(compile: bool, problem: Problem) -> Implementation:
    """Repeat the formula of OpenFlamingo's PerceiverAttention, whose projections cannot be cut."""
    scale = problem.case.shape.head_dim**-0.5

    def attention(leaves: Leaves) -> Tensor:
        k, v = concatenated(leaves)
        q, k, v = (t.transpose(1, 2) for t in (leaves["q"], k, v))
        similarity = torch.einsum("... i d, ... j d -> ... i j", q * scale, k)
        similarity = similarity - similarity.amax(dim=-1, keepdim=True).detach()
        out = torch.einsum("... i j, ... j d -> ... i d", similarity.softmax(dim=-1), v)
        return out.transpose(1, 2).contiguous()

    call = compiled(attention) if compile else attention
    return Implementation(
        lambda: call(problem.leaves), problem.leaves, "inductor" if compile else "eager"
    )


peer(
    "openflamingo",
    "The attention of open-flamingo 2.0.1 without its norm and projections: it computes the scores "
    "of all images and masks them; for `latent_attention`, the formula of its Perceiver.",
    MEDIA,
    LATENT,
)(functools.partial(_open_flamingo, False))
peer(
    "openflamingo-compile",
    "`openflamingo` under `torch.compile`.",
    MEDIA,
    LATENT,
    compiled=True,
    quick=False,
)(functools.partial(_open_flamingo, True))


@peer(
    "flamingo-pytorch",
    "The attention of flamingo-pytorch without its norm and projections: it computes the scores of "
    "all images and masks them.",
    MEDIA,
)
def _flamingo_pytorch(problem: Problem) -> Implementation:
    if problem.case.shape.layout == "decode":
        raise UnavailableError("has no cached decoding")
    package = require("flamingo_pytorch", "flamingo-pytorch")
    module_class = package.flamingo_pytorch.MaskedCrossAttention
    return _their_attention(problem, module_class, {}, compile=False)


def _sdpa(backend: str, problem: Problem) -> Implementation:
    """Attend over all keys with a boolean mask that is made once per step."""
    leaves = problem.leaves

    def mask() -> tuple[Tensor, Tensor | None]:
        visible = visible_keys(problem)
        nothing = ~visible.any(-1)
        # A fully masked softmax row is NaN, so it sees everything and is dropped afterwards.
        allowed = (visible | nothing[..., None])[:, None]
        return allowed, nothing[..., None, None] if bool(nothing.any()) else None

    allowed, nothing = mask()
    context = functools.partial(sdpa_kernel, _BACKENDS[backend]) if backend else nullcontext

    def transposed() -> list[Tensor]:
        q, k, v = leaves.values()
        return [t.transpose(1, 2) for t in (q, flat_keys(k), flat_keys(v))]

    def forward() -> Tensor:
        q, k, v = transposed()
        with context():
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, **grouped(q, k))
        out = out.transpose(1, 2)
        return out if nothing is None else out.masked_fill(nothing, 0)

    chosen = backend or sdpa_choice(*transposed(), allowed)
    return Implementation(forward, leaves, f"sdpa {chosen}", prepare=mask)


def grouped(q: Tensor, k: Tensor) -> dict[str, bool]:
    """Return the option of SDPA and FlexAttention for [B, H, T, D] and [B, Hkv, S, D]."""
    return {} if q.shape[1] == k.shape[1] else {"enable_gqa": True}


def sdpa_choice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str:
    """Name the backend that SDPA picks for these tensors."""
    try:
        chosen = torch._fused_sdp_choice(q, k, v, mask, **grouped(q, k))
        return SDPBackend(chosen).name.lower()
    except Exception as error:
        return f"unknown ({type(error).__name__})"


peer(
    "sdpa-mask",
    "`scaled_dot_product_attention` on the keys of all images, with a boolean mask that is made "
    "once per step.",
    MEDIA,
    RANGES,
)(functools.partial(_sdpa, ""))
for _name in _BACKENDS:
    peer(
        f"sdpa-mask-{_name}",
        f"`sdpa-mask` with the {_name} backend.",
        MEDIA,
        RANGES,
        devices=("cuda",),
    )(functools.partial(_sdpa, _name))


@peer(
    "sdpa-concat",
    "`scaled_dot_product_attention` on the concatenated keys of features and latents; the "
    "concatenation is part of the call.",
    LATENT,
)
def _sdpa_concat(problem: Problem) -> Implementation:
    leaves = problem.leaves

    def transposed() -> list[Tensor]:
        return [t.transpose(1, 2) for t in (leaves["q"], *concatenated(leaves))]

    return Implementation(
        lambda: F.scaled_dot_product_attention(*transposed()).transpose(1, 2),
        leaves,
        f"sdpa {sdpa_choice(*transposed())}",
    )


def _flex(block_size: tuple[int, int] | None, problem: Problem) -> Implementation:
    """Attend by FlexAttention with a block mask that is made once per step."""
    flex = require("torch.nn.attention.flex_attention")
    leaves, spans = problem.leaves, item_spans(problem)
    first, last = spans.first, spans.last
    keys = flat_keys(leaves["k"]).shape[1]
    latents = keys // max(leaves["k"].shape[1], 1)

    def visible(b, h, token, key):
        item = key // latents
        return (item >= first[b, token]) & (item <= last[b, token])

    def make_mask() -> object:
        sizes = {} if block_size is None else {"BLOCK_SIZE": block_size}
        return flex.create_block_mask(
            visible, first.shape[0], None, first.shape[1], keys, device=problem.device, **sizes
        )

    block_mask = make_mask()
    on_cpu = problem.device.type == "cpu"
    options = {"kernel_options": {"BLOCK_N": 64}} if block_size and not on_cpu else {}
    call = compiled(flex.flex_attention)
    if on_cpu:  # it refuses tensors that require grad, even in no_grad mode
        leaves = {name: leaf.detach() for name, leaf in leaves.items()}

    def forward() -> Tensor:
        q, k, v = leaves.values()
        q, k, v = (t.transpose(1, 2) for t in (q, flat_keys(k), flat_keys(v)))
        return call(q, k, v, block_mask=block_mask, **grouped(q, k), **options).transpose(1, 2)

    no_backward = "FlexAttention has no CPU backward" if on_cpu else ""
    return Implementation(
        forward, leaves, "flex inductor", no_backward=no_backward, prepare=make_mask
    )


peer(
    "flex",
    "Compiled FlexAttention with a block mask that is made once per step; it has no CPU backward.",
    MEDIA,
    RANGES,
    compiled=True,
    quick=False,
)(functools.partial(_flex, None))
peer(
    "flex-64",
    "`flex` with blocks of 128 tokens and 64 keys, so that no block of keys has two images of 64 "
    "latents.",
    MEDIA,
    compiled=True,
    quick=False,
)(functools.partial(_flex, (128, 64)))


@peer(
    "torch-compile",
    "The op's formula in PyTorch under `torch.compile`.",
    *POINTWISE,
    compiled=True,
    quick=False,
)
def _compiled_pointwise(problem: Problem) -> Implementation:
    call = compiled(lambda leaves: textbook_pointwise(problem.case, leaves))
    return Implementation(lambda: call(problem.leaves), problem.leaves, "inductor")


@peer(
    "eager-mask",
    "The op's formula in PyTorch, with the scores of all keys and a boolean mask.",
    RANGES,
    quick=False,
)
def _eager_mask(problem: Problem) -> Implementation:
    leaves, allowed = problem.leaves, visible_keys(problem)
    scores = allowed.numel() * problem.case.shape.heads * problem.dtype.itemsize
    if scores > _MOST_SCORES:
        raise UnavailableError(f"scores of {scores / 2**30:.1f} GiB, and copies of them")
    return Implementation(
        lambda: textbook_attention(*leaves.values(), allowed),
        leaves,
        "eager",
        prepare=lambda: visible_keys(problem),
    )


@peer("eager", "The op's formula in PyTorch, operator by operator.", *POINTWISE)
def _eager_pointwise(problem: Problem) -> Implementation:
    return Implementation(
        lambda: textbook_pointwise(problem.case, problem.leaves), problem.leaves, "eager"
    )
