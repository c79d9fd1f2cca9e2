"""What one call of each op costs besides its kernel: checks, choice, allocation, ctypes.

The same call of the smallest tensors is repeated without gradients. ``kernel`` is the native
function alone, with the parameters that the op packed. ``torch`` is the nearest operator of torch,
its kernel included.

    python -m benchmarks.call_overhead

The figures are printed and written to ``<output>/<device>/call_overhead.json``. ``publish`` puts
them into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks import results, tables
from flamingo_kernels import MediaSpans, ops
from flamingo_kernels._cpp import library
from flamingo_kernels.ops import signature

ROUNDS, CALLS = 15, 2000


def pairs() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Return for each op a call of its C++ kernel, and one of torch's nearest operator."""
    x, weight, gate = torch.randn(1, 8), torch.ones(8), torch.tensor([0.5])
    q, kv = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 1, 8)
    spans = MediaSpans.from_media_index(torch.zeros(1, 1, dtype=torch.int32))
    attention = lambda: F.scaled_dot_product_attention(q, q, q)  # noqa: E731
    return {
        "media_cross_attention": (
            lambda: ops.media_cross_attention(q, kv, kv, spans, gate, kernel="cpp"),
            attention,
        ),
        "latent_attention": (lambda: ops.latent_attention(q, q, q, q, q, kernel="cpp"), attention),
        "gated_residual": (
            lambda: ops.gated_residual(x, x, gate, kernel="cpp"),
            lambda: torch.addcmul(x, x, gate),
        ),
        "gated_activation": (
            lambda: ops.gated_activation(x, gate, kernel="cpp"),
            lambda: F.gelu(x),
        ),
        "layer_norm": (
            lambda: ops.layer_norm(x, weight, weight, kernel="cpp"),
            lambda: F.layer_norm(x, (8,), weight, weight),
        ),
    }


def native_call(call: Callable[[], object]) -> tuple[Callable[[], object], object]:
    """Return the native call at the end of ``call``, and the output that keeps pointers valid."""
    recorded: list[tuple[str, bytes]] = []
    functions = library.function

    def recording(name: str) -> Callable[[bytes], None]:
        return lambda params: recorded.append((name, params)) or functions(name)(params)

    signature.forget()
    with mock.patch.object(library, "function", recording):
        out = call()
    signature.forget()
    ((name, params),) = recorded
    function = library.load()[name]  # a new one, without the check of its status
    function.argtypes = [ctypes.c_void_p]
    return lambda: function(params), out


def microseconds(call: Callable[[], object]) -> float:
    """Return the mean time of a call over one round."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.call_overhead", description=__doc__)
    parser.add_argument("--output", type=Path, default=results.RESULTS)
    options = parser.parse_args()
    environment = results.clean_environment(options.output)
    figures = {}
    with torch.no_grad():
        for name, (ours, torchs) in pairs().items():
            kernel, _kept = native_call(ours)
            calls = {"call": ours, "kernel": kernel, "torch": torchs}
            samples = {kind: [] for kind in calls}
            for _ in range(ROUNDS):
                for kind, call in calls.items():
                    samples[kind].append(microseconds(call))
            medians = {kind: statistics.median(values) for kind, values in samples.items()}
            beside = [c - k for c, k in zip(samples["call"], samples["kernel"], strict=True)]
            figures[name] = medians | {
                "overhead": statistics.median(beside),
                "lowest_overhead": min(beside),
            }
    record = environment | {"figures": figures}
    path = results.write_beside(tables.OVERHEAD_FILE, record, options.output)
    print("\n".join([*tables.overhead_lines(record), str(path)]))


if __name__ == "__main__":
    main()
