"""Conversion tables: each key of a checkpoint is used, or left out for a stated reason."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flamingo_kernels.model.saving import misfits


@dataclass(frozen=True)
class Rule:
    """One line of a table, for keys that match all of ``pattern``.

    Attributes
    ----------
    pattern : str
        Regular expression.
    target : str or callable
        New name, as a template (``\\1``) or a function of the match. Empty: leave the key out.
    part : int
        Index of this key if several keys make one tensor, concatenated over rows.
    flatten : bool
        Make the tensor a vector.
    reason : str
        Why the key is left out.
    """

    pattern: str
    target: str | Callable[[re.Match], str] = ""
    part: int = 0
    flatten: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Conversion:
    """Converted tensors by name, and how many keys were used and left out."""

    tensors: dict[str, Tensor]
    used: int
    left_out: Counter[str]

    @property
    def report(self) -> str:
        """Counts of used and left-out keys, in one line."""
        reasons = "; ".join(f"{count} left out ({why})" for why, count in self.left_out.items())
        return f"{self.used} tensors used" + (f", {reasons}" if reasons else "")


def convert(tensors: Mapping[str, Tensor], table: Iterable[Rule], what: str) -> Conversion:
    """Rename each key by the first rule that matches it.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        The checkpoint.
    table : iterable of Rule
        The rules, in order.
    what : str
        Name of the checkpoint's kind, for errors.

    Raises
    ------
    ValueError
        A key that no rule matches, two keys for one tensor, a missing part of a tensor, or a value
        that is not a dense floating-point tensor.
    """
    rules = [(re.compile(rule.pattern), rule) for rule in table]
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    left_out: Counter[str] = Counter()
    unknown, twice, wrong = [], [], []
    for key, tensor in tensors.items():
        hits = ((m, rule) for pattern, rule in rules if (m := pattern.fullmatch(key)))
        match, rule = next(hits, (None, None))
        if rule is None:
            unknown.append(key)
            continue
        if rule.reason:
            left_out[rule.reason] += 1
            continue
        target = match.expand(rule.target) if isinstance(rule.target, str) else rule.target(match)
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            wrong.append(f"{key} ({tensor.dtype}, {tensor.layout})")
        if rule.part in parts[target]:
            twice.append(f"{key} for {target}")
        parts[target][rule.part] = tensor.flatten() if rule.flatten else tensor
    if unknown:
        raise ValueError(f"not {what}: {_some(unknown)} not in its layout")
    if twice:
        raise ValueError(f"{what}: two keys for one tensor: {_some(twice)}")
    if wrong:
        raise ValueError(f"{what}: not dense floating-point tensors: {_some(wrong)}")
    broken = [t for t, found in parts.items() if sorted(found) != list(range(len(found)))]
    if broken:
        raise ValueError(f"{what}: parts are missing of {_some(broken)}")
    joined = {
        target: found[0] if len(found) == 1 else torch.cat([found[i] for i in sorted(found)])
        for target, found in parts.items()
    }
    return Conversion(joined, sum(map(len, parts.values())), left_out)


def check_fit(model: nn.Module, tensors: Mapping[str, Tensor], needed: set[str], what: str) -> None:
    """Raise ValueError if a needed tensor is missing, or one is unknown or of another shape."""
    faults = misfits(tensors, model.state_dict(), needed)
    found = [f"{_some(names)} {fault}" for fault, names in faults.items() if names]
    if found:
        raise ValueError(f"{what} does not fit the model: " + "; ".join(found))


def load_into(model: nn.Module, tensors: Mapping[str, Tensor], needed: set[str], what: str) -> None:
    """Copy tensors into a model, whose dtypes and devices stay, after :func:`check_fit`."""
    check_fit(model, tensors, needed, what)
    model.load_state_dict(tensors, strict=False)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
