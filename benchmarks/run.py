"""Measure cases: gate, alternated rounds, one line per measurement."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from benchmarks import ceilings, gate, measure, results
from benchmarks.cases import CASES, OPS, Case
from benchmarks.peers import Peer, UnavailableError, peers_for
from benchmarks.problems import Problem, build
from benchmarks.results import Record

QUICK_MINUTES = 2.2


@dataclass(frozen=True)
class Options:
    """The options of ``run``, as on its command line."""

    device: str = "cpu"
    suite: str = "quick"
    ops: tuple[str, ...] = ()
    cases: str = ""
    peers: tuple[str, ...] = ()
    shard: tuple[int, int] = (1, 1)
    budget_minutes: float | None = None
    output: Path | None = None
    fresh: bool = False
    allow_dirty: bool = False
    effort: measure.Effort | None = None
    patience: float | None = None


@dataclass
class Progress:
    """One line of progress on stderr, rewritten in place on a terminal."""

    total: int
    started: float = field(default_factory=time.monotonic)
    done: int = 0

    def __call__(self, text: str) -> None:
        if sys.stderr.isatty():
            width = 24
            filled = width * self.done // max(self.total, 1)
            bar = "#" * filled + "-" * (width - filled)
            elapsed = time.monotonic() - self.started
            line = f"[{bar}] {self.done}/{self.total} {elapsed:4.0f}s {text}"
            print(f"\r{line[:110]:<110}", end="", file=sys.stderr, flush=True)

    def finished(self, group: list[Case]) -> None:
        """Count the cases; in a log, print one line for each."""
        for case in group:
            self.done += 1
            if not sys.stderr.isatty():
                elapsed = time.monotonic() - self.started
                self.say(f"{self.done}/{self.total} {elapsed:.0f} s {case.key}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        clear = "\r" + " " * 110 + "\r" if sys.stderr.isatty() else ""
        print(f"{clear}{text}", file=sys.stderr, flush=True)


def selected(options: Options, cases: list[Case] | None = None) -> list[Case]:
    """Return the cases that the options ask for.

    Raises
    ------
    ValueError
        An op is unknown, or the shard is outside 1..n.
    """
    unknown = sorted(set(options.ops) - set(OPS))
    if unknown:
        raise ValueError(f"unknown ops {', '.join(unknown)}; known: {', '.join(OPS)}")
    index, count = options.shard
    if not 1 <= index <= count:
        raise ValueError(f"shard {index}/{count}: the first number must be in 1..{count}")
    chosen = [
        case
        for case in (CASES if cases is None else cases)
        if options.device in case.devices
        and (options.suite == "full" or case.quick)
        and (not options.ops or case.op in options.ops)
        and re.search(options.cases, case.key)
    ]
    groups = list(grouped(chosen))
    return [case for group in groups[index - 1 :: count] for case in group]


def grouped(cases: list[Case]) -> Iterator[list[Case]]:
    """Yield the cases that are measured in the same rounds."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group or case.key, []).append(case)
    yield from groups.values()


