"""The choice of kernels: preference, reasons, no silent fallback."""

from __future__ import annotations

import pytest
import torch

from flamingo_kernels.ops import KernelUnavailableError, dispatch, gated_residual
from flamingo_kernels.ops.dispatch import Call


def test_auto_takes_the_first_able_kernel_and_torch_is_always_able() -> None:
    for op in dispatch.OPS:
        for needs_grad in (False, True):
            call = Call("cpu", torch.float32, needs_grad)
            chosen = dispatch.choose(op, "auto", call)
            better = dispatch.KERNELS[1 : dispatch.KERNELS.index(chosen)]
            for kernel in better:
                assert dispatch.unsupported_reasons(op, kernel, call)
            assert not dispatch.unsupported_reasons(op, "torch", call)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_explicit_kernel_raises_with_every_reason(op: str) -> None:
    with pytest.raises(KernelUnavailableError) as caught:
        dispatch.choose(op, "triton", Call("meta", torch.int8, True))
    message = str(caught.value)
    assert message.startswith(f"{op} cannot run with kernel='triton'")
    assert "runs on cpu, cuda, the tensors are on meta" in message
    assert "the tensors are torch.int8" in message
    assert "Kernels that can run this call: torch" in message


def test_missing_library_is_a_reason() -> None:
    capability = dispatch.Capability(unavailable=lambda call: "the library was not built")
    assert capability.reasons(Call("cpu", torch.float32)) == ["the library was not built"]


def test_reasons_name_what_is_supported_and_what_was_given() -> None:
    capability = dispatch.Capability(
        device_types=frozenset({"cpu"}),
        dtypes=frozenset({torch.float32}),
        head_dims=range(16, 129),
        any_stride=False,
        backward=False,
    )
    assert capability.reasons(Call("cuda", torch.float16, True, 200, False)) == [
        "runs on cpu, the tensors are on cuda",
        "supports float32, the tensors are torch.float16",
        "supports head dims 16 to 128, the tensors have 200",
        "needs a stride of 1 in the last dimension of every tensor (pointwise ops: and at most two "
        "strides before it)",
        "has no backward and a gradient is needed",
    ]
    assert not capability.reasons(Call("cpu", torch.float32, False, 128))


def test_an_op_passes_its_kernel_on() -> None:
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    with pytest.raises(KernelUnavailableError, match="gated_residual cannot run with kernel='tri"):
        gated_residual(x, x, torch.zeros(1), kernel="triton")
    with pytest.raises(ValueError, match="unknown kernel 'fast'"):
        gated_residual(x, x, torch.zeros(1), kernel="fast")
