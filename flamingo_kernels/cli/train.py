"""Train a model as a YAML file says; the same command again continues after an interruption."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

from flamingo_kernels.cli.loading import progress
from flamingo_kernels.train import TrainConfig, Trainer, distributed
from flamingo_kernels.train.building import build
from flamingo_kernels.train.checkpoints.folder import exclusive
from flamingo_kernels.train.datasets import build_loaders
from flamingo_kernels.train.interrupts import Interrupts


def add(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "config",
        type=Path,
        metavar="CONFIG",
        help="YAML file; its keys are on the training page of the documentation",
    )


def run(options: Namespace) -> int:
    """Train to the end and return 0, or to a signal and return 128 plus its number."""
    config = TrainConfig.from_yaml(options.config)
    device = distributed.start()
    try:
        return _train(config, device)
    finally:
        distributed.stop()


def _train(config: TrainConfig, device: torch.device) -> int:
    torch.manual_seed(config.seed)
    section, first = config.model, distributed.rank() == 0
    for folder in filter(
        None, (section.pretrained, section.vision_encoder, section.language_model)
    ):
        if first and Path(folder).is_dir():
            progress(f"loading {folder}")
    model, tokenizer = build(section)
    if config.distributed == "ddp":
        model.to(device)
    trainer = Trainer(model, build_loaders(config, model, tokenizer), config)
    trainable = sum(p.numel() for p in trainer.masters.parameters.values())
    with exclusive(trainer.output), Interrupts(trainer.stop) as interrupts:
        resumed = trainer.resume()
        if first:
            progress(
                f"{trainable:,} trainable parameters, {distributed.world_size()} process(es) on "
                f"{device.type}, {section.compute}, "
                + (f"continuing after step {trainer.step_number}" if resumed else "from step 0")
            )
            for change in trainer.changed_settings:
                progress(f"continuing with {change}")
        trainer.run()
    skipped = trainer.skipped()
    if first:
        for reason, count in skipped.items():
            progress(f"skipped, {reason}: {count}")
        print(f"{config.output}: {trainer.step_number} steps")
        if trainer.step_number < config.steps:
            progress(
                f"stopped before step {config.steps}; everything up to step "
                f"{trainer.step_number} is saved, and the same command continues"
            )
    return interrupts.exit_status
