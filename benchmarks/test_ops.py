"""Microbenchmarks of the public ops and the reference: ``pytest benchmarks/``.

They serve to watch single ops over time with pytest-benchmark's ``--benchmark-compare``. The
published figures come from ``python -m benchmarks run``.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import gate
from benchmarks.cases import Case, LatentShape, MediaShape, PointwiseShape
from benchmarks.peers import Implementation, UnavailableError, load_all
from benchmarks.problems import Problem, build

CASES = (
    Case("media_cross_attention", MediaShape(tokens=512, images=4)),
    Case("media_cross_attention", MediaShape(tokens=1, images=33, layout="decode")),
    Case("latent_attention", LatentShape(features=256)),
    Case("layer_norm", PointwiseShape(512, 1024)),
    Case("gated_residual", PointwiseShape(512, 1024)),
    Case("gated_activation", PointwiseShape(512, 1024, "gelu")),
)
KERNELS = ("reference", "torch", "cpp", "triton")


@pytest.fixture(scope="module")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def implementation(problem: Problem, kernel: str) -> Implementation:
    if kernel == "reference":
        return Implementation(lambda: problem.exact(problem.leaves), problem.leaves)
    try:
        found = load_all()[f"ours-{kernel}"].setup(problem)
    except UnavailableError as error:
        pytest.skip(str(error))
    gate.check(problem, found, gate.truth(problem))
    return found


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_forward(benchmark, case: Case, kernel: str, device: str) -> None:
    benchmark.group = f"{case.key} forward"
    found = implementation(build(case, device), kernel)

    def call() -> None:
        with torch.no_grad():
            found.forward()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(call)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.shape.label.find("decode") < 0], ids=lambda c: c.key
)
def test_forward_backward(benchmark, case: Case, kernel: str, device: str) -> None:
    benchmark.group = f"{case.key} forward + backward"
    problem = build(case, device)
    found = implementation(problem, kernel)
    if found.no_backward:
        pytest.skip(found.no_backward)

    def call() -> None:
        found.backward(found.forward(), problem.seed)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
