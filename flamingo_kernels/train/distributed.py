"""Processes started by torchrun: ranks, sums, and what they share.

Without a process group everything here is the trivial case of one process.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flamingo_kernels.model import FlamingoModel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
# Buffers are constants of the frozen parts. torch 2.13 renamed the option.
_SYNC_BUFFERS = "broadcast_buffers"
if "forward_sync_buffers" in signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "forward_sync_buffers"
_meshes: list[DeviceMesh] = []


def start() -> torch.device:
    """Join the group if torchrun started this process; the device to train on."""
    if dist.is_available() and dist.is_torchelastic_launched():
        if torch.cuda.is_available():
            own = torch.device("cuda", dist.get_node_local_rank(0))
            torch.cuda.set_device(own)
            dist.init_process_group("nccl", device_id=own)
        else:
            dist.init_process_group("gloo")
    return device()


def device() -> torch.device:
    """Where this process trains: on the device that the group communicates from."""
    if torch.cuda.is_available() and not (active() and dist.get_backend() == "gloo"):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def mesh() -> DeviceMesh:
    """All processes of the group in a row."""
    from torch.distributed.device_mesh import init_device_mesh

    _meshes.append(init_device_mesh(device().type, (world_size(),)))
    return _meshes[-1]


def stop() -> None:
    """Leave the group, if there is one, and end its threads.

    A thread of gloo that lets go of its last tensor while the interpreter ends aborts the process.
    The threads end with the group, which lives on in meshes, and those in caches of DTensor's. What
    still refers to a sharded model, as the traceback of an error, keeps them.
    """
    if active():
        dist.destroy_process_group()
        while _meshes:
            getattr(_meshes.pop(), "_pg_registry", {}).clear()  # private, of torch 2.10 and later
        gc.collect()


def rank() -> int:
    """Number of this process, 0 for one alone."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """Processes in the group."""
    return dist.get_world_size() if active() else 1


def wrap(model: FlamingoModel) -> nn.Module:
    """``model`` with gradients averaged over the processes; itself for one process.

    Parameters are taken to be equal already, and all processes to use the same ones.
    """
    if not active():
        return model
    return DistributedDataParallel(model, init_sync=False, **{_SYNC_BUFFERS: False})


def broadcast(parameters: Iterable[Tensor]) -> None:
    """Give all processes the values of the first; the parameters may be on the host."""
    if active():
        for parameter in parameters:
            values = parameter.detach().to(device())
            dist.broadcast(values, 0)
            parameter.detach().copy_(values)


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sums; the values themselves for one process."""
    if not active():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather(value: T) -> list[T]:
    """``value`` of every process, in order of rank."""
    values: list[Any] = [value] * world_size()
    if active():
        dist.all_gather_object(values, value)
    return values


def on_first_rank(run: Callable[[], T]) -> T:
    """What ``run`` returns on rank 0, on all; an OSError that it raises there is raised on all."""
    if not active():
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


def active() -> bool:
    """Whether this process is in a group."""
    return dist.is_available() and dist.is_initialized()
