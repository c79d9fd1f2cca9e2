"""Choose the kernel that runs an op: capabilities as data, and the reasons against a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from flamingo_kernels import _triton
from flamingo_kernels._cpp import library
from flamingo_kernels.ops.rows import has_unit_stride
from flamingo_kernels.ops.transforms import is_recorded, transform_of

# In order of preference for kernel="auto".
KERNELS = ("triton", "cpp", "torch")
ATTENTION_OPS = ("media_cross_attention", "latent_attention")
ROW_OPS = ("gated_residual", "gated_activation", "layer_norm")
OPS = (*ATTENTION_OPS, *ROW_OPS)


class KernelUnavailableError(RuntimeError):
    """The kernel asked for cannot run this call; the message lists why, and which kernels can."""


class Choice(NamedTuple):
    """The kernel that runs a call."""

    kernel: str
    saves: bool  # it runs as an autograd function, which saves what its backward needs


class Call(NamedTuple):
    """What the choice of a kernel depends on."""

    device_type: str
    dtype: torch.dtype
    needs_grad: bool = False
    head_dim: int | None = None
    plain_strides: bool = True  # every tensor has the strides that compiled kernels take
    channels: int | None = None  # of a row that is normalised
    transform: str | None = None  # what torch asks for beside a first backward


@dataclass(frozen=True)
class Capability:
    """What one kernel can do for one op."""

    device_types: frozenset[str] | None = None  # None: any
    dtypes: frozenset[torch.dtype] | None = None  # None: any floating dtype
    head_dims: range | None = None  # None: any
    max_channels: int | None = None  # None: any
    any_stride: bool = True
    backward: bool = True
    transforms: bool = True
    needs_segments: bool = False  # the backward works from a SegmentTable
    unavailable: Callable[[Call], str | None] = lambda call: None  # why it cannot run here at all

    def reasons(self, call: Call) -> list[str]:
        """Why the kernel cannot run ``call``; empty if it can."""
        reasons = []
        missing = self.unavailable(call)
        if missing:
            reasons.append(missing)
        if self.device_types is not None and call.device_type not in self.device_types:
            reasons.append(
                f"runs on {_names(self.device_types)}, the tensors are on {call.device_type}"
            )
        if self.dtypes is not None and call.dtype not in self.dtypes:
            reasons.append(f"supports {_names(self.dtypes)}, the tensors are {call.dtype}")
        if self.head_dims is not None and call.head_dim not in (None, *self.head_dims):
            reasons.append(
                f"supports head dims {self.head_dims.start} to {self.head_dims.stop - 1}, "
                f"the tensors have {call.head_dim}"
            )
        if self.max_channels is not None and (call.channels or 0) > self.max_channels:
            reasons.append(
                f"supports up to {self.max_channels} channels, the tensors have {call.channels}"
            )
        if not (self.any_stride or call.plain_strides):
            reasons.append(
                "needs a stride of 1 in the last dimension of every tensor (pointwise ops: and at "
                "most two strides before it)"
            )
        if call.needs_grad and not self.backward:
            reasons.append("has no backward and a gradient is needed")
        if call.transform is not None and not self.transforms:
            reasons.append(f'has no {call.transform}; use kernel="torch"')
        return reasons

    def limits(self) -> str:
        """What the kernel takes, in words."""
        dtypes = "any floating dtype" if self.dtypes is None else _names(self.dtypes)
        dims = ""
        if self.head_dims is not None:
            dims = f"; head dims {self.head_dims.start} to {self.head_dims.stop - 1}"
        if self.max_channels is not None:
            dims += f"; up to {self.max_channels} channels"
        return f"{dtypes}{dims}; {'any strides' if self.any_stride else 'unit last stride'}"


_CPU = frozenset({"cpu"})
_FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_CPP = Capability(
    device_types=_CPU,
    dtypes=_FLOATS,
    any_stride=False,
    transforms=False,
    unavailable=lambda call: library.unavailable_reason(),
)


def _triton_reason(call: Call) -> str | None:
    reason = _triton.unavailable_reason(call.device_type)
    if reason is None and call.device_type == "cpu" and call.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly"
    if reason is None and call.device_type != "cpu" and call.dtype == torch.float64:
        return "there are no float64 Triton kernels for a GPU"
    return reason


_TRITON = Capability(
    device_types=frozenset({"cuda", "cpu"}),
    dtypes=_FLOATS,
    any_stride=False,
    transforms=False,
    unavailable=_triton_reason,
)
_TRITON_ATTENTION = replace(_TRITON, head_dims=range(1, _triton.MAX_HEAD_DIM + 1))

CAPABILITIES: dict[tuple[str, str], Capability] = {
    **{(op, "torch"): Capability() for op in OPS},
    **{(op, "cpp"): _CPP for op in OPS},
    **{(op, "triton"): _TRITON for op in ROW_OPS},
    ("layer_norm", "triton"): replace(_TRITON, max_channels=_triton.MAX_CHANNELS),
    ("media_cross_attention", "triton"): replace(_TRITON_ATTENTION, needs_segments=True),
    ("latent_attention", "triton"): _TRITON_ATTENTION,
}


def unsupported_reasons(op: str, kernel: str, call: Call) -> list[str]:
    """Why ``kernel`` cannot run ``op`` for such a call; an empty list means that it can."""
    capability = CAPABILITIES.get((op, kernel))
    if capability is None:
        return [f"flamingo_kernels has no {kernel} implementation of {op}"]
    return capability.reasons(call)


def choose(op: str, kernel: str, call: Call) -> str:
    """Return the kernel that runs ``op``: the one asked for, or for ``"auto"`` the best available.

    Raises
    ------
    ValueError
        Unknown kernel name.
    KernelUnavailableError
        The kernel asked for cannot run the call. There is no silent fallback.
    """
    check_kernel_name(kernel)
    reasons = {name: unsupported_reasons(op, name, call) for name in KERNELS}
    able = [name for name in KERNELS if not reasons[name]]
    # On the CPU Triton means its interpreter, which is for tests: only when asked for.
    automatic = KERNELS[1:] if call.device_type == "cpu" else KERNELS
    candidates = automatic if kernel == "auto" else (kernel,)
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


def choose_for(
    op: str,
    kernel: str,
    *tensors: torch.Tensor | None,
    head_dim: int | None = None,
    channels: int | None = None,
    plain: Callable[[torch.Tensor], bool] = has_unit_stride,
) -> Choice:
    """Apply :func:`choose` to tensors; the first one gives device and dtype.

    ``plain`` tells whether the compiled kernels of the op take the strides of a tensor.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    first = present[0]
    call = Call(
        first.device.type,
        first.dtype,
        needs_grad(*present),
        head_dim,
        all(plain(tensor) for tensor in present),
        channels,
        transform_of(*present),
    )
    return Choice(_constant_choice(op, kernel, *call), saves_for_backward(*present))


def _constant_choice(op: str, kernel: str, *properties: Any) -> str:
    """Apply :func:`choose` as a constant of the graph while torch compiles."""
    return choose(op, kernel, Call(*properties))


# The attribute is all that torch.compiler.assume_constant_result sets; importing its module takes
# 1.6 s. Dynamo rebuilds a named tuple wrongly, so the properties are passed one by one.
_constant_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]


def needs_grad(*tensors: torch.Tensor) -> bool:
    """Whether autograd will ask for a gradient of any of the tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def saves_for_backward(*tensors: torch.Tensor) -> bool:
    """Whether an op must run as an autograd function.

    In a program that torch records, the operators have gradients of their own.
    """
    return needs_grad(*tensors) and not is_recorded()


def _names(values: frozenset) -> str:
    return ", ".join(sorted(str(value).removeprefix("torch.") for value in values))
