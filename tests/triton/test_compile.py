"""The torch boundary of the Triton kernels, in the interpreter."""

from __future__ import annotations

import pytest

from tests.compiled import SHAPES, check_graphs
from tests.operators import check_operator, operator_calls
from tests.triton.targets import HAS_GPU

pytestmark = pytest.mark.skipif(HAS_GPU, reason="the arguments are on the CPU: for the interpreter")


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck(name: str) -> None:
    check_operator(name, "triton")


def test_compiled_results() -> None:
    """Static and dynamic shapes; tests/ops/test_compile.py counts the graphs of many more."""
    check_graphs("triton", SHAPES[:2])
