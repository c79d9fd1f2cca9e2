"""What torch may do with a call other than run it: record it, or differentiate it in other ways.

torch has public names for some of these questions only; this is the one place that asks the others.
"""

from __future__ import annotations

from torch import Tensor
from torch._C import _is_tracing
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_exporting
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_watched() -> bool:
    """Whether torch must see each operation: it compiles, exports, traces or transforms the call.

    A kernel that reads memory itself would be missing from the program that torch records.
    """
    return (
        is_compiling()
        or is_in_torch_dispatch_mode()
        or _is_tracing()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def is_recorded() -> bool:
    """Whether torch makes a program that outlives the call: ``torch.export``, ``torch.jit.trace``.

    It can hold operators, but no autograd function.
    """
    return is_exporting() or (not is_compiling() and _is_tracing())


def is_batched_gradient(tensor: Tensor) -> bool:
    """Whether the tensor stands for a batch of them, as in ``grad(..., is_grads_batched=True)``."""
    return is_legacy_batchedtensor(tensor)


def transform_of(*tensors: Tensor) -> str | None:
    """Name the derivative that torch takes of a call beside a first backward, or else None.

    Stock PyTorch alone has a formula for forward mode and for the transforms of ``torch.func``.
    """
    if is_compiling():
        return None
    if peek_interpreter_stack() is not None:
        return "transforms of torch.func"
    return "forward-mode derivatives" if has_tangent(*tensors) else None


def has_tangent(*tensors: Tensor) -> bool:
    """Whether one of the tensors is dual: it carries a tangent of forward mode."""
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )
