"""The devices and dtypes of the kernel tests: Triton's interpreter, or a GPU if there is one."""

from __future__ import annotations

import pytest
import torch
import triton

HAS_GPU = torch.cuda.is_available()

# The interpreter computes bf16 products wrongly, and a GPU has no fp64 kernels.
_INTERPRETED = (torch.float32, torch.float16, torch.float64)
_COMPILED = (torch.bfloat16, torch.float16, torch.float32)

gpu = (pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU"))
interpreted = pytest.mark.skipif(HAS_GPU, reason="the kernels are compiled in this process")
float64_products = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5),
    reason="before 3.5, Triton's interpreter has no float64 products",
)


def _name(device: str, dtype: torch.dtype) -> str:
    return f"{device}-{str(dtype).removeprefix('torch.')}"


def _marks(dtype: torch.dtype) -> list[pytest.MarkDecorator]:
    return [interpreted, float64_products] if dtype == torch.float64 else [interpreted]


TARGETS = [
    *(pytest.param("cpu", d, marks=_marks(d), id=_name("cpu", d)) for d in _INTERPRETED),
    *(pytest.param("cuda", d, marks=gpu, id=_name("cuda", d)) for d in _COMPILED),
]
ONE_TARGET = [TARGETS[0], TARGETS[3]]
