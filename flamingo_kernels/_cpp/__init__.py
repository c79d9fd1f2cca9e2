"""The native CPU library: found, checked and loaded once, on first use, through ctypes.

The structs and signatures here mirror ``csrc/include/flamingo_cpu.h``; ``ABI_VERSION`` ties the two
together. Arguments are not checked here: the public ops do that.

Shape letters: B rows, T text tokens, I media slots, R latents per media item, H query heads,
Hkv key/value heads, D head dim.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

# Before the library: it then binds to the OpenMP runtime that torch has loaded.
import torch

from flamingo_kernels import env

__all__ = [
    "NativeLibraryError",
    "build_flags",
    "instruction_sets",
    "load",
    "media_attention_forward",
    "selected_instruction_set",
    "unavailable_reason",
    "usable_instruction_sets",
    "version",
]

ABI_VERSION = 1

_INSTALLED_LIBRARY = Path(__file__).with_name("libflamingo_cpu.so")
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1}


class NativeLibraryError(RuntimeError):
    """The native library cannot be used; the message is the reason."""


class _MediaAttentionForwardParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "first", "last", "gate", "out")),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "tokens", "media", "latents", "heads", "kv_heads", "head_dim")
        ),
        *((f"q_stride_{dim}", ctypes.c_int64) for dim in "bth"),
        *((f"k_stride_{dim}", ctypes.c_int64) for dim in "birh"),
        *((f"v_stride_{dim}", ctypes.c_int64) for dim in "birh"),
        *((f"first_stride_{dim}", ctypes.c_int64) for dim in "bt"),
        *((f"last_stride_{dim}", ctypes.c_int64) for dim in "bt"),
        *((f"out_stride_{dim}", ctypes.c_int64) for dim in "bth"),
        ("scale", ctypes.c_double),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("instruction_set", ctypes.c_int32),
    ]


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
    requested: str | None, known: list[str], detected: object, usable: dict[str, int]
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
    handle.flamingo_media_attention_forward.restype = ctypes.c_int32
    handle.flamingo_media_attention_forward.argtypes = [
        ctypes.POINTER(_MediaAttentionForwardParams)
    ]

    known = []
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


def media_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    gate: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Attention of each text token to the latents of its range of media items, on the CPU.

    Parameters
    ----------
    q : Tensor [B, T, H, D]
        float32 or float64; here as for k and v any strides with a last one of 1.
    k, v : Tensor [B, I, R, Hkv, D]
        Same dtype. Media items outside every range are never read.
    first, last : Tensor [B, T]
        int32, the inclusive range of media items of each token, empty where first > last.
    gate : Tensor of one element, optional
        Same dtype; the result is multiplied by its tanh.
    scale : float
        Multiplies the scores.

    Returns
    -------
    Tensor [B, T, H, D]
        Contiguous, dtype of q; exact zeros where a range is empty.

    Raises
    ------
    NativeLibraryError
        As for `load`.
    RuntimeError
        The library rejects the arguments.
    """
    library = _library()
    assert q.dtype in _DTYPE_CODES and q.dtype == k.dtype == v.dtype, (q.dtype, k.dtype, v.dtype)
    assert first.dtype == last.dtype == torch.int32, (first.dtype, last.dtype)
    assert gate is None or (gate.dtype, gate.numel()) == (q.dtype, 1)
    assert all(x.is_cpu for x in (q, k, v, first, last))
    assert all(x.stride(-1) == 1 or x.shape[-1] <= 1 for x in (q, k, v))

    out = torch.empty(q.shape, dtype=q.dtype)
    rows, tokens, heads, head_dim = q.shape
    _, media, latents, kv_heads, _ = k.shape
    params = _MediaAttentionForwardParams(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        first.data_ptr(),
        last.data_ptr(),
        None if gate is None else gate.data_ptr(),
        out.data_ptr(),
        rows,
        tokens,
        media,
        latents,
        heads,
        kv_heads,
        head_dim,
        *q.stride()[:3],
        *k.stride()[:4],
        *v.stride()[:4],
        *first.stride(),
        *last.stride(),
        *out.stride()[:3],
        scale,
        _DTYPE_CODES[q.dtype],
        torch.get_num_threads(),
        library.usable[library.selected],
    )
    status = library.handle.flamingo_media_attention_forward(params)
    if status != 0:
        message = library.handle.flamingo_status_message(status).decode()
        raise RuntimeError(f"flamingo_media_attention_forward: {message} (status {status})")
    return out
