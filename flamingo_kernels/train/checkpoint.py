"""Checkpoints of a training run: trainable tensors, optimiser, random states, data position.

A checkpoint is a folder that appears in one rename. ``model.safetensors`` is what
``FlamingoModel.from_pretrained`` reads, in float32; ``optimizer.safetensors`` holds the moments and
random states, ``state.json`` the rest. No pickle. Sharded training has its own files in place of
the first two, see ``sharded_checkpoint``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flamingo_kernels.model import FlamingoConfig
from flamingo_kernels.model import checkpoint as weights
from flamingo_kernels.model.flamingo import FROZEN_PARTS, FlamingoModel
from flamingo_kernels.train import distributed
from flamingo_kernels.train.optimizer import MasterWeights

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "state.json"
SHARDS = "shard-*.safetensors"
FORMAT = 1
_RANDOM = "/random/"
_FOLDER = re.compile(r"step_(\d{8,})")
# Values of a frozen tensor that its fingerprint reads; smaller tensors are read whole.
_FINGERPRINT_VALUES = 65_536


def list_checkpoints(output: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    found = [path for path in output.glob("step_*") if _FOLDER.fullmatch(path.name)]
    found = [path for path in found if (path / STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def fingerprints(model: FlamingoModel) -> dict[str, str]:
    """SHA-256 of the configuration, and of each frozen part.

    Of a part: names, shapes, dtypes and evenly spread values of its tensors. Two models of the same
    tensors may still differ, as in their heads.
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


