"""Memory per GPU of training a configuration, and which strategies fit."""

from __future__ import annotations

import torch

from flamingo_kernels.cli.convert import read_config
from flamingo_kernels.train.memory_estimate import Workload, report


def run(
    config: str,
    gpus: int,
    memory: float,
    *,
    batch_size: int,
    tokens: int,
    images: int,
    compute: str,
    keep_activations: bool,
) -> int:
    """Print the table; 0."""
    work = Workload(
        batch_size=batch_size,
        tokens=tokens,
        images=images,
        dtype=getattr(torch, compute),
        activation_checkpointing=not keep_activations,
    )
    for line in report(read_config(config), gpus, memory, work):
        print(line)
    return 0
