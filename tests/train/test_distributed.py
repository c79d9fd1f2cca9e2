"""Both strategies with two gloo processes, against one process.

Tested are gradients, a rank without images, checkpoints, and errors on all ranks.
"""

from __future__ import annotations

import dataclasses
import errno
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystem

from flamingo_kernels import FlamingoModel
from flamingo_kernels.cli import main
from flamingo_kernels.data.samples import Sample, collate
from flamingo_kernels.model.network import FROZEN_PARTS
from flamingo_kernels.train import (
    TrainConfig,
    Trainer,
    TrainingError,
    distributed,
    sharding,
)
from flamingo_kernels.train.checkpoints import whole as whole_checkpoints
from flamingo_kernels.train.memory_estimate import shard_sizes
from flamingo_kernels.vision import build_vision_encoder
from testing.backbones import language_model
from testing.budgets import assert_close_to_reference
from testing.processes import join_group
from testing.tiny_model import TINY, open_gates_of

STEPS = 2
FIRST_SHARD = "shard-00001-model-00001-of-00001.safetensors"
SECOND_SHARD = "shard-00002-model-00001-of-00001.safetensors"


def row(length: int, images: int, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (length,), generator=generator).tolist()
    for place in range(images):
        ids[3 * place + 1] = TINY.image_token_id
    media = [torch.randn(1, 3, 32, 32, generator=generator) for _ in range(images)]
    return Sample(f"row {seed}", ids, media, "next" if seed % 2 else "previous")


def rows_of(rank: int, step: int) -> dict[str, list[Sample]]:
    """Return a step's rows. Rank 1 has no image in the first step, ``text`` has none at all."""
    mixed = [row(9, 2, 10), row(14, 1, 11)] if rank == 0 else [row(20, step, 12)]
    return {"mixed": mixed, "text": [row(7 + 4 * rank, 0, 20 + rank)]}


class FixedBatches:
    """Stands in for a ``BatchLoader``; its state is the number of the next batch."""

    def __init__(self, batches: list[list[Sample]]) -> None:
        self.batches, self.place = batches, 0
        self.keys: list[str] = []
        self.skipped: dict[str, int] = {}

    def __next__(self) -> dict[str, Any]:
        self.place += 1
        batch = self.batches[self.place - 1]
        self.keys = [sample.key for sample in batch]
        return collate(batch, TINY.pad_token_id)

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


@dataclass(frozen=True)
class Case:
    """What is trained, and how; ``opt`` names a language model of transformers."""

    distributed: str
    language: str = "own"
    compute: str = "float32"
    activation_checkpointing: bool = False

    def network(self) -> FlamingoModel:
        torch.manual_seed(0)
        if self.language == "own":
            network = FlamingoModel(TINY)
        else:
            language = language_model(self.language, vocab_size=TINY.language.vocab_size)
            for name in ("image_token_id", "end_of_chunk_token_id"):
                setattr(language.config, name, getattr(TINY, name))
            language.config.new_token_ids = [TINY.image_token_id, TINY.end_of_chunk_token_id]
            network = FlamingoModel.from_backbones(build_vision_encoder(TINY.vision), language)
        open_gates_of(network)
        return network


def trainer_of(ranks: list[int], folder: str, case: Case) -> Trainer:
    shared = {"kind": "pairs", "shards": ["none"], "batch_size": 1}
    config = TrainConfig.from_dict(
        {
            "model": {
                "config": "tiny",
                "compute": case.compute,
                "activation_checkpointing": case.activation_checkpointing,
            },
            "distributed": case.distributed,
            "datasets": [
                {"name": "mixed", **shared},
                {"name": "text", "weight": 0.5, **shared},
            ],
            "steps": STEPS,
            "output": folder,
            "optimizer": {"clip": 0.5, "lr": 1e-4, "warmup_steps": 0},
        }
    )
    loaders = {
        name: FixedBatches(
            [[r for rank in ranks for r in rows_of(rank, step)[name]] for step in range(STEPS)]
        )
        for name in ("mixed", "text")
    }
    return Trainer(case.network(), loaders, config)


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    parameters = trainer.masters.parameters.items()
    return {n: sharding.whole(p.grad) for n, p in parameters if p.grad is not None}


