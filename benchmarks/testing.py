"""Tiny cases and hand-made result lines for the tests of this package."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks import measure, results, run, tables
from benchmarks.cases import Case, LatentShape, MediaShape

SMALL = {"tokens": 12, "images": 3, "heads": 2, "head_dim": 8, "latents": 4}
MEDIA = Case("media_cross_attention", MediaShape(batch=2, **SMALL), quick=True)
LATENT = Case("latent_attention", LatentShape(2, 10, 2, 8, 4), quick=True)
EFFORT = measure.Effort(rounds=3, seconds=0.0, min_samples=2, max_samples=2)
EAGER = ("ours-torch", "openflamingo", "sdpa-mask", "segments-bmm", "sdpa-concat")


def options(folder: Path, **changed: object) -> run.Options:
    """Return options with the least effort, and only peers that do not compile."""
    return run.Options(output=folder, effort=EFFORT, peers=EAGER, **changed)


def fixture_records(commit: str = "c" * 40, run_id: str = "r1", slower: float = 4.0) -> list[dict]:
    """Return lines of two peers on three sizes, and one of a peer that failed the gate."""
    base = {
        "schema": results.SCHEMA,
        "commit": commit,
        "dirty": "",
        "run": run_id,
        "device": "cpu-test-2c",
        "device_name": "Test",
        "driver": "",
        "versions": {"torch": "2"},
        "threads": 2,
        "instruction_set": "avx2",
        "dtype": "float32",
        "group": "",
        "op": "media_cross_attention",
        "ceilings": {
            "bandwidth": {"1024": 1e9},
            "arithmetic": {"float32": 1e11},
            "source": {"float32": "test"},
        },
    }
    records = []
    for images in (2, 4, 8):
        shape = MediaShape(images=images)
        for peer, seconds in (("ours-cpp", 1e-3), ("sdpa-mask", slower * 1e-3)):
            for phase in tables.PHASES:
                records.append(
                    {
                        **base,
                        "case": f"media_cross_attention/{shape.label}/float32",
                        "label": shape.label,
                        "shape": dataclasses.asdict(shape),
                        "sweeps": ["images"] if images < 8 else [],
                        "peer": peer,
                        "status": "ok",
                        "reason": "",
                        "backend": "test",
                        "phase": phase,
                        "cache": "warm",
                        "median_s": seconds * images,
                        "q20_s": seconds * images,
                        "q80_s": seconds * images * 1.01,
                        "samples": 3,
                        "saved_bytes": 1000,
                        "peak_bytes": 2000,
                        "bytes": 1e6,
                        "flops": 1e8,
                        "gb_per_s": 1.0,
                        "tflop_per_s": 0.1,
                        "of_floor": 0.5,
                    }
                )
    red = {k: v for k, v in records[-1].items() if k in base or k in ("case", "label", "shape")}
    return [*records, {**red, "sweeps": [], "peer": "flex", "status": "red", "reason": "a|b"}]


def write_lines(path: Path, records: list[dict]) -> Path:
    """Append the lines to a result file."""
    for record in records:
        results.append(path, record)
    return path
