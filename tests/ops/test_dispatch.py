"""The choice of kernels: preference, reasons, no silent fallback."""

from __future__ import annotations

import pytest
import torch

from flamingo_kernels.ops import KernelUnavailableError, dispatch, gated_residual


def test_auto_takes_the_first_able_kernel_and_torch_is_always_able() -> None:
    for op in dispatch.OPS:
        for needs_grad in (False, True):
            chosen = dispatch.choose(op, "auto", "cpu", torch.float32, needs_grad)
            better = dispatch.KERNELS[: dispatch.KERNELS.index(chosen)]
            for kernel in better:
                assert dispatch.unsupported_reasons(op, kernel, "cpu", torch.float32, needs_grad)
            assert not dispatch.unsupported_reasons(op, "torch", "cpu", torch.float32, needs_grad)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_explicit_kernel_raises_with_every_reason(op: str) -> None:
    capability = dispatch.CAPABILITIES.get((op, "triton"))
    with pytest.raises(KernelUnavailableError) as caught:
        dispatch.choose(op, "triton", "meta", torch.int8, True)
    message = str(caught.value)
    assert message.startswith(f"{op} cannot run with kernel='triton'")
    if capability is None:
        assert "no triton implementation" in message
    assert "Kernels that can run this call: torch" in message


def test_missing_library_is_a_reason() -> None:
    capability = dispatch.Capability(unavailable=lambda: "the library was not built")
    assert capability.reasons("cpu", torch.float32, False) == ["the library was not built"]


def test_reasons_name_what_is_supported_and_what_was_given() -> None:
    capability = dispatch.Capability(
        device_types=frozenset({"cpu"}), dtypes=frozenset({torch.float32}), backward=False
    )
    assert capability.reasons("cuda", torch.float16, True) == [
        "runs on cpu, the tensors are on cuda",
        "supports float32, the tensors are torch.float16",
        "has no backward and a gradient is needed",
    ]


def test_an_op_passes_its_kernel_on() -> None:
    x = torch.randn(2, 4)
    if dispatch.unsupported_reasons("gated_residual", "triton", "cpu", x.dtype):
        with pytest.raises(KernelUnavailableError, match="gated_residual cannot run"):
            gated_residual(x, x, torch.zeros(1), kernel="triton")
    with pytest.raises(ValueError, match="unknown kernel 'fast'"):
        gated_residual(x, x, torch.zeros(1), kernel="fast")
