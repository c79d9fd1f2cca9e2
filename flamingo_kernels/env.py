"""All environment variables that the package reads; no other module of it uses ``os.environ``.

FLAMINGO_CPP_LIBRARY
    Path of the native library to load instead of the one installed with the package.
FLAMINGO_CPU_ISA
    Instruction set of the native kernels, by a name that ``flamingo-kernels info`` lists, for
    example ``portable``. Default: the best one that this processor has and the library was built
    for. It is read once, when the library is loaded. A name that cannot be used makes the library
    unavailable; ``info`` prints the reason.
FLAMINGO_TRITON_CONFIGS
    Path of a file of launch configurations that ``python -m flamingo_kernels.tools.tune`` wrote;
    they replace the shipped ones of the same key. It is read once, at the first launch.
TRITON_INTERPRET
    ``1`` runs Triton kernels in Triton's interpreter, on the CPU. Triton reads it when a kernel's
    module is imported, so it must be set before.

setup.py reads one more: ``FLAMINGO_BUILD_CPP=0`` leaves the native library out of an install.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cpp_library_path", "cpu_isa", "triton_configs_path", "triton_interpret"]


def cpp_library_path() -> Path | None:
    """Return the path in FLAMINGO_CPP_LIBRARY, or None if it is unset or empty."""
    value = os.environ.get("FLAMINGO_CPP_LIBRARY")
    return Path(value) if value else None


def cpu_isa() -> str | None:
    """Return the name in FLAMINGO_CPU_ISA, or None if it is unset or empty.

    The library validates it.
    """
    return os.environ.get("FLAMINGO_CPU_ISA") or None


def triton_configs_path() -> Path | None:
    """Return the path in FLAMINGO_TRITON_CONFIGS, or None if it is unset or empty."""
    value = os.environ.get("FLAMINGO_TRITON_CONFIGS")
    return Path(value) if value else None


def triton_interpret() -> bool:
    """Return whether TRITON_INTERPRET asks for Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"
