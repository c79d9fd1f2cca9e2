"""The native library: loading, what it says of itself, and strided media attention.

Shape letters: B rows, T text tokens, I media slots, R latents, H query heads, Hkv key/value heads,
D head dim.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flamingo_kernels
from flamingo_kernels._cpp import library
from flamingo_kernels.ops.media_attention import impl_cpp
from flamingo_kernels.ops.media_attention.arguments import Arguments
from testing.budgets import assert_close_to_reference

ROOT = Path(__file__).resolve().parents[2]

PROBE = """
import torch
from flamingo_kernels._cpp import library
print(library.unavailable_reason() or library.selected_instruction_set())
try:
    library.load()
    print("loaded")
except RuntimeError as error:
    print(type(error).__name__, error)
"""


def probe(**environment: str) -> list[str]:
    """Lines of: the reason or the selected instruction set; what loading says, in a new process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FLAMINGO_")}
    run = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return run.stdout.splitlines()


def test_version_is_the_packages() -> None:
    assert library.version() == flamingo_kernels.__version__
    assert library.unavailable_reason() is None
    assert library.load() is library.load()


def test_build_flags_name_the_compiled_instruction_sets() -> None:
    compiled = library.build_flags().partition("[")[2].rstrip("]").split()
    assert compiled[0] == "portable"
    assert set(library.usable_instruction_sets()) == set(compiled) & set(library.instruction_sets())


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists(), reason="the kernel's list of processor flags is Linux's"
)
def test_instruction_sets_are_the_kernels_flags() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    needs = {
        "portable": set(),
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx2", "fma", "avx512f", "avx512dq", "avx512bw", "avx512vl"},
        "avx512_bf16": {
            "avx2",
            "fma",
            "avx512f",
            "avx512dq",
            "avx512bw",
            "avx512vl",
            "avx512_bf16",
        },
    }
    assert library.instruction_sets() == tuple(n for n, needed in needs.items() if needed <= flags)


