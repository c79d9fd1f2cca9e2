"""Cases, their selection, and every peer on them."""

from __future__ import annotations

import dataclasses
import re

import pytest

from benchmarks import gate, run
from benchmarks.cases import (
    CASES,
    LAYOUTS,
    BlockShape,
    Case,
    MediaShape,
    ModelShape,
    PointwiseShape,
    RangeShape,
    ResamplerShape,
)
from benchmarks.peers import UnavailableError, load_all, peers_for
from benchmarks.problems import build
from benchmarks.testing import LATENT, MEDIA, SMALL
from flamingo_kernels.ops import KernelUnavailableError


def test_cases_are_unique_and_have_peers() -> None:
    assert len({case.key for case in CASES}) == len(CASES)
    for case in CASES:
        for device in case.devices:
            assert peers_for(case.op, device)


def test_the_shapes_of_the_cpu_figures_are_there() -> None:
    keys = {case.key for case in CASES if "cpu" in case.devices}
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 4):
            for images in (8, 32):
                label = f"B{batch} T2048 I{images} H8 D64 R64"
                assert f"media_cross_attention/{label}/{dtype}" in keys
        for features in (256, 1024, 8192):
            for heads in ("H8 D64", "H16 D96"):
                assert f"latent_attention/N1 M{features} {heads} L64/{dtype}" in keys


def test_shards_partition_the_suite_and_keep_groups_together() -> None:
    everything = run.selected(run.Options(suite="full"))
    shards = [run.selected(run.Options(suite="full", shard=(i, 3))) for i in (1, 2, 3)]
    assert sorted(c.key for s in shards for c in s) == sorted(c.key for c in everything)
    for group in {c.group for c in everything if c.group}:
        assert sum(any(c.group == group for c in shard) for shard in shards) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ops": ("nonsense",)}, "unknown ops nonsense; known: media_cross_attention"),
        ({"shard": (3, 2)}, "shard 3/2: the first number must be in 1..2"),
    ],
)
def test_wrong_selection(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run.selected(run.Options(**wrong))


def test_unknown_peer_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown peers nobody; known: ours-cpp"):
        peers_for("latent_attention", "cpu", ["nobody"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    """Every layout has as many <image> tokens as images; ``late`` starts in the second half."""
    tokens = 1 if layout == "decode" else 20
    problem = build(
        Case("media_cross_attention", MediaShape(2, tokens, 3, 2, 4, 2, layout=layout)), "cpu"
    )
    assert problem.fixed["locations"].sum(1).tolist() == [3, 3]
    seen = problem.fixed["spans"].visible(3)
    if layout == "late":
        assert not seen[:, :10].any()
    if layout == "decode":
        assert seen[:, 0].tolist() == [[False, False, True]] * 2


@pytest.mark.parametrize(
    "case",
    [
        MEDIA,
        Case("media_cross_attention", MediaShape(2, 13, 3, 2, 8, 4, layout="uneven")),
        Case("media_cross_attention", MediaShape(2, 12, 3, 2, 8, 4, layout="late")),
        Case("media_cross_attention", MediaShape(1, 12, 4, 2, 8, 4, attend="last_group")),
        Case("media_cross_attention", MediaShape(1, 12, 3, 2, 8, 4, attend="previous")),
        Case(
            "media_cross_attention",
            MediaShape(1, 1, 3, 2, 8, 4, layout="decode"),
            training=False,
        ),
        Case("key_ranges", RangeShape("own", 12, (5, 9, 3), 4, 2, 8)),
        Case("key_ranges", RangeShape("prefix", 12, (5, 5, 5), 2, 2, 8, "prefix")),
        Case("key_ranges", RangeShape("window", 1, (5, 9), 4, 1, 8, "window", 6), training=False),
        LATENT,
        Case("layer_norm", PointwiseShape(5, 16)),
        Case("gated_residual", PointwiseShape(5, 16)),
        Case("gated_activation", PointwiseShape(5, 16, "squared_relu")),
        Case("block", BlockShape(MediaShape(1, **SMALL), 16, 16)),
        Case(
            "block",
            BlockShape(MediaShape(1, 1, 3, 2, 8, 4, layout="decode"), 16, 12),
            training=False,
        ),
        Case("resampler", ResamplerShape(2, 1, 5, 16, 2, 2, 8)),
        Case("model_decode", ModelShape("tiny", 1, 8, 2), training=False),
    ],
    ids=lambda case: case.key,
)
def test_every_peer_that_needs_no_compiler_passes_the_gate(case: Case) -> None:
    problem = build(case, "cpu")
    truth = gate.truth(problem)
    passed = []
    for peer in peers_for(case.op, "cpu"):
        if peer.compiled:
            continue
        try:
            gate.check(problem, peer.setup(problem), truth)
        except (UnavailableError, KernelUnavailableError):  # says why
            continue
        passed.append(peer.name)
    assert len(passed) >= 2


def test_bfloat16_peers_pass_the_gate() -> None:
    problem = build(dataclasses.replace(MEDIA, dtype="bfloat16"), "cpu")
    truth = gate.truth(problem)
    for name in ("ours-torch", "openflamingo", "sdpa-mask", "segments-sdpa"):
        gate.check(problem, load_all()[name].setup(problem), truth)
