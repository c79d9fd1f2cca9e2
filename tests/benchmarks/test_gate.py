"""The gate is green for right results and red for wrong ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import gate, run
from benchmarks.peers import REGISTRY, Implementation, Peer, load_all
from benchmarks.problems import Problem, build
from benchmarks.results import read as records_of
from benchmarks.testing import MEDIA, options


def wrong_peer(problem: Problem) -> Implementation:
    """Set up a peer that attends to the wrong image."""
    from flamingo_kernels.ops import MediaSpans, media_cross_attention

    spans = problem.fixed["spans"]
    moved = MediaSpans((spans.first + 1) % 3, (spans.last + 1) % 3, True)
    leaves = problem.leaves
    return Implementation(
        lambda: media_cross_attention(*leaves.values(), moved, kernel="torch"), leaves
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gate_is_red_for_a_wrong_mask(dtype: str) -> None:
    problem = build(dataclasses.replace(MEDIA, dtype=dtype), "cpu")
    with pytest.raises(AssertionError, match=r"out: error .* exceeds"):
        gate.check(problem, wrong_peer(problem), gate.truth(problem))


def test_gate_is_red_for_a_wrong_gradient() -> None:
    problem = build(MEDIA, "cpu")
    right = load_all()["ours-torch"].setup(problem)
    wrong = dataclasses.replace(right, rename=lambda g: {**g, "k": g["k"] * 1.01})
    with pytest.raises(AssertionError, match=r"k: error .* exceeds"):
        gate.check(problem, wrong, gate.truth(problem))


def test_gate_is_red_for_a_missing_gradient() -> None:
    problem = build(MEDIA, "cpu")
    right = load_all()["ours-torch"].setup(problem)
    wrong = dataclasses.replace(right, rename=lambda g: {n: g[n] for n in g if n != "v"})
    with pytest.raises(AssertionError, match="no result for v"):
        gate.check(problem, wrong, gate.truth(problem))


def test_red_peer_gets_a_line_and_no_figure(tmp_path: Path, monkeypatch, capsys) -> None:
    load_all()
    monkeypatch.setitem(
        REGISTRY, "wrong", Peer("wrong", "Test.", ("media_cross_attention",), wrong_peer)
    )
    path = run.run(dataclasses.replace(options(tmp_path), peers=("ours-torch", "wrong")), [MEDIA])
    (line,) = (r for r in records_of(path) if r["peer"] == "wrong")
    assert line["status"] == "red" and "exceeds" in line["reason"]
    assert "median_s" not in line
    assert "RED" in capsys.readouterr().err


def test_a_slow_peer_is_left_out_before_its_results_are_checked(
    tmp_path: Path, monkeypatch
) -> None:
    load_all()
    monkeypatch.setitem(
        REGISTRY, "wrong", Peer("wrong", "Test.", ("media_cross_attention",), wrong_peer)
    )
    impatient = dataclasses.replace(options(tmp_path), peers=("wrong",), patience=0.0)
    (line,) = records_of(run.run(impatient, [MEDIA]))
    assert line["status"] == "unavailable" and "TooSlowError: forward took" in line["reason"]


def test_a_peer_that_fails_is_a_reason_not_a_crash(tmp_path: Path, monkeypatch) -> None:
    def broken(problem: Problem) -> Implementation:
        raise KeyError("surprise")

    load_all()
    monkeypatch.setitem(
        REGISTRY, "broken", Peer("broken", "Test.", ("media_cross_attention",), broken)
    )
    path = run.run(dataclasses.replace(options(tmp_path), peers=("ours-torch", "broken")), [MEDIA])
    (line,) = (r for r in records_of(path) if r["peer"] == "broken")
    assert (line["status"], line["reason"]) == ("unavailable", "KeyError: 'surprise'")