def test_missing_library_is_a_reason_not_an_import_error(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.so"
    reason, error = probe(FLAMINGO_CPP_LIBRARY=str(missing))
    assert reason.startswith(f"the native library is not at {missing}: ")
    assert "FLAMINGO_BUILD_CPP=0" in reason
    assert error == f"NativeLibraryError {reason}"


def test_foreign_file_is_a_reason(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.so"
    foreign.write_text("not a library")
    reason, error = probe(FLAMINGO_CPP_LIBRARY=str(foreign))
    assert reason.startswith(f"{foreign} is not a loadable native library: ")
    assert error == f"NativeLibraryError {reason}"


def test_another_abi_version_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI_VERSION", 999)
    with pytest.raises(
        library.NativeLibraryError, match=r"has ABI version \d+, this package needs 999"
    ):
        library._load(library._INSTALLED_LIBRARY)


def test_struct_sizes_are_the_compilers() -> None:
    assert library.struct_size("flamingo_execution") == struct.calcsize(library.EXECUTION)
    assert library.struct_size("flamingo_tensor") == struct.calcsize("@5q")
    assert library.struct_size("flamingo_rows") == struct.calcsize("@4q")


def test_an_unknown_struct_has_no_size() -> None:
    with pytest.raises(ValueError, match="no struct 'flamingo_tensors'"):
        library.struct_size("flamingo_tensors")


def test_environment_selects_the_instruction_set() -> None:
    for name in library.usable_instruction_sets():
        assert probe(FLAMINGO_CPU_ISA=name) == [name, "loaded"]


def test_unknown_instruction_set_is_a_reason() -> None:
    reason, _ = probe(FLAMINGO_CPU_ISA="sse9")
    usable = ", ".join(library.usable_instruction_sets())
    assert reason == f"FLAMINGO_CPU_ISA='sse9' is no instruction set; usable here: {usable}"


def test_the_best_usable_instruction_set_is_the_default() -> None:
    assert probe() == [library.usable_instruction_sets()[-1], "loaded"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's process maps")
def test_one_openmp_runtime_is_torchs() -> None:
    script = (
        "from flamingo_kernels._cpp import library; library.load();"
        "print(open('/proc/self/maps').read())"
    )
    maps = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout.splitlines()
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    assert len(runtimes) == 1, runtimes


def expected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    gate: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The definition, token by token: [B, T, H, D] in fp64."""
    heads, kv_heads = q.shape[2], k.shape[3]
    out_BTHD = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            items = range(max(int(first[b, t]), 0), min(int(last[b, t]) + 1, k.shape[1]))
            if not items:
                continue
            keys, values = (x[b, items.start : items.stop].flatten(0, 1).double() for x in (k, v))
            for h in range(heads):
                kv_head = h // (heads // kv_heads)
                weights = (keys[:, kv_head] @ q[b, t, h].double() * scale).softmax(0)
                out_BTHD[b, t, h] = weights @ values[:, kv_head]
    return out_BTHD if gate is None else out_BTHD * gate.double().tanh()


def forward(*arguments) -> torch.Tensor:
    return impl_cpp.forward(Arguments(*arguments, single_item=False))


def backward(d_out: torch.Tensor, *arguments) -> tuple[torch.Tensor, ...]:
    return impl_cpp.backward(d_out, Arguments(*arguments, single_item=False))


def strided(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Normal values, outer dimensions reversed in memory and NaN between rows."""
    outer = tuple(reversed(shape[:-1]))
    memory = torch.full((*outer, shape[-1] + 3), torch.nan, dtype=dtype)
    view = memory.permute(*reversed(range(len(outer))), len(outer))[..., : shape[-1]]
    return view.copy_(torch.randn(shape, dtype=dtype))


RANGES = {
    "last": (torch.tensor([[-1, 0, 0, 2, 3], [-1, -1, 1, 1, 1]]),) * 2,
    "previous": (torch.zeros(2, 5), torch.tensor([[-1, 0, 0, 2, 3], [-1, -1, 1, 1, 1]])),
    "clipped": (torch.full((2, 5), -7), torch.full((2, 5), 9)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("gated", [False, True])
def test_media_attention_of_strided_tensors(ranges: str, dtype: torch.dtype, gated: bool) -> None:
    torch.manual_seed(0)
    q = strided((2, 5, 6, 24), dtype)
    k, v = strided((2, 4, 65, 2, 24), dtype), strided((2, 4, 65, 2, 24), dtype)
    first, last = (x.int().t().contiguous().t() for x in RANGES[ranges])
    gate = torch.tensor([0.7], dtype=dtype) if gated else None
    actual = forward(q, k, v, first, last, gate, 0.3)
    expected = expected_attention(q, k, v, first, last, gate, 0.3)
    assert_close_to_reference(actual, expected, dtype, "out")
    sees_nothing = (first.clamp(min=0) > last).nonzero()
    assert all(not actual[b, t].any() for b, t in sees_nothing)


def test_threads_change_no_bit() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 70, 2, 16), torch.randn(2, 3, 9, 2, 16), torch.randn(2, 3, 9, 2, 16)
    last = torch.randint(-1, 3, (2, 70)).int()
    threads = torch.get_num_threads()
    try:
        outs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outs.append(forward(q, k, v, last, last, None, 0.25))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_a_rejected_call_says_why() -> None:
    q, kv = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 4, 2, 8)
    item = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"query heads is not a multiple .* \(status 3\)"):
        forward(q, kv, kv, item, item, None, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", library.usable_instruction_sets()[:-1])
def test_ops_in_every_other_instruction_set(name: str) -> None:
    """The op tests run with the best set; here with each of the others that this machine has."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpp", "tests/ops"],
        cwd=ROOT,
        env={**os.environ, "FLAMINGO_CPU_ISA": name},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-2000:]


def test_offsets_beyond_two_to_the_31_elements() -> None:
    """Batch strides of more than 2^31 elements: memory that is reserved but not touched."""
    far = 2**31 + 64
    reserved = torch.empty(far + 2**12, dtype=torch.bfloat16)
    q = reserved.as_strided((2, 3, 2, 16), (far, 32, 16, 1))
    kv = reserved.as_strided((2, 1, 5, 2, 16), (far, 160, 32, 16, 1), 2**11)
    for view in (q, kv):
        view.copy_(torch.randn(view.shape))
    item = torch.zeros(2, 3, dtype=torch.int32)
    out = forward(q, kv, kv, item, item, None, 0.3)
    near = [t.contiguous() for t in (q, kv, kv)]
    assert torch.equal(out, forward(*near, item, item, None, 0.3))
    gradients = backward(out, q, kv, kv, item, item, None, 0.3)
    expected = backward(out, *near, item, item, None, 0.3)
    assert all(map(torch.equal, gradients, expected))