def run(options: Options, cases: list[Case] | None = None) -> Path:
    """Measure and append; return the result file. Ctrl-C and the time budget keep what is done.

    Raises
    ------
    ValueError
        The device is missing, or the tree is dirty and ``allow_dirty`` is not set.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    environment = results.environment(options.device)
    environment["allocator"] = measure.keep_freed_memory()
    folder = options.output or results.RESULTS
    if environment["dirty"] and not options.output and not options.allow_dirty:
        raise ValueError(
            "the working tree differs from its commit: commit first, give --output, or mark the "
            "results with --allow-dirty"
        )
    path = results.file_for(environment, folder)
    chosen = selected(options, cases)
    done = {}
    if path.exists() and not options.fresh:
        done = results.done_cases(results.read(path), environment)
    minutes = options.budget_minutes
    if minutes is None:
        minutes = QUICK_MINUTES if options.suite == "quick" else float("inf")
    deadline = time.monotonic() + 60 * minutes
    progress = Progress(len(chosen))
    progress("measuring the ceilings of this machine")
    measured = ceilings.measure(options.device, sorted({case.dtype for case in chosen}))
    session = _Session(options, environment, path, measured, deadline, progress)
    try:
        for group in grouped(chosen):
            if time.monotonic() > deadline:
                progress.say("time budget used up; run again to continue")
                break
            todo = [case for case in group if not session.is_done(case, done)]
            if todo:
                session.measure_group(group)
            progress.finished(group)
    except KeyboardInterrupt:
        progress.say("interrupted; the cases measured so far are kept")
    progress.say(f"{session.lines} measurements appended to {path}")
    return path


@dataclass
class _Session:
    options: Options
    environment: Record
    path: Path
    ceilings: ceilings.Ceilings
    deadline: float
    progress: Progress
    lines: int = 0

    def peers(self, case: Case) -> list[Peer]:
        named = list(self.options.peers)
        everyone = bool(named) or self.options.suite == "full"
        return [
            p
            for p in peers_for(case.op, self.options.device, named)
            if (p.quick or everyone) and not (p.compiled and case.only_in_sweeps)
        ]

    def is_done(self, case: Case, done: dict[str, set[str]]) -> bool:
        return {p.name for p in self.peers(case)} <= done.get(case.key, set())

    @property
    def effort(self) -> measure.Effort:
        usual = measure.QUICK if self.options.suite == "quick" else measure.FULL
        effort = self.options.effort or usual
        if self.options.patience is not None:
            effort = replace(effort, patience=self.options.patience)
        return effort

    def measure_group(self, group: list[Case]) -> None:
        """Set up and gate every peer of every case, then time those that passed, side by side."""
        variants, gates = [], {}
        for case in group:
            self.progress(f"{case.key}: reference")
            problem = build(case, self.options.device)
            truth = gate.truth(problem)
            peers = self.peers(case)
            for number, peer in enumerate(peers):
                if time.monotonic() > self.deadline:
                    names = ", ".join(p.name for p in peers[number:])
                    self.progress.say(f"time budget used up in {case.key}, left out: {names}")
                    break
                self.progress(f"{case.key}: gate {peer.name}")
                variant = self._gated(problem, peer, truth, gates)
                if variant is not None:
                    variants.append(variant)
        rounds = measure.alternate(
            variants,
            self.effort,
            self.deadline,
            lambda text: self.progress(f"{group[0].key}: {text}"),
        )
        for variant in variants:
            self._write(variant, rounds, gates[id(variant)])

    def _gated(
        self, problem: Problem, peer: Peer, truth: gate.Truth, gates: dict
    ) -> measure.Variant | None:
        common = {"case": problem.case, "peer": peer.name}
        try:
            implementation = peer.setup(problem)
            if problem.device.type == "cpu":
                measure.try_forward(implementation, self.effort)
            errors = gate.check(problem, implementation, truth)
        except UnavailableError as error:
            self._append(**common, status="unavailable", reason=str(error))
        except AssertionError as error:
            self.progress.say(f"RED {problem.case.key} {peer.name}: {error}")
            self._append(**common, status="red", reason=str(error))
        except Exception as error:  # a failure of a peer is its reason and must not end the run
            self._append(**common, status="unavailable", reason=measure.first_line(error))
        else:
            variant = measure.Variant(peer.name, problem, implementation)
            gates[id(variant)] = errors
            return variant
        return None

    def _write(self, variant: measure.Variant, rounds: int, errors: dict[str, float]) -> None:
        case, implementation = variant.problem.case, variant.implementation
        common = {"case": case, "peer": variant.name, "backend": implementation.backend}
        if variant.error:
            self._append(**common, status="unavailable", reason=variant.error)
            return
        memory = {"peak_bytes": measure.peak_bytes(variant)}
        if variant.trains:
            memory["saved_bytes"] = measure.saved_bytes(variant.problem, implementation)
        if implementation.prepare:
            memory["prepare_s"] = measure.seconds_of(implementation.prepare, self.options.device)
        for (phase, cache), samples in variant.samples.items():
            timing = measure.summary(samples)
            self._append(
                **common,
                status="ok",
                reason=implementation.no_backward,
                phase=phase,
                cache=cache,
                rounds=rounds,
                gate=errors,
                **timing,
                **memory,
                **self._rates(variant.problem, phase, timing["median_s"]),
            )

    def _rates(self, problem: Problem, phase: str, seconds: float) -> dict[str, float]:
        rates = {}
        if problem.tokens:
            rates["tokens_per_s"] = problem.tokens / seconds
        if problem.cost is None:
            return rates
        moved, operations = problem.cost.of(phase)
        floor = self.ceilings.floor_seconds(moved, operations, problem.case.dtype)
        return rates | {
            "bytes": moved,
            "flops": operations,
            "gb_per_s": moved / seconds / 1e9,
            "tflop_per_s": operations / seconds / 1e12,
            "floor_s": floor,
            "of_floor": floor / seconds,
        }

    def _append(self, case: Case, **values: object) -> None:
        record = {
            **self.environment,
            "op": case.op,
            "case": case.key,
            "label": case.shape.label,
            "dtype": case.dtype,
            "shape": asdict(case.shape),
            "sweeps": case.sweeps,
            "group": case.group,
            "ceilings": self.ceilings.to_dict(),
            **values,
        }
        results.append(self.path, record)
        self.lines += 1
