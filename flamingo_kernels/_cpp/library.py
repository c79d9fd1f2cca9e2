"""Finding, checking and calling the native CPU library."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Before the library: it then binds to the OpenMP runtime that torch has loaded.
import torch

from flamingo_kernels import env

ABI_VERSION = 5

_INSTALLED_LIBRARY = Path(__file__).with_name("libflamingo_cpu.so")
# flamingo_execution, for the module struct: dtype, instruction set, threads.
EXECUTION = "3i"
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class NativeLibraryError(RuntimeError):
    """The native library cannot be used; the message is the reason."""


@dataclass(frozen=True)
class _Library:
    handle: ctypes.CDLL
    version: str
    build_flags: str
    detected: dict[str, int]  # name -> bit mask, slowest first
    usable: dict[str, int]
    selected: str


def _open(path: Path) -> ctypes.CDLL:
    if not path.is_file():
        raise NativeLibraryError(
            f"the native library is not at {path}: install with a C++ compiler and without "
            "FLAMINGO_BUILD_CPP=0, or run 'make build' in a checkout"
        )
    try:
        handle = ctypes.CDLL(str(path))
        handle.flamingo_abi_version.restype = ctypes.c_int32
        found = handle.flamingo_abi_version()
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(f"{path} is not a loadable native library: {error}") from error
    if found != ABI_VERSION:
        raise NativeLibraryError(
            f"{path} has ABI version {found}, this package needs {ABI_VERSION}: "
            "build it again with 'make build' or reinstall"
        )
    return handle


def _select(
    requested: str | None, known: list[str], detected: dict[str, int], usable: dict[str, int]
) -> str:
    if requested is None:
        return list(usable)[-1]
    if requested in usable:
        return requested
    if requested not in known:
        why = "is no instruction set"
    elif requested not in detected:
        why = "is not supported by this processor"
    else:
        why = "was not compiled into the native library"
    raise NativeLibraryError(
        f"FLAMINGO_CPU_ISA={requested!r} {why}; usable here: {', '.join(usable)}"
    )


def _load(path: Path) -> _Library:
    handle = _open(path)
    for name in ("flamingo_version", "flamingo_build_flags"):
        getattr(handle, name).restype = ctypes.c_char_p
    for name in ("flamingo_status_message", "flamingo_instruction_set_name"):
        getattr(handle, name).restype = ctypes.c_char_p
        getattr(handle, name).argtypes = [ctypes.c_int32]
    for name in ("flamingo_detected_instruction_sets", "flamingo_usable_instruction_sets"):
        getattr(handle, name).restype = ctypes.c_uint32
    handle.flamingo_sizeof.restype = ctypes.c_int64
    handle.flamingo_sizeof.argtypes = [ctypes.c_char_p]
    handle.flamingo_multiply_add_rate.restype = ctypes.c_double
    handle.flamingo_multiply_add_rate.argtypes = [ctypes.c_void_p, ctypes.c_double]

    known: list[str] = []
    while name := handle.flamingo_instruction_set_name(len(known)):
        known.append(name.decode())
    detected, usable = (
        {name: 1 << bit for bit, name in enumerate(known) if mask >> bit & 1}
        for mask in (
            handle.flamingo_detected_instruction_sets(),
            handle.flamingo_usable_instruction_sets(),
        )
    )
    return _Library(
        handle=handle,
        version=handle.flamingo_version().decode(),
        build_flags=handle.flamingo_build_flags().decode(),
        detected=detected,
        usable=usable,
        selected=_select(env.cpu_isa(), known, detected, usable),
    )


@functools.cache
def _outcome() -> _Library | NativeLibraryError:
    try:
        return _load(env.cpp_library_path() or _INSTALLED_LIBRARY)
    except NativeLibraryError as error:
        return error


def _library() -> _Library:
    outcome = _outcome()
    if isinstance(outcome, _Library):
        return outcome
    # A fresh exception each time: raising the cached one would pile up tracebacks on it.
    raise NativeLibraryError(str(outcome))


def load() -> ctypes.CDLL:
    """Return the native library, loaded on the first call.

    Raises
    ------
    NativeLibraryError
        It is missing, cannot be loaded, has another ABI version, or FLAMINGO_CPU_ISA names an
        instruction set that cannot be used.
    """
    return _library().handle


def unavailable_reason() -> str | None:
    """Why the native library cannot be used, or None where it can."""
    outcome = _outcome()
    return None if isinstance(outcome, _Library) else str(outcome)


def version() -> str:
    """Package version that the native library was built from."""
    return _library().version


def build_flags() -> str:
    """Compiler, its version and flags, and in brackets the instruction sets compiled in."""
    return _library().build_flags


def instruction_sets() -> tuple[str, ...]:
    """Names of the instruction sets that processor and system support, slowest first."""
    return tuple(_library().detected)


def usable_instruction_sets() -> tuple[str, ...]:
    """Names of the supported instruction sets that kernels were compiled for, slowest first."""
    return tuple(_library().usable)


def selected_instruction_set() -> str:
    """Name of the set that kernels run with: the best usable one, or FLAMINGO_CPU_ISA."""
    return _library().selected


def dtype_and_set(dtype: torch.dtype) -> tuple[int, int]:
    """The first two values of ``EXECUTION``: code of ``dtype``, the selected set's bit."""
    library = _library()
    return DTYPE_CODES[dtype], library.usable[library.selected]


@functools.cache
def function(name: str) -> Callable[[bytes], None]:
    """The C function ``name``, which takes its packed params.

    ctypes takes longer to fill in a structure than a decoding step takes to compute.

    Returns
    -------
    callable
        Raises RuntimeError with the library's message if it rejects the params.

    Raises
    ------
    NativeLibraryError
        As for :func:`load`.
    """

    def check(status: int, *_: object) -> None:
        if status:
            message = load().flamingo_status_message(status).decode()
            raise RuntimeError(f"{name}: {message} (status {status})")

    found = getattr(_library().handle, name)
    found.restype = ctypes.c_int32
    found.argtypes = [ctypes.c_void_p]
    found.errcheck = check
    return found


def struct_size(name: str) -> int:
    """Return the bytes of a struct of the C interface, such as ``"flamingo_tensor"``.

    Raises
    ------
    NativeLibraryError
        As for :func:`load`.
    ValueError
        The interface has no struct of this name.
    """
    size = load().flamingo_sizeof(name.encode())
    if size < 0:
        raise ValueError(f"the native library has no struct {name!r}")
    return size


def multiply_add_rate(dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Floating point operations per second that the kernels' arithmetic reaches on registers alone.

    The ceiling of what the attention kernels can do with ``torch.get_num_threads()`` threads and
    inputs of ``dtype``; takes about ``seconds``.
    """
    params = struct.pack(EXECUTION, *dtype_and_set(dtype), torch.get_num_threads())
    return load().flamingo_multiply_add_rate(params, seconds)
