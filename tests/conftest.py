"""Shared settings: a fixed seed per test, and NaN in fresh memory to show unwritten output."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from flamingo_kernels.ops import dispatch

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
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()
