"""A checkpoint of either kind as a model that ``from_pretrained`` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flamingo_kernels.model import FlamingoConfig, FlamingoModel
from flamingo_kernels.model import saving as weights
from flamingo_kernels.train.building import build
from flamingo_kernels.train.checkpoints.folder import (
    STATE_FILE,
    is_sharded,
    newest_checkpoint,
    unreadable,
)
from flamingo_kernels.train.checkpoints.state import check_base_model, fingerprints, read_state
from flamingo_kernels.train.config import TrainConfig


def export(folder: Path, output: Path, *, trained_only: bool = False) -> Path:
    """Write the model of a checkpoint as ``save_pretrained`` does, and its tokenizer beside it.

    The frozen parts are built again from the settings of the run, and compared with those that it
    was trained with.

    Parameters
    ----------
    folder : Path
        A checkpoint, or the output of a run, whose newest checkpoint is taken.
    output : Path
        Folder to write into.
    trained_only : bool
        Leave out the frozen parts and the tokenizer.

    Returns
    -------
    Path
        The file of weights that was written.

    Raises
    ------
    FileNotFoundError, ValueError
        There is no checkpoint, it is damaged, or its base model cannot be built again.
    OSError
        A file could not be written.
    """
    checkpoint = folder if (folder / STATE_FILE).is_file() else newest_checkpoint(folder)
    if checkpoint is None:
        raise FileNotFoundError(f"no checkpoint of a training run in {folder}")
    state = read_state(checkpoint)
    config, tensors = _trained(checkpoint)
    if trained_only:
        weights.write(tensors, config, output)
        return output / weights.WEIGHTS_FILE
    model, tokenizer = _base_model(checkpoint, state)
    _put(tensors, model, checkpoint)
    model.save_pretrained(output, include_frozen=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    return output / weights.WEIGHTS_FILE


def _trained(checkpoint: Path) -> tuple[FlamingoConfig, dict[str, Tensor]]:
    """Return the configuration and the trained tensors."""
    if not is_sharded(checkpoint):
        return weights.read(checkpoint / weights.WEIGHTS_FILE)
    from flamingo_kernels.train.checkpoints.sharded import whole_tensors  # needs torch 2.9

    config = FlamingoConfig.from_dict(read_state(checkpoint, "config")["config"])
    try:
        return config, whole_tensors(checkpoint)
    except ValueError as error:
        raise unreadable(checkpoint, error) from error


def _base_model(checkpoint: Path, state: dict[str, Any]) -> tuple[FlamingoModel, Any | None]:
    """Build the model that the run began with, and its tokenizer."""
    settings = TrainConfig.from_dict({**state["settings"], "output": str(checkpoint.parent)})
    try:
        torch.manual_seed(settings.seed)
        model, tokenizer = build(settings.model)
        check_base_model(checkpoint, state, fingerprints(model))
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(
            f"the base model of {checkpoint} cannot be built again: {error}. Export with "
            "--trained-only, and give the frozen parts to generate or from_pretrained"
        ) from error
    return model, tokenizer


def _put(tensors: dict[str, Tensor], model: FlamingoModel, checkpoint: Path) -> None:
    """Set the trained tensors of ``model``, which take the dtype of the checkpoint."""
    needed = set(model.trainable_parameters())
    if faults := weights.described(weights.misfits(tensors, model.state_dict(), needed)):
        raise ValueError(f"{checkpoint} does not fit its base model: tensors {faults}")
    for name, parameter in model.named_parameters():
        if name in needed:
            parameter.data = parameter.data.to(tensors[name].dtype)
    model.load_state_dict(tensors, strict=False)
