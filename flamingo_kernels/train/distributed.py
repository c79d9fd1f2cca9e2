"""The group of processes that torchrun starts: ranks, sums, exchange.

Without a process group every function acts as for a group of one process.
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
    """Join the group if torchrun started this process; return the device to train on."""
    if of_torchrun():
        if torch.cuda.is_available():
            own = torch.device("cuda", dist.get_node_local_rank(0))
            torch.cuda.set_device(own)
            dist.init_process_group("nccl", device_id=own)
        else:
            dist.init_process_group("gloo")
    return device()


def of_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def device() -> torch.device:
    """Return the device that this process trains on, and that the group communicates from."""
    if torch.cuda.is_available() and not (active() and dist.get_backend() == "gloo"):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def mesh() -> DeviceMesh:
    """Return a one-dimensional mesh of all processes of the group."""
    from torch.distributed.device_mesh import init_device_mesh

    _meshes.append(init_device_mesh(device().type, (world_size(),)))
    return _meshes[-1]


def stop() -> None:
    """Leave the group, if there is one, and end its threads.

    A gloo thread that releases its last tensor while the interpreter exits aborts the process. The
    threads end with the group, but meshes refer to the group, and caches of DTensor refer to
    meshes. Whatever still refers to a sharded model, such as an error's traceback, keeps the
    threads.
    """
    if active():
        dist.destroy_process_group()
        while _meshes:
            getattr(_meshes.pop(), "_pg_registry", {}).clear()  # private, of torch 2.10 and later
        gc.collect()


def rank() -> int:
    """Return the number of this process in the group."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """Return the number of processes in the group."""
    return dist.get_world_size() if active() else 1


def wrap(model: FlamingoModel) -> nn.Module:
    """Return ``model`` in a module that averages gradients over the processes.

    A single process gets ``model`` itself. The processes must start with equal parameters, and use
    the same ones in every step.
    """
    if not active():
        return model
    return DistributedDataParallel(model, init_sync=False, **{_SYNC_BUFFERS: False})


def broadcast(parameters: Iterable[Tensor]) -> None:
    """Give all processes the values of the first. The parameters may be on the host."""
    if active():
        for parameter in parameters:
            values = parameter.detach().to(device())
            dist.broadcast(values, 0)
            parameter.detach().copy_(values)


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Return the sums over all processes of each of ``values``."""
    if not active():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather(value: T) -> list[T]:
    """Return every process's ``value``, in order of rank."""
    values: list[Any] = [value] * world_size()
    if active():
        dist.all_gather_object(values, value)
    return values


def on_first_rank(run: Callable[[], T]) -> T:
    """Call ``run`` on the first process; return its value, or raise its OSError, on all of them."""
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
    """Return whether this process is in a group."""
    return dist.is_available() and dist.is_initialized()
