"""Shared settings: a fixed seed per test, and NaN in fresh memory to show unwritten output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from flamingo_kernels.ops import dispatch, kernel_op, memo

settings.register_profile("repository", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("repository")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN: a kernel that leaves an element unwritten is caught."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def any_kernel_may_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests that run no kernel: they need neither a GPU nor the native library."""
    monkeypatch.setattr(dispatch.Capability, "reasons", lambda self, call: [])
    _forget_choices()
    yield
    _forget_choices()


def _forget_choices() -> None:
    dispatch._choose.cache_clear()
    memo.forget()


@pytest.fixture
def stand_in_kernels(
    any_kernel_may_run: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """Kernels that give zeros of the shapes their operators promise; the names of those called."""
    called: list[str] = []

    def stand_in(op: str, kernel: str, function: str) -> Callable[..., Any]:
        name = function if op == "pointwise" else f"{op}_{function}"
        operator = getattr(torch.ops.flamingo_kernels, name).default

        def zeros(*inputs: Any) -> Any:
            called.append(name)
            with FakeTensorMode() as mode:
                fakes = tree_map_only(torch.Tensor, mode.from_tensor, inputs)
                promised = operator(*fakes, kernel)
            return tree_map_only(
                torch.Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), promised
            )

        return zeros

    monkeypatch.setattr(kernel_op, "_implementation", stand_in)
    yield called
