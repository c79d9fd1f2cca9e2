"""Checkpoints of a training run: trainable tensors, optimiser, random states, data position.

A checkpoint is a folder that appears in one rename. ``model.safetensors`` is what
``FlamingoModel.from_pretrained`` reads, in float32; ``optimizer.safetensors`` holds the moments and
random states, ``state.json`` the rest. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flamingo_kernels.model import checkpoint as weights
from flamingo_kernels.model.flamingo import FROZEN_PARTS, FlamingoModel

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "state.json"
FORMAT = 1
_FOLDER = re.compile(r"step_(\d{8,})")
# Values of a frozen tensor that its fingerprint reads; smaller tensors are read whole.
_FINGERPRINT_VALUES = 65_536


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds; ``moments`` by parameter name, ``state`` of JSON types."""

    step: int
    tensors: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    random_states: dict[str, Tensor]
    state: dict[str, Any]


def list_checkpoints(output: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    found = [path for path in output.glob("step_*") if _FOLDER.fullmatch(path.name)]
    found = [path for path in found if (path / STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def fingerprints(model: FlamingoModel) -> dict[str, str]:
    """SHA-256 of each frozen part: names, shapes, dtypes, evenly spread values of its tensors."""
    trainable = model.trainable_parameters()
    result = {}
    for part in FROZEN_PARTS:
        digest = hashlib.sha256()
        for name, tensor in sorted(getattr(model, part).state_dict().items()):
            if f"{part}.{name}" in trainable:
                continue
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
            flat = tensor.detach().flatten()
            flat = flat[:: max(1, flat.numel() // _FINGERPRINT_VALUES)].cpu().contiguous()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        result[part] = digest.hexdigest()
    return result


def save(
    output: Path,
    model: FlamingoModel,
    masters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Write the checkpoint of ``state["step"]``, then remove all but the newest ``keep``.

    Raises
    ------
    OSError
        It could not be written, as on a full disk; earlier checkpoints are untouched.
    """
    folder = output / f"step_{state['step']:08}"
    temporary = output / f".{folder.name}.incomplete"
    names = {id(parameter): name for name, parameter in masters.items()}
    moments = {
        f"{names[id(parameter)]}/{key}": value.detach().contiguous()
        for parameter, of_parameter in optimizer.state.items()
        for key, value in of_parameter.items()
    }
    random_states = {"/random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_states["/random/cuda"] = torch.cuda.get_rng_state()
    frozen = model.state_dict() if model.saved_frozen else {}
    tensors = {**{name: frozen[name] for name in sorted(model.saved_frozen)}, **masters}
    try:
        output.mkdir(parents=True, exist_ok=True)
        for leftover in output.glob(".step_*"):  # of a run that was killed in here
            shutil.rmtree(leftover)
        weights.write(tensors, model.config, temporary)
        save_file({**moments, **random_states}, temporary / OPTIMIZER_FILE)
        (temporary / STATE_FILE).write_text(json.dumps({"format": FORMAT, **state}))
        for path in (temporary / OPTIMIZER_FILE, temporary / STATE_FILE, temporary):
            _synchronise(path)
        if folder.exists():
            os.replace(folder, output / f".{folder.name}.replaced")
        os.replace(temporary, folder)
        _synchronise(output)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        earlier = list_checkpoints(output)
        last = f"the last good one is {earlier[-1]}" if earlier else "there is no earlier one"
        raise OSError(f"cannot write the checkpoint {folder}: {error}; {last}") from error
    shutil.rmtree(output / f".{folder.name}.replaced", ignore_errors=True)
    for old in list_checkpoints(output)[:-keep]:
        removed = output / f".{old.name}.removed"
        os.replace(old, removed)  # a checkpoint disappears at once, as it appeared
        shutil.rmtree(removed)
    return folder


def load(folder: Path, base_model: dict[str, str]) -> Checkpoint:
    """Read a checkpoint that was trained on the frozen parts of these fingerprints.

    Raises
    ------
    ValueError
        A file is missing, damaged or of another version, or the base model is another one.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        stored = load_file(folder / OPTIMIZER_FILE)
        tensors = load_file(folder / weights.WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot read the checkpoint {folder}: {error}") from error
    if state.pop("format", None) != FORMAT:
        raise ValueError(f"{folder} was written by another version of flamingo_kernels")
    wrong = [part for part, digest in base_model.items() if state["base_model"][part] != digest]
    if wrong:
        raise ValueError(
            f"{folder} was trained on another {' and another '.join(wrong)}: resume with the base "
            "model it was trained with, or train into another output folder"
        )
    moments: dict[str, dict[str, Tensor]] = {}
    random_states = {}
    for name, tensor in stored.items():
        owner, _, key = name.rpartition("/")
        if owner == "/random":
            random_states[key] = tensor
        else:
            moments.setdefault(owner, {})[key] = tensor
    return Checkpoint(state["step"], tensors, moments, random_states, state)


def _synchronise(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
