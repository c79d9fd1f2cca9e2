"""Which kernel runs an op: capabilities as data, reasons when one cannot, and the choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from flamingo_kernels import _cpp

# In order of preference for kernel="auto".
KERNELS = ("triton", "cpp", "torch")
OPS = (
    "media_cross_attention",
    "latent_attention",
    "gated_residual",
    "gated_activation",
    "layer_norm",
)


class KernelUnavailableError(RuntimeError):
    """The kernel asked for cannot run this call; the message lists why, and which kernels can."""


def _always() -> str | None:
    return None


@dataclass(frozen=True)
class Capability:
    """What one kernel can do for one op."""

    device_types: frozenset[str] | None = None  # None: any
    dtypes: frozenset[torch.dtype] | None = None  # None: any floating dtype
    backward: bool = True
    unavailable: Callable[[], str | None] = _always  # reason the kernel cannot run here at all

    def reasons(self, device_type: str, dtype: torch.dtype, needs_grad: bool) -> list[str]:
        reasons = []
        missing = self.unavailable()
        if missing:
            reasons.append(missing)
        if self.device_types is not None and device_type not in self.device_types:
            reasons.append(f"runs on {_names(self.device_types)}, the tensors are on {device_type}")
        if self.dtypes is not None and dtype not in self.dtypes:
            reasons.append(f"supports {_names(self.dtypes)}, the tensors are {dtype}")
        if needs_grad and not self.backward:
            reasons.append("has no backward and a gradient is needed")
        return reasons


_CPU = frozenset({"cpu"})

CAPABILITIES: dict[tuple[str, str], Capability] = {
    **{(op, "torch"): Capability() for op in OPS},
    ("media_cross_attention", "cpp"): Capability(
        device_types=_CPU,
        dtypes=frozenset({torch.float32, torch.float64}),
        backward=False,
        unavailable=_cpp.unavailable_reason,
    ),
}


def unsupported_reasons(
    op: str, kernel: str, device_type: str, dtype: torch.dtype, needs_grad: bool = False
) -> list[str]:
    """Why ``kernel`` cannot run ``op`` for such tensors; an empty list means that it can."""
    capability = CAPABILITIES.get((op, kernel))
    if capability is None:
        return [f"flamingo_kernels has no {kernel} implementation of {op}"]
    return capability.reasons(device_type, dtype, needs_grad)


def choose(op: str, kernel: str, device_type: str, dtype: torch.dtype, needs_grad: bool) -> str:
    """The kernel that runs ``op``: the one asked for, or the best available for ``"auto"``.

    Raises
    ------
    ValueError
        Unknown kernel name.
    KernelUnavailableError
        The kernel asked for cannot run the call. There is no silent fallback.
    """
    return _choose(op, kernel, device_type, dtype, needs_grad)


# What torch.compiler.assume_constant_result sets; calling it would import all of torch._dynamo.
choose._dynamo_marked_constant = True


@cache
def _choose(op: str, kernel: str, device_type: str, dtype: torch.dtype, needs_grad: bool) -> str:
    check_kernel_name(kernel)
    reasons = {
        name: unsupported_reasons(op, name, device_type, dtype, needs_grad) for name in KERNELS
    }
    able = [name for name in KERNELS if not reasons[name]]
    candidates = KERNELS if kernel == "auto" else (kernel,)
    for name in candidates:
        if name in able:
            return name
    why = "; ".join(f"{name}: {', '.join(reasons[name])}" for name in candidates)
    raise KernelUnavailableError(
        f"{op} cannot run with kernel={kernel!r} ({why}). Kernels that can run this call: "
        f"{', '.join(able) or 'none'}"
    )


def check_kernel_name(kernel: str) -> None:
    """Raise ValueError, listing the known names, unless ``kernel`` is one of them."""
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"unknown kernel {kernel!r}; known: auto, {', '.join(KERNELS)}")


def choose_for(op: str, kernel: str, *tensors: torch.Tensor | None) -> str:
    """:func:`choose` for these tensors; the first one names device and dtype."""
    present = [tensor for tensor in tensors if tensor is not None]
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present)
    return choose(op, kernel, present[0].device.type, present[0].dtype, needs_grad)


def _names(values: frozenset) -> str:
    return ", ".join(sorted(str(value).removeprefix("torch.") for value in values))
