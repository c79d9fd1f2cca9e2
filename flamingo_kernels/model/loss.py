"""Next-token cross-entropy and its labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_kernels.precision import accumulator

# torch 2.13; without options its linear_cross_entropy keeps all logits.
_IN_CHUNKS = hasattr(nn, "LinearCrossEntropyOptions")


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross-entropy of predicting ``labels[:, t + 1]`` from ``logits[:, t]``.

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


def next_token_loss_of_hidden(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> Tensor:
    """Compute :func:`next_token_loss` of ``F.linear(hidden, weight, bias)`` in chunks.

    ``torch.nn.functional.linear_cross_entropy`` computes the logits in chunks, here and again in
    the backward, and never holds all of them. They are computed at once if torch lacks it, or if
    the weight is trained: on a GPU it sums that gradient in no fixed order.

    Parameters
    ----------
    hidden : Tensor
        [B, T, dim].
    weight, bias : Tensor
        [V, dim] and [V] or None.
    labels : Tensor
        int64 [B, T]; positions whose target is -100 are skipped.

    Returns
    -------
    Tensor
        As :func:`next_token_loss`; the losses of single tokens are in the dtype of ``hidden``.
    """
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trained or not _IN_CHUNKS:
        return next_token_loss(F.linear(hidden, weight, bias), labels)
    counted = labels[:, 1:] != -100
    losses = F.linear_cross_entropy(
        hidden[:, :-1][counted],
        weight,
        labels[:, 1:][counted],
        linear_bias=bias,
        reduction="none",  # "sum" adds up bfloat16 losses in bfloat16
        options=nn.LinearCrossEntropyOptions(),
    )
    precision = accumulator(hidden.dtype)
    return losses.to(precision).sum() / max(1, len(losses))


def ignore_text_before_first_image(
    labels: Tensor, input_ids: Tensor, image_token_id: int
) -> Tensor:
    """Return labels [B, T] with -100 before each row's first ``<image>`` token.

    OpenFlamingo trains on MMC4 so. A row without an image is ignored as a whole.
    """
    before = (input_ids == image_token_id).cumsum(1) == 0
    return labels.masked_fill(before, -100)
