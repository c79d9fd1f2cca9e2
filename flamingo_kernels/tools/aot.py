"""Compile every kernel with its shipped launch configs for several architectures, without a GPU.

``python -m flamingo_kernels.tools.aot`` runs the Triton launchers of the ops on meta tensors,
compiles what they would launch, and reads registers, spills and shared memory from the result. It
fails on a spill, on shared memory over the limit, and on an attention kernel without tensor-core
instructions. ``--output`` writes the table as Markdown, with the bytes that
:mod:`flamingo_kernels.tools.traffic` counts. Triton keeps what it compiled in its own cache, so a
second run takes seconds per architecture.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flamingo_kernels._triton.launch import Launch, recording
from flamingo_kernels.ops.gated_activation import impl_triton as gated_activation
from flamingo_kernels.ops.gated_residual import impl_triton as gated_residual
from flamingo_kernels.ops.latent_attention import impl_triton as latent_attention
from flamingo_kernels.ops.latent_attention.arguments import Arguments as LatentArguments
from flamingo_kernels.ops.layer_norm import impl_triton as layer_norm
from flamingo_kernels.ops.media_attention import impl_triton as media_attention
from flamingo_kernels.ops.media_attention.arguments import Arguments as MediaArguments
from flamingo_kernels.tools import traffic
from flamingo_kernels.tools.traffic import meta

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# 96 leaves columns of its tile to mask, and so does 32 in fp32 on NVIDIA. fp16 has the tiles of
# bf16, and items of 128 latents those of 64 in fp32: once each shows that they compile.
HEAD_DIMS = {"bf16": (16, 32, 64, 96, 128), "fp16": (64,), "fp32": (32, 64, 128)}
LATENTS = {"bf16": (64, 128), "fp16": (64,), "fp32": (64,)}
CHANNELS = {"bf16": (1024, 2048, 4096, 8192), "fp16": (4096,), "fp32": (1024, 2048, 4096, 8192)}
ATTENTION = re.compile("^(media|latent)_(forward|backward|rows|keys)")
Place = tuple[int, ...]  # of an argument, and of a value in it if it is a tuple
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Architecture:
    """What a kernel may use; sizes in bytes, per multiprocessor (compute unit on AMD)."""

    target: GPUTarget
    shared_per_program: int
    shared: int
    warps: int
    tensor_core: str  # pattern of the instructions

    @property
    def is_amd(self) -> bool:
        return self.target.backend == "hip"


KIB = 1024
ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 163 * KIB, 164 * KIB, 64, r"mma\.sync"),
    "sm_86": Architecture(GPUTarget("cuda", 86, 32), 99 * KIB, 100 * KIB, 48, r"mma\.sync"),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 227 * KIB, 228 * KIB, 64, r"(wg)?mma[._]"),
    "sm_100": Architecture(
        GPUTarget("cuda", 100, 32), 227 * KIB, 228 * KIB, 64, r"tcgen05\.mma|mma\.sync"
    ),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 64 * KIB, 64 * KIB, 32, r"v_mfma"),
}

# sm_86 has configs of its own too: ``--arch sm_86`` checks them.
DEFAULT = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Result:
    """What one compiled kernel uses."""

    kernel: str
    architecture: str
    warps: int
    registers: int  # per thread
    spill: int  # bytes of stack per thread on NVIDIA, spilled registers on AMD
    shared: int  # bytes
    tensor_cores: bool | None  # None: the kernel has no matrix product

    @property
    def programs(self) -> int:
        """Programs per multiprocessor that registers, shared memory and warp slots allow."""
        machine = ARCHITECTURES[self.architecture]
        if machine.is_amd:  # four SIMDs of 512 registers a lane, at most 8 waves each
            waves = min(8, 512 // max(-(-self.registers // 8) * 8, 8))
            by_registers = 4 * waves // self.warps
        else:
            by_registers = 65536 // (-(-max(self.registers, 1) // 8) * 8 * 32 * self.warps)
        by_shared = machine.shared // (self.shared + KIB) if self.shared else machine.warps
        return min(by_registers, by_shared, machine.warps // self.warps, 32)

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's warp slots that these programs fill."""
        return self.programs * self.warps / ARCHITECTURES[self.architecture].warps

    def problems(self) -> list[str]:
        """Reasons not to ship this config."""
        limit = ARCHITECTURES[self.architecture].shared_per_program
        found = []
        if self.spill:
            found.append(f"spills ({self.spill})")
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, the limit is {limit}")
        if self.tensor_cores is False:
            found.append("no tensor-core instruction")
        return found