def save(
    output: Path,
    model: FlamingoModel,
    masters: MasterWeights,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Write the checkpoint of ``state["step"]``, then remove all but the newest ``keep``.

    To be called by all processes of a group; the first one writes.

    Raises
    ------
    OSError
        It could not be written, as on a full disk; earlier checkpoints are untouched.
    """
    frozen = model.state_dict() if model.saved_frozen else {}
    tensors = {**{name: frozen[name] for name in sorted(model.saved_frozen)}, **masters.parameters}
    rest = {**moments_by_name(masters, optimizer), **random_states()}

    def write() -> Path:
        temporary = begin(output, state["step"])
        try:
            weights.write(tensors, model.config, temporary)
            save_file(rest, temporary / OPTIMIZER_FILE)
        except (OSError, SafetensorError) as error:
            raise failed(temporary, error) from error
        return finish(temporary, state, keep)

    return distributed.on_first_rank(write)


def begin(output: Path, step: int) -> Path:
    """An empty folder for the files of a checkpoint, which is none before :func:`finish`."""
    temporary = output / f".step_{step:08}.incomplete"
    try:
        output.mkdir(parents=True, exist_ok=True)
        for leftover in output.glob(".step_*"):  # of a run that was killed in here
            shutil.rmtree(leftover)
        temporary.mkdir()
    except OSError as error:
        raise failed(temporary, error) from error
    return temporary


def finish(temporary: Path, state: dict[str, Any], keep: int) -> Path:
    """Make the files in ``temporary`` a checkpoint, and remove all but the newest ``keep``."""
    output, folder = temporary.parent, _folder_of(temporary)
    replaced = output / f".{folder.name}.replaced"
    try:
        (temporary / STATE_FILE).write_text(json.dumps({"format": FORMAT, **state}))
        for path in (*temporary.iterdir(), temporary):
            _synchronise(path)
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(temporary, folder)
        _synchronise(output)
    except OSError as error:
        raise failed(temporary, error) from error
    shutil.rmtree(replaced, ignore_errors=True)
    for old in list_checkpoints(output)[:-keep]:
        removed = output / f".{old.name}.removed"
        os.replace(old, removed)  # a checkpoint disappears at once, as it appeared
        shutil.rmtree(removed)
    return folder


def failed(temporary: Path, why: object) -> OSError:
    """Remove what was begun; the error to raise."""
    shutil.rmtree(temporary, ignore_errors=True)
    earlier = list_checkpoints(temporary.parent)
    last = f"the last good one is {earlier[-1]}" if earlier else "there is no earlier one"
    return OSError(f"cannot write the checkpoint {_folder_of(temporary)}: {why}; {last}")


def load_state(folder: Path, base_model: dict[str, str]) -> dict[str, Any]:
    """The ``state`` of a checkpoint that was trained on the frozen parts of these fingerprints.

    Raises
    ------
    ValueError
        It is damaged or of another version, or the base model is another one.
    """
    state = _read_state(folder)
    trained_on = state["base_model"]
    wrong = [part for part, digest in base_model.items() if trained_on.get(part) != digest]
    if wrong:
        raise ValueError(
            f"{folder} was trained on another {' and another '.join(wrong)}: resume with the base "
            "model it was trained with, or train into another output folder"
        )
    return state


def is_sharded(folder: Path) -> bool:
    """Whether its tensors are in shares of several processes."""
    return any(folder.glob(SHARDS))


def load(
    folder: Path,
    model: FlamingoModel,
    masters: MasterWeights,
    optimizer: torch.optim.Optimizer,
) -> None:
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
    masters.load({n: t for n, t in tensors.items() if n not in model.saved_frozen})
    moments: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        owner, _, key = name.rpartition("/")
        if owner in masters.parameters:
            # AdamW keeps its count of steps on the host.
            where = "cpu" if key == "step" else masters.parameters[owner].device
            moments.setdefault(owner, {})[key] = tensor.to(where, copy=True)
    for owner, kept in moments.items():
        optimizer.state[masters.parameters[owner]] = kept
    set_random_states({n: t for n, t in stored.items() if n.startswith(_RANDOM)})


def export(folder: Path, output: Path) -> Path:
    """Write the trained tensors of a checkpoint as one file, as ``save_pretrained`` does.

    ``folder`` may be the output of a run, whose newest checkpoint is taken. Returns the file.

    Raises
    ------
    FileNotFoundError, ValueError
        There is no checkpoint, or it is damaged.
    OSError
        It could not be written.
    """
    found = [folder] if (folder / STATE_FILE).is_file() else list_checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"no checkpoint of a training run in {folder}")
    if is_sharded(found[-1]):
        from flamingo_kernels.train import sharded_checkpoint

        config = FlamingoConfig.from_dict(_read_state(found[-1], "config")["config"])
        tensors = sharded_checkpoint.whole_tensors(found[-1])
    else:
        config, tensors = weights.read(found[-1] / weights.WEIGHTS_FILE)
    weights.write(tensors, config, output)
    return output / weights.WEIGHTS_FILE


def moments_by_name(masters: MasterWeights, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors, ``<parameter>/<moment>``."""
    names = {id(parameter): name for name, parameter in masters.parameters.items()}
    return {
        f"{names[id(parameter)]}/{key}": value.detach().contiguous()
        for parameter, of_parameter in optimizer.state.items()
        for key, value in of_parameter.items()
    }


def random_states() -> dict[str, Tensor]:
    """States of this process's generators, by the names that a checkpoint has for them."""
    states = {f"{_RANDOM}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{_RANDOM}cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Undo :func:`random_states`; a GPU's are left out where there is none."""
    torch.set_rng_state(states[f"{_RANDOM}cpu"])
    if f"{_RANDOM}cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"{_RANDOM}cuda"])


def _folder_of(temporary: Path) -> Path:
    return temporary.parent / temporary.name.removeprefix(".").removesuffix(".incomplete")


def _read_state(folder: Path, *more: str) -> dict[str, Any]:
    """``state.json``, which has to have ``more`` mappings beside what every checkpoint has."""
    try:
        state = json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the checkpoint {folder}: {error}") from error
    if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
        raise ValueError(f"{folder} was written by another version of flamingo_kernels")
    kinds = {"step": int, "base_model": dict, "data": list, **dict.fromkeys(more, dict)}
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(
                f"cannot read the checkpoint {folder}: {name} in {STATE_FILE} is "
                f"{state.get(name)!r}"
            )
    shards, writers = len(list(folder.glob(SHARDS))), len(state["data"])
    if shards not in (0, writers):
        raise ValueError(f"cannot read the checkpoint {folder}: {shards} of {writers} shards")
    return state


def _synchronise(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
