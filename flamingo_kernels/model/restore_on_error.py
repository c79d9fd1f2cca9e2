"""Undo changes to the caller's models if a step fails halfway."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def restore_on_error(*parts: object) -> Iterator[None]:
    """Restore the modules among ``parts`` if the block raises.

    Submodules, hooks, modes, sizes, configurations and ``requires_grad`` return to what they were.
    Values that were written into a tensor in place do not, so write those last.
    """
    modules = {m: None for p in parts if isinstance(p, nn.Module) for m in p.modules()}
    parameters = [(p, p.data, p.requires_grad) for m in modules for p in m.parameters(False)]
    states = [_state(module) for module in modules]
    states += [_state(config) for config in _configs(modules)]
    try:
        yield
    except BaseException:
        for attributes, before, tables in states:
            attributes.clear()
            attributes.update(before)
            for table, entries in tables:
                table.clear()
                table.update(entries)
        for parameter, data, requires_grad in parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
        raise


def _state(
    thing: object,
) -> tuple[dict[str, Any], dict[str, Any], list[tuple[dict, dict]]]:
    """Return its attributes, a copy of them, and each dict among them with a copy (hooks)."""
    attributes = vars(thing)
    tables = [(value, dict(value)) for value in attributes.values() if isinstance(value, dict)]
    return attributes, dict(attributes), tables


def _configs(modules: Iterable[nn.Module]) -> list[object]:
    """Return the distinct transformers configurations of modules, nested ones included."""
    found: dict[int, object] = {}
    waiting = [vars(module) for module in modules]
    while waiting:
        for value in waiting.pop().values():
            if hasattr(value, "to_diff_dict") and id(value) not in found:
                found[id(value)] = value
                waiting.append(vars(value))
    return list(found.values())
