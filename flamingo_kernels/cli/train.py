"""Train a model as a YAML file says; the same command again continues after an interruption."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

from flamingo_kernels import FlamingoConfig, FlamingoModel
from flamingo_kernels.cli.loading import progress, read_backbone
from flamingo_kernels.train import TrainConfig, Trainer, distributed
from flamingo_kernels.train.config import ModelSection
from flamingo_kernels.train.datasets import build_loaders


def add(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "config",
        type=Path,
        metavar="CONFIG",
        help="YAML file; its keys are on the training page of the documentation",
    )


def run(options: Namespace) -> int:
    """Train to the end; return 0."""
    config = TrainConfig.from_yaml(options.config)
    device = distributed.start()
    try:
        _train(config, device)
    finally:
        distributed.stop()
    return 0


def _train(config: TrainConfig, device: torch.device) -> None:
    torch.manual_seed(config.seed)
    model = _build_model(config.model)
    if config.distributed == "ddp":
        model.to(device)
    trainer = Trainer(model, build_loaders(config, model), config)
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


def _build_model(section: ModelSection) -> FlamingoModel:
    """Return the model of a configuration, with new weights where it names none."""
    vision = read_backbone("AutoModel", section.vision_encoder)
    language = read_backbone("AutoModelForCausalLM", section.language_model)
    if section.pretrained is not None:
        return FlamingoModel.from_pretrained(
            section.pretrained, section.kernel, vision_encoder=vision, language_model=language
        )
    config = None if section.config is None else FlamingoConfig.from_name_or_file(section.config)
    if vision is not None and language is not None:
        return FlamingoModel.from_backbones(vision, language, config, section.kernel)
    if vision is not None or language is not None or config is None:
        raise ValueError("model: give both language_model and vision_encoder, or neither")
    return FlamingoModel(config, section.kernel)
