"""This library's ops, through the public functions."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from benchmarks.cases import RANGES
from benchmarks.peers import Implementation, UnavailableError, peer
from benchmarks.problems import Problem
from benchmarks.problems.base import seen_items
from flamingo_kernels import ops
from flamingo_kernels.ops import dispatch

OPS = dispatch.OPS


def _call(problem: Problem, kernel: str) -> Callable[[], Tensor]:
    op, leaves = problem.case.op, tuple(problem.leaves.values())
    if op in ("media_cross_attention", RANGES):
        return lambda: ops.media_cross_attention(*leaves, problem.fixed["spans"], kernel=kernel)
    if op == "gated_activation":
        activation = problem.case.shape.activation
        return lambda: ops.gated_activation(*leaves, activation, kernel=kernel)
    function = getattr(ops, op)
    return lambda: function(*leaves, kernel=kernel)


def _setup(kernel: str, problem: Problem) -> Implementation:
    op = problem.case.op
    first = next(iter(problem.leaves.values()))
    head_dim = first.shape[-1] if first.ndim == 4 else None

    def reasons(needs_grad: bool) -> list[str]:
        call = dispatch.Call(problem.device.type, problem.dtype, needs_grad, head_dim)
        known = "media_cross_attention" if op == RANGES else op
        return dispatch.unsupported_reasons(known, kernel, call)

    if reasons(needs_grad=False):
        raise UnavailableError("; ".join(reasons(needs_grad=False)))
    return Implementation(
        _call(problem, kernel),
        problem.leaves,
        backend=backend(kernel),
        no_backward="; ".join(reasons(needs_grad=True)),
        ours=True,
    )


def backend(kernel: str) -> str:
    """Name the kernel, and for the native library its instruction set."""
    if kernel != "cpp":
        return kernel
    from flamingo_kernels._cpp import library

    return f"cpp {library.selected_instruction_set()}"


def kernels_used(kernel: str, problem: Problem) -> str:
    """Name the kernels that a module runs: for ``auto``, the choice for each op."""
    if kernel != "auto":
        return backend(kernel)
    call = dispatch.Call(problem.device.type, problem.dtype, problem.case.training)
    taken: dict[str, list[str]] = {}
    for op in OPS:
        taken.setdefault(backend(dispatch.choose(op, "auto", call)), []).append(op)
    return "; ".join(f"{name}: {', '.join(ops)}" for name, ops in taken.items())


KERNELS = {
    "cpp": (("cpu",), "the C++ kernels"),
    "triton": (("cuda",), "the Triton kernels"),
    "auto": (("cpu", "cuda"), "the best available kernel for each op"),
    "torch": (("cpu", "cuda"), "the PyTorch implementation"),
}


def register(
    kind: str, what: str, setup: Callable[[str, Problem], Implementation], *ops: str, auto: bool
) -> None:
    """Register ``<kind>-<kernel>`` for every kernel; ``what`` begins their descriptions."""
    for kernel, (devices, meaning) in KERNELS.items():
        if kernel != "auto" or auto:
            description = f'{what} with `kernel="{kernel}"`: {meaning}.'
            peer(f"{kind}-{kernel}", description, *ops, devices=devices)(
                functools.partial(setup, kernel)
            )


register("ours", "This library's op", _setup, *OPS, RANGES, auto=False)


@peer(
    "ours-items",
    'This library\'s op with `kernel="auto"`, `MediaSpans` and media items in place of key ranges, '
    "where all items have one length.",
    RANGES,
)
def _items(problem: Problem) -> Implementation:
    shape, (q, k, v) = problem.case.shape, problem.leaves.values()
    if shape.sees == "window" or len(set(shape.lengths)) > 1:
        raise UnavailableError("the keys of a token are not those of items of one length")
    items = seen_items(shape)
    bounds = (bound.to(problem.device) for bound in (items.first, items.last))
    spans = ops.MediaSpans(*bounds, items.single_item)

    def forward() -> Tensor:
        keys, values = (t.unflatten(1, (len(shape.lengths), -1)) for t in (k, v))
        return ops.media_cross_attention(q, keys, values, spans)

    return Implementation(forward, problem.leaves, ours=True)
