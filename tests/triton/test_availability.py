"""Whether Triton can run here, and why not; the shipped launch configs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flamingo_kernels import _triton
from flamingo_kernels.ops import tiles

ROOT = Path(__file__).resolve().parents[2]


def in_new_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PATH": "", "HOME": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


REASON = "from flamingo_kernels import _triton; print(_triton.unavailable_reason({!r}))"


def test_cpu_tensors_need_the_interpreter() -> None:
    assert "needs TRITON_INTERPRET=1" in in_new_process(REASON.format("cpu"))
    assert in_new_process(REASON.format("cpu"), TRITON_INTERPRET="1") == "None"


def test_gpu_tensors_need_the_compiler() -> None:
    assert in_new_process(REASON.format("cuda")) == "None"
    reason = in_new_process(REASON.format("cuda"), TRITON_INTERPRET="1")
    assert "the interpreter runs CPU tensors only" in reason


def test_the_variable_set_too_late_does_not_count() -> None:
    code = "import os, triton; os.environ['TRITON_INTERPRET'] = '1';" + REASON.format("cpu")
    assert "before it is first imported" in in_new_process(code)


def test_asking_does_not_import_triton() -> None:
    code = REASON.format("cuda") + "; import sys; print('triton' in sys.modules)"
    assert in_new_process(code).splitlines()[-1] == "False"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    _triton._missing.cache_clear()
    monkeypatch.setattr(_triton.importlib.util, "find_spec", lambda name: None)
    assert _triton.unavailable_reason("cuda") == "Triton is not installed"
    _triton._missing.cache_clear()
    monkeypatch.setattr(_triton.sys, "platform", "darwin")
    assert "Linux only, this is darwin" in _triton.unavailable_reason("cuda")
    monkeypatch.undo()
    _triton._missing.cache_clear()


LOOPING = (
    "media_rows_backward",
    "media_keys_backward",
    "latent_forward",
    "latent_backward",
)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_every_case_has_a_config(head_dim: int, itemsize: int, architecture: str) -> None:
    """The one-pass backward may be missing, its replacement and all others may not."""
    for kernel in ("media_forward", *LOOPING):
        config = tiles.lookup(kernel, head_dim, itemsize, architecture)
        assert config is not None and config.reason


def test_unknown_architectures_take_a_close_one() -> None:
    assert tiles.family("sm_89") == tiles.family("sm_120") == "sm_86"
    assert tiles.family("sm_103") == "sm_100"
    assert tiles.family("gfx90a") == "gfx942"
