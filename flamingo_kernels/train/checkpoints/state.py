"""``state.json`` of a checkpoint, and the fingerprints that tie it to its base model."""

from __future__ import annotations

import hashlib
import json
import reprlib
from pathlib import Path
from typing import Any

import torch

from flamingo_kernels.model import FlamingoModel
from flamingo_kernels.model.network import FROZEN_PARTS
from flamingo_kernels.train.checkpoints.folder import FORMAT, SHARDS, STATE_FILE, unreadable

# Values of a frozen tensor that its fingerprint reads; smaller tensors are read whole.
_FINGERPRINT_VALUES = 65_536


def read_state(folder: Path, *more: str) -> dict[str, Any]:
    """Return ``state.json``, with its own fields and the mappings ``more`` checked.

    Raises
    ------
    ValueError
        It is damaged or of another version, or shards are missing.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(folder, f"{STATE_FILE}: {error}") from error
    if not isinstance(state, dict):
        raise unreadable(folder, f"{STATE_FILE} holds a {type(state).__name__}")
    if (found := state.pop("format", None)) != FORMAT:
        raise unreadable(folder, f"its format is {found!r}, this version reads {FORMAT}")
    mappings = ("base_model", "settings", *more)
    kinds = {"step": int, "data": list, **dict.fromkeys(mappings, dict)}
    for name, kind in kinds.items():
        if type(state.get(name)) is not kind:  # True is an int too
            raise unreadable(folder, f"{name} in {STATE_FILE} is {reprlib.repr(state.get(name))}")
    if not all(isinstance(position, dict) for position in state["data"]):
        raise unreadable(folder, f"data in {STATE_FILE} is {reprlib.repr(state['data'])}")
    datasets = state["settings"].get("datasets", [])
    if not isinstance(datasets, list) or not all(
        isinstance(section, dict) and isinstance(section.get("name"), str) for section in datasets
    ):
        what = f"the settings' datasets in {STATE_FILE} are {reprlib.repr(datasets)}"
        raise unreadable(folder, what)
    shards, writers = len(list(folder.glob(SHARDS))), len(state["data"])
    if shards not in (0, writers):
        raise unreadable(folder, f"{shards} of {writers} shards")
    return state


def fingerprints(model: FlamingoModel) -> dict[str, str]:
    """Return the SHA-256 of the configuration and of each frozen part.

    A part's digest is over names, shapes, dtypes and evenly spread values of its frozen tensors.
    The configuration has one of its own: models may differ although their tensors agree, as in
    their numbers of heads.
    """
    trainable = model.trainable_parameters()
    described = {key: value for key, value in model.config.to_dict().items() if key != "name"}
    text = json.dumps(described, sort_keys=True)
    result = {"configuration": hashlib.sha256(text.encode()).hexdigest()}
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


def check_base_model(folder: Path, state: dict[str, Any], base_model: dict[str, str]) -> None:
    """Raise ValueError unless ``state`` of ``folder`` was trained on these fingerprints."""
    trained_on = state["base_model"]
    wrong = [part for part, digest in base_model.items() if trained_on.get(part) != digest]
    if wrong:
        raise ValueError(
            f"{folder} was trained on another {' and another '.join(wrong)}: resume with the base "
            "model it was trained with, or train into another output folder"
        )
