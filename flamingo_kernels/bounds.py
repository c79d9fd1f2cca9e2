"""Bounds on what a program reads of a configuration, and builds as it says."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as hooks

from flamingo_kernels.fields import is_integer

# Room for what a file does not store: tied tensors and tables that are computed.
_MORE_TENSORS = 1000
_MORE_VALUES = 2**28
_COUNTS = re.compile("layer|depth|block", re.IGNORECASE)
_MOST_LABELS = 2**20  # transformers names every label


def read_json(path: str | PathLike, largest: int = 2**26) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It holds something else, or has more than ``largest`` bytes; the message names the file.
    """
    with open(path, "rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"{path} has more than {largest} bytes")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


class TooLargeError(ValueError):
    """A configuration describes a model that is far larger than its file."""


def check_counts(options: Mapping[str, Any], tensors: int, of: str) -> None:
    """Raise TooLargeError if nested options ask for far more layers than a file has tensors.

    Configurations of transformers make lists with an entry for every layer, and for every label,
    before any module.

    Parameters
    ----------
    options : mapping
        Nested values of JSON types.
    tensors : int
        Tensors in the file.
    of : str
        The file, for the error.
    """
    for name, value in _numbers(options, ""):
        too_deep = _COUNTS.search(name) and value > _MORE_TENSORS + tensors
        if too_deep or (name.endswith("num_labels") and value > _MOST_LABELS):
            raise TooLargeError(f"{of} holds {tensors} tensors, but its config has {name}={value}")


@contextmanager
def bounded_building(tensors: int, values: int | None, of: str) -> Iterator[None]:
    """Let this thread build no modules that are far larger than what a file holds.

    Parameters
    ----------
    tensors, values : int
        Tensors and values in the file. Without values only the number of tensors is bounded.
    of : str
        The file, for the error.

    Raises
    ------
    TooLargeError
        Inside, as soon as too many or too large parameters, buffers or modules are registered.
    """
    thread, counts = threading.get_ident(), {"tensors": 0, "values": 0, "modules": 0}
    most = {"tensors": _MORE_TENSORS + 10 * tensors, "modules": 10 * _MORE_TENSORS + 20 * tensors}
    if values is not None:
        most["values"] = _MORE_VALUES + 4 * values

    def count(_: nn.Module, name: str, added: object) -> None:
        if threading.get_ident() != thread:
            return
        if isinstance(added, Tensor):
            counts["tensors"] += 1
            counts["values"] += added.numel()
        counts["modules"] += isinstance(added, nn.Module)
        for what, bound in most.items():
            if counts[what] > bound:
                raise TooLargeError(
                    f"{of} holds {tensors} tensors, but its config describes a model of over "
                    f"{bound} {what}"
                )

    with ExitStack() as stack:
        for register in (
            hooks.register_module_parameter_registration_hook,
            hooks.register_module_buffer_registration_hook,
            hooks.register_module_module_registration_hook,
        ):
            stack.callback(register(count).remove)
        yield


def _numbers(values: Any, name: str) -> Iterator[tuple[str, int]]:
    """Return all integers in nested values, with the names of the keys that lead to them."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _numbers(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _numbers(value, name)
    elif is_integer(values):
        yield name, values
