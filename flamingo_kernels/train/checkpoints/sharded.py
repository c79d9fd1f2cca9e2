"""Checkpoints to which every process writes its shards, by torch.distributed.checkpoint.

Each process writes one safetensors file, whose header says where its shards belong. The default
format of torch.distributed.checkpoint is not used: it pickles its metadata.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from flamingo_kernels.train import distributed
from flamingo_kernels.train.checkpoints import contents
from flamingo_kernels.train.checkpoints.contents import Trained
from flamingo_kernels.train.checkpoints.folder import begin, failed, finish

try:
    from torch.distributed.checkpoint.hf_storage import (
        HuggingFaceStorageReader,
        HuggingFaceStorageWriter,
    )
except ImportError as error:
    raise ImportError(
        f"sharded checkpoints are safetensors, which torch {torch.__version__} cannot write: "
        "install one that has torch.distributed.checkpoint.HuggingFaceStorageWriter (2.9)"
    ) from error


def save(output: Path, trained: Trained, state: dict[str, Any], *, keep: int) -> Path:
    """Write the checkpoint of ``state["step"]``, as ``whole.save`` does; all processes call it.

    Raises
    ------
    OSError
        On all processes: one of them could not write. Earlier checkpoints are untouched.
    """
    tensors = {
        **contents.trained_tensors(trained),
        **contents.moments(trained),
        **_of_this_rank(contents.random_states()),
    }
    temporary = distributed.on_first_rank(lambda: begin(output, state["step"]))
    why = None
    try:
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        state_dict_saver.save(tensors, storage_writer=writer)
    except CheckpointException as error:  # raised on all if one fails
        why = _first_failure(error)

    def complete() -> Path:
        if why is not None:
            raise failed(temporary, why)
        return finish(temporary, {**state, "config": trained.model.config.to_dict()}, keep)

    return distributed.on_first_rank(complete)


def load(folder: Path, trained: Trained) -> None:
    """Set everything to a checkpoint, as ``whole.load`` does; each process reads its shards."""
    stored = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
        for name, tensor in _metadata(folder).items()
    }
    contents.check_headers(stored, trained)
    random_states = contents.random_states()
    _read(folder, {**contents.resumed_tensors(trained), **_of_this_rank(random_states)})
    contents.set_random_states(random_states)


def whole_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the trained tensors of a checkpoint, put together by this process alone.

    Raises
    ------
    ValueError
        The shards are damaged.
    """
    tensors = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in _metadata(folder).items()
        if contents.is_trained_tensor(name)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        _read(folder, tensors, no_dist=True)
    return tensors


def _of_this_rank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``tensors`` with this process's rank appended to each name."""
    return {f"{name}.{distributed.rank()}": tensor for name, tensor in tensors.items()}


def _metadata(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Return the sizes and dtypes of all tensors, from the headers of all files."""
    try:
        stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (AttributeError, KeyError, OSError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"its shards cannot be read: {error!r}") from error
    tensors = {name: t for name, t in stored.items() if isinstance(t, TensorStorageMetadata)}
    for name, tensor in tensors.items():
        if sum(chunk.sizes.numel() for chunk in tensor.chunks) != tensor.size.numel():
            raise ValueError(f"a part of {name} is missing")
    return tensors


def _read(folder: Path, tensors: dict[str, Tensor], **options: Any) -> None:
    """Fill ``tensors`` with the values of their names."""
    try:
        reader = HuggingFaceStorageReader(str(folder))
        state_dict_loader.load(tensors, storage_reader=reader, **options)
    except CheckpointException as error:
        raise ValueError(_first_failure(error)) from error


def _first_failure(error: CheckpointException) -> str:
    rank, (reason, _) = min(error.failures.items(), key=lambda failure: failure[0])
    return f"process {rank}: {reason}"
