"""Checkpoints of processes that hold a whole model each; the first process writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flamingo_kernels.model import saving as weights
from flamingo_kernels.train import distributed
from flamingo_kernels.train.checkpoints import contents
from flamingo_kernels.train.checkpoints.contents import Trained
from flamingo_kernels.train.checkpoints.folder import begin, failed, finish

OPTIMIZER_FILE = "optimizer.safetensors"


def save(output: Path, trained: Trained, state: dict[str, Any], *, keep: int) -> Path:
    """Write the checkpoint of ``state["step"]``, then remove all but the newest ``keep``.

    All processes of a group must call it.

    Returns
    -------
    Path
        The checkpoint's folder.

    Raises
    ------
    OSError
        It could not be written, as on a full disk; earlier checkpoints are untouched.
    """
    tensors = contents.trained_tensors(trained)
    rest = {**contents.moments(trained), **contents.random_states()}

    def write() -> Path:
        temporary = begin(output, state["step"])
        try:
            weights.write(tensors, trained.model.config, temporary)
            weights.write_tensors(rest, temporary / OPTIMIZER_FILE)
        except (OSError, SafetensorError) as error:
            raise failed(temporary, error) from error
        return finish(temporary, state, keep)

    return distributed.on_first_rank(write)


def load(folder: Path, trained: Trained) -> None:
    """Set the trainable tensors, the optimiser and the random states to those of a checkpoint.

    Raises
    ------
    ValueError
        A file is missing or damaged, or the tensors are not those of this model.
    """
    stored: dict[str, Tensor] = {}
    for file in (weights.WEIGHTS_FILE, OPTIMIZER_FILE):
        try:
            stored |= load_file(folder / file)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"{file}: {error}") from error
    contents.check_headers(stored, trained)
    for name, tensor in contents.resumed_tensors(trained).items():
        tensor.copy_(stored[name])
    contents.set_random_states(stored)
