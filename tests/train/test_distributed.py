"""Two gloo processes against one: gradients, a rank without images, checkpoints of both."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from flamingo_kernels import FlamingoConfig, FlamingoModel
from flamingo_kernels.data.samples import Sample, collate
from flamingo_kernels.train import TrainConfig, Trainer
from tests.budgets import assert_close_to_reference
from tests.model.conftest import TINY, open_gates_of

STEPS = 2


def row(length: int, images: int, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (length,), generator=generator).tolist()
    for place in range(images):
        ids[3 * place + 1] = TINY.image_token_id
    media = [torch.randn(1, 3, 32, 32, generator=generator) for _ in range(images)]
    return Sample(f"row {seed}", ids, media, "next" if seed % 2 else "previous")


def rows_of(rank: int, step: int) -> dict[str, list[Sample]]:
    """Of every step; rank 1 has no image in the first, and no rank has one in ``text``."""
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
        return collate(self.batches[self.place - 1], TINY.pad_token_id)

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def trainer_of(ranks: list[int], folder: str) -> Trainer:
    shared = {"kind": "pairs", "shards": ["none"], "batch_size": 1}
    config = TrainConfig.from_dict(
        {
            "model": {"config": "tiny"},
            "datasets": [
                {"name": "mixed", **shared},
                {"name": "text", "weight": 0.5, **shared},
            ],
            "steps": STEPS,
            "output": folder,
            "optimizer": {"clip": 1e9, "lr": 1e-4, "warmup_steps": 0},
        }
    )
    torch.manual_seed(0)
    model = FlamingoModel(FlamingoConfig.from_name("tiny"))
    open_gates_of(model)
    loaders = {
        name: FixedBatches(
            [[r for rank in ranks for r in rows_of(rank, step)[name]] for step in range(STEPS)]
        )
        for name in ("mixed", "text")
    }
    return Trainer(model, loaders, config)


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in trainer.masters.parameters.items() if p.grad is not None}


def run_rank(rank: int, folder: str) -> None:
    """What each of the two processes runs."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    trainer = trainer_of([rank], f"{folder}/out")
    reports = [trainer.step()]
    save_file(gradients(trainer), f"{folder}/gradients.{rank}.safetensors")
    trainer.save()
    reports.append(trainer.step())
    resumed = trainer_of([rank], f"{folder}/out")
    assert resumed.resume() and resumed.step_number == 1
    assert resumed.step() == reports[1]
    values = torch.tensor([[r["loss"], r["tokens"], r["images"]] for r in reports])
    save_file({"reports": values}, f"{folder}/reports.{rank}.safetensors")
    try:
        with torch.no_grad():
            if rank == 1:
                next(trainer.model.language_model.parameters()).add_(1)
        Trainer(trainer.model, trainer.loaders, trainer.config)
    except ValueError as error:
        assert "has another base model than this one" in str(error)
    else:
        raise AssertionError("different base models were not noticed")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    alone = trainer_of([0, 1], str(tmp_path / "alone"))
    reports = [alone.step()]
    expected = {name: gradient.clone() for name, gradient in gradients(alone).items()}
    magnitude = max(gradient.abs().max().item() for gradient in expected.values())
    found = [load_file(tmp_path / f"gradients.{rank}.safetensors") for rank in range(2)]
    for name, gradient in expected.items():
        assert torch.equal(found[0][name], found[1][name]), name
        assert_close_to_reference(found[0][name], gradient, torch.float32, name, terms=magnitude)
    assert found[0].keys() == expected.keys()
    reports.append(alone.step())
    for rank in range(2):
        values = load_file(tmp_path / f"reports.{rank}.safetensors")["reports"]
        assert values[:, 1:].tolist() == [[r["tokens"], r["images"]] for r in reports]
        wanted = torch.tensor([r["loss"] for r in reports])
        assert_close_to_reference(values[:, 0], wanted, torch.float32, "losses")
    with pytest.raises(ValueError, match=r"was saved by 2 process\(es\), now there are 1"):
        trainer_of([0], str(tmp_path / "out")).resume()
