"""Shared settings: a fixed seed per test, and NaN in fresh memory to show unwritten output."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from flamingo_kernels import ops
from flamingo_kernels.ops import dispatch, signature

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
    signature.forget()
    yield
    signature.forget()


@pytest.fixture
def stand_in_kernels(
    any_kernel_may_run: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """Triton kernels that return zeros of the promised shapes; the names of those called."""
    called: list[str] = []

    def stand_in(name: str) -> Callable[..., Any]:
        def zeros(*inputs: Any) -> Any:
            called.append(name)
            flat = [part for x in inputs for part in (x if isinstance(x, tuple) else (x,))]
            flat.sort(key=lambda value: isinstance(value, int | float))  # as in the operators
            registered = getattr(torch.ops.flamingo_kernels, name).default
            with FakeTensorMode() as mode:
                fakes = tree_map_only(torch.Tensor, mode.from_tensor, flat)
                promised = registered(*fakes, "triton")
            return tree_map_only(
                torch.Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), promised
            )

        return zeros

    for path in Path(ops.__file__).parent.glob("*/impl_triton*"):
        op = path.parent.name
        functions = ("forward", "backward", "segments")
        module = SimpleNamespace(**{name: stand_in(f"{op}_{name}") for name in functions})
        # Where an import finds it: as an attribute if it was imported before, else by name.
        monkeypatch.setattr(import_module(f"{ops.__name__}.{op}"), "impl_triton", module, False)
        monkeypatch.setitem(sys.modules, f"{ops.__name__}.{op}.impl_triton", module)
    yield called
