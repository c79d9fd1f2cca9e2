"""Checks of dataclass fields: what they hold, and what the checks cannot judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from flamingo_kernels.fields import check_types


@dataclass
class Inner:
    size: int

    def __post_init__(self) -> None:
        check_types(self)


@dataclass
class Outer:
    inner: Inner
    several: tuple[Inner, ...] = ()
    rate: float | None = None
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_types(self)


@dataclass
class Unchecked:
    names: list[str]

    def __post_init__(self) -> None:
        check_types(self)


@dataclass
class PartlyUnchecked:
    size: int | set[int]

    def __post_init__(self) -> None:
        check_types(self)


def test_what_fields_may_hold() -> None:
    inner = Inner(3)
    Outer(inner)
    Outer(inner, (inner, inner), 1, {"a": 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((3,), r"Outer\.inner must be Inner, got 3"),
        ((Inner(3), (4,)), r"Outer\.several must be tuple\[Inner, \.\.\.\], got \(4,\)"),
        ((Inner(3), [Inner(3)]), r"Outer\.several must be tuple\[Inner, \.\.\.\], got \["),
        ((Inner(3), (), "1"), r"Outer\.rate must be float \| None, got '1'"),
        ((Inner(3), (), True), r"Outer\.rate must be float \| None, got True"),
        ((Inner(3), (), None, []), r"Outer\.options must be dict\[str, Any\] \| None, got \[\]"),
    ],
)
def test_other_values_are_refused(values: tuple, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Outer(*values)


def test_an_annotation_that_cannot_be_checked_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Unchecked\.names is annotated list\[str\], which check_"):
        Unchecked(["a"])
    with pytest.raises(TypeError, match=r"PartlyUnchecked\.size is annotated int \| set\[int\], "):
        PartlyUnchecked(1)
