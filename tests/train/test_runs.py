"""What users do to runs: interrupt them, start them twice, change them, and use what they made."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flamingo_kernels import FlamingoConfig, FlamingoModel
from flamingo_kernels.cli import main
from flamingo_kernels.train import TrainConfig
from flamingo_kernels.train.checkpoints.folder import exclusive
from flamingo_kernels.train.checkpoints.settings import compare
from testing.folders import write_language_model, write_vision_encoder
from testing.markdown import ROOT
from testing.tiny_run import make_trainer

yaml = pytest.importorskip("yaml")


def write(values: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def steps_saved(output: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted(output.glob("step_*"))]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_saves_and_the_same_command_continues(
    number: int, workers: int, values, tmp_path: Path
) -> None:
    values |= {"steps": 3000, "save_every": 1000}
    values["datasets"][1]["workers"] = workers
    command = [sys.executable, "-m", "flamingo_kernels", "train", str(write(values, tmp_path))]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    last = 0
    for line in child.stderr:
        if line.startswith("step "):
            last = int(line.split()[1].partition("/")[0])
        if last >= 3:
            break
    child.send_signal(number)
    told = child.communicate(timeout=60)[1]
    assert child.returncode == 128 + number
    (saved,) = steps_saved(tmp_path / "out")
    assert saved >= last and f"up to step {saved} is saved, and the same command" in told
    config = write({**values, "steps": saved + 1}, tmp_path)
    done = subprocess.run([*command[:-1], str(config)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"continuing after step {saved}" in done.stderr


def test_a_second_signal_ends_at_once() -> None:
    from flamingo_kernels.train.interrupts import Interrupts

    stops = []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells' background jobs ignore it
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts(lambda: stops.append(1)) as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stops == [1] and interrupts.exit_status == 143
        assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyboardInterrupt), Interrupts(lambda: stops.append(2)):
        os.kill(os.getpid(), signal.SIGINT)
        assert stops == [1, 2]
        os.kill(os.getpid(), signal.SIGINT)


def test_one_run_per_output_folder(values, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    with exclusive(output):
        assert main(["train", str(write(values, tmp_path))]) == 1
        assert f"another run is training into {output}: wait" in capsys.readouterr().err
    assert main(["train", str(write(values, tmp_path))]) == 0


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from flamingo_kernels.train.checkpoints.folder import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    with pytest.raises(OSError, match="another run is training"), exclusive(tmp_path):
        pass
    child.kill()
    child.communicate()
    for _ in range(50):
        try:
            with exclusive(tmp_path):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the lock outlived its process")


CHANGES: list[tuple[Callable[[dict], Any], str | None]] = [
    (lambda v: v.update(seed=1), "seed 1 instead of 0"),
    (lambda v: v["datasets"][0].update(batch_size=1), "datasets.pages.batch_size 1 instead of 2"),
    (lambda v: v["datasets"][1].update(shuffle=9), "datasets.pairs.shuffle 9 instead of 4"),
    (lambda v: v["datasets"][1].update(flip=0), "datasets.pairs.flip 0"),
    (lambda v: v["optimizer"].update(lr=1e-3), None),
    (lambda v: v["datasets"][1].update(weight=0.5), None),
    (lambda v: v["model"].update(compute="bfloat16"), None),
]


@pytest.mark.parametrize(("change", "refusal"), CHANGES)
def test_changes_of_a_continued_run(change, refusal: str | None, values, capsys, tmp_path) -> None:
    assert main(["train", str(write(values, tmp_path))]) == 0
    change(values)
    values |= {"steps": 4, "save_every": 7, "keep": 9}
    status = main(["train", str(write(values, tmp_path))])
    told = capsys.readouterr().err
    if refusal is None:
        assert status == 0 and "continuing with " in told and " instead of " in told
    else:
        assert status == 1 and refusal in told
        assert "Continue with those of the run, or train into another output folder" in told
        assert steps_saved(tmp_path / "out")[-1] == 3


def test_every_setting_is_compared_or_free(values) -> None:
    """A new setting is refused until someone says that it may change."""
    config = TrainConfig.from_dict(values).to_dict()
    config["datasets"][0]["brand_new"] = 1
    with pytest.raises(ValueError, match="brand_new nothing instead of 1"):
        compare(Path("x"), config, TrainConfig.from_dict(values).to_dict())
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names - {"model", "datasets", "optimizer"} == set(config) - {
        "model",
        "datasets",
        "optimizer",
    }


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_the_umask_decides_who_reads(mask: int, values, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        assert main(["train", str(write(values, tmp_path))]) == 0
        assert main(["export", str(tmp_path / "out"), str(tmp_path / "model")]) == 0
    finally:
        os.umask(before)
    written = [*(tmp_path / "out").rglob("*"), *(tmp_path / "model").rglob("*")]
    assert {p.stat().st_mode & 0o777 for p in written if p.is_file()} == {0o666 & ~mask}


def test_a_full_disk_is_one_line(values, tmp_path: Path, capsys) -> None:
    assert main(["train", str(write(values, tmp_path))]) == 0
    model = FlamingoModel(FlamingoConfig.from_name("tiny"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert main(["export", str(tmp_path / "out"), str(tmp_path / "model")]) == 1
        with pytest.raises(OSError, match=r"cannot write .*saved/model\.safetensors: .*too large"):
            model.save_pretrained(tmp_path / "saved", include_frozen=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("flamingo-kernels export: cannot write ")
    assert not any((tmp_path / "model").iterdir()) and not any((tmp_path / "saved").iterdir())


def test_weights_of_others_are_not_replaced(tmp_path: Path) -> None:
    write_language_model(tmp_path / "lm")
    weights = (tmp_path / "lm" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds weights that are not a checkpoint of flam"):
        FlamingoModel(FlamingoConfig.from_name("tiny")).save_pretrained(tmp_path / "lm")
    assert (tmp_path / "lm" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("base", ["config", "pretrained", "folders", "trained-only"])
def test_from_training_to_text(base: str, values, tmp_path: Path, capsys) -> None:
    """Train, export, generate: no other file is needed."""
    pytest.importorskip("transformers")
    folders = {"language_model": str(tmp_path / "lm"), "vision_encoder": str(tmp_path / "clip")}
    if base == "pretrained":
        FlamingoModel(FlamingoConfig.from_name("tiny")).save_pretrained(tmp_path / "base", True)
        values["model"] = {"pretrained": str(tmp_path / "base")}
    elif base != "config":
        write_language_model(folders["language_model"])
        write_vision_encoder(folders["vision_encoder"])
        values["model"] = folders
    assert main(["train", str(write(values, tmp_path))]) == 0
    model = tmp_path / "model"
    options = ["--trained-only"] if base == "trained-only" else []
    assert main(["export", str(tmp_path / "out"), str(model), *options]) == 0
    capsys.readouterr()
    command = ["generate", "--model", str(model), "--image", str(tmp_path / "0.png")]
    command += ["--text", "<image> a", "--max-new-tokens", "3"]
    if base == "trained-only":
        assert main(command) == 1
        command += ["--language-model", folders["language_model"]]
        command += ["--vision-encoder", folders["vision_encoder"]]
        assert "holds no vision_encoder; pass vision_encoder=" in capsys.readouterr().err
        return
    assert main(command) == 0
    assert FlamingoModel.from_pretrained(model).config.new_token_ids or base in (
        "config",
        "pretrained",
    )


def test_a_checkpoint_without_its_state_is_not_passed_over(values, tmp_path, capsys) -> None:
    config = write(values, tmp_path)
    assert main(["train", str(config)]) == 0
    (tmp_path / "out" / "step_00000003" / "state.json").unlink()
    commands = (["train", str(config)], ["export", str(tmp_path / "out"), str(tmp_path / "m")])
    for command in commands:
        assert main(command) == 1
        assert "cannot read the checkpoint" in (told := capsys.readouterr().err)
        assert "step_00000003: state.json: it is missing; copy the folder again" in told
    shutil.rmtree(tmp_path / "out" / "step_00000003")
    (tmp_path / "out" / "step_00000003").write_text("no checkpoint")
    (tmp_path / "out" / "step_00000009").mkdir()
    assert main(commands[1]) == 0
    (tmp_path / "out" / "step_00000003").unlink()
    assert main(commands[0]) == 0
    assert "continuing after step 2" in capsys.readouterr().err


def test_training_prepares_pixels_as_the_folder_of_the_encoder_says(values, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folders = {"language_model": str(tmp_path / "lm"), "vision_encoder": str(tmp_path / "clip")}
    write_language_model(folders["language_model"])
    write_vision_encoder(folders["vision_encoder"])
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(said))
    values["model"] = folders
    assert main(["train", str(write(values, tmp_path))]) == 0
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "model")]) == 0
    encoder = FlamingoModel.from_pretrained(tmp_path / "model").vision_encoder
    assert [encoder.image_mean, encoder.image_std] == [(0.1, 0.2, 0.3), (0.4, 0.5, 0.6)]


def test_another_base_model_cannot_be_exported_whole(values, tmp_path: Path, capsys) -> None:
    trainer = make_trainer(values, model_seed=1)  # a run from Python, of no configuration
    trainer.step()
    trainer.save()
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "model")]) == 1
    assert "cannot be built again" in (told := capsys.readouterr().err)
    assert "--trained-only" in told and told.count("\n") == 1
    assert json.loads((tmp_path / "out/step_00000001/state.json").read_text())["step"] == 1
