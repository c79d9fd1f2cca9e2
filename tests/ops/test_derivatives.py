"""Derivatives beside a first backward: right with stock PyTorch, refused by compiled kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from flamingo_kernels.ops import (
    KernelUnavailableError,
    gated_activation,
    gated_activation_linear,
    gated_residual,
    latent_attention,
    layer_norm,
    layer_norm_linear,
    media_cross_attention,
)
from testing.budgets import assert_close_to_reference, assert_gradients_close
from testing.cases import kernels_for, media_case
from testing.key_ranges import range_case
from testing.tiny_model import make_model, ragged_batch

Call = tuple[Callable[..., Tensor], list[Tensor]]
COMPILED = sorted({kernel for kernel, _ in kernels_for("layer_norm", needs_grad=True)} - {"torch"})


def calls(kernel: str) -> dict[str, Call]:
    """Return a small call of every op in fp64: the function, and the tensors it takes."""
    torch.manual_seed(0)
    x, y, vector, weight = torch.randn(4, 3, 4, dtype=torch.float64)
    vector, one = vector[0], torch.randn(1, dtype=torch.float64)
    q, k, v, k_latents, v_latents = torch.randn(5, 2, 3, 2, 2, dtype=torch.float64)
    lengths = torch.tensor([3, 1])
    sizes = {"tokens": 4, "latents": 2, "heads": 2, "head_dim": 2}
    single = media_case(media=2, kv_heads=2, **sizes)
    grouped = media_case(media=2, kv_heads=1, attend="previous", **sizes)
    no_media = media_case(media=0, kv_heads=2, gated=False, **sizes)
    keys = range_case(keys=5, tokens=4, heads=2, kv_heads=1, head_dim=2)
    named: dict[str, Call] = {
        f"media {name}": (
            lambda q, k, v, gate=None, case=case: media_cross_attention(
                q, k, v, case.spans, gate, kernel=kernel
            ),
            case.tensors(),
        )
        for name, case in (
            ("single", single),
            ("grouped", grouped),
            ("none", no_media),
            ("keys", keys),
        )
    }
    keys = [k, v, k_latents, v_latents]
    for name, given, of in (
        ("full", None, keys),
        ("ragged", lengths, keys),
        ("grouped", lengths, [x[:, :, :1] for x in keys]),
    ):
        named[f"latent {name}"] = (
            lambda *tensors, given=given: latent_attention(*tensors, given, kernel=kernel),
            [q, *of],
        )
    named |= {
        "residual": (lambda *inputs: gated_residual(*inputs, kernel=kernel), [x, y, vector]),
        "activation": (lambda *inputs: gated_activation(*inputs, kernel=kernel), [x, one]),
        "squared relu": (lambda x: gated_activation(x, None, "squared_relu", kernel), [x]),
        "activation linear": (
            lambda *inputs: gated_activation_linear(*inputs, kernel=kernel),
            [x, weight, one],
        ),
        "norm": (lambda *inputs: layer_norm(*inputs, kernel=kernel), [x, vector, vector + 1]),
        "norm linear": (
            lambda *inputs: layer_norm_linear(*inputs, kernel=kernel),
            [x, vector, vector + 1, weight],
        ),
    }
    return named


NAMES = list(calls("torch"))


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().nan_to_num().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_and_transforms(name: str, kernel: str) -> None:
    function, tensors = calls(kernel)[name]
    inputs = leaves(tensors)
    gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    tangents = [torch.randn_like(x) for x in inputs]
    plain = [x.detach() for x in inputs]

    def total(*tensors: Tensor) -> Tensor:
        return function(*tensors).square().sum()

    _, tangent = jvp(total, tuple(plain), tuple(tangents))
    arguments = tuple(range(len(plain)))
    gradients = grad(total, arguments)(*plain)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    assert_close_to_reference(tangent, expected, torch.float64, "tangent")
    assert hessian(total)(*plain).isfinite().all()
    batch = vmap(function)(*(torch.stack((x, x)) for x in plain))
    assert_close_to_reference(batch[1], function(*plain), torch.float64, "vmap")


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_kernels_refuse_tangents_and_transforms(name: str, kernel: str) -> None:
    function, tensors = calls(kernel)[name]
    plain = [x.detach().nan_to_num() for x in tensors]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(plain[0], torch.ones_like(plain[0]))
        with pytest.raises(KernelUnavailableError, match=r"no forward-mode derivatives; .*torch"):
            function(dual, *plain[1:])
        function(*plain)  # nothing is dual: as ever
    with pytest.raises(KernelUnavailableError, match=r"has no transforms of torch\.func.*torch"):
        jvp(function, tuple(plain), tuple(plain))


@pytest.mark.skipif(
    torch.__version__ < "2.8", reason="torch 2.7 reads no values of tensors inside torch.func"
)
def test_a_model_in_forward_mode() -> None:
    model = make_model().double()
    arguments = {
        name: x.double() if x.is_floating_point() else x
        for name, x in ragged_batch(counts=(0, 1, 2)).arguments().items()
    }
    trained = {name: p.detach() for name, p in model.trainable_parameters().items()}
    tangents = {name: torch.randn_like(p) for name, p in trained.items()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        options = {**arguments, "labels": arguments["input_ids"]}
        return functional_call(model, parameters, (), options).loss

    _, tangent = jvp(loss, (trained,), (tangents,))
    gradients = grad(loss)(trained)
    expected = sum((gradients[name] * tangents[name]).sum() for name in trained)
    assert_close_to_reference(tangent, expected, torch.float64, "tangent")


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_of_torch(name: str) -> None:
    function, tensors = calls("torch")[name]
    inputs = leaves(tensors)
    gradgradcheck(function, inputs)
    gradgradcheck(function, inputs, check_fwd_over_rev=True, check_undefined_grad=False)


def test_second_derivative_where_a_tensor_is_given_twice() -> None:
    case = media_case(media=2, heads=2, kv_heads=2, head_dim=2, nan=False).require_grad()
    gradgradcheck(
        lambda q, k: media_cross_attention(q, k, k, case.spans, kernel="torch"), (case.q, case.k)
    )


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_kernels_refuse_a_second_derivative(name: str, kernel: str) -> None:
    """Also where its first gradient does not depend on ``d_out``, and is a term of a sum."""
    function, tensors = calls(kernel)[name]
    inputs = leaves(tensors)
    out = function(*inputs).sum() + inputs[-1].square().sum()
    first = torch.autograd.grad(out, inputs, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in first)
    with pytest.raises(KernelUnavailableError, match=r"no second derivative.*kernel='torch'"):
        torch.autograd.grad(penalty, inputs)


def test_second_derivative_of_a_model() -> None:
    model = make_model("torch").double()
    arguments = {
        name: x.double() if x.is_floating_point() else x
        for name, x in ragged_batch(counts=(0, 1, 2)).arguments().items()
    }
    trained = model.trainable_parameters()

    def second() -> dict[str, Tensor]:
        loss = model(**arguments, labels=arguments["input_ids"]).loss
        first = torch.autograd.grad(loss, list(trained.values()), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        return dict(zip(trained, torch.autograd.grad(penalty, list(trained.values())), strict=True))

    ours = second()
    with sdpa_kernel(SDPBackend.MATH), pytest.MonkeyPatch.context() as patch:
        patch.setattr("flamingo_kernels.ops.attention._SecondDerivative.apply", lambda out, *_: out)
        assert_gradients_close(ours, second(), torch.float64)
    model.gradient_checkpointing_enable()
    assert_gradients_close(second(), ours, torch.float64)
