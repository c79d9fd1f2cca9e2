"""Programs that torch records of the ops: right values and gradients, or a refusal."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from flamingo_kernels.nn import GatedCrossAttentionBlock
from flamingo_kernels.ops import gated_activation, gated_residual, layer_norm
from testing.budgets import assert_close_to_reference, assert_gradients_close
from testing.cases import kernels_for
from testing.compiled import Bridge
from testing.tiny_model import TINY, make_model

KERNELS = sorted({kernel for kernel, _ in kernels_for("media_cross_attention", needs_grad=True)})
OPTIONS = {"dim_head": 8, "heads": 2, "ff_mult": 2}


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, ids and hidden states for a :class:`Bridge`; the ids are the same."""
    torch.manual_seed(seed)
    ids = torch.tensor([[9, 1, 9, 2, 3], [1, 9, 2, 3, 4]])
    return torch.randn(2, 3, 1, 4, 16), ids, torch.randn(2, 5, 24)


def traced(module: nn.Module) -> Callable:
    program = torch.jit.trace(module, inputs(0), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    return torch.jit.load(file)


RECORDERS: dict[str, Callable[[nn.Module], Callable]] = {
    "jit.trace": traced,
    "make_fx": lambda module: make_fx(lambda *x: module(*x))(*inputs(0)),
    "make_fx pre-dispatch": lambda module: make_fx(lambda *x: module(*x), pre_dispatch=True)(
        *inputs(0)
    ),
    "export": lambda module: torch.export.export(module, inputs(0), strict=False).module(),
    "strict export": lambda module: torch.export.export(module, inputs(0), strict=True).module(),
}


@pytest.mark.filterwarnings("ignore")  # of tracing: sizes and checks become constants
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_values_and_gradients_of_a_program(recorder: str, kernel: str, trains: bool) -> None:
    module = Bridge(kernel).requires_grad_(trains)
    program = RECORDERS[recorder](module)
    results = []
    for function in (program, module):
        features, ids, hidden = inputs(1)
        leaves = {"features": features, "hidden": hidden}
        for leaf in leaves.values():
            leaf.requires_grad_(trains)
        out = function(features, ids, hidden)
        gradients = torch.autograd.grad(out.square().sum(), leaves.values()) if trains else ()
        results.append({"out": out.detach(), **dict(zip(leaves, gradients, strict=False))})
    assert_gradients_close(*results, torch.float32)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_model() -> None:
    """Other images, texts and sizes; values that are read on the way are refused."""
    model = make_model().requires_grad_(False)

    def logits(ids: Tensor, pixels: Tensor) -> Tensor:
        return model(ids, pixels).logits

    def example(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(0, 256, (rows, tokens))
        ids[:, 1] = TINY.image_token_id
        return ids, torch.randn(rows, 1, 1, 3, 32, 32)

    program = torch.jit.trace(logits, example(2, 6), check_trace=False)
    for sizes in ((2, 6), (3, 8)):
        inputs = example(*sizes)
        assert_close_to_reference(program(*inputs), logits(*inputs), torch.float32)
    counted = (*inputs, torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_images is read while tracing"):
        torch.jit.trace(lambda ids, x, n: model(ids, x, num_images=n).logits, counted)


def test_a_mode_sees_the_operators() -> None:
    block = GatedCrossAttentionBlock(16, 12, **OPTIONS).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        block(torch.randn(1, 2, 16), torch.randn(1, 1, 3, 12), torch.tensor([[True, False]]))
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("op", ["residual", "activation", "norm"])
@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_compiled_transforms(op: str, kernel: str) -> None:
    torch.compiler.reset()
    x, gate = torch.randn(3, 4), torch.tensor([0.7])

    def function(x: Tensor) -> Tensor:
        if op == "residual":
            return gated_residual(x, 2 * x, gate, kernel).sum()
        if op == "activation":
            return gated_activation(x, gate, kernel=kernel).sum()
        return layer_norm(x, None, None, kernel=kernel).pow(3).sum()

    given = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(given), given)
    compiled = torch.compile(lambda x: grad(function)(x), backend="aot_eager")
    assert_gradients_close({"x": compiled(x)}, {"x": expected}, torch.float32)
    tangent = torch.compile(lambda x: jvp(function, (x,), (x,))[1], backend="aot_eager")
    try:
        result = tangent(x)
    except RuntimeError as error:
        # torch 2.15 leaves it to the operators, as outside a compiled function; 2.13 does not.
        assert kernel == "auto" and KERNELS != ["torch"], error
        assert "has no forward-mode derivative" in str(error)
    else:
        terms = float((expected * x).abs().max())
        assert_close_to_reference(result, (expected * x).sum(), x.dtype, terms=terms)
