"""Next-token cross-entropy and its labels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_kernels.language import NewTokenRows
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
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    new_tokens: NewTokenRows | None = None,
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
    new_tokens : NewTokenRows, optional
        Rows in place of those of ``weight`` and ``bias``. Their few logits are computed apart.

    Returns
    -------
    Tensor
        As :func:`next_token_loss`; the losses of single tokens are in the dtype of ``hidden``.
    """
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trained or not _IN_CHUNKS:
        logits = F.linear(hidden, weight, bias)
        if new_tokens is not None:
            logits = new_tokens.correct_product(hidden, logits, weight, bias)
        return next_token_loss(logits, labels)
    counted = labels[:, 1:] != -100
    hidden, targets = hidden[:, :-1][counted], labels[:, 1:][counted]
    if new_tokens is None:
        losses = _losses_in_chunks(hidden, weight, bias, targets)
    else:
        losses = _losses_with_new_tokens(hidden, weight, bias, targets, new_tokens)
    return losses.sum() / max(1, len(losses))


def _losses_in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    """Return the cross-entropy [N] of each row of ``hidden`` [N, dim]."""
    losses = F.linear_cross_entropy(
        hidden,
        weight,
        targets,
        linear_bias=bias,
        reduction="none",  # "sum" adds up bfloat16 losses in bfloat16
        options=nn.LinearCrossEntropyOptions(),
    )
    return losses.to(accumulator(hidden.dtype))


def _losses_with_new_tokens(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, new_tokens: NewTokenRows
) -> Tensor:
    """Return the cross-entropy [N] over the frozen rows but those of new tokens, and over theirs.

    A bias of minus infinity takes tokens out of the chunks. The loss of a token that is left, plus
    its logit, is the log of the sum over all that are left.
    """
    precision = accumulator(hidden.dtype)
    ids, _, rows, own_bias = new_tokens()
    left = new_tokens.another_token
    is_new = targets[:, None] == ids
    among_left = targets.masked_fill(is_new.any(1), left)
    without = hidden.new_zeros(len(weight)) if bias is None else bias.to(hidden.dtype)
    without = without.index_fill(0, ids, -math.inf)
    logit = (hidden * weight[among_left]).sum(-1, dtype=precision) + without[among_left]
    rest = _losses_in_chunks(hidden, weight, without, among_left) + logit
    own_bias = None if own_bias is None else own_bias.to(hidden.dtype)
    new = F.linear(hidden, rows.to(hidden.dtype), own_bias).to(precision)
    target = torch.where(is_new.any(1), (new * is_new).sum(-1), logit)
    return torch.logaddexp(rest, new.logsumexp(-1)) - target


def ignore_text_before_first_image(
    labels: Tensor, input_ids: Tensor, image_token_id: int
) -> Tensor:
    """Return labels [B, T] with -100 before each row's first ``<image>`` token.

    OpenFlamingo trains on MMC4 so. A row without an image is ignored as a whole.
    """
    before = (input_ids == image_token_id).cumsum(1) == 0
    return labels.masked_fill(before, -100)
