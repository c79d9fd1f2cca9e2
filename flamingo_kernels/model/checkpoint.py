"""Checkpoints: a directory with ``config.json`` and ``model.safetensors``; no pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flamingo_kernels.model.config import FlamingoConfig

if TYPE_CHECKING:
    from flamingo_kernels.model.flamingo import FlamingoModel

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def save(model: FlamingoModel, path: str | PathLike, include_frozen: bool) -> None:
    """Write ``model``; a crash leaves either the old files or the new ones."""
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    if include_frozen:
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    else:
        tensors = {name: p.detach() for name, p in model.trainable_parameters().items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "contents": "all" if include_frozen else "trainable"}
    text = json.dumps(model.config.to_dict(), indent=2) + "\n"
    _replace(directory / CONFIG_FILE, lambda file: file.write_text(text, encoding="utf-8"))
    _replace(directory / WEIGHTS_FILE, lambda file: save_file(tensors, file, metadata))


def load(
    model_class: type[FlamingoModel],
    path: str | PathLike,
    kernel: str,
    *,
    vision_encoder: nn.Module | None,
    language_model: nn.Module | None,
) -> FlamingoModel:
    """Read the checkpoint at ``path``; see ``FlamingoModel.from_pretrained``."""
    directory = Path(path)
    config = _read_config(directory / CONFIG_FILE)
    tensors = _read_tensors(directory / WEIGHTS_FILE)
    given = {"vision_encoder": vision_encoder, "language_model": language_model}
    for part, module in given.items():
        stored = any(name.startswith(f"{part}.") for name in tensors)
        if not stored and module is None:
            raise ValueError(
                f"{directory / WEIGHTS_FILE} holds no {part}; pass {part}=, the one that the "
                "checkpoint was trained with"
            )
    model = model_class(config, kernel, **given)
    expected = model.state_dict()
    supplied = {
        name
        for name in expected
        for part, module in given.items()
        if module is not None and name.startswith(f"{part}.")
    }
    missing = sorted(set(expected) - set(tensors) - supplied)
    foreign = sorted(set(tensors) - set(expected))
    misshapen = sorted(
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in set(tensors) & set(expected)
        if tensors[name].shape != expected[name].shape
    )
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (
            ("missing", missing),
            ("unknown", foreign),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{directory / WEIGHTS_FILE} does not fit config {config.name!r}: tensors "
            + "; ".join(problems)
        )
    model.load_state_dict(tensors, strict=False)
    return model


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    """Write beside ``file``, flush to disk, then rename over it."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _read_config(file: Path) -> FlamingoConfig:
    if not file.is_file():
        raise FileNotFoundError(
            f"no {file.name} in {file.parent}: not a flamingo_kernels checkpoint"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, expected an object")
    try:
        return FlamingoConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a flamingo_kernels config: {error}") from error


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {file.parent}")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt or not a safetensors file: {error}") from error
