"""Inputs of the op tests: generated shapes, and kernels taken from the capability records."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from flamingo_kernels.ops import KeyRanges, MediaSpans, dispatch
from flamingo_kernels.ops.spans import ATTEND_MODES

IMAGE = 9
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def kernels_for(op: str, needs_grad: bool = False) -> list[tuple[str, torch.dtype]]:
    """Return the (kernel, dtype) pairs that claim to run ``op`` on this CPU, without Triton."""
    return [
        (kernel, dtype)
        for kernel in dispatch.KERNELS[1:]
        for dtype in FLOATS
        if not dispatch.unsupported_reasons(op, kernel, dispatch.Call("cpu", dtype, needs_grad))
    ]


def random_tokens(batch: int, tokens: int, media: int) -> Tensor:
    """Return int64 [B, T] with 0..media ``IMAGE`` tokens at random places of each row."""
    ids = torch.randint(0, IMAGE, (batch, tokens))
    for row in range(batch):
        count = int(torch.randint(0, min(media, tokens) + 1, ()))
        ids[row, torch.randperm(tokens)[:count]] = IMAGE
    return ids


@dataclass
class MediaCase:
    """Arguments of ``media_cross_attention``; slots, or keys, that no token sees hold NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    spans: MediaSpans | KeyRanges
    gate: Tensor | None

    @property
    def visible(self) -> Tensor:
        """Return bool [B, T, slots]; with key ranges, a slot is a key."""
        return self.spans.visible(self.k.shape[1])

    def rows(self, pick: slice) -> MediaCase:
        """Return some rows of the batch."""
        names = ("start", "stop") if isinstance(self.spans, KeyRanges) else ("first", "last")
        spans = type(self.spans)(*(getattr(self.spans, name)[pick] for name in names))
        return MediaCase(self.q[pick], self.k[pick], self.v[pick], spans, self.gate)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that have gradients, in the order of the op's arguments."""
        return [t for t in (self.q, self.k, self.v, self.gate) if t is not None]

    def to(self, dtype: torch.dtype) -> MediaCase:
        """Return the same values in ``dtype``, detached."""
        q, k, v = (t.detach().to(dtype) for t in (self.q, self.k, self.v))
        gate = None if self.gate is None else self.gate.detach().to(dtype)
        return MediaCase(q, k, v, self.spans, gate)

    def require_grad(self) -> MediaCase:
        """Make all tensors require gradients; return the case."""
        for tensor in self.tensors():
            tensor.requires_grad_()
        return self


def media_case(
    dtype: torch.dtype = torch.float64,
    *,
    batch: int = 2,
    tokens: int = 11,
    media: int = 3,
    latents: int = 5,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    attend: str = "last",
    gated: bool = True,
    nan: bool = True,
    seed: int = 0,
) -> MediaCase:
    """Draw a random case. Its values are rounded to ``dtype``, so every precision sees the same."""
    torch.manual_seed(seed)
    spans = MediaSpans.from_tokens(random_tokens(batch, tokens, media), IMAGE, attend)
    q = torch.randn(batch, tokens, heads, head_dim)
    k, v = torch.randn(2, batch, media, latents, kv_heads, head_dim)
    gate = torch.randn(1) if gated else None
    case = MediaCase(q, k, v, spans, gate)
    return (unseen_as_nan(case) if nan else case).to(dtype)


def unseen_as_nan(case: MediaCase) -> MediaCase:
    """Fill with NaN what no token of a row sees; return the case."""
    unseen = ~case.visible.any(1)
    case.k[unseen] = case.v[unseen] = float("nan")
    return case


media_shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "tokens": st.integers(1, 40),
        "media": st.integers(0, 5),
        "latents": st.sampled_from([1, 7, 63, 64, 65, 130]),
        "heads": st.sampled_from([2, 4]),
        "kv_heads": st.sampled_from([1, 2]),
        "head_dim": st.sampled_from([1, 8, 24, 40, 80, 96]),
        "attend": st.sampled_from(ATTEND_MODES),
        "gated": st.booleans(),
        "seed": st.integers(0, 99),
    }
)
