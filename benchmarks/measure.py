"""Timing in alternated rounds, and memory.

``forward`` is measured without a graph, as in inference. A training sample runs the forward with a
graph and then the backward, and gives ``backward`` and ``forward_backward``.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.peers import Implementation
from benchmarks.problems import Problem
from flamingo_kernels import saved_tensors

MIN_ROUNDS = 3
SHORT = 50e-6  # calls below this are timed several at a time
LONG = 0.3  # calls above this evict every cache, so no warm-up call is made
ENOUGH = 6.0  # seconds of a variant's rounds after which MIN_ROUNDS suffice
FLUSH_BYTES = 2**28  # more than any L2 cache
# GPU cycles to keep the queue busy while a call is launched, so that events time the kernels.
SLEEP_CYCLES = 400_000


class TooSlowError(RuntimeError):
    """One call took longer than the run waits for."""


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes
    ----------
    rounds : int
        Rounds over all peers.
    seconds : float
        Time of each phase of each peer in a round.
    min_samples, max_samples : int
        Bounds on the samples of a phase in a round.
    patience : float
        A peer whose call on a CPU takes more seconds is left out; :func:`try_forward` finds that
        out before its results are checked.
    """

    rounds: int = 3
    seconds: float = 0.05
    min_samples: int = 1
    max_samples: int = 200
    patience: float = 3.0


QUICK = Effort()
FULL = Effort(rounds=5, seconds=0.1)


def keep_freed_memory() -> str:
    """Make the C library keep freed memory for the rest of the process; return what was done.

    By default glibc returns the top of its heap to the system after a call, and the next call
    faults it in again, page by page. That takes up to half of the time of a backward. A training
    process seldom sees it, because other tensors lie above.
    """
    trim_threshold, mmap_threshold, bytes_kept = -1, -3, 2**30
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return "the C library's default"
    if not (mallopt(trim_threshold, bytes_kept) and mallopt(mmap_threshold, bytes_kept)):
        return "the C library's default"
    return "glibc, freed memory kept"


@dataclass
class Variant:
    """One peer on one problem, and its samples in seconds by (phase, cache state)."""

    name: str
    problem: Problem
    implementation: Implementation
    samples: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    error: str = ""
    spent: float = 0.0  # seconds, in all rounds

    @property
    def trains(self) -> bool:
        return self.problem.case.training and not self.implementation.no_backward


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Return the median and the 20 and 80 % quantiles.

    Raises
    ------
    ValueError
        There are no samples.
    """
    if not samples:
        raise ValueError("no samples to summarise")
    if len(samples) == 1:
        low = high = samples[0]
    else:
        cuts = statistics.quantiles(samples, n=5, method="inclusive")
        low, high = cuts[0], cuts[-1]
    return {
        "median_s": statistics.median(samples),
        "q20_s": low,
        "q80_s": high,
        "samples": len(samples),
    }


def alternate(
    variants: list[Variant],
    effort: Effort,
    deadline: float = float("inf"),
    progress: Callable[[str], None] = lambda text: None,
) -> int:
    """Run the rounds, each in another order, and fill ``samples``; return the rounds completed.

    Past the deadline (``time.monotonic()``) it stops after ``MIN_ROUNDS``, and so does a variant
    that has taken ``ENOUGH``. A variant that fails is dropped, with its ``error`` set.
    """
    for number in range(effort.rounds):
        if number >= MIN_ROUNDS and time.monotonic() > deadline:
            return number
        shift = number % max(len(variants), 1)
        gc.collect()
        for variant in variants[shift:] + variants[:shift]:
            if variant.error or (number >= MIN_ROUNDS and variant.spent > ENOUGH):
                continue
            progress(f"round {number + 1}/{effort.rounds} {variant.name}")
            start = time.perf_counter()
            try:
                _one_round(variant, effort)
            except (RuntimeError, NotImplementedError) as error:
                variant.error = first_line(error)
            variant.spent += time.perf_counter() - start
    return effort.rounds


def first_line(error: BaseException) -> str:
    """Return the error's type and the first line of its message."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _one_round(variant: Variant, effort: Effort) -> None:
    sampler = _cuda_round if variant.problem.device.type == "cuda" else _cpu_round
    gc.disable()
    try:
        sampler(variant, effort)
    finally:
        gc.enable()


def _repeat(sample: Callable[[], None], effort: Effort) -> None:
    """Take samples until the time is used up."""
    end = time.perf_counter() + effort.seconds
    for count in range(effort.max_samples):
        if count >= effort.min_samples and time.perf_counter() > end:
            return
        sample()


