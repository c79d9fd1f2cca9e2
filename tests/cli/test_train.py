"""The command ``train``: a run to its end, and errors in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flamingo_kernels.cli import main

yaml = pytest.importorskip("yaml")


def test_train_and_what_it_writes(values, tmp_path: Path, capsys) -> None:
    (tmp_path / "0.png").write_bytes(b"no picture")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    assert main(["train", str(config)]) == 0
    out = capsys.readouterr()
    assert "from step 0" in out.err and "step 3/3  loss " in out.err
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["gates"].keys() == {"attn_gate.0", "attn_gate.1", "ff_gate.0", "ff_gate.1"}
    assert lines[0]["losses"].keys() == {"pages", "pairs"} and lines[0]["tokens_per_second"] > 0
    assert lines[-1]["skipped"].keys() == {"pages: broken image", "pages: no image"}
    for reason, count in lines[-1]["skipped"].items():
        assert f"skipped, {reason}: {count}\n" in out.err
    assert [p.name for p in sorted((tmp_path / "out").glob("step_*"))] == [
        "step_00000002",
        "step_00000003",
    ]
    assert main(["train", str(config)]) == 0
    assert "continuing after step 3" in capsys.readouterr().err


def test_errors_are_one_line(values, tmp_path: Path, capsys) -> None:
    config = tmp_path / "run.yaml"
    pages, pairs = map(dict, values["datasets"])
    for changes, message in (
        ({"steps": "many"}, "run.yaml: steps must be int, got 'many'"),
        ({"model": {"config": "huge"}}, "unknown config 'huge'"),
        ({"datasets": [{**pages, "shards": ["none*.tar"]}]}, "no shard matches 'none*.tar'"),
        ({"datasets": [{**pairs, "workers": 3}]}, "2 shard(s) for 3 readers"),
        ({"model": {"language_model": str(tmp_path / "lm")}}, "no folder "),
    ):
        config.write_text(yaml.safe_dump({**values, **changes}))
        assert main(["train", str(config)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("flamingo-kernels train: ") and message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_one_json_lines_file_under_torchrun(values, tmp_path: Path) -> None:
    """The command of README, with the file and the workers of its example, and once more."""
    lines, config = tmp_path / "pages.jsonl", tmp_path / "run.yaml"
    for steps, records, workers in ((2, 6, 0), (3, 6, 0), (2, 3, 2)):
        values["output"] = str(tmp_path / f"out{workers}")
        pages = {**values["datasets"][0], "workers": workers}
        values |= {"steps": steps, "datasets": [pages]}
        lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:records]))
        config.write_text(yaml.safe_dump(values))
        command = "-m torch.distributed.run --standalone --nproc_per_node 2 -m flamingo_kernels"
        run = subprocess.run(
            [sys.executable, *command.split(), "train", str(config)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert "2 process(es) on " in run.stderr
        assert ("continuing after step 2" in run.stderr) == (steps == 3)
        log = Path(values["output"]) / "log.jsonl"
        assert [json.loads(x)["step"] for x in log.read_text().splitlines()] == [
            *range(1, steps + 1)
        ]


def test_train_around_hugging_face_models(values, tmp_path: Path, capsys) -> None:
    pytest.importorskip("transformers")
    from flamingo_kernels import FlamingoModel
    from flamingo_kernels.language import add_media_tokens
    from testing.backbones import clip, language_model, word_tokenizer

    tokenizer, lm = word_tokenizer("<s>", "</s>", "two", "page"), language_model("llama")
    add_media_tokens(tokenizer, lm)
    folders = {"language_model": str(tmp_path / "lm"), "vision_encoder": str(tmp_path / "clip")}
    lm.save_pretrained(folders["language_model"])
    tokenizer.save_pretrained(folders["language_model"])
    clip().save_pretrained(folders["vision_encoder"])
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({**values, "model": folders, "steps": 2}))
    assert main(["train", str(config)]) == 0
    checkpoint = tmp_path / "out" / "step_00000002"
    trained = FlamingoModel.from_pretrained(checkpoint, vision_encoder=clip(), language_model=lm)
    assert all(layer.ff_gate.item() != 0 for layer in trained.gated_cross_attn_layers)
    with (tmp_path / "out" / "log.jsonl").open() as log:
        assert [json.loads(line)["step"] for line in log] == [1, 2]
    del folders["vision_encoder"]
    config.write_text(yaml.safe_dump({**values, "model": folders}))
    capsys.readouterr()
    assert main(["train", str(config)]) == 1
    assert "give both language_model and vision_encoder" in capsys.readouterr().err
