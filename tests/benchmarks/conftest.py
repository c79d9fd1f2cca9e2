"""A fixed machine and tree; no test here depends on how long anything takes."""

from __future__ import annotations

import pytest

from benchmarks import ceilings
from testing import provenance


@pytest.fixture(autouse=True)
def fixed_machine_and_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probing the machine takes seconds, and the tree may be edited while a test runs."""
    monkeypatch.setattr(provenance, "revision", lambda: ("a" * 40, ""))
    fixed = ceilings.Ceilings({"1024": 1e9, "4096": 2e9}, {"float32": 1e10}, {"float32": "test"})
    monkeypatch.setattr(ceilings, "measure", lambda *arguments: fixed)
