"""Argument checks of the public ops: errors that name the offending values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flamingo_kernels.ops.spans import MediaSpans
from flamingo_kernels.ops.transforms import is_watched

INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})


def describe(value: object) -> torch.dtype | str:
    """Return what an error message calls a value: the dtype of a tensor, or else the type."""
    return value.dtype if isinstance(value, Tensor) else type(value).__name__


def require_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is a strided floating point tensor."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating point tensor, got {describe(tensor)}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a strided tensor, got layout {tensor.layout}")


def require_rank(op: str, name: str, tensor: Tensor, layout: str) -> None:
    """Raise unless ``tensor`` is floating point of the rank of ``layout``: ``"[B, T, H, D]"``."""
    require_floating(op, name, tensor)
    if tensor.ndim != layout.count(",") + 1:
        raise ValueError(f"{op}: {name} must be {layout}, got shape {tuple(tensor.shape)}")


def require_alike(op: str, names: str, *tensors: Tensor) -> None:
    """Raise unless all tensors share one device and one dtype."""
    device, dtype = tensors[0].device, tensors[0].dtype
    for tensor in tensors[1:]:
        if tensor.device != device:
            found = ", ".join(str(t.device) for t in tensors)
            raise ValueError(f"{op}: {names} must be on one device, got {found}")
        if tensor.dtype != dtype:
            found = ", ".join(str(t.dtype) for t in tensors)
            raise TypeError(f"{op}: {names} must have one dtype, got {found}")


def _require_shape(op: str, name: str, tensor: Tensor, expected: Sequence[int], why: str) -> None:
    if tensor.shape != expected:
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)} to match "
            f"{why}"
        )


def _require_positive(op: str, what: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{op}: {what} must be at least 1, got {value}")


def _require_groups(op: str, heads: int, kv_heads: int) -> None:
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"{op}: query heads must be a multiple of key/value heads, got H={heads}, "
            f"Hkv={kv_heads}"
        )


def require_parameter(op: str, name: str, parameter: Tensor, device_of: Tensor) -> None:
    """Raise unless ``parameter`` is a floating point tensor on the device of the input."""
    require_floating(op, name, parameter)
    if parameter.device != device_of.device:
        raise ValueError(f"{op}: {name} is on {parameter.device}, the input on {device_of.device}")


def require_counts(
    op: str, name: str, counts: Tensor, shape: tuple[int, ...], device_of: Tensor
) -> None:
    """Raise unless ``counts`` is an integer tensor of ``shape`` on the device of the input."""
    if not isinstance(counts, Tensor) or counts.dtype not in INTEGERS:
        raise TypeError(f"{op}: {name} must be an integer tensor, got {describe(counts)}")
    if counts.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(counts.shape)}")
    if counts.device != device_of.device:
        raise ValueError(f"{op}: {name} is on {counts.device}, the input on {device_of.device}")


def may_read(tensor: Tensor) -> bool:
    """Whether reading values waits for nothing: on the CPU, unless torch looks on."""
    return type(tensor) is Tensor and tensor.is_cpu and not is_watched()


def require_within(op: str, name: str, counts: Tensor, low: int, high: int) -> None:
    """Raise unless ``counts`` are ``low..high``.

    They are read where :func:`may_read` allows it.
    """
    if not may_read(counts):
        return
    for count in counts.flatten().tolist():
        if not low <= count <= high:
            raise ValueError(f"{op}: {name} holds {count}, outside {low}..{high}")


def require_gate(op: str, gate: Tensor, device_of: Tensor, sizes: tuple[int, ...]) -> None:
    """Raise unless ``gate`` is floating point, on the device of the input, of an allowed size."""
    require_parameter(op, "gate", gate, device_of)
    if gate.numel() not in sizes:
        raise ValueError(
            f"{op}: gate must have {' or '.join(map(str, sizes))} element(s), got shape "
            f"{tuple(gate.shape)}"
        )


def require_spans(
    op: str, spans: MediaSpans, batch: int, tokens: int | None, name: str, device_of: Tensor
) -> None:
    """Raise unless ``spans`` are [batch, tokens] (None: any) on the device of tensor ``name``."""
    if not isinstance(spans, MediaSpans):
        raise TypeError(f"{op}: spans must be MediaSpans or KeyRanges, got {type(spans).__name__}")
    shape = (batch, spans.shape[1] if tokens is None else tokens)
    _require_shape(op, "spans", spans.first, shape, name)
    if spans.first.device != device_of.device or spans.last.device != device_of.device:
        raise ValueError(f"{op}: spans are on {spans.first.device}, {name} on {device_of.device}")


def media_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: MediaSpans, gate: Tensor | None, flat: bool = False
) -> None:
    """Raise TypeError or ValueError unless the arguments fit together.

    ``flat``: the items are single keys, which the caller gave as [B, S, Hkv, D].
    """
    op = "media_cross_attention"
    require_rank(op, "q", q, "[B, T, H, D]")
    require_rank(op, "k", k, "[B, I, R, Hkv, D]")
    require_rank(op, "v", v, "[B, I, R, Hkv, D]")
    require_alike(op, "q, k, v", q, k, v)
    batch, tokens, heads, head_dim = q.shape
    _, media, latents, kv_heads, _ = k.shape
    _require_positive(op, "head_dim D", head_dim)
    _require_positive(op, "latents R", latents)
    _require_groups(op, heads, kv_heads)
    if flat:
        k, v = k.squeeze(2), v.squeeze(2)
    _require_shape(op, "k", k, (batch, *k.shape[1:-1], head_dim), "q")
    _require_shape(op, "v", v, k.shape, "k")
    require_spans(op, spans, batch, tokens, "q", q)
    segments, slots = spans.segments, "S" if flat else "I"
    if segments is not None and (segments.media, segments.kv_heads) != (media, kv_heads):
        raise ValueError(
            f"{op}: spans are planned for {slots}={segments.media}, Hkv={segments.kv_heads}; k has "
            f"{slots}={media}, Hkv={kv_heads}"
        )
    if gate is not None:
        require_gate(op, gate, q, (1,))


def latent_attention(tensors: tuple[Tensor, ...], lengths: Tensor | None) -> None:
    """Raise TypeError or ValueError unless queries, keys, values and lengths fit together."""
    q, k_media, v_media, k_latents, v_latents = tensors
    op = "latent_attention"
    require_rank(op, "q", q, "[N, L, H, D]")
    require_rank(op, "k_media", k_media, "[N, M, Hkv, D]")
    require_rank(op, "v_media", v_media, "[N, M, Hkv, D]")
    require_rank(op, "k_latents", k_latents, "[N, L, Hkv, D]")
    require_rank(op, "v_latents", v_latents, "[N, L, Hkv, D]")
    require_alike(op, "q, k_media, v_media, k_latents, v_latents", *tensors)
    items, latents, heads, head_dim = q.shape
    _require_positive(op, "head_dim D", head_dim)
    _require_positive(op, "latents L", latents)
    _, features, kv_heads, _ = k_media.shape
    if kv_heads != heads:
        _require_positive(op, "query heads H", heads)
        _require_groups(op, heads, kv_heads)
    of_latents = (items, latents, kv_heads, head_dim)
    _require_shape(op, "k_media", k_media, (items, features, kv_heads, head_dim), "q")
    _require_shape(op, "v_media", v_media, k_media.shape, "k_media")
    _require_shape(op, "k_latents", k_latents, of_latents, "q and k_media")
    _require_shape(op, "v_latents", v_latents, of_latents, "q and k_media")
    if lengths is not None:
        require_counts(op, "lengths", lengths, (items,), q)


def require_channels(op: str, x: Tensor) -> None:
    """Raise unless ``x`` is floating point with at least one dimension."""
    require_floating(op, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{op}: x must have at least one dimension")


def require_projection(op: str, projection: Tensor, x: Tensor) -> None:
    """Raise unless ``projection`` is a floating point [C', C] on the device of ``x`` [..., C]."""
    require_parameter(op, "projection", projection, x)
    if projection.ndim != 2 or projection.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: projection has shape {tuple(projection.shape)}, x has {x.shape[-1]} channels"
        )
