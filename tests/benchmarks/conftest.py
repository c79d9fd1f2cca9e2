"""Tiny cases and a fixed pair of ceilings; nothing here looks at how long anything takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ceilings, measure, results, run
from benchmarks.cases import Case, LatentShape, MediaShape

SMALL = {"tokens": 12, "images": 3, "heads": 2, "head_dim": 8, "latents": 4}
MEDIA = Case("media_cross_attention", MediaShape(batch=2, **SMALL), quick=True)
LATENT = Case("latent_attention", LatentShape(2, 10, 2, 8, 4), quick=True)
EFFORT = measure.Effort(rounds=3, seconds=0.0, min_samples=2, max_samples=2)
EAGER = ("ours-torch", "openflamingo", "sdpa-mask", "segments-bmm", "sdpa-concat")


def options(folder: Path, **changed: object) -> run.Options:
    return run.Options(output=folder, effort=EFFORT, peers=EAGER, **changed)


@pytest.fixture(autouse=True)
def fixed_machine_and_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probing the machine takes seconds; and the tree may be edited while a test runs."""
    monkeypatch.setattr(results, "revision", lambda: ("a" * 40, ""))
    fixed = ceilings.Ceilings({"1024": 1e9, "4096": 2e9}, {"float32": 1e10}, {"float32": "test"})
    monkeypatch.setattr(ceilings, "measure", lambda *arguments: fixed)
