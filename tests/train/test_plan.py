"""Memory plans: counted parameters, and activations as real tensors keep them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flamingo_kernels import FlamingoConfig, FlamingoModel
from flamingo_kernels.cli import main
from flamingo_kernels.language import build_language_model
from flamingo_kernels.model.loss import next_token_loss
from flamingo_kernels.train import plan as planning
from flamingo_kernels.train.plan import STRATEGIES, Workload

TINY = FlamingoConfig.from_name("tiny")


def test_bytes_of_parameters_by_hand() -> None:
    model = FlamingoModel(TINY)
    trainable = sum(p.numel() for p in model.trainable_parameters().values())
    frozen = sum(p.numel() for p in model.parameters()) - trainable
    ddp, partly, fully = planning.plan(TINY, 4, Workload()).values()
    assert ddp.parameters == 2 * frozen + 6 * trainable
    assert ddp.gradients == 8 * trainable and ddp.optimizer == 8 * trainable
    assert partly.optimizer == fully.optimizer == 8 * -(-trainable // 4)
    units = [*model.gated_cross_attn_layers, model.perceiver]
    largest = max(sum(p.numel() for p in unit.parameters()) for unit in units)
    assert partly.parameters == 2 * frozen + 4 * -(-trainable // 4) + 4 * largest
    assert ddp.activations == partly.activations == fully.activations


def test_keys_and_values_by_hand() -> None:
    work = Workload(batch_size=3, images=5)
    # 2 layers, 16 latents, keys and values of 4 heads of 16, 2 bytes.
    assert planning.media_bytes(TINY, work) == 2 * 3 * 5 * 16 * 2 * 64 * 2


def test_fake_tensors_keep_what_real_ones_do() -> None:
    config = dataclasses.replace(TINY.language, depth=2)
    model = build_language_model(config).requires_grad_(False)
    ids = torch.zeros(2, 24, dtype=torch.int64)
    hidden = torch.randn(2, 24, config.dim, requires_grad=True)

    def run() -> torch.Tensor:
        return next_token_loss(
            model(ids, before_block=lambda i, x: hidden if i == 0 else x).logits, ids
        )

    real = planning.kept_bytes(model, run)
    block, head = planning.language_bytes(TINY.language, 2, 24, torch.float32)
    logits = 2 * 24 * config.vocab_size * 4
    assert real == 2 * block + head - logits


def test_checkpointing_and_sharding_save_memory() -> None:
    config = FlamingoConfig.from_name("flamingo-3b")
    kept = planning.activation_bytes(config, Workload(activation_checkpointing=False))
    checkpointed = planning.activation_bytes(config, Workload())
    assert checkpointed < kept / 2
    totals = [memory.total for memory in planning.plan(config, 8, Workload()).values()]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 3


def test_command(capsys) -> None:
    arguments = ["plan", "--config", "flamingo-80b", "--gpus", "64", "--memory", "141"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    verdicts = {name: line.split()[-1] for name in STRATEGIES for line in lines if name in line}
    assert verdicts == dict(zip(STRATEGIES, ("no", "yes", "yes"), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "tiny", "--gpus", "0", "--memory", "80"], "gpus must be at least 1, got 0"),
        (["--config", "huge", "--gpus", "1", "--memory", "80"], "unknown config 'huge'"),
        (["--config", "open-flamingo-3b", "--gpus", "1", "--memory", "9"], "kind 'huggingface'"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys) -> None:
    assert main(["plan", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
