"""Next-token cross-entropy and its labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from flamingo_kernels.precision import accumulator


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of predicting ``labels[:, t + 1]`` from ``logits[:, t]``.

    Parameters
    ----------
    logits : Tensor
        [B, T, V].
    labels : Tensor
        int64 [B, T]; -100 is ignored.

    Returns
    -------
    Tensor
        fp32 scalar (fp64 for fp64 logits); 0 with zero gradients if every label is ignored.
    """
    precision = accumulator(logits.dtype)
    targets = labels[:, 1:]
    total = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).to(precision), targets.flatten(), reduction="sum"
    )
    return total / (targets != -100).sum().clamp(min=1)


def ignore_text_before_first_image(
    labels: Tensor, input_ids: Tensor, image_token_id: int
) -> Tensor:
    """Labels [B, T] with -100 up to each row's first ``<image>`` token (OpenFlamingo on MMC4).

    A row without an image is ignored as a whole.
    """
    before = (input_ids == image_token_id).cumsum(1) == 0
    return labels.masked_fill(before, -100)
