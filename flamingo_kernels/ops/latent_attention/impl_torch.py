"""Latent attention in stock PyTorch: attention to concatenated keys, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo_kernels.ops.attention import attend
from flamingo_kernels.ops.latent_attention.arguments import Arguments


def forward(arguments: Arguments) -> Tensor:
    """See ``api.latent_attention``."""
    q, k_media, v_media, k_latents, v_latents, lengths, scale = arguments
    mask = None
    if lengths is not None:
        keys = torch.arange(k_media.shape[1], device=q.device)
        valid = keys < lengths[:, None]  # [N, M]
        k_media, v_media = (x.masked_fill(~valid[:, :, None, None], 0) for x in (k_media, v_media))
        mask = F.pad(valid, (0, k_latents.shape[1]), value=True)[:, None, None]
    return attend(
        q.transpose(1, 2),
        torch.cat((k_media, k_latents), 1).transpose(1, 2),
        torch.cat((v_media, v_latents), 1).transpose(1, 2),
        mask,
        scale=scale,
    ).transpose(1, 2)
