"""The torch boundary of the Triton kernels, in the interpreter."""

from __future__ import annotations

import pytest

from testing.compiled import check_graphs
from testing.operators import check_operator, operator_calls
from testing.targets import HAS_GPU

pytestmark = pytest.mark.skipif(HAS_GPU, reason="the arguments are on the CPU: for the interpreter")


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck(name: str) -> None:
    check_operator(name, "triton")


def test_compiled_results() -> None:
    """The second shape's equal eager ones; tests/ops/test_compile.py counts graphs of 20."""
    check_graphs("triton", [(1, 3, 2), (2, 5, 2)])