def _check_patience(call: str, seconds: float, effort: Effort) -> None:
    if seconds > effort.patience:
        raise TooSlowError(
            f"{call} took {seconds:.1f} s, more than the {effort.patience:g} s of --patience"
        )


def try_forward(implementation: Implementation, effort: Effort) -> None:
    """Call ``forward``, and a second time if that was slow: the first call may compile.

    Raises
    ------
    TooSlowError
        Both calls took longer than the patience.
    """
    before, seconds = implementation.before or (lambda: None), float("inf")
    with torch.no_grad():
        for _ in range(2):
            if seconds > effort.patience:
                before()
                start = time.perf_counter()
                implementation.forward()
                seconds = time.perf_counter() - start
    _check_patience("forward", seconds, effort)


def _cpu_round(variant: Variant, effort: Effort) -> None:
    implementation, seed = variant.implementation, variant.problem.seed
    forward, before = implementation.forward, implementation.before or (lambda: None)
    forwards = variant.samples["forward", "warm"]
    clock = time.perf_counter
    with torch.no_grad():
        elapsed = LONG
        if not forwards or min(forwards) < LONG:
            before()
            start = clock()
            forward()
            elapsed = clock() - start
        calls = 1 if implementation.before or elapsed > SHORT else 1 + int(SHORT / elapsed) * 4

        def sample_forward() -> None:
            before()
            start = clock()
            for _ in range(calls):
                forward()
            forwards.append((clock() - start) / calls)

        _repeat(sample_forward, effort)
    if not variant.trains:
        return
    backwards = variant.samples["backward", "warm"]
    both = variant.samples["forward_backward", "warm"]

    def sample_training() -> None:
        before()
        start = clock()
        out = forward()
        middle = clock()
        implementation.backward(out, seed)
        end = clock()
        backwards.append(end - middle)
        both.append(end - start)

    if not both or min(both) < LONG:
        sample_training()
        backwards.pop()
        _check_patience("forward and backward", both.pop(), effort)
    _repeat(sample_training, effort)


def _cuda_round(variant: Variant, effort: Effort) -> None:
    """Sample cold and warm L2 by events, and the wall time per call of a queue of calls."""
    implementation, seed = variant.implementation, variant.problem.seed
    forward, before = implementation.forward, implementation.before or (lambda: None)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def timed(cache: str, call: Callable[[], object]) -> tuple[float, object]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cache == "cold":
            flush.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3, result

    def wall(phase: str, call: Callable[[], object], calls: int = 20) -> None:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(1 if implementation.before else calls):
            call()
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        variant.samples[phase, "wall"].append(elapsed / (1 if implementation.before else calls))

    def train() -> object:
        return implementation.backward(forward(), seed)

    for cache in ("warm", "cold"):
        with torch.no_grad():
            before()
            forward()

            def sample_forward(cache: str = cache) -> None:
                before()
                variant.samples["forward", cache].append(timed(cache, forward)[0])

            _repeat(sample_forward, effort)
        if variant.trains:
            before()
            train()

            def sample_training(cache: str = cache) -> None:
                before()
                variant.samples["forward_backward", cache].append(timed(cache, train)[0])
                before()
                out = forward()
                call = lambda: implementation.backward(out, seed)  # noqa: E731
                variant.samples["backward", cache].append(timed(cache, call)[0])

            _repeat(sample_training, effort)
    with torch.no_grad():
        before()
        wall("forward", forward)
    if variant.trains:
        before()
        wall("forward_backward", train)


def seconds_of(call: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Return the median wall time of a call."""
    samples = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def saved_bytes(problem: Problem, implementation: Implementation) -> int:
    """Return the bytes of storages kept for the backward, besides inputs and parameters."""
    given = [*problem.leaves.values(), *implementation.leaves.values()]
    given += [t for t in problem.fixed.values() if isinstance(t, Tensor)]
    if implementation.before:
        implementation.before()
    return saved_tensors.saved_bytes(implementation.forward, given)


def peak_bytes(variant: Variant) -> int:
    """Return the allocator's peak above the start, over forward and backward (or forward alone).

    On a CPU this is the peak of torch's allocator, without a library's own scratch memory.
    """
    implementation, seed = variant.implementation, variant.problem.seed
    if implementation.before:
        implementation.before()

    def call() -> None:
        if variant.trains:
            implementation.backward(implementation.forward(), seed)
        else:
            with torch.no_grad():
                implementation.forward()

    if variant.problem.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
