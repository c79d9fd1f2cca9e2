"""What one forward computes once, however many layers use it."""

from __future__ import annotations

import torch

from flamingo_kernels import FlamingoConfig, FlamingoModel


def test_one_plan_for_all_layers(stand_in_kernels: list[str]) -> None:
    """Triton's segments and chunks, in a training step with several cross-attention layers."""
    config = FlamingoConfig.from_name("tiny")
    layers = len(config.cross_attention_blocks)
    assert layers > 1
    model = FlamingoModel(config, kernel="triton")
    ids = torch.tensor([[config.image_token_id, 72, config.image_token_id, 33]])
    model(ids, torch.randn(1, 2, 1, 3, 32, 32), labels=ids).loss.backward()
    assert stand_in_kernels.count("media_attention_backward") == layers
    assert stand_in_kernels.count("media_attention_segments") == 1

    stand_in_kernels.clear()
    with torch.no_grad():
        model(ids, torch.randn(1, 2, 1, 3, 32, 32))
    assert "media_attention_segments" not in stand_in_kernels
