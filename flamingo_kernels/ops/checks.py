"""Argument checks of the public ops: errors that name the offending values."""

from __future__ import annotations

from torch import Tensor

from flamingo_kernels.ops.spans import MediaSpans


def require_rank(op: str, name: str, tensor: Tensor, layout: str) -> None:
    """``tensor`` is floating point and has the rank of ``layout``, e.g. ``"[B, T, H, D]"``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {layout}, got {type(tensor).__name__}")
    if tensor.ndim != layout.count(",") + 1:
        raise ValueError(f"{op}: {name} must be {layout}, got shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}")


def require_alike(op: str, names: str, *tensors: Tensor) -> None:
    """All tensors share one device and one dtype."""
    if any(t.device != tensors[0].device for t in tensors):
        raise ValueError(
            f"{op}: {names} must be on one device, got {', '.join(str(t.device) for t in tensors)}"
        )
    if any(t.dtype != tensors[0].dtype for t in tensors):
        raise TypeError(
            f"{op}: {names} must have one dtype, got {', '.join(str(t.dtype) for t in tensors)}"
        )


def _require_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, expected {expected} to match {why}"
        )


def _require_positive(op: str, what: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{op}: {what} must be at least 1, got {value}")


def require_gate(op: str, gate: Tensor | None, device_of: Tensor, sizes: tuple[int, ...]) -> None:
    """``gate`` is None or floating point on the same device, with one of the allowed ``sizes``."""
    if gate is None:
        return
    if not gate.is_floating_point():
        raise TypeError(f"{op}: gate must be floating point, got {gate.dtype}")
    if gate.device != device_of.device:
        raise ValueError(f"{op}: gate is on {gate.device}, the input on {device_of.device}")
    if gate.numel() not in sizes:
        raise ValueError(
            f"{op}: gate must have {' or '.join(map(str, sizes))} element(s), got shape "
            f"{tuple(gate.shape)}"
        )


def media_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: MediaSpans, gate: Tensor | None
) -> None:
    """Raise TypeError or ValueError unless the arguments fit together."""
    op = "media_cross_attention"
    require_rank(op, "q", q, "[B, T, H, D]")
    require_rank(op, "k", k, "[B, I, R, Hkv, D]")
    require_rank(op, "v", v, "[B, I, R, Hkv, D]")
    require_alike(op, "q, k, v", q, k, v)
    batch, tokens, heads, head_dim = q.shape
    _, media, latents, kv_heads, _ = k.shape
    _require_positive(op, "head_dim D", head_dim)
    _require_positive(op, "latents R", latents)
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"{op}: query heads must be a multiple of key/value heads, got H={heads}, "
            f"Hkv={kv_heads}"
        )
    _require_shape(op, "k", k, (batch, media, latents, kv_heads, head_dim), "q")
    _require_shape(op, "v", v, tuple(k.shape), "k")
    if not isinstance(spans, MediaSpans):
        raise TypeError(f"{op}: spans must be MediaSpans, got {type(spans).__name__}")
    _require_shape(op, "spans", spans.first, (batch, tokens), "q")
    if spans.first.device != q.device or spans.last.device != q.device:
        raise ValueError(f"{op}: spans are on {spans.first.device}, q on {q.device}")
    require_gate(op, gate, q, (1,))


def latent_attention(
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    lengths: Tensor | None,
) -> None:
    """Raise TypeError or ValueError unless the arguments fit together."""
    op = "latent_attention"
    require_rank(op, "q", q, "[N, L, H, D]")
    require_rank(op, "k_media", k_media, "[N, M, H, D]")
    require_rank(op, "v_media", v_media, "[N, M, H, D]")
    require_rank(op, "k_latents", k_latents, "[N, L, H, D]")
    require_rank(op, "v_latents", v_latents, "[N, L, H, D]")
    require_alike(
        op, "q, k_media, v_media, k_latents, v_latents", q, k_media, v_media, k_latents, v_latents
    )
    items, latents, heads, head_dim = q.shape
    _require_positive(op, "head_dim D", head_dim)
    _require_positive(op, "latents L", latents)
    _require_shape(op, "k_media", k_media, (items, k_media.shape[1], heads, head_dim), "q")
    _require_shape(op, "v_media", v_media, tuple(k_media.shape), "k_media")
    _require_shape(op, "k_latents", k_latents, tuple(q.shape), "q")
    _require_shape(op, "v_latents", v_latents, tuple(q.shape), "q")
    if lengths is not None:
        if lengths.is_floating_point() or lengths.is_complex():
            raise TypeError(f"{op}: lengths must be integers, got {lengths.dtype}")
        _require_shape(op, "lengths", lengths, (items,), "q")
        if lengths.device != q.device:
            raise ValueError(f"{op}: lengths are on {lengths.device}, q on {q.device}")
