"""The torch boundary of the ops: operators, and graphs of ``torch.compile``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from flamingo_kernels.ops import kernel_op
from tests.cases import kernels_for
from tests.compiled import check_graphs
from tests.operators import check_operator, operator_calls

KERNELS = sorted({kernel for kernel, _ in kernels_for("media_cross_attention", needs_grad=True)})


@pytest.mark.parametrize("kernel", sorted({*KERNELS} - {"torch"}))
@pytest.mark.parametrize("name", [name for name in operator_calls() if "plan" not in name])
def test_opcheck(name: str, kernel: str) -> None:
    check_operator(name, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_at_most_two_graphs_over_20_shapes(kernel: str) -> None:
    check_graphs(kernel)


@pytest.mark.slow
@pytest.mark.usefixtures("any_kernel_may_run")
def test_at_most_two_graphs_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels that give zeros of the shapes that the operators promise: nothing is run."""

    def stand_in(op: str, kernel: str, function: str) -> Any:
        name = function if op == "pointwise" else f"{op}_{function}"
        operator = getattr(torch.ops.flamingo_kernels, name).default

        def zeros(*inputs: Any) -> Any:
            with FakeTensorMode() as mode:
                fakes = tree_map_only(torch.Tensor, mode.from_tensor, inputs)
                promised = operator(*fakes, kernel)
            return tree_map_only(
                torch.Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), promised
            )

        return zeros

    monkeypatch.setattr(kernel_op, "_implementation", stand_in)
    check_graphs("triton")
