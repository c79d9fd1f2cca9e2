"""Triton kernels: device code, launch configurations as data, ahead-of-time compile check.

Importing this package does not import Triton. The kernels run on CUDA and ROCm devices, and on CPU
tensors in Triton's interpreter where ``TRITON_INTERPRET=1`` was set before Triton was imported.
"""

from __future__ import annotations

import functools
import importlib.util
import sys

from flamingo_kernels import env

__all__ = ["MAX_CHANNELS", "MAX_HEAD_DIM", "unavailable_reason"]

MAX_HEAD_DIM = 128
# A LayerNorm row is held in the registers of one program; the backward of wider rows spills.
MAX_CHANNELS = 8192


def unavailable_reason(device_type: str) -> str | None:
    """Why the Triton kernels cannot run on tensors of ``device_type`` here, or None if they can."""
    missing = _missing()
    if missing:
        return missing
    interpreted = _interpreted()
    if device_type == "cpu" and not interpreted:
        return "on CPU tensors Triton needs TRITON_INTERPRET=1, set before it is first imported"
    if device_type != "cpu" and interpreted:
        return "TRITON_INTERPRET=1 is set: the interpreter runs CPU tensors only"
    return None


@functools.cache
def _missing() -> str | None:
    if not sys.platform.startswith("linux"):
        return f"Triton is available on Linux only, this is {sys.platform}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def _interpreted() -> bool:
    """What holds for this process: decided when Triton was imported, or will be."""
    standard = sys.modules.get("triton.language.standard")
    if standard is None:
        return env.triton_interpret()
    return type(standard.sum).__name__ == "InterpretedFunction"
