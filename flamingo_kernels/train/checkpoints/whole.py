"""Checkpoints of processes that hold a whole model each; the first process writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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
            save_file(rest, temporary / OPTIMIZER_FILE)
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
    try:
        stored = load_file(folder / OPTIMIZER_FILE)
        tensors = load_file(folder / weights.WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot read the checkpoint {folder}: {error}") from error
    saved_frozen, masters = trained.model.saved_frozen, trained.masters
    masters.load({name: t for name, t in tensors.items() if name not in saved_frozen})
    moments: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if (owner := contents.owner_of_moment(name, masters)) is not None:
            # AdamW keeps its count of steps on the host.
            where = "cpu" if name.endswith("/step") else masters.parameters[owner].device
            moments[name] = tensor.to(where, copy=True)
    contents.set_moments(trained, moments)
    contents.set_random_states(stored)
