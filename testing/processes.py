"""The process group of tests that run several processes on this machine."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist


def join_group(rank: int, folder: str) -> None:
    """Join a group of two gloo processes that meet in ``folder``, with one thread each."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