def run_rank(rank: int, folder: str, case: Case) -> None:
    """Run one of the two processes."""
    join_group(rank, folder)
    train_save_resume(rank, folder, case)
    distributed.stop()
    # The system lists a thread for a moment after it has been joined.
    end = time.monotonic() + 20
    while gloo_threads() and time.monotonic() < end:
        time.sleep(0.02)
    assert not gloo_threads(), "threads that outlive the group"


def gloo_threads() -> list[str]:
    found = []
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # it may end while we look
            name = (task / "comm").read_text()
            found += [name] if "gloo" in name else []
    return found


def train_save_resume(rank: int, folder: str, case: Case) -> None:
    trainer = trainer_of([rank], f"{folder}/out", case)
    held = sum(sharding.local(p).untyped_storage().nbytes() for p in trainer.model.parameters())
    reports = [trainer.step()]
    save_file(gradients(trainer), f"{folder}/gradients.{rank}.safetensors")
    saved = trainer.save()
    masters = {n: sharding.whole(p.detach()) for n, p in trainer.masters.parameters.items()}
    save_file(masters, f"{folder}/masters.{rank}.safetensors")
    reports.append(trainer.step())
    assert_stays_good_on_a_full_disk(trainer, saved, rank)
    assert_nan_of_one_process_stops_both(trainer, saved, rank)

    resumed = trainer_of([rank], f"{folder}/out", case)
    assert resumed.resume() and resumed.step_number == 1
    assert resumed.step() == reports[1]
    save_file(
        {
            "reports": torch.tensor([[r["loss"], r["tokens"], r["images"]] for r in reports]),
            "gates": torch.tensor(list(resumed.gates().values())),
            "held": torch.tensor(held),
        },
        f"{folder}/reports.{rank}.safetensors",
    )
    if case.distributed == "fsdp":
        assert_damaged_shards_are_refused(resumed, saved, rank)
    assert_refused(resumed, rank)


def assert_stays_good_on_a_full_disk(trainer: Trainer, saved: Path, rank: int) -> None:
    """Fill the disk of the process that writes, or of the last one if all write."""
    whole = trainer.config.distributed == "ddp"
    target = (whole_checkpoints.weights, "save_file") if whole else (FileSystem, "create_stream")
    broken = mock.patch.object(*target, side_effect=OSError(errno.ENOSPC, "No space left"))
    message = rf"cannot write .*step_00000002: .*No space.*; the last good one is {saved}"
    with broken if rank == (0 if whole else 1) else nullcontext():
        with pytest.raises(OSError, match=message):
            trainer.save()
    dist.barrier()
    assert [path.name for path in trainer.output.iterdir()] == [saved.name]


