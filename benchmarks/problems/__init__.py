"""A case made concrete: tensors, the exact result, what plain PyTorch gives, and the cost.

All random numbers are drawn on the CPU from a seed that depends on the case, so every peer, device
and revision gets the same values, rounded once to the dtype of the case.
"""

from __future__ import annotations

import zlib

import torch

from benchmarks.cases import Case
from benchmarks.problems import models, modules, ops
from benchmarks.problems.base import Cost, Leaves, Problem

__all__ = ["Cost", "Leaves", "Problem", "build"]

_BUILDERS = {**ops.BUILDERS, **modules.BUILDERS, **models.BUILDERS}


def build(case: Case, device: str) -> Problem:
    """Allocate the tensors of a case on ``device``; the same values every time."""
    torch.manual_seed(zlib.crc32(case.key.encode()))
    problem = _BUILDERS[case.op](case, torch.device(device))
    if case.training:
        for leaf in problem.leaves.values():
            leaf.requires_grad_()
    return problem
