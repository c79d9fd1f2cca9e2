"""The torch boundary of the ops: operators, and graphs of ``torch.compile``."""

from __future__ import annotations

import pytest

from testing.cases import kernels_for
from testing.compiled import check_graphs
from testing.operators import check_operator, operator_calls

KERNELS = sorted({kernel for kernel, _ in kernels_for("media_cross_attention", needs_grad=True)})


@pytest.mark.parametrize("kernel", sorted({*KERNELS} - {"torch"}))
@pytest.mark.parametrize("name", [name for name in operator_calls() if "segments" not in name])
def test_opcheck(name: str, kernel: str) -> None:
    check_operator(name, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_at_most_two_graphs_over_20_shapes(kernel: str) -> None:
    check_graphs(kernel)


@pytest.mark.slow
def test_at_most_two_graphs_of_triton(stand_in_kernels: list[str]) -> None:
    """Nothing is run, so this is about the operators and what is between them."""
    check_graphs("triton")
    assert "media_attention_backward" in stand_in_kernels
