"""Read tensors from safetensors, and from pickles that hold nothing but tensors."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flamingo_kernels.bounds import read_json

_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
# How torch.load names a function or class that it refuses to call.
_CALLED = re.compile(r"GLOBAL (\S+)")


def read_tensors(source: str | PathLike | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint.

    Parameters
    ----------
    source : str, PathLike or mapping
        One of: a ``.safetensors`` file; a directory with ``model.safetensors``, in one file or in
        shards; a file of ``torch.save``, read with ``weights_only=True``; a mapping, which is
        copied. A training checkpoint may hold them in ``model_state_dict`` or ``state_dict``, and
        the prefix ``module.`` is removed.

    Returns
    -------
    dict of str to Tensor
        Tensors on the CPU, by name.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is truncated, holds code, or holds anything but tensors by name.
    """
    if isinstance(source, Mapping):
        return _state(source, "the mapping")
    path = Path(source)
    if path.is_dir():
        return _read_directory(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with warnings.catch_warnings():  # about odd protocols: the error says enough
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes can raise anything
        called = _CALLED.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if called is None:
            raise ValueError(f"{path} is truncated or not a file of torch.save") from error
        raise ValueError(
            f"{path} holds more than tensors and was not read, as unpickling would run its "
            f"{called[1]} (convert it to safetensors where you trust it)"
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not tensors by name")
    return _state(loaded, str(path))


def _state(loaded: Mapping, what: str) -> dict[str, Tensor]:
    for key in ("model_state_dict", "state_dict"):
        if isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    others = [
        f"{name!r} is a {type(value).__name__}"
        for name, value in loaded.items()
        if not isinstance(value, Tensor)
    ]
    others += [f"{name!r} is not a name" for name in loaded if not isinstance(name, str)]
    if others or not loaded:
        raise ValueError(f"{what} holds no tensors by name" + (f": {others[0]}" if others else ""))
    tensors: dict[str, Tensor] = {}
    for name, tensor in loaded.items():
        short = name.removeprefix("module.")
        if short in tensors:
            raise ValueError(f"{what} holds {short!r} twice, with and without 'module.'")
        tensors[short] = tensor
    return tensors


def _read_directory(path: Path) -> dict[str, Tensor]:
    index = path / _INDEX
    if not index.is_file():
        if not (path / _WEIGHTS).is_file():
            raise FileNotFoundError(f"no {_WEIGHTS} and no {_INDEX} in {path}")
        return _read_safetensors(path / _WEIGHTS)
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
        raise ValueError(f"{index} is not an index of safetensors files: its weight_map is wrong")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index} names {shard!r}, which is not a file of its own directory")
        if not (path / shard).is_file():
            raise FileNotFoundError(f"{index} names {shard}, which is missing")
        tensors |= _read_safetensors(path / shard)
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