def assert_nan_of_one_process_stops_both(trainer: Trainer, saved: Path, rank: int) -> None:
    loader = trainer.loaders["mixed"]
    loader.place = 1
    if rank == 1:
        loader.batches[1][0].media[0].fill_(float("nan"))
    before = [sharding.local(p).clone() for p in trainer.masters.parameters.values()]
    message = rf"loss of mixed is nan at step 3, process 1, samples row 12; .* is {saved}"
    with pytest.raises(TrainingError, match=message):
        trainer.step()
    after = [sharding.local(p) for p in trainer.masters.parameters.values()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def assert_refused(trainer: Trainer, rank: int) -> None:
    """Refuse another base model, another strategy, and base models that differ by rank."""
    own, config = trainer.base_model, trainer.config
    trainer.base_model = {**own, "language_model": "another"}
    with pytest.raises(ValueError, match="was trained on another language_model: resume with"):
        trainer.resume()
    other = "fsdp" if config.distributed == "ddp" else "ddp"
    trainer.base_model, trainer.config = own, dataclasses.replace(config, distributed=other)
    with pytest.raises(ValueError, match="was saved with another value of distributed"):
        trainer.resume()
    torch.manual_seed(rank)
    network = FlamingoModel(TINY)
    with pytest.raises(ValueError, match="has another base model than this one"):
        Trainer(network, trainer.loaders, config)


def assert_damaged_shards_are_refused(trainer: Trainer, saved: Path, rank: int) -> None:
    """Refuse on all processes what one shard lacks, or holds and cannot be."""
    moment, state = "perceiver.latents/exp_avg", "/random/cpu.0"
    for name, change, reason in (
        (moment, None, f"a part of {moment} is missing"),
        (moment, lambda t: t * torch.nan, f"{moment} is not finite"),
        (state, None, f"process 0: .*{state}"),
        (state, lambda t: t[:3], f"process 0: .*{state}"),
    ):
        file = saved / FIRST_SHARD
        good = file.read_bytes()
        dist.barrier()
        if rank == 0:
            tensors = load_file(file)
            with safe_open(file, "pt") as stored:
                metadata = stored.metadata()
            tensor = tensors.pop(name)
            if change is not None:
                tensors[name] = change(tensor)
            save_file(tensors, file, metadata)
        dist.barrier()
        with pytest.raises(ValueError, match=rf"cannot read the checkpoint {saved}: {reason}"):
            trainer.resume()
        dist.barrier()
        if rank == 0:
            file.write_bytes(good)
        dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("ddp"),
        Case("fsdp", activation_checkpointing=True),
        Case("fsdp", "opt", "bfloat16", activation_checkpointing=True),
    ],
    ids=["ddp", "fsdp", "fsdp-opt-bfloat16"],
)
def test_two_processes_are_one(case: Case, tmp_path: Path, capsys) -> None:
    if case.language != "own":
        pytest.importorskip("transformers")
    mp.spawn(run_rank, (str(tmp_path), case), nprocs=2)
    dtype = getattr(torch, case.compute)
    one_process = dataclasses.replace(case, distributed="ddp")
    alone = trainer_of([0, 1], str(tmp_path / "alone"), one_process)
    reports = [alone.step()]
    expected = {name: gradient.clone() for name, gradient in gradients(alone).items()}
    magnitude = max(gradient.abs().max().item() for gradient in expected.values())
    found = [load_file(tmp_path / f"gradients.{rank}.safetensors") for rank in range(2)]
    for name, gradient in expected.items():
        assert torch.equal(found[0][name], found[1][name]), name
        assert_close_to_reference(found[0][name], gradient, dtype, name, terms=magnitude)
    assert found[0].keys() == expected.keys()

    exported = tmp_path / "exported"
    export = ["export", str(tmp_path / "out"), str(exported), "--trained-only"]
    assert main([*export, "--overwrite"]) == 0
    base = {part: getattr(alone.model, part) for part in FROZEN_PARTS}
    trained = FlamingoModel.from_pretrained(exported, **base).trainable_parameters()
    assert trained.keys() == expected.keys()
    for name, master in load_file(tmp_path / "masters.1.safetensors").items():
        assert torch.equal(trained[name], master), name

    if case.distributed == "fsdp":
        (tmp_path / "out" / "step_00000001" / SECOND_SHARD).unlink()
        assert main([*export, "--overwrite"]) == 1
        assert "step_00000001: 1 of 2 shards" in capsys.readouterr().err

    reports.append(alone.step())
    for rank in range(2):
        of_rank = load_file(tmp_path / f"reports.{rank}.safetensors")
        values = of_rank["reports"]
        assert values[:, 1:].tolist() == [[r["tokens"], r["images"]] for r in reports]
        wanted = torch.tensor([r["loss"] for r in reports])
        assert_close_to_reference(values[:, 0], wanted, dtype, "losses")
        gates = torch.tensor(list(alone.gates().values()))
        assert_close_to_reference(of_rank["gates"], gates, dtype, "gates")
        if case == Case("fsdp", activation_checkpointing=True):  # the estimate knows that model
            frozen, trainable = shard_sizes(TINY, 2)
            assert of_rank["held"] == frozen * dtype.itemsize + trainable * 4
    if case.distributed == "ddp":
        with pytest.raises(ValueError, match=r"was saved by 2 process\(es\), now there are 1"):
            trainer_of([0], str(tmp_path / "out"), case).resume()


def test_sharding_needs_processes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fsdp shards over the processes that torchrun starts"):
        trainer_of([0], str(tmp_path), Case("fsdp"))
