"""Peak rates of this machine, measured in the run that is judged by them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import torch

COPY_BYTES = {"cpu": tuple(2**n for n in (20, 22, 24, 26, 28)), "cuda": (2**31,)}
LONG_ENOUGH = 1e-3  # seconds per sample, so that starting threads does not count
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass
class Ceilings:
    """Copy bandwidth by bytes moved, and arithmetic by dtype, per second.

    Attributes
    ----------
    bandwidth : dict
        Bytes read and written by a copy -> bytes per second. On a CPU small copies stay in cache.
    arithmetic : dict
        Dtype -> floating point operations per second.
    source : dict
        Dtype -> which of the probes reached it.
    """

    bandwidth: dict[str, float] = field(default_factory=dict)
    arithmetic: dict[str, float] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)

    def floor_seconds(self, moved: float, operations: float, dtype: str) -> float:
        """Return the least time for these bytes and operations: the roofline."""
        return max(moved / self.bandwidth_for(moved), operations / self.arithmetic[dtype])

    def bandwidth_for(self, moved: float) -> float:
        """Return the rate of the largest copy within ``moved`` bytes, or of a faster larger one."""
        sizes = sorted(map(int, self.bandwidth))
        fitting = [size for size in sizes if size <= moved] or sizes[:1]
        return max(self.bandwidth[str(size)] for size in sizes if size >= fitting[-1])

    def to_dict(self) -> dict:
        return asdict(self)


def highest(found: Iterable[Ceilings]) -> Ceilings:
    """Return the highest rates of several runs: a disturbance only lowers a rate."""
    result = Ceilings()
    for one in found:
        for moved, rate in one.bandwidth.items():
            result.bandwidth[moved] = max(rate, result.bandwidth.get(moved, 0.0))
        for dtype, rate in one.arithmetic.items():
            if rate > result.arithmetic.get(dtype, 0.0):
                result.arithmetic[dtype], result.source[dtype] = rate, one.source[dtype]
    return result


def measure(device: str, dtypes: list[str], seconds: float = 0.15) -> Ceilings:
    """Measure copies and products, about ``seconds`` each."""
    found = Ceilings()
    for moved in COPY_BYTES[device]:
        found.bandwidth[str(moved)] = rate_of_copy(device, moved, seconds)
    for name in dtypes:
        rates = {probe: rate(device, name, seconds) for probe, rate in PROBES.items()}
        best = max(rates, key=lambda probe: rates[probe] or 0.0)
        found.arithmetic[name], found.source[name] = rates[best], best
    return found


def rate_of_copy(device: str, moved: int, seconds: float) -> float:
    """Return bytes per second of a copy that reads and writes ``moved`` bytes in all."""
    source = torch.ones(moved // 8, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return moved / _best_seconds(lambda: target.copy_(source), device, seconds)


def _matrix_product(device: str, dtype: str, seconds: float) -> float:
    size = PRODUCT_SIZE[device]
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * size**3 / _best_seconds(lambda: torch.mm(a, b, out=out), device, seconds)


def _native_multiply_add(device: str, dtype: str, seconds: float) -> float | None:
    """Return the rate of the native library's loop on registers, in its instruction set."""
    from flamingo_kernels._cpp import library

    probe = getattr(library, "multiply_add_rate", None)
    if device != "cpu" or probe is None or library.unavailable_reason():
        return None
    parts = 5
    return max(probe(getattr(torch, dtype), seconds / parts) for _ in range(parts)) or None


PROBES: dict[str, Callable[[str, str, float], float | None]] = {
    "torch matrix product": _matrix_product,
    "native multiply-add loop": _native_multiply_add,
}


def _best_seconds(call: Callable[[], object], device: str, seconds: float) -> float:
    """Return the fastest of at least three calls within the time: a ceiling, not typical."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    count, calls = 0, 1
    while count < 3 or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        elapsed = time.perf_counter() - start
        best = min(best, elapsed / calls)
        count += 1
        if elapsed < LONG_ENOUGH:
            calls *= 2
    return best


def synchronize(device: str) -> None:
    """Wait for a GPU; do nothing on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