def media_calls(dtype: torch.dtype, head_dim: int, latents: int, group: int = 1) -> None:
    """Forward and both backwards of media attention, on views of fused projections."""
    q, d_out = (meta(2, 4096, 8, head_dim, dtype=dtype) for _ in range(2))
    k, v = meta(2, 5, latents, 2, 8 // group, head_dim, dtype=dtype).unbind(3)
    first, last = (meta(2, 4096, dtype=torch.int32) for _ in range(2))
    gate = meta(1, dtype=torch.float32)
    for single_item in (True, False):
        arguments = MediaArguments(q, k, v, first, last, gate, head_dim**-0.5, single_item)
        media_attention.forward(arguments)
        # The two passes loop over an item's tiles: one head dim shows that several of them compile.
        if single_item or latents == 64 or head_dim == 64:
            media_attention.backward(d_out, None, arguments)


def key_range_calls(dtype: torch.dtype, head_dim: int) -> None:
    """Forward and backward of a flat list of keys, and the forward of a decoding step."""
    k, v = meta(2, 8192, 1, 2, 8, head_dim, dtype=dtype).unbind(3)
    for tokens in (4096, 1):
        q, d_out = (meta(2, tokens, 8, head_dim, dtype=dtype) for _ in range(2))
        first, last = (meta(2, tokens, dtype=torch.int32) for _ in range(2))
        gate = meta(1, dtype=torch.float32)
        arguments = MediaArguments(q, k, v, first, last, gate, head_dim**-0.5, False)
        media_attention.forward(arguments)
        if tokens > 1:
            media_attention.backward(d_out, None, arguments)


def latent_calls(dtype: torch.dtype, head_dim: int, group: int = 1) -> None:
    """Forward, split and not, and backward of latent attention with lengths."""
    lengths = meta(2, dtype=torch.int32)
    for keys in (256, 8192):
        q, d_out = (meta(2, 64, 8, head_dim, dtype=dtype) for _ in range(2))
        k, v = meta(2, keys, 2, 8 // group, head_dim, dtype=dtype).unbind(2)
        k_latents, v_latents = (meta(2, 64, 8 // group, head_dim, dtype=dtype) for _ in range(2))
        arguments = LatentArguments(q, k, v, k_latents, v_latents, lengths, head_dim**-0.5)
        out, lse = latent_attention.forward(arguments)
        latent_attention.backward(d_out, arguments, out, lse)


def pointwise_calls(dtype: torch.dtype, channels: int, rows: int = 8192) -> None:
    """Every pointwise kernel, with scalar and vector gates and each activation."""
    x, d_out = (meta(rows, channels, dtype=dtype) for _ in range(2))
    weight = meta(channels, dtype=dtype)
    for gate in (meta(1, dtype=torch.float32), meta(channels, dtype=torch.float32)):
        gated_residual.forward(x, d_out, gate)
        gated_residual.backward(d_out, x, gate)
    for activation in ("gelu", "squared_relu", "relu"):
        gate = meta(1, dtype=torch.float32)
        gated_activation.forward(x, gate, activation)
        gated_activation.backward(d_out, x, gate, activation)
    _, mean, rstd = layer_norm.forward(x, weight, weight, 1e-5)
    layer_norm.backward(d_out, x, weight, mean, rstd, True)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield (label, calls) that between them use every shipped config."""
    for name, dtype in DTYPES.items():
        for head_dim in HEAD_DIMS[name]:
            for latents in LATENTS[name]:
                label = f"{name} D{head_dim} R{latents}"
                yield label, partial(media_calls, dtype, head_dim, latents)
            yield f"{name} D{head_dim} keys", partial(key_range_calls, dtype, head_dim)
            yield f"{name} D{head_dim}", partial(latent_calls, dtype, head_dim)
        for channels in CHANNELS[name]:
            yield f"{name} C{channels}", partial(pointwise_calls, dtype, channels)
    yield "fp32 D64 R128", partial(media_calls, torch.float32, 64, 128)
    yield "bf16 D64 R64 G4", partial(media_calls, torch.bfloat16, 64, 64, group=4)
    for name, head_dim in (("bf16", 64), ("bf16", 96), ("fp32", 64)):
        yield f"{name} D{head_dim} G4", partial(latent_calls, DTYPES[name], head_dim, group=4)
    yield "bf16 C4096 past 32 bits", partial(pointwise_calls, torch.bfloat16, 4096, rows=2**20)


def record(
    architecture: str, pattern: str = "", selected: Iterable[tuple[str, Callable[[], None]]] = ()
) -> list[tuple[str, Launch]]:
    """Distinct launches of ``selected`` cases (all by default) whose label or kernel matches."""
    found: dict[str, tuple[str, Launch]] = {}
    for label, calls in selected or cases():
        with recording(architecture) as recorder:
            calls()
        for launch in recorder.launches:
            name = launch.kernel.fn.__name__
            if re.search(pattern, f"{label} {name}"):
                found.setdefault(str((name, launch.config, _specialised(launch))), (label, launch))
    return list(found.values())


def _specialised(launch: Launch) -> tuple[dict[str, Any], dict[Place, Any], list[Place]]:
    """Return signature, constants and what is known to be a multiple of 16, as at run time.

    Constants and multiples are named by the place of the argument, and of the value in a tuple.
    """
    signature: dict[str, Any] = {}
    constants: dict[Place, Any] = {}
    aligned: list[Place] = []

    def specialise(value: Any, path: Place, is_constexpr: bool) -> Any:
        if isinstance(value, tuple) and not is_constexpr:
            parts = [specialise(part, (*path, i), False) for i, part in enumerate(value)]
            return type(value)(*parts)
        if isinstance(value, Tensor):
            aligned.append(path)
            return POINTERS[value.dtype]
        if is_constexpr or value is None or value == 1:
            constants[path] = value
            return "constexpr"
        if value % 16 == 0:
            aligned.append(path)
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        signature[parameter.name] = specialise(value, (i,), parameter.is_constexpr)
    return signature, constants, aligned


def compile_launch(launch: Launch, architecture: str) -> Result:
    """Compile one launch for ``architecture`` and read what it uses."""
    machine = ARCHITECTURES[architecture]
    signature, constants, aligned = _specialised(launch)
    source = ASTSource(
        fn=launch.kernel,
        signature=signature,
        constexprs=constants,
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
    compiled = triton.compile(source, target=machine.target, options=options)
    if machine.is_amd:
        text = compiled.asm["amdgcn"]
        # vgpr_count holds the accumulation registers too.
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        spill = _number(r"\.vgpr_spill_count:\s+(\d+)", text)
        spill += _number(r"\.sgpr_spill_count:\s+(\d+)", text)
    else:
        text = compiled.asm["ptx"]
        registers, spill = _cubin_usage(compiled.asm["cubin"])
    name = launch.kernel.fn.__name__
    wants_tensor_cores = bool(ATTENTION.match(name))
    return Result(
        kernel=name,
        architecture=architecture,
        warps=launch.config.num_warps,
        registers=registers,
        spill=spill,
        shared=compiled.metadata.shared,
        tensor_cores=bool(re.search(machine.tensor_core, text)) if wants_tensor_cores else None,
    )


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    usage = done.stdout + done.stderr
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"{pattern!r} is not in the compiler's output")
    return int(match.group(1))


def _tiles(arguments: dict[str, Any]) -> str:
    names = {"BLOCK_T": "rows", "BLOCK_L": "rows", "BLOCK_R": "keys", "BLOCK_K": "keys"}
    parts = [f"{arguments[key]} {what}" for key, what in names.items() if key in arguments]
    extra = [arguments[key] for key in ("ACTIVATION",) if key in arguments]
    flags = [key.lower() for key in ("ONE_TILE", "IS_SPLIT", "VECTOR") if arguments.get(key)]
    return ", ".join([*parts, *extra, *flags])


def launch_columns(architecture: str, label: str, launch: Launch) -> str:
    """The columns of the table that are known before compiling."""
    config = launch.config
    name = launch.kernel.fn.__name__.removesuffix("_kernel")
    tiles = _tiles(launch.arguments)
    return (
        f"| {name} | {label} | {architecture} | {tiles} | {config.num_warps} | {config.num_stages} "
    )


HEADER = (
    "| kernel | case | arch | tile | warps | stages | registers | spill | shared KB | programs "
    "| occupancy |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(columns: str, result: Result) -> str:
    """One line of the Markdown table."""
    return (
        f"{columns}| {result.registers} | {result.spill} | {result.shared / KIB:.1f} "
        f"| {result.programs} | {result.occupancy:.0%} |"
    )


def page(rows: list[str]) -> str:
    """The whole document."""
    return "\n".join(
        [
            "# Triton kernels at compile time",
            "",
            f"Written by `make aot` with Triton {triton.__version__}; not edited by hand. Nothing "
            "here was run or measured on a GPU.",
            "",
            "## Bytes moved",
            "",
            traffic.EXPLANATION,
            "",
            *traffic.table(),
            "",
            "## What each kernel uses",
            "",
            "Registers per thread (AMD: vector and accumulation registers), spills in bytes of "
            "stack (AMD: registers), shared memory of a program, programs that fit a "
            "multiprocessor at once, and the share of its warp slots that these fill.",
            "",
            HEADER,
            *rows,
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 where a kernel fails a check."""
    parser = argparse.ArgumentParser(prog="python -m flamingo_kernels.tools.aot")
    parser.add_argument("--arch", nargs="+", default=DEFAULT, choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="regular expression over case and kernel name")
    parser.add_argument("--output", type=Path, help="write the table here, as Markdown")
    parser.add_argument(
        "--list", action="store_true", help="print what would be compiled, compile nothing"
    )
    options = parser.parse_args(arguments)
    if type(tl.sum).__name__ == "InterpretedFunction":
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")

    work = [(arch, *item) for arch in options.arch for item in record(arch, options.only)]
    rows, failures, start = [], 0, time.monotonic()
    for i, (architecture, label, launch) in enumerate(work):
        columns = launch_columns(architecture, label, launch)
        if options.list:
            print(columns)
            continue
        result = compile_launch(launch, architecture)
        rows.append(row(columns, result))
        problems = result.problems()
        failures += bool(problems)
        if problems:
            print(f"{rows[-1]} FAILED: {'; '.join(problems)}", flush=True)
        progress = f"[{i + 1}/{len(work)}] {time.monotonic() - start:.0f} s, {failures} failed"
        print(f"{progress}: {architecture} {result.kernel}", file=sys.stderr, flush=True)
    if not options.list:
        print(f"{len(rows)} compiled, {failures} failed", flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(page(rows))
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
