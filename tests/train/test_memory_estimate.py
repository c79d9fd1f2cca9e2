"""Memory estimates: counted parameters, and activations as autograd saves real tensors."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

from flamingo_kernels import FlamingoConfig, FlamingoModel
from flamingo_kernels.cli import main
from flamingo_kernels.language import build_language_model
from flamingo_kernels.model import loss as losses
from flamingo_kernels.model.config import ProjectorConfig
from flamingo_kernels.model.loss import next_token_loss_of_hidden
from flamingo_kernels.saved_tensors import saved_bytes
from flamingo_kernels.train import memory_estimate
from flamingo_kernels.train.config import STRATEGIES
from flamingo_kernels.train.memory_estimate import Workload
from flamingo_kernels.vision import FeaturesConfig

TINY = FlamingoConfig.from_name("tiny")


def test_bytes_of_parameters_by_hand() -> None:
    model = FlamingoModel(TINY)
    trainable = sum(p.numel() for p in model.trainable_parameters().values())
    frozen = sum(p.numel() for p in model.parameters()) - trainable
    ddp, fsdp = memory_estimate.estimate(TINY, 1, Workload()).values()
    assert ddp.parameters == 2 * frozen + 6 * trainable
    assert ddp.gradients == 8 * trainable and ddp.optimizer == 8 * trainable
    language = model.language_model
    resident = language.token_embedding.weight.numel() + language.final_norm.weight.numel()
    units = [model.vision_encoder, model.perceiver, *language.blocks]
    vision, resampler, *blocks = (sum(p.numel() for p in unit.parameters()) for unit in units)
    layers = [
        sum(p.numel() for name, p in layer.named_parameters() if "to_kv" not in name)
        for layer in model.gated_cross_attn_layers
    ]
    gathered = 2 * (resident + 3 * max(vision, resampler, *blocks, *layers))
    assert fsdp.parameters == 2 * frozen + 4 * trainable + gathered
    assert fsdp.gradients == 4 * trainable + 6 * max(resampler, *layers)
    assert fsdp.optimizer == 8 * trainable
    assert ddp.activations == fsdp.activations


def test_shards_are_as_long_as_the_longest() -> None:
    """On each of three GPUs, 64 rows take 22, one row takes one, and so does a gate."""
    frozen, trainable = memory_estimate.shard_sizes(TINY, 3)
    rows = {name: -(-len(p) // 3) * p[0].numel() for name, p in trainable_of(TINY).items()}
    assert trainable == sum(rows.values())
    assert rows["gated_cross_attn_layers.0.attn_gate"] == 1
    assert memory_estimate.shard_sizes(TINY, 1) == (
        memory_estimate.parameter_sizes(TINY).frozen,
        memory_estimate.parameter_sizes(TINY).trainable,
    )
    assert frozen > memory_estimate.parameter_sizes(TINY).frozen / 3


def trainable_of(config: FlamingoConfig) -> dict[str, torch.Tensor]:
    return FlamingoModel(config).trainable_parameters()


def test_keys_and_values_by_hand() -> None:
    work = Workload(batch_size=3, images=5)
    # 2 layers, 16 latents, keys and values of 4 heads of 16, 2 bytes.
    assert memory_estimate.media_bytes(TINY, work) == 2 * 3 * 5 * 16 * 2 * 64 * 2


def test_keys_of_projected_features_by_hand() -> None:
    """4 x 4 features of each of two tiles, and one key/value head."""
    grouped = dataclasses.replace(TINY.cross_attention, kv_heads=1)
    config = dataclasses.replace(
        TINY, resampler=None, projector=ProjectorConfig(dim=48), cross_attention=grouped
    )
    work = Workload(batch_size=3, images=5, frames=2)
    assert memory_estimate.media_bytes(config, work) == 2 * 3 * 5 * 2 * 16 * 2 * 16 * 2
    estimates = memory_estimate.estimate(config, 1, work).values()
    assert all(estimate.total > 0 for estimate in estimates)
    features = dataclasses.replace(config, vision=FeaturesConfig(output_dim=8))
    with pytest.raises(ValueError, match="has a vision encoder of kind 'features'"):
        memory_estimate.estimate(features, 1, work)


@pytest.mark.skipif(not losses._IN_CHUNKS, reason="this torch has no LinearCrossEntropyOptions")
def test_fake_tensors_keep_what_real_ones_do() -> None:
    config = dataclasses.replace(TINY.language, depth=2)
    model = build_language_model(config).requires_grad_(False)
    ids = torch.zeros(2, 24, dtype=torch.int64)
    hidden = torch.randn(2, 24, config.dim, requires_grad=True)

    def run() -> torch.Tensor:
        return model(
            ids,
            before_block=lambda i, x: hidden if i == 0 else x,
            head=partial(next_token_loss_of_hidden, labels=ids),
        ).head_output

    real = saved_bytes(run, model.parameters())
    block, head = memory_estimate.language_bytes(TINY.language, 2, 24, torch.float32)
    in_the_backward = 4 * hidden.nbytes
    kept = 2 * 23 * (config.dim * 4 + 8 + 1)  # hidden states, targets, and which are counted
    assert real == 2 * block + head - in_the_backward + kept


def test_checkpointing_and_sharding_save_memory() -> None:
    config = FlamingoConfig.from_name("flamingo-3b")
    kept = memory_estimate.activation_bytes(config, Workload(activation_checkpointing=False))
    checkpointed = memory_estimate.activation_bytes(config, Workload())
    assert checkpointed < kept / 2
    ddp, fsdp = memory_estimate.estimate(config, 8, Workload()).values()
    assert fsdp.total < ddp.total


def test_command(capsys) -> None:
    arguments = ["plan", "--config", "flamingo-80b", "--gpus", "64", "--memory", "141"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    verdicts = {
        name: line.split()[-1] for name in STRATEGIES for line in lines if line.startswith(name)
    }
    assert verdicts == dict(zip(STRATEGIES, ("no", "yes"), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "tiny", "--gpus", "0", "--memory", "80"], "gpus must be at least 1, got 0"),
        (["--config", "huge", "--gpus", "1", "--memory", "80"], "unknown config 'huge'"),
        (["--config", "open-flamingo-3b", "--gpus", "1", "--memory", "9"], "kind 'huggingface'"),
        (["--config", "tiny", "--gpus", "1", "--memory", "nan"], "GiB of each GPU, got nan"),
        (
            ["--config", "tiny", "--gpus", "1", "--memory", "9", "--batch-size", "-3"],
            "batch_size must be positive, got -3",
        ),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys) -> None:
    assert main(["plan", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
