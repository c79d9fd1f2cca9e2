"""Checks of dataclass fields, and dataclasses from mappings.

Every error names the field, as ``Class.field`` or as the caller's ``section.field``, and the value.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


_LONGEST = 300  # of a value in an error, in characters


class _Short(reprlib.Repr):
    """The usual repr, of the first few items and two levels only: values may be of any size."""

    maxlevel = 2
    maxstring = maxother = maxlong = _LONGEST

    def repr_int(self, x: int, level: int) -> str:
        bits = x.bit_length()  # Python writes out no integer of many thousands
        return repr(x) if bits <= _LONGEST else f"<an integer of {bits} bits>"


def shown(value: object) -> str:
    """Return a repr of bounded length for error messages, whatever the value is."""
    return shortened(_Short().repr(value))


def shortened(text: str) -> str:
    """Return the beginning of a text, marked if that is not all."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def is_integer(value: object) -> bool:
    """Return whether ``value`` is an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether ``value`` is an int or float that is not a bool."""
    return isinstance(value, float) or is_integer(value)


_PREDICATES: dict[object, Callable[[object], bool]] = {
    int: is_integer,
    float: is_number,
    bool: lambda value: isinstance(value, bool),
    str: lambda value: isinstance(value, str),
    NoneType: lambda value: value is None,
    dict[str, Any]: lambda value: isinstance(value, dict),
}


def check_types(config: Any) -> None:
    """Check that the fields of a dataclass hold what they are annotated with.

    Raises
    ------
    TypeError
        A field holds another type, or its annotation is not one that this function can check:
        int, float, bool, str, None, ``dict[str, Any]``, a dataclass, and unions of these and
        ``tuple[..., ...]`` of them.
    """
    predicates = _field_predicates(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not predicates[field.name](value):
            raise TypeError(
                f"{type(config).__name__}.{field.name} must be {field.type}, got {shown(value)}"
            )


@cache
def _field_predicates(config_class: type) -> dict[str, Callable[[object], bool]]:
    hints = get_type_hints(config_class)
    predicates = {}
    for field in dataclasses.fields(config_class):
        try:
            predicates[field.name] = _predicate(hints[field.name])
        except NotImplementedError:
            raise TypeError(
                f"{config_class.__name__}.{field.name} is annotated {field.type}, which "
                "check_types cannot check"
            ) from None
    return predicates


def _predicate(hint: Any) -> Callable[[object], bool]:
    """Return whether a value is of type ``hint``, as a function."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _PREDICATES:
        return _PREDICATES[hint]
    if origin in (Union, UnionType):
        members = [_predicate(argument) for argument in arguments]
        return lambda value: any(holds(value) for holds in members)
    if origin is tuple and arguments[1:] == (...,):
        item = _predicate(arguments[0])
        return lambda value: isinstance(value, tuple) and all(map(item, value))
    if dataclasses.is_dataclass(hint):
        return lambda value: isinstance(value, hint)
    raise NotImplementedError


def check_positive(config: Any, *names: str) -> None:
    """Raise ValueError unless these fields are None, or finite and above 0; so each of a tuple."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, tuple):
            labelled = [(f"{name}[{i}]", part) for i, part in enumerate(value)]
        else:
            labelled = [(name, value)]
        for label, part in labelled:
            if part is not None and not 0 < part < math.inf:
                wanted = "finite" if part == math.inf else "positive"
                raise ValueError(
                    f"{type(config).__name__}.{label} must be {wanted}, got {shown(part)}"
                )


def check_known(config: Any, name: str, known: Collection[str]) -> None:
    """Raise ValueError unless this field is one of the words in ``known``."""
    value = getattr(config, name)
    if value not in known:
        raise ValueError(
            f"{type(config).__name__}.{name}: unknown {shown(value)}; known: {', '.join(known)}"
        )


def unknown_and_missing(
    config_class: type, values: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Compare ``values`` with what the constructor of a dataclass takes.

    Returns
    -------
    tuple
        The keys that are no field, and the required fields that are no key.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    required = [
        name
        for name, field in fields.items()
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    unknown = [key for key in values if key not in fields]
    return unknown, [name for name in required if name not in values]


def build(config_class: type[T], values: Mapping[str, Any], prefix: str) -> T:
    """Return ``config_class(**values)``, with lists as tuples: JSON and YAML have no tuples.

    Raises
    ------
    ValueError
        A field is wrong; the message names it ``<prefix><field>`` in place of ``Class.field``.
    """
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return config_class(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(str(error).replace(f"{config_class.__name__}.", prefix, 1)) from None
