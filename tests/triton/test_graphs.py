"""Nothing waits for the device: what a CUDA graph needs, shown without and with a GPU."""

from __future__ import annotations

import pytest
import torch

from flamingo_kernels._triton.launch import recording
from flamingo_kernels.tools import aot
from testing.cases import IMAGE
from testing.compiled import Bridge
from testing.targets import gpu

CASES = dict(aot.cases())


@pytest.mark.parametrize("label", CASES)
def test_launchers_read_no_values(label: str) -> None:
    """Meta tensors have none: asking for one raises, as every host synchronisation would."""
    with recording("sm_90") as recorder:
        CASES[label]()
    assert recorder.launches
    for launch in recorder.launches:
        assert all(isinstance(size, int) for size in launch.grid)
    with pytest.raises(RuntimeError, match="meta tensors"):
        aot.meta(1, dtype=torch.int32).item()


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=gpu)])
def test_model_part_replays_with_other_inputs(dtype: torch.dtype) -> None:
    """Resampler, plan and blocks, forward and backward, captured once; the text then changes."""
    bridge = Bridge("triton").to("cuda", dtype)
    features = torch.randn(2, 3, 1, 20, 16, device="cuda", dtype=dtype)
    hidden = torch.randn(2, 300, 24, device="cuda", dtype=dtype, requires_grad=True)
    ids = torch.randint(0, IMAGE + 1, (2, 300), device="cuda")
    leaves = [hidden, *bridge.parameters()]

    def both() -> list[torch.Tensor]:
        out = bridge(features, ids, hidden)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for shift in (0, 7):
        ids.copy_(torch.where(torch.arange(300, device="cuda") % (60 + shift) == shift, IMAGE, 1))
        graph.replay()
        expected = both()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
