"""Training checkpoints: size, atomicity, refusal, and exact continuation."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flamingo_kernels import FlamingoModel
from flamingo_kernels.cli import main
from flamingo_kernels.train import TrainingError
from flamingo_kernels.train.checkpoints import folder as folders
from flamingo_kernels.train.checkpoints import whole
from flamingo_kernels.train.checkpoints.folder import list_checkpoints
from flamingo_kernels.train.checkpoints.state import fingerprints
from flamingo_kernels.train.log import LOG_FILE
from testing.tiny_run import make_trainer

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]
TIMES = ("tokens_per_second", "images_per_second")


def logged(output: str | Path) -> list[dict]:
    lines = [json.loads(line) for line in (Path(output) / LOG_FILE).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def write_config(values: dict, path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def command(config: Path, processes: int = 1) -> list[str]:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    start = launcher if processes > 1 else []
    return [sys.executable, "-m", *start, "flamingo_kernels", "train", str(config)]


def children_of(process: int) -> list[int]:
    """Return the processes that torchrun started; each is in its own session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            parent = stat.read_text().rpartition(")")[2].split()[1]
            if int(parent) == process:
                found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_checkpoint_holds_the_trainable_tensors_alone(compute: str, values) -> None:
    values["model"]["compute"] = compute
    trainer = make_trainer(values)
    trainer.step()
    folder = trainer.save()
    trainable = sum(4 * p.numel() for p in trainer.masters.parameters.values())
    size = (folder / "model.safetensors").stat().st_size
    # The header names every tensor; a tiny model is hardly larger than that.
    tensors = load_file(folder / "model.safetensors")
    assert sum(t.nbytes for t in tensors.values()) == trainable
    header = size - trainable
    assert header < 150 * len(tensors) + 4096
    moments = load_file(folder / "optimizer.safetensors")
    assert sum(t.nbytes for t in moments.values()) < 2.1 * trainable
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    base = make_trainer(values).model
    loaded = FlamingoModel.from_pretrained(
        folder, vision_encoder=base.vision_encoder, language_model=base.language_model
    )
    for name, parameter in loaded.trainable_parameters().items():
        assert torch.equal(parameter, trainer.masters.parameters[name])


def test_only_the_newest_are_kept_and_incomplete_ones_are_no_checkpoints(values) -> None:
    trainer = make_trainer({**values, "steps": 9, "save_every": 2, "keep": 2})
    trainer.output.mkdir()
    for leftover in (".step_00000002.incomplete", ".step_00000001.removed", "step_00000099"):
        (trainer.output / leftover).mkdir()  # as left by a kill, but for the last
    trainer.run()
    names = [path.name for path in list_checkpoints(trainer.output)]
    assert names == ["step_00000008", "step_00000009"]
    assert not list(trainer.output.glob(".step*"))
    again = make_trainer({**values, "steps": 9})
    assert again.resume() and again.step_number == 9


@pytest.mark.parametrize("where", ["model", "optimizer", "state", "rename"])
def test_a_full_disk_leaves_the_previous_checkpoint_good(where: str, values, monkeypatch) -> None:
    trainer = make_trainer(values)
    trainer.step()
    good = trainer.save()
    files = {path.name: path.read_bytes() for path in good.iterdir()}
    trainer.step()

    write = whole.weights.write_tensors

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_later(tensors: dict, file: Path, *more: object) -> None:
        (full if file.name == whole.OPTIMIZER_FILE else write)(tensors, file, *more)

    target = {
        "model": (whole.weights, "save_file"),
        "optimizer": (whole.weights, "write_tensors"),
        "state": (folders.Path, "write_text"),
        "rename": (folders.os, "fsync"),
    }[where]
    monkeypatch.setattr(*target, full_later if where == "optimizer" else full)
    with pytest.raises(OSError, match=rf"cannot write .*step_00000002: .*No space.*is {good}"):
        trainer.save()
    monkeypatch.undo()
    assert [path.name for path in trainer.output.iterdir()] == [good.name]
    assert {path.name: path.read_bytes() for path in good.iterdir()} == files
    trainer.save()


