"""The correctness gate: no figure is printed for a peer whose result is wrong.

The library's ops must keep the budget of the test suite (``testing.budgets``). A peer may round its
scores to the dtype, so a peer or a whole module also passes with an error of a few rounding units
of the largest value. A wrong mask, scale or gradient still fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers import Implementation
from benchmarks.problems import Leaves, Problem
from benchmarks.problems.modules import PARAMETERS
from testing.budgets import assert_within_budget, unit

PEER_UNITS = {torch.float32: 64.0, torch.float16: 32.0, torch.bfloat16: 16.0}


@dataclass(frozen=True)
class Truth:
    """Output and gradients in fp64, and those of plain PyTorch in the dtype of the case."""

    exact: Mapping[str, Tensor]
    plain: Mapping[str, Tensor]


def truth(problem: Problem) -> Truth:
    """Compute both, once per case."""
    exact_leaves = {name: leaf.detach().double() for name, leaf in problem.leaves.items()}
    plain_leaves = {name: leaf.detach().clone() for name, leaf in problem.leaves.items()}
    return Truth(
        _evaluate(problem, exact_leaves, problem.exact),
        _evaluate(problem, plain_leaves, problem.plain),
    )


def _evaluate(problem: Problem, leaves: Leaves, function) -> dict[str, Tensor]:
    if not problem.case.training:
        with torch.no_grad():
            return {"out": function(leaves)}
    for leaf in leaves.values():
        leaf.requires_grad_()
    out = function(leaves)
    seed = problem.seed.to(out.dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), seed, allow_unused=True)
    named = {n: g for n, g in zip(leaves, gradients, strict=True) if g is not None}
    return {"out": out.detach(), **named}


def check(problem: Problem, implementation: Implementation, truth: Truth) -> dict[str, float]:
    """Return the relative error of the output and of each gradient of one peer.

    Raises
    ------
    AssertionError
        The gate is red; the message says which tensor is off and by how much.
    """
    if implementation.exact is not None:
        truth = implementation.exact()
    results = implementation.results(problem)
    trains = problem.case.training and not implementation.no_backward
    wanted = truth.exact if trains else ["out"]
    # A peer's module may have other parameters; its inputs are those of the case.
    missing = [
        name
        for name in wanted
        if name not in results and (implementation.ours or not name.startswith(PARAMETERS))
    ]
    if missing:
        raise AssertionError(f"no result for {', '.join(missing)}")
    largest = max(_magnitude(value) for value in truth.exact.values())
    errors = {}
    for name, value in results.items():
        if name not in truth.exact:
            raise AssertionError(f"{name}: the reference has no such result")
        exact = truth.exact[name]
        errors[name] = _error(value, exact, name) / (_magnitude(exact) or 1.0)
        try:
            assert_within_budget(
                value,
                truth.plain[name],
                exact,
                problem.dtype,
                gradient=name != "out",
                terms=problem.terms.get(name, 0.0),
                what=name,
            )
        except AssertionError:
            if implementation.ours and problem.strict:
                raise
            # The gradient of a single value may cancel; its scale is that of the others.
            scale = largest if exact.numel() == 1 else _magnitude(exact)
            bound = PEER_UNITS[problem.dtype] * unit(problem.dtype) * scale
            error = _error(value, exact, name)
            if not error <= bound:
                raise AssertionError(
                    f"{name}: error {error:.3e} exceeds {bound:.3e} ({problem.case.dtype})"
                ) from None
    return errors


def _error(actual: Tensor, exact: Tensor, what: str) -> float:
    if actual.shape != exact.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    return (actual.detach().double() - exact).abs().max().item()


def _magnitude(exact: Tensor) -> float:
    return exact.detach().double().abs().max().item()
