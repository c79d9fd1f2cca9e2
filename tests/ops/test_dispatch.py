"""The choice of kernels: preference, reasons, no silent fallback."""

from __future__ import annotations

import pytest
import torch

from flamingo_kernels.ops import (
    KernelUnavailableError,
    MediaSpans,
    dispatch,
    gated_residual,
    latent_attention,
    layer_norm,
    media_cross_attention,
    plan_media_attention,
)
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


@pytest.mark.parametrize(
    ("op", "call", "reasons", "able"),
    [
        (
            "media_cross_attention",
            Call("cuda", torch.float32, True, 129),
            ["supports head dims 1 to 128, the tensors have 129"],
            "torch",
        ),
        (
            "latent_attention",
            Call("cuda", torch.float64, True, 64),
            ["there are no float64 Triton kernels for a GPU"],
            "torch",
        ),
        (
            "layer_norm",
            Call("cuda", torch.bfloat16, channels=8193),
            ["supports up to 8192 channels, the tensors have 8193"],
            "torch",
        ),
        (
            "gated_residual",
            Call("cuda", torch.float8_e4m3fn),
            ["supports bfloat16, float16, float32, float64, the tensors are torch.float8_e4m3fn"],
            "torch",
        ),
        (
            "media_cross_attention",
            Call("cpu", torch.bfloat16, True, 200),
            [
                "on CPU tensors Triton needs TRITON_INTERPRET=1, set before it is first imported",
                "supports head dims 1 to 128, the tensors have 200",
            ],
            None,
        ),
    ],
)
def test_what_triton_refuses(op: str, call: Call, reasons: list[str], able: str | None) -> None:
    """Every reason, and the kernels that would run the call."""
    with pytest.raises(KernelUnavailableError) as caught:
        dispatch.choose(op, "triton", call)
    able = able or ", ".join(
        kernel for kernel in dispatch.KERNELS if not dispatch.unsupported_reasons(op, kernel, call)
    )
    assert str(caught.value) == (
        f"{op} cannot run with kernel='triton' (triton: {', '.join(reasons)}). "
        f"Kernels that can run this call: {able}"
    )


def test_triton_on_cpu_tensors_says_what_is_missing() -> None:
    """Through the public op; the other kernels that can run the call are named."""
    q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 2, 4, 2, 8)
    spans = MediaSpans.everything(1, 3, 2, q.device)
    for call in (
        lambda: media_cross_attention(q, k, k, spans, kernel="triton"),
        lambda: plan_media_attention(spans, k, kernel="triton"),
        lambda: latent_attention(q, q, q, q, q, kernel="triton"),
        lambda: layer_norm(q, None, None, kernel="triton"),
    ):
        with pytest.raises(KernelUnavailableError, match=r"TRITON_INTERPRET=1.*can run.*torch"):
            call()


def test_wide_rows_leave_triton_to_torch() -> None:
    assert dispatch.choose("layer_norm", "auto", Call("cuda", torch.bfloat16, channels=8193)) == (
        "torch"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, far: media_cross_attention(
                x, far, far, MediaSpans.everything(1, 1, 1, "cpu")
            ),
            "q, k, v must be on one device, got cpu, meta, meta",
        ),
        (
            lambda x, far: media_cross_attention(
                x, x[None], x[None], MediaSpans.everything(1, 1, 1, "meta")
            ),
            "spans are on meta, q on cpu",
        ),
        (
            lambda x, far: plan_media_attention(MediaSpans.everything(1, 1, 1, "meta"), x[None]),
            "spans are on meta, k on cpu",
        ),
        (
            lambda x, far: latent_attention(x, x, far[0], x, x),
            "must be on one device, got cpu, cpu, meta, cpu, cpu",
        ),
        (lambda x, far: gated_residual(x, far[0], torch.ones(1)), "x is on cpu, y on meta"),
    ],
)
def test_mixed_devices(call, message: str) -> None:
    x = torch.randn(1, 1, 1, 1)
    with pytest.raises(ValueError, match=message):
        call(x, x[None].to("meta"))
