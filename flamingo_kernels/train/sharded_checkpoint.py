"""Checkpoints to which every process writes its shares, by torch.distributed.checkpoint.

One safetensors file per process, the places of its shares in the header. The default format of
torch.distributed.checkpoint is not used: it pickles its metadata.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from flamingo_kernels.model import FlamingoModel
from flamingo_kernels.train import checkpoint, distributed
from flamingo_kernels.train.optimizer import MasterWeights

try:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
except ImportError as error:
    raise ImportError(
        f"sharded checkpoints are safetensors, which torch {torch.__version__} cannot write: "
        "install one that has torch.distributed.checkpoint.HuggingFaceStorageWriter (2.9)"
    ) from error


def save(
    output: Path,
    model: FlamingoModel,
    masters: MasterWeights,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """As :func:`checkpoint.save`, to be called by all processes.

    Raises
    ------
    OSError
        On all processes: one of them could not write. Earlier checkpoints are untouched.
    """
    frozen = model.state_dict() if model.saved_frozen else {}
    tensors = {
        **{name: frozen[name] for name in model.saved_frozen},
        **{name: parameter.detach() for name, parameter in masters.parameters.items()},
        **checkpoint.moments_by_name(masters, optimizer),
        **{_own(name): value for name, value in checkpoint.random_states().items()},
    }
    temporary = distributed.on_first_rank(lambda: checkpoint.begin(output, state["step"]))
    why = None
    try:
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
    except CheckpointException as error:  # raised on all if one fails
        why = _first_failure(error)

    def finish() -> Path:
        if why is not None:
            raise checkpoint.failed(temporary, why)
        return checkpoint.finish(temporary, {**state, "config": model.config.to_dict()}, keep)

    return distributed.on_first_rank(finish)


def load(
    folder: Path,
    model: FlamingoModel,
    masters: MasterWeights,
    optimizer: torch.optim.Optimizer,
) -> None:
    """As :func:`checkpoint.load`, to be called by all processes: each reads its shares."""
    stored = _metadata(folder)
    masters.check(
        {n: m.size for n, m in stored.items() if "/" not in n and n not in model.saved_frozen}
    )
    moments: dict[str, dict[str, Tensor]] = {}
    for name, of_tensor in stored.items():
        owner, _, key = name.rpartition("/")
        if owner in masters.parameters:
            # AdamW keeps its count of steps on the host, and whole.
            moments.setdefault(owner, {})[key] = (
                torch.zeros(of_tensor.size)
                if key == "step"
                else torch.zeros_like(masters.parameters[owner]).detach()
            )
    random_states = checkpoint.random_states()
    _read(
        folder,
        {
            **{name: parameter.detach() for name, parameter in masters.parameters.items()},
            **{f"{owner}/{key}": t for owner, kept in moments.items() for key, t in kept.items()},
            **{_own(name): value for name, value in random_states.items()},
        },
    )
    for owner, kept in moments.items():
        optimizer.state[masters.parameters[owner]] = kept
    checkpoint.set_random_states(random_states)


def whole_tensors(folder: Path) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint put together, by one process alone."""
    tensors = {
        name: torch.empty(of_tensor.size, dtype=of_tensor.properties.dtype)
        for name, of_tensor in _metadata(folder).items()
        if "/" not in name
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        _read(folder, tensors, no_dist=True)
    return tensors


def _own(name: str) -> str:
    """Name of what every process has one of."""
    return f"{name}.{distributed.rank()}"


def _metadata(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Sizes by name, from the headers of all files."""
    try:
        return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"cannot read the checkpoint {folder}: {error}") from error


def _read(folder: Path, tensors: dict[str, Tensor], **options: Any) -> None:
    try:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), **options)
    except CheckpointException as error:
        raise ValueError(f"cannot read the checkpoint {folder}: {_first_failure(error)}") from error


def _first_failure(error: CheckpointException) -> str:
    rank, (reason, _) = min(error.failures.items(), key=lambda failure: failure[0])
    return f"process {rank}: {reason}"
