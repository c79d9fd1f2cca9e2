"""Memory that autograd keeps between a forward and its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(run: Callable[[], object], besides: Iterable[Tensor] = ()) -> int:
    """Return the bytes of the distinct storages that autograd saves while ``run`` computes.

    Fake tensors count as real ones would.

    Parameters
    ----------
    run : callable
        A forward. What it returns is kept until the bytes are counted.
    besides : iterable of Tensor
        Tensors whose storages do not count, such as parameters and inputs.

    Returns
    -------
    int
        Whole storages, also of views of them.
    """
    excluded = {tensor.untyped_storage()._cdata for tensor in besides}
    saved: dict[int, Tensor] = {}  # kept, as a freed storage's address may be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in excluded:
            saved[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del output
    return total
