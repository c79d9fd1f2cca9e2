"""Train a model as a YAML file says; the same command again continues after an interruption."""

from __future__ import annotations

from pathlib import Path

import torch

from flamingo_kernels import FlamingoModel
from flamingo_kernels.cli.convert import read_config
from flamingo_kernels.cli.loading import frozen_part, progress, text_encoding
from flamingo_kernels.train import TrainConfig, Trainer, distributed
from flamingo_kernels.train.config import ModelSection
from flamingo_kernels.train.datasets import build_loader


def run(path: Path) -> int:
    """Train to the end; 0."""
    config = TrainConfig.from_yaml(path)
    device = distributed.start()
    try:
        _train(config, device)
    finally:
        distributed.stop()
    return 0


def _train(config: TrainConfig, device: torch.device) -> None:
    torch.manual_seed(config.seed)
    model = build_model(config.model)
    if config.distributed == "ddp":
        model.to(device)
    tokenizer = config.model.tokenizer or config.model.language_model or config.model.pretrained
    encoding = text_encoding(None if tokenizer is None else Path(tokenizer), model.config)
    loaders = {
        section.name: build_loader(
            section,
            encoding,
            model.vision_encoder,
            seed=config.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        for section in config.datasets
    }
    trainer = Trainer(model, loaders, config)
    trainable = sum(p.numel() for p in trainer.masters.parameters.values())
    resumed = trainer.resume()
    first = distributed.rank() == 0
    if first:
        progress(
            f"{trainable:,} trainable parameters, {distributed.world_size()} process(es) on "
            f"{device.type}, {config.model.compute}, "
            + (f"continuing after step {trainer.step_number}" if resumed else "from step 0")
        )
    trainer.run()
    skipped = trainer.skipped()
    if first:
        for reason, count in skipped.items():
            progress(f"skipped, {reason}: {count}")
        print(f"{config.output}: {trainer.step_number} steps")


def build_model(section: ModelSection) -> FlamingoModel:
    """The model that a configuration names, with fresh weights where none are given."""
    parts = {
        "vision_encoder": frozen_part("AutoModel", _path(section.vision_encoder)),
        "language_model": frozen_part("AutoModelForCausalLM", _path(section.language_model)),
    }
    if section.pretrained is not None:
        return FlamingoModel.from_pretrained(section.pretrained, section.kernel, **parts)
    config = None if section.config is None else read_config(section.config)
    if parts["language_model"] is not None and parts["vision_encoder"] is not None:
        return FlamingoModel.from_backbones(
            parts["vision_encoder"], parts["language_model"], config, section.kernel
        )
    if any(part is not None for part in parts.values()) or config is None:
        raise ValueError("model: give both language_model and vision_encoder, or neither")
    return FlamingoModel(config, section.kernel)


def _path(folder: str | None) -> Path | None:
    return None if folder is None else Path(folder)
