"""Processes started by torchrun, each with a model of its own: ranks, sums, and what they share.

Without a process group everything here is the trivial case of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flamingo_kernels.model import FlamingoModel

T = TypeVar("T")
# Buffers are constants of the frozen parts. torch 2.13 renamed the option.
_SYNC_BUFFERS = "broadcast_buffers"
if "forward_sync_buffers" in signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "forward_sync_buffers"


def start() -> torch.device:
    """Join the group if torchrun started this process; the device to train on."""
    cuda = torch.cuda.is_available()
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return torch.device("cuda" if cuda else "cpu")
    if not cuda:
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", dist.get_node_local_rank(0))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def stop() -> None:
    """Leave the group, if there is one."""
    if _active():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, 0 for one alone."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Processes in the group."""
    return dist.get_world_size() if _active() else 1


def wrap(model: FlamingoModel) -> nn.Module:
    """``model`` with gradients averaged over the processes; itself for one process.

    Parameters are taken to be equal already. A process whose batch has no image uses no resampler:
    DDP finds that out at each call, in place of waiting for its gradients for ever.
    """
    if not _active():
        return model
    return DistributedDataParallel(
        model, find_unused_parameters=True, init_sync=False, **{_SYNC_BUFFERS: False}
    )


def broadcast(parameters: Iterable[Tensor]) -> None:
    """Give all processes the values of the first."""
    if _active():
        for parameter in parameters:
            dist.broadcast(parameter.detach(), 0)


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sums; the values themselves for one process."""
    if not _active():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather(value: T) -> list[T]:
    """``value`` of every process, in order of rank."""
    values: list[Any] = [value] * world_size()
    if _active():
        dist.all_gather_object(values, value)
    return values


def on_first_rank(run: Callable[[], T]) -> T:
    """What ``run`` returns on rank 0, on all; an OSError that it raises there is raised on all."""
    if not _active():
        return run()
    outcome: list[Any] = [None]
    if rank() == 0:
        try:
            outcome = [run()]
        except OSError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, 0)
    if isinstance(outcome[0], OSError):
        raise outcome[0]
    return outcome[0]


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()
