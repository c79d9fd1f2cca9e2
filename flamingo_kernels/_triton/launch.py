"""Launch kernels on the device of their tensors, or record the launches without a device.

The ahead-of-time check (:mod:`flamingo_kernels.tools.aot`) records what the launchers of the ops do
with meta tensors, so it compiles what runs and not a copy of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

import torch
import triton.language as tl
from torch import Tensor

from flamingo_kernels._triton import configs
from flamingo_kernels._triton.configs import LaunchConfig
from flamingo_kernels._triton.reduce import sum_partials_kernel

# Programs that keep an H200 (132 multiprocessors) busy: about two each. Work is split along keys or
# rows, at the price of partial sums, until there are so many.
TARGET_PROGRAMS = 256


Layout = TypeVar("Layout", bound=tuple)


def strided(layout: type[Layout], tensor: Tensor) -> Layout:
    """Pair a tensor with its leading strides, as one argument of a kernel.

    ``layout`` is a named tuple of a pointer and of the strides that the kernel uses. The last
    stride of the tensor is 1.
    """
    strides = len(layout._fields) - 1  # type: ignore[attr-defined]
    return layout(tensor, *tensor.stride()[:strides])  # type: ignore[call-arg]


def tensors_of(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among arguments of a kernel, those inside of layouts included."""
    for value in arguments:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors_of(value)


@dataclass
class Launch:
    """One kernel launch: what to compile and with which options."""

    kernel: Any
    grid: tuple[int, ...]
    config: LaunchConfig
    arguments: dict[str, Any]


@dataclass
class Recorder:
    """The launches made under :func:`recording`, for one architecture."""

    architecture: str
    launches: list[Launch] = field(default_factory=list)


_RECORDER: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def recording(architecture: str) -> Iterator[Recorder]:
    """Make :func:`launch` record instead of run, with the configs of ``architecture``."""
    recorder = Recorder(architecture)
    token = _RECORDER.set(recorder)
    try:
        yield recorder
    finally:
        _RECORDER.reset(token)


def launch(kernel: Any, grid: Sequence[int], config: LaunchConfig, **arguments: Any) -> None:
    """Run ``kernel`` over ``grid``, which may be empty, on the device of its tensors."""
    if 0 in grid:
        return
    recorder = _RECORDER.get()
    if recorder is not None:
        recorder.launches.append(Launch(kernel, tuple(grid), config, arguments))
        return
    device = next(tensors_of(arguments.values())).device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[tuple(grid)](**arguments, num_warps=config.num_warps, num_stages=config.num_stages)


def architecture(tensor: Tensor) -> str:
    """Return ``"sm_90"``, ``"gfx942"`` and the like, or ``"interpreter"``."""
    recorder = _RECORDER.get()
    if recorder is not None:
        return recorder.architecture
    if tensor.device.type == "cpu":
        return configs.INTERPRETER
    return _device_architecture(tensor.device.index)


@functools.cache
def _device_architecture(index: int | None) -> str:
    properties = torch.cuda.get_device_properties(index)
    name = getattr(properties, "gcnArchName", "")
    if name.startswith("gfx"):
        return name.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def triton_accumulator(dtype: torch.dtype) -> tl.dtype:
    """Return :func:`~flamingo_kernels.precision.accumulator` as a Triton type."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def padded(size: int, least: int = 16) -> int:
    """Return the power of two that holds ``size``, at least the side of a tensor-core tile."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def padded_head_dim(q: Tensor) -> int:
    """Return the width of the tiles of ``q``. Padding is masked, so it moves no bytes.

    fp32 tiles narrower than 64 spill on NVIDIA: TF32 products of so few columns repeat registers.
    """
    narrowest = 64 if q.element_size() == 4 and architecture(q).startswith("sm_") else 16
    return padded(q.shape[-1], narrowest)


@overload
def dense(parameter: Tensor) -> Tensor: ...
@overload
def dense(parameter: Tensor | None) -> Tensor | None: ...
def dense(parameter: Tensor | None) -> Tensor | None:
    """Return a gate, weight or bias in contiguous memory; None stays None."""
    return None if parameter is None else parameter.contiguous()


def reduce_partials(partials: Tensor, out: Tensor, gate: Tensor | None = None) -> None:
    """Sum ``partials`` [count, *out.shape], contiguous, into ``out`` in a fixed order.

    With ``gate``, of the shape of ``out``, the sums are gradients of its tanh; ``out`` becomes the
    gradient of the gate itself.
    """
    if out.numel() == 1:
        config = configs.SUM_ONE
    else:
        config = configs.SUM_TALL if partials.shape[0] > 16 else configs.SUM_WIDE
    launch(
        sum_partials_kernel,
        (-(-out.numel() // config.keys),),
        config,
        partials=partials,
        gate=gate,
        out=out,
        COUNT=partials.shape[0],
        SIZE=out.numel(),
        BLOCK_ROWS=config.rows,
        BLOCK=config.keys,
    )


def gate_gradient(partials: Tensor, gate: Tensor) -> Tensor:
    """Return the gradient of ``gate`` from partial sums [count, gate.numel()] of its tanh's."""
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    reduce_partials(partials, d_gate, gate.contiguous())
    return d_gate


def dot_precision(tensor: Tensor) -> str:
    """Return how fp32 products are formed; those of 16-bit and fp64 values ignore it.

    NVIDIA has no fp32 tensor cores; three TF32 products recover fp32's precision on its tensor
    cores, and leave the kernels free of the thousands of unrolled fused multiply-adds of "ieee".
    """
    return "tf32x3" if architecture(tensor).startswith("sm_") else "ieee"