def test_export_writes_the_newest_as_one_file(values, tmp_path, capsys) -> None:
    trainer = make_trainer(values)
    target = tmp_path / "exported"
    for number in (1, 2):
        trainer.step()
        folder = trainer.save()
        newest = {n: p.detach().clone() for n, p in trainer.masters.parameters.items()}
        command = ["export", str(trainer.output), str(target), "--trained-only", "--overwrite"]
        assert main(command) == 0, number
        stored = load_file(target / "model.safetensors")
        assert stored.keys() == newest.keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in newest.items())
    assert capsys.readouterr().out == f"{target / 'model.safetensors'}\n" * 2
    assert main(["export", str(folder), str(target), "--overwrite"]) == 0
    assert main(["export", str(folder), str(target)]) == 1
    assert "exists: give another folder, or --overwrite" in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(tmp_path / "more")]) == 1
    assert "no checkpoint of a training run in" in capsys.readouterr().err


def test_another_base_model_is_refused(values) -> None:
    trainer = make_trainer(values)
    trainer.step()
    trainer.save()
    other = make_trainer(values)
    with torch.no_grad():
        next(other.model.language_model.parameters()).view(-1)[5] += 1e-3
    other.base_model = fingerprints(other.model)
    with pytest.raises(ValueError, match="was trained on another language_model: resume with"):
        other.resume()
    with pytest.raises(ValueError, match="another vision_encoder and another language_model"):
        make_trainer(values, model_seed=1).resume()
    other = make_trainer(values)
    attention = replace(other.model.config.cross_attention, attend="previous")
    other.model.config = replace(other.model.config, cross_attention=attention)
    other.base_model = fingerprints(other.model)
    with pytest.raises(ValueError, match="was trained on another configuration: resume with"):
        other.resume()
    values["datasets"] = values["datasets"][:1]
    with pytest.raises(ValueError, match=r"trained on the datasets \['pages', 'pairs'\], the conf"):
        make_trainer(values).resume()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_damaged_checkpoints_are_refused(name: str, values) -> None:
    trainer = make_trainer(values)
    trainer.step()
    file = trainer.save() / name
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=rf"cannot read the checkpoint .*step_00000001: {name}: "):
        make_trainer(values).resume()
    file.unlink()
    with pytest.raises(ValueError, match=rf"cannot read the checkpoint .*step_00000001: {name}: "):
        make_trainer(values).resume()


MOMENT = "perceiver.latents/exp_avg"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({MOMENT: None}, rf"tensors 1 missing \({MOMENT}\)"),
        ({"perceiver.latents": None}, r"tensors 1 missing \(perceiver\.latents\)"),
        ({MOMENT: lambda t: t[:3]}, rf"1 of another shape \({MOMENT} \(3, 64\) instead of"),
        ({MOMENT: lambda t: t.half()}, rf"{MOMENT} torch.float16 instead of torch.float32"),
        ({MOMENT: lambda t: t * torch.nan}, f"{MOMENT} is not finite"),
        ({MOMENT + "_sq": lambda t: t - 1}, f"{MOMENT}_sq is negative"),
        ({"perceiver.latents": lambda t: t + torch.inf}, r"perceiver\.latents is not finite"),
        ({"perceiver.gone/exp_avg": lambda _: torch.zeros(3)}, "1 unknown "),
        ({"perceiver.latents/step": lambda t: t - 5}, "latents/step is -4 after step 1"),
        ({"perceiver.latents/step": lambda t: t + 1}, "latents/step is 2 after step 1"),
        ({"/step": torch.zeros_like}, "the optimiser is at step 0, the checkpoint at 1"),
        ({"/exp_avg": None}, r"tensors \d\d missing"),
        ({"/random/cpu": None}, "the random state '/random/cpu' is missing"),
        ({"/random/cpu": lambda t: t[:3]}, "a random state is wrong: .*size"),
    ],
)
def test_damaged_tensors_are_refused(changes: dict, reason: str, values) -> None:
    trainer = make_trainer(values)
    trainer.step()
    folder = trainer.save()
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for ending, change in changes.items():
            found = [name for name in tensors if name.endswith(ending)]
            found += [ending] * ("gone" in ending and file.stem == "optimizer")
            for name in found:
                tensor = tensors.pop(name, None)
                if change is not None:
                    tensors[name] = change(tensor)
        save_file(tensors, file)
    with pytest.raises(ValueError, match=f"cannot read the checkpoint .*step_00000001: .*{reason}"):
        make_trainer(values).resume()


def changed(values: Any, place: tuple, new: object) -> Any:
    """Return nested dicts and lists with the value at ``place`` replaced."""
    if not place:
        return new
    copied = values.copy()
    copied[place[0]] = changed(values[place[0]], place[1:], new)
    return copied


