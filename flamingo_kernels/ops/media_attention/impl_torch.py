"""Media attention in stock PyTorch: attention with a boolean mask, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo_kernels.ops.attention import attend
from flamingo_kernels.ops.spans import MediaSpans
from flamingo_kernels.precision import accumulated


def forward(
    q: Tensor, k: Tensor, v: Tensor, spans: MediaSpans, gate: Tensor | None, scale: float
) -> Tensor:
    """See ``api.media_cross_attention``."""
    if k.shape[1] == 0:  # one slot that nothing sees keeps q, k and v in the graph
        k, v = (F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1)) for x in (k, v))
    if spans.single_item and q.shape[1] == 1 and k.shape[1] > 1:
        k, v, spans = _only_item(k, v, spans)

    visible = spans.visible(k.shape[1])  # [B, T, I]
    k, v = (_zero_unseen(x, visible) for x in (k, v))
    sees_nothing = ~visible.any(-1)  # [B, T]
    # A fully masked softmax row is NaN: let it see everything, then drop it.
    mask = (visible | sees_nothing[..., None]).repeat_interleave(k.shape[2], dim=-1)
    out = attend(
        q.transpose(1, 2),
        k.flatten(1, 2).transpose(1, 2),
        v.flatten(1, 2).transpose(1, 2),
        mask[:, None],
        scale=scale,
    ).transpose(1, 2)
    out = out.masked_fill(sees_nothing[..., None, None], 0)
    return out if gate is None else out * torch.tanh(accumulated(gate, q)).to(out.dtype)


def _only_item(k: Tensor, v: Tensor, spans: MediaSpans) -> tuple[Tensor, Tensor, MediaSpans]:
    """Keep the one item that the token of a decoding step sees, whatever the number of slots."""
    item = spans.last[:, 0].long()
    item = torch.where(item < k.shape[1], item, -1)
    rows = torch.arange(k.shape[0], device=k.device)
    slot = torch.where(item < 0, -1, 0).to(torch.int32)[:, None]
    item = item.clamp(min=0)
    only = MediaSpans(torch.zeros_like(slot), slot, single_item=True)
    return k[rows, item][:, None], v[rows, item][:, None], only


def _zero_unseen(media: Tensor, visible: Tensor) -> Tensor:
    """Zero the slots of media [B, I, ...] that no token of the row sees: 0 * NaN is NaN."""
    seen = visible.any(1)  # [B, I]
    return media.masked_fill(~seen[:, :, None, None, None], 0)
