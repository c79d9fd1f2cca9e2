"""From a padding mask to the number of valid keys of each item."""

from __future__ import annotations

import torch
from torch import Tensor

from flamingo_kernels.ops.checks import describe


def key_lengths(mask: Tensor) -> Tensor:
    """Return the ``lengths`` of ``latent_attention`` for a padding mask, which is read.

    Compute them once per forward and pass them to every layer.

    Parameters
    ----------
    mask : Tensor
        bool [N, M], True where a key is valid. The valid keys of each item come first.

    Returns
    -------
    Tensor
        int64 [N].

    Raises
    ------
    TypeError
        ``mask`` is no bool tensor.
    ValueError
        It is not [N, M], or a valid key comes after padding; the message names the first such item.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor [N, M], got {describe(mask)}")
    if mask.ndim != 2:
        raise ValueError(f"mask must be [N, M], got shape {tuple(mask.shape)}")
    late = mask[:, 1:] & ~mask[:, :-1]  # valid, and the key before it is not
    if bool(late.any()):
        item, key = late.nonzero()[0].tolist()
        raise ValueError(
            f"mask: item {item} has the valid key {key + 1} after padding at {key}. Move the valid "
            "keys of each item to the front: attention does not depend on their order"
        )
    return mask.sum(1)