PAGES = ("data", 0, "pages")
WORKER = (*PAGES, "workers", 0)


@pytest.mark.parametrize(
    ("place", "new"),
    [
        ((), []),
        ((), None),
        (("data",), None),
        (("data",), [3]),
        (PAGES, {}),
        (PAGES, None),
        ((*PAGES, "next_worker"), 1),
        (WORKER, {}),
        ((*WORKER, "epoch"), -1),
        ((*WORKER, "offset"), 10**30),
        ((*WORKER, "offset"), "0"),
        ((*WORKER, "position"), 7),
        ((*WORKER, "buffer"), [[9, 0]]),
        ((*WORKER, "buffer"), [[0, 3, 3]]),
        ((*WORKER, "skipped"), {"broken record": "many"}),
        (("base_model",), 3),
        (("settings", "datasets"), 5),
        (("settings", "datasets"), [{}]),
        (("settings", "datasets"), [["pages"]]),
        (("step",), "a"),
        (("step",), True),
        (("step",), 2),
        (("step",), -1),
        (("format",), 0),
    ],
)
def test_damaged_states_are_refused(place: tuple, new: object, values) -> None:
    trainer = make_trainer(values)
    trainer.step()
    file = trainer.save() / "state.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), place, new)))
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*step_00000001: "):
        make_trainer(values).resume()


def test_what_is_not_finite_is_not_saved(values) -> None:
    trainer = make_trainer(values)
    trainer.step()
    good = trainer.save()
    trainer.step()
    with torch.no_grad():
        trainer.model.perceiver.latents[0, 0] = torch.inf
    with pytest.raises(
        TrainingError, match=r"perceiver\.latents is not finite after step 2; .*step_00000001"
    ):
        trainer.save()
    assert list_checkpoints(trainer.output) == [good]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_resumed_in_process_it_continues_bit_for_bit(compute: str, values) -> None:
    values["model"]["compute"] = compute
    whole = make_trainer({**values, "steps": 6, "save_every": 3})
    whole.run()
    expected = logged(whole.output)
    part = {**values, "steps": 6, "save_every": 3, "output": values["output"] + "2"}
    make_trainer({**part, "steps": 4}).run()
    # As if it had died after step 5, before the next checkpoint: 4 is the last one.
    with (Path(part["output"]) / LOG_FILE).open("a") as file:
        file.write('{"step": 5, "loss": 0}\n{"step": 6, "lo')
    resumed = make_trainer(part)
    assert resumed.resume() and resumed.step_number == 4
    resumed.run()
    assert logged(part["output"]) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "strategy", "kills"), [(1, "ddp", (2, 6)), (2, "fsdp", (6,))], ids=["one", "fsdp"]
)
def test_killed_and_resumed_gives_the_same_bits(
    processes: int, strategy: str, kills: tuple[int, ...], values, tmp_path
) -> None:
    """The kill follows a line of the log; the signal may meet the processes anywhere."""
    values |= {"steps": 20, "save_every": 4, "keep": 1, "distributed": strategy}
    shutil.copy(tmp_path / "pages.jsonl", tmp_path / "pages2.jsonl")  # one for each process
    values["datasets"][0]["shards"] = [str(tmp_path / "pages*.jsonl")]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for run in (whole, killed):
        write_config(values, run.with_suffix(".yaml"), output=str(run))
    whole_command, killed_command = (
        command(run.with_suffix(".yaml"), processes) for run in (whole, killed)
    )
    subprocess.run(whole_command, cwd=ROOT, check=True, capture_output=True)
    log = killed / LOG_FILE
    for after in kills:
        child = subprocess.Popen(killed_command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while child.poll() is None and not (log.exists() and log.read_text().count("\n") >= after):
            time.sleep(0.002)
        started = children_of(child.pid)
        assert len(started) == (processes if processes > 1 else 0)
        for process in (child.pid, *started):
            os.kill(process, signal.SIGKILL)
        message = child.communicate()[1]
        assert child.returncode == -signal.SIGKILL, message
    done = subprocess.run(killed_command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "continuing after step" in done.stderr
    assert logged(killed) == logged(whole)
    first, second = (run / "step_00000020" for run in (whole, killed))
    assert (first / "state.json").read_bytes() == (second / "state.json").read_bytes()
    names = sorted(path.name for path in first.glob("*.safetensors"))
    assert names and names == sorted(path.name for path in second.glob("*.safetensors"))
    for name in names:
        expected, found = load_file(first / name), load_file(second / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items()), name
