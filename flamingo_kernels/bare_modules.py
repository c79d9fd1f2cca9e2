"""Whether calling a module runs the code of its class on plain tensors, and nothing else.

Adapters, sharding, offloading and quantisation wrap, replace or hook modules, or put tensors of
their own kinds into them. Such a module must be called; its weight alone says too little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_PLAIN = (Tensor, nn.Parameter, FakeTensor)
_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def is_bare(module: nn.Module, ours: Callable[[Any], bool] = lambda hook: False) -> bool:
    """Whether calling ``module`` runs the ``forward`` of its class and nothing else.

    Hooks for which ``ours`` holds do not count.
    """
    tables = [getattr(module, f"_{name}") for name in _HOOKS]
    tables += [getattr(torch.nn.modules.module, f"_global_{name}") for name in _HOOKS]
    return "forward" not in module.__dict__ and all(
        ours(hook) for table in tables for hook in table.values()
    )


def is_plain_linear(module: nn.Module, ours: Callable[[Any], bool] = lambda hook: False) -> bool:
    """Whether calling ``module`` is the product with its weight (and bias) and nothing else."""
    return (
        type(module) is nn.Linear
        and is_bare(module, ours)
        and all(t is None or is_plain_tensor(t) for t in (module.weight, module.bias))
    )


def is_plain_product(module: nn.Module) -> bool:
    """Whether ``module`` is a plain linear without a bias."""
    return is_plain_linear(module) and module.bias is None


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` holds its numbers in no form of its own (quantised, sharded)."""
    return type(tensor) in _PLAIN
