"""Tables, plots, the page, the comparison, the command line."""

from __future__ import annotations

import argparse
import json
import re
from itertools import chain
from pathlib import Path

import pytest

from benchmarks import __main__ as command_line
from benchmarks import compare, plots, publish, report, results, tables
from benchmarks.cases import OPS
from benchmarks.page import render
from benchmarks.peers import load_all
from benchmarks.testing import fixture_records, write_lines


def test_report_has_tables_plots_and_a_page(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in" / "a.jsonl", fixture_records())
    pages = report.write([path], tmp_path / "out")
    assert [p.name for p in pages] == ["report.md", "index.html"]
    markdown, html = (p.read_text() for p in pages)
    assert "| B1 T2048 I8 H8 D64 R64, float32 | ours-cpp | 8 | 1.00 | 4.00 |" in markdown
    assert "a\\|b" in markdown and "| red |" in markdown
    assert html.count("<table>") == html.count("</table>") == markdown.count("\n## ") - 1
    assert "http://" not in re.sub(r"base64,[^\"]+", "", html) and "https://" not in html
    names = {p.stem for p in pages[0].parent.glob("*.svg")}
    assert names == {p.stem for p in pages[0].parent.glob("*.png")}
    for wanted in (
        "speed-up-media_cross_attention-forward",
        "memory-media_cross_attention",
        "scaling-media_cross_attention-images-forward",
        "roofline-float32",
    ):
        assert wanted in names
        assert f"{wanted}.svg" in markdown


@pytest.mark.parametrize("sweep", plots.SWEEPS)
def test_a_line_of_a_scaling_plot_has_one_dtype(sweep: str) -> None:
    """Two dtypes of one size would be joined by a vertical line; each time is on its own line."""
    pytest.importorskip("matplotlib").use("Agg")
    sizes = {"tokens": 1, "images": 2, "batch": 3, "features": 256}
    records = [
        {
            "op": "op",
            "phase": "forward",
            "sweeps": [sweep],
            "peer": peer,
            "dtype": dtype,
            "shape": {name: step * size for name, size in sizes.items()},
            "median_s": seconds * step,
        }
        for peer, factor in (("a", 1.0), ("b", 2.0))
        for dtype, seconds in (("float32", 1.0 * factor), ("bfloat16", 10.0 * factor))
        for step in (1, 2, 4)
    ]
    figure = plots._scaling(records, sweep, "forward")
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert set(lines) == {f"{p}, {d}" for p in "ab" for d in ("float32", "bfloat16")}
    for label, line in lines.items():
        first = (2.0 if "b," in label else 1.0) * (10.0 if "bfloat16" in label else 1.0)
        assert list(line.get_ydata()) == [1e3 * first, 2e3 * first, 4e3 * first]
        assert len(set(line.get_xdata())) == 3
    assert lines["a, float32"].get_linestyle() != lines["a, bfloat16"].get_linestyle()
    assert lines["a, float32"].get_color() == lines["a, bfloat16"].get_color()


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Both pages with the two markers, and results in the same folder."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    found = {"README": tmp_path / "README.md", "docs": tmp_path / "docs" / "benchmarks.md"}
    found["docs"].parent.mkdir()
    for page in found.values():
        page.write_text(f"before\n{publish.BEGIN}\nold\n{publish.END}\nafter\n")
    return found


def test_publish_fills_both_pages_between_their_markers(
    pages: dict[str, Path], tmp_path: Path
) -> None:
    records = fixture_records(slower=0.5)
    write_lines(tmp_path / "results" / records[0]["device"] / "a.jsonl", records)
    for _ in range(2):  # the second time over the first
        publish.publish(tmp_path)
        for page in pages.values():
            text = page.read_text()
            assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
            assert "| media_cross_attention | forward | " in text and "| 0.50 |" in text
            for target in re.findall(r"\]\((.+?)\)", text):
                assert (page.parent / target).is_file(), target
        summary = pages["README"].read_text()
        for expected in ("Test, 2 threads, avx2; commit cccccccccccc; torch 2.", "| 0.50 | 0.50 |"):
            assert expected in summary
        assert "| sdpa-mask (3 of 3) |" in summary and " ms (B1 T2048 I2 " in summary
    pages["docs"].write_text("no markers")
    with pytest.raises(ValueError, match="once each"):
        publish.publish(tmp_path)


def test_the_summary_names_the_fastest_baseline_and_the_worst_case() -> None:
    def factor(record: dict) -> float:
        return 0.4 if "I8" in record["case"] else 3.0

    records = fixture_records(slower=2.0)
    fast = [
        {**r, "peer": "segments-sdpa", "median_s": r["median_s"] * factor(r)}
        for r in records
        if r["peer"] == "sdpa-mask"
    ]
    own = [{**r, "peer": "ours-torch"} for r in records if r["peer"] == "ours-cpp"]
    row = publish.summary_table({"[1]": [*records, *fast, *own]}).rows[0]
    assert [cell.text for cell in row[:7]] == [
        "media_cross_attention", "forward", "[1]", "3", "sdpa-mask (2 of 3)", "2.00", "0.80"
    ]  # fmt: skip


def test_every_peer_is_defined(pages: dict[str, Path], tmp_path: Path) -> None:
    records = fixture_records()
    write_lines(tmp_path / "results" / records[0]["device"] / "a.jsonl", records)
    publish.publish(tmp_path)
    text = pages["docs"].read_text()
    for peer in load_all().values():
        assert peer.description.endswith(".") and f"| `{peer.name}` | {peer.description} |" in text


def test_the_pages_of_this_tree_are_what_publish_writes() -> None:
    """README.md and docs/benchmarks.md hold the figures of the committed results."""
    for page, expected in publish.render(results.ROOT).items():
        text = page.read_text()
        assert text == expected
        for target in re.findall(r"\]\((\.\./benchmarks/.+?)\)", text):
            assert (page.parent / target).is_file(), target
    rows = publish.summary_table({"": [*chain(*report.load(None).values())]}).rows
    assert len(rows) == len(publish.SUMMARY)


def test_publish_adds_what_other_commands_measured(pages: dict[str, Path], tmp_path: Path) -> None:
    records = fixture_records()
    folder = tmp_path / "results" / records[0]["device"]
    write_lines(folder / "a.jsonl", records)
    figures = {"ours": {"median_s": 0.02, "q20_s": 0.01, "q80_s": 0.04, "with_prompt_s": 0.5}}
    decoding = {
        "commit": "c" * 40,
        "setting": "2 layers",
        "images": 33,
        "times_as_fast": 0.5,
        "many_images_over_one": 1.25,
        "figures": figures,
    }
    (folder / tables.DECODING_FILE).write_text(json.dumps(decoding))
    costs = {"call": 9.0, "kernel": 2.0, "overhead": 7.0, "lowest_overhead": 6.5, "torch": 4.0}
    overhead = {"device": folder.name, "commit": "d" * 40, "figures": {"layer_norm": costs}}
    results.write_beside(tables.OVERHEAD_FILE, overhead, results.RESULTS)
    publish.publish(tmp_path)
    for page in pages.values():
        assert "33 images is 0.5 times as fast" in page.read_text()
    text = pages["docs"].read_text()
    assert "| layer_norm | 9.0 | 2.0 | 7.0 | 6.5 | 4.0 |" in text
    assert "| ours | 20.0 | 10.0 | 40.0 | 50.0 | 0.50 |" in text


def test_losses_are_shown_like_wins() -> None:
    (table,) = (
        tables.ratio_table(fixture_records(slower=0.5), "media_cross_attention", phase)
        for phase in ("forward",)
    )
    assert [row[-1].text for row in table.rows] == ["0.50"] * 3


def test_commits_are_never_mixed(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_lines(folder / "a.jsonl", fixture_records("a" * 40))
    write_lines(folder / "b.jsonl", fixture_records("b" * 40, slower=9.0))
    pages = report.write([folder], tmp_path / "out")
    assert len(pages) == 4 and len({p.parent for p in pages}) == 2
    assert "9.00" not in pages[0].read_text() and "9.00" in pages[2].read_text()


def test_the_newest_measurement_wins_and_other_runs_are_marked() -> None:
    old, new = fixture_records(), fixture_records(run_id="r2", slower=2.0)
    only = [r for r in new if r["peer"] == "sdpa-mask"]
    kept = results.newest([*old, *only])
    table = tables.ratio_table(kept, "media_cross_attention", "forward")
    assert [row[-1].text for row in table.rows] == ["2.00*"] * 3


def test_one_low_ceiling_flatters_nobody(tmp_path: Path) -> None:
    records = fixture_records()
    for record in records[: len(records) // 2]:
        record["run"] = "r0"
        record["ceilings"] = {
            "bandwidth": {"1024": 5e8},
            "arithmetic": {"float32": 1e9, "float64": 1e10},
            "source": {"float32": "disturbed", "float64": "test"},
        }
    write_lines(tmp_path / "a.jsonl", records)
    ((_, found),) = report.load([tmp_path]).items()
    for record in found:
        assert record["ceilings"] == {
            "bandwidth": {"1024": 1e9},
            "arithmetic": {"float32": 1e11, "float64": 1e10},
            "source": {"float32": "test", "float64": "test"},
        }
        if "bytes" in record:
            floor = max(record["bytes"] / 1e9, record["flops"] / 1e11)
            assert record["of_floor"] == pytest.approx(floor / record["median_s"])


def test_report_without_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results in"):
        report.write([tmp_path], tmp_path / "out")
    with pytest.raises(ValueError, match="no such result file"):
        report.write([tmp_path / "missing.jsonl"], tmp_path / "out")


def test_page_escapes_and_sorts_by_value() -> None:
    cells = [[tables.text("<b>"), tables.number(12.0)], [tables.text("x"), tables.number(None)]]
    html = render(fixture_records(), [tables.Table("t", ["a", "b"], cells)], [])
    assert "&lt;b&gt;" in html and "<b>" not in html
    assert 'data-value="12.0"' in html


def test_growth_of_decoding() -> None:
    records = []
    for record in fixture_records():
        if record["status"] == "ok" and record["phase"] == "forward":
            records.append({**record, "group": "decode"})
    table = tables.growth_table(records)
    assert [row[-1].text for row in table.rows] == ["4.00", "4.00"]


def test_plots_of_nothing(tmp_path: Path) -> None:
    assert plots.write([], tmp_path) == []


def test_changes_beyond_noise() -> None:
    def line(median: float, spread: float) -> dict:
        return {
            **fixture_records()[0],
            "median_s": median,
            "q20_s": median - spread,
            "q80_s": median + spread,
        }

    (clear,) = compare.changes([line(1.0, 0.01)], [line(1.2, 0.01)], 0.05)
    assert clear.beyond_noise and clear.ratio == pytest.approx(1.2)
    (noisy,) = compare.changes([line(1.0, 0.2)], [line(1.2, 0.2)], 0.05)
    (small,) = compare.changes([line(1.0, 0.001)], [line(1.02, 0.001)], 0.05)
    assert not noisy.beyond_noise and not small.beyond_noise
    text = list(compare.lines([clear, noisy], "main"))
    assert text[1].startswith("!") and text[-1].startswith("1 regressions and 0 improvements")
    assert compare.changes([], [line(1.0, 0.1)], 0.05) == []


def test_compare_measures_our_kernels_by_default() -> None:
    given = argparse.Namespace(
        peers=[], suite="quick", ops=[], cases="x", device=None, budget_minutes=4
    )
    arguments = compare.run_arguments(given)
    assert "ours-cpp" in arguments and "openflamingo" not in arguments
    assert arguments[-2:] == ["--budget-minutes", "1.0"]


def test_command_line(capsys) -> None:
    assert command_line.main(["run", "--device", "cpu", "--list", "--cases", "^block/"]) == 0
    assert "block/" in capsys.readouterr().out
    assert command_line.main(["run", "--device", "cpu", "--list", "--ops", "x"]) == 2
    assert "unknown ops x" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line.main(["run", "--shard", "two"])
    assert set(OPS) >= {"media_cross_attention", "latent_attention", "block", "resampler"}
