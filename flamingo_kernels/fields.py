"""Checks of configuration fields; every error names ``Class.field`` and the value."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any


def is_integer(value: object) -> bool:
    """Whether ``value`` is an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether ``value`` is an int or float that is not a bool."""
    return isinstance(value, float) or is_integer(value)


# Annotations that are checked, as they are written.
_HOLDS = {
    "int": is_integer,
    "int | None": lambda value: value is None or is_integer(value),
    "float": is_number,
    "float | None": lambda value: value is None or is_number(value),
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "str | None": lambda value: value is None or isinstance(value, str),
    "dict[str, Any]": lambda value: isinstance(value, dict),
    "tuple[float, ...]": lambda value: isinstance(value, tuple) and all(map(is_number, value)),
    "tuple[str, ...]": lambda value: (
        isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    ),
    "tuple[int, ...]": lambda value: isinstance(value, tuple) and all(map(is_integer, value)),
}


def check_types(config: Any) -> None:
    """Raise TypeError unless the plain fields of a dataclass hold what they are annotated with."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type in _HOLDS and not _HOLDS[field.type](value):
            raise TypeError(
                f"{type(config).__name__}.{field.name} must be {field.type}, got {value!r}"
            )


def check_positive(config: Any, *names: str) -> None:
    """Raise ValueError unless these are None or finite and above 0, all of them in a tuple."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, tuple):
            labelled = [(f"{name}[{i}]", part) for i, part in enumerate(value)]
        else:
            labelled = [(name, value)]
        for label, part in labelled:
            if part is not None and not 0 < part < math.inf:
                wanted = "finite" if part == math.inf else "positive"
                raise ValueError(f"{type(config).__name__}.{label} must be {wanted}, got {part}")


# Of transformers' configurations: what it writes about itself, and labels of classifiers.
_NOT_OPTIONS = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "model_type",
    "torch_dtype",
    "transformers_version",
}


def plain_options(values: dict[str, Any]) -> dict[str, Any]:
    """Options of a transformers configuration as JSON gives them back, without bookkeeping."""

    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: kept(v) for k, v in value.items() if k not in _NOT_OPTIONS}

    return json.loads(json.dumps(kept(values)))
