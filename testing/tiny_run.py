"""A tiny training run: two datasets of drawn pictures, the tiny model, a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_kernels import FlamingoConfig, FlamingoModel
from flamingo_kernels.train import TrainConfig, Trainer
from flamingo_kernels.train.datasets import build_loaders
from testing.shard_files import numbered_pairs, picture_bytes, write_lines


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A configuration as read from YAML: pages in JSON lines, pairs in tar shards."""
    pytest.importorskip("PIL.Image")
    for name in range(4):
        (tmp_path / f"{name}.png").write_bytes(picture_bytes(60 * name))
    pages = [
        {"texts": [None, f"page {i}", None, "two"], "images": [f"{i % 4}.png", None, "0.png", None]}
        for i in range(6)
    ]
    write_lines(tmp_path / "pages.jsonl", pages)
    (tmp_path / "pairs").mkdir()
    numbered_pairs(tmp_path / "pairs", 2, 5)
    return {
        "model": {"config": "tiny"},
        "steps": 3,
        "output": str(tmp_path / "out"),
        "log_every": 1,
        "save_every": 2,
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        "datasets": [
            {
                "name": "pages",
                "kind": "interleaved",
                "shards": [str(tmp_path / "pages.jsonl")],
                "batch_size": 2,
                "max_tokens": 20,
            },
            {
                "name": "pairs",
                "kind": "pairs",
                "shards": [str(tmp_path / "pairs" / "*.tar")],
                "batch_size": 3,
                "weight": 0.2,
                "shuffle": 4,
            },
        ],
    }


def make_trainer(values: dict[str, Any], model_seed: int = 0) -> Trainer:
    """Build a trainer of the tiny model for a configuration."""
    config = TrainConfig.from_dict(values)
    torch.manual_seed(model_seed)
    model = FlamingoModel(FlamingoConfig.from_name("tiny"))
    return Trainer(model, build_loaders(config, model), config)
