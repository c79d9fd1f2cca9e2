"""Statistics, rounds, memory, ceilings."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import ceilings, measure
from benchmarks.peers import Implementation
from benchmarks.problems import build
from benchmarks.testing import EFFORT, LATENT


def test_summary() -> None:
    found = measure.summary([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert found == {"median_s": 3.5, "q20_s": 2.0, "q80_s": 5.0, "samples": 6}
    assert measure.summary([2.0])["q80_s"] == 2.0
    with pytest.raises(ValueError, match="no samples"):
        measure.summary([])


def test_rounds_alternate_and_drop_what_fails() -> None:
    order = []

    def variant(name: str, fails: bool = False) -> measure.Variant:
        problem = build(LATENT, "cpu")

        def forward() -> torch.Tensor:
            order.append(name)
            if fails:
                raise RuntimeError("out of luck\nlong text")
            return problem.leaves["q"] * 1

        return measure.Variant(name, problem, Implementation(forward, problem.leaves))

    variants = [variant("a"), variant("b", fails=True), variant("c")]
    assert measure.alternate(variants, EFFORT) == 3
    assert variants[1].error == "RuntimeError: out of luck"
    assert order.count("b") == 1
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["a", "b", "c", "a", "c", "a"] or turns == ["a", "b", "c", "c", "a", "c", "a"]
    for one in (variants[0], variants[2]):
        assert {phase for phase, _ in one.samples} == {"forward", "backward", "forward_backward"}
        assert all(len(samples) == 6 for samples in one.samples.values())


def test_the_deadline_leaves_three_rounds() -> None:
    problem = build(LATENT, "cpu")
    implementation = Implementation(lambda: problem.leaves["q"] * 1, problem.leaves)
    variant = measure.Variant("a", problem, implementation)
    effort = dataclasses.replace(EFFORT, rounds=9)
    assert measure.alternate([variant], effort, deadline=0.0) == 3


def test_a_slow_peer_is_left_out_with_the_reason() -> None:
    problem = build(LATENT, "cpu")
    implementation = Implementation(lambda: problem.leaves["q"] * 1, problem.leaves)
    variant = measure.Variant("a", problem, implementation)
    measure.alternate([variant], dataclasses.replace(EFFORT, patience=0.0))
    assert "TooSlowError: forward and backward took" in variant.error
    assert "0 s of --patience" in variant.error
    assert not variant.samples["forward_backward", "warm"]


def test_a_slow_first_call_is_followed_by_another() -> None:
    problem, calls = build(LATENT, "cpu"), []
    implementation = Implementation(lambda: calls.append(1), problem.leaves)
    measure.try_forward(implementation, EFFORT)
    assert len(calls) == 1
    with pytest.raises(measure.TooSlowError, match="forward took"):
        measure.try_forward(implementation, dataclasses.replace(EFFORT, patience=0.0))
    assert len(calls) == 3


def test_memory_counts_what_the_backward_needs() -> None:
    """exp keeps its output, 4 bytes a value; inputs do not count."""
    problem = build(LATENT, "cpu")
    q = problem.leaves["q"]
    implementation = Implementation(lambda: q.exp().exp(), {"q": q})
    size = q.numel() * 4
    assert measure.saved_bytes(problem, implementation) == 2 * size
    variant = measure.Variant("a", problem, implementation)
    assert measure.peak_bytes(variant) >= 2 * size


def test_ceilings() -> None:
    found = ceilings.Ceilings({"1024": 4e9, "4096": 2e9}, {"float32": 1e10}, {})
    assert found.bandwidth_for(2000) == 4e9
    assert found.bandwidth_for(10) == 4e9
    assert found.bandwidth_for(1e9) == 2e9
    assert found.floor_seconds(8192, 0, "float32") == 8192 / 2e9
    assert found.floor_seconds(0, 1e10, "float32") == 1.0
    assert ceilings.rate_of_copy("cpu", 2**16, 0.0) > 0
    for probe in ceilings.PROBES.values():
        rate = probe("cpu", "float32", 0.001)
        assert rate is None or rate > 0
