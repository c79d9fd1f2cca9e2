"""Result files: complete, resumable, kept when a run is interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import measure, results, run
from benchmarks.results import read as records_of
from benchmarks.testing import LATENT, MEDIA, options
from testing import provenance


def test_lines_round_trip_and_are_complete(tmp_path: Path) -> None:
    path = run.run(options(tmp_path), [MEDIA, LATENT])
    records = records_of(path)
    assert path.parent.name == provenance.device_slug("cpu")
    assert {r["case"] for r in records} == {MEDIA.key, LATENT.key}
    for record in records:
        assert json.loads(json.dumps(record)) == record
        for name in ("commit", "device", "versions", "threads", "instruction_set", "run"):
            assert record[name], name
        assert record["ceilings"]["arithmetic"]
        if record["status"] == "ok":
            assert record["q20_s"] <= record["median_s"] <= record["q80_s"]
            assert record["rounds"] == 3 and record["backend"]
    phases = {r["phase"] for r in records if r["peer"] == "ours-torch"}
    assert phases == {"forward", "backward", "forward_backward"}


def test_a_second_run_measures_nothing_again_unless_fresh(tmp_path: Path) -> None:
    path = run.run(options(tmp_path), [MEDIA])
    first = path.read_text()
    assert run.run(options(tmp_path), [MEDIA]) == path
    assert path.read_text() == first
    run.run(options(tmp_path), [MEDIA, LATENT])
    added = path.read_text().removeprefix(first)
    assert added and all(json.loads(x)["case"] == LATENT.key for x in added.splitlines())
    before = len(path.read_text().splitlines())
    run.run(options(tmp_path, fresh=True), [MEDIA])
    assert len(path.read_text().splitlines()) == before + len(first.splitlines())


def test_results_of_another_tree_are_not_resumed(tmp_path: Path) -> None:
    path = run.run(options(tmp_path), [MEDIA])
    records = records_of(path)
    environment = results.environment("cpu")
    assert MEDIA.key in results.done_cases(records, environment)
    changed = {**environment, "dirty": "other"}
    assert not results.done_cases(records, changed)


def test_interruption_keeps_finished_cases(tmp_path: Path, monkeypatch, capsys) -> None:
    real = measure.alternate

    def interrupted(variants: list, *arguments: object) -> int:
        if variants[0].problem.case.op == "latent_attention":
            raise KeyboardInterrupt
        return real(variants, *arguments)

    monkeypatch.setattr(measure, "alternate", interrupted)
    path = run.run(options(tmp_path), [MEDIA, LATENT])
    assert {r["case"] for r in records_of(path) if r["status"] == "ok"} == {MEDIA.key}
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.setattr(measure, "alternate", real)
    run.run(options(tmp_path), [MEDIA, LATENT])
    ok = [r["case"] for r in records_of(path) if r["status"] == "ok"]
    assert set(ok) == {MEDIA.key, LATENT.key}


def test_time_budget_of_nothing_measures_nothing(tmp_path: Path, capsys) -> None:
    path = run.run(options(tmp_path, budget_minutes=0.0), [MEDIA])
    assert not path.exists()
    assert "time budget used up" in capsys.readouterr().err


def test_a_cut_off_last_line_is_ignored_and_any_other_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    results.append(path, {"schema": results.SCHEMA, "a": 1})
    with path.open("a") as file:
        file.write('{"schema": 1, "a"')
    assert results.read(path) == [{"schema": results.SCHEMA, "a": 1}]
    with path.open("a") as file:
        file.write("\n{}\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:2: not JSON"):
        results.read(path)
    path.write_text('{"schema": 99}\n{"schema": 99}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:1: schema 99, not 1"):
        results.read(path)


def test_a_dirty_tree_is_refused_in_the_results_folder(monkeypatch) -> None:
    monkeypatch.setattr(provenance, "revision", lambda: ("abc", "1234"))
    with pytest.raises(ValueError, match="working tree differs from its commit"):
        run.run(run.Options(), [MEDIA])
