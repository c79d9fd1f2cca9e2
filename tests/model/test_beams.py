"""Beam search against transformers' own, on the same logits."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from flamingo_kernels.model.generation.beams import Beams

PAD = 1  # transformers takes a stop token in place of padding token 0


@pytest.mark.parametrize("num_beams", [2, 3, 5])
@pytest.mark.parametrize("stops", [[], [3], [3, 5, 7]])
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_equals_transformers(num_beams: int, stops: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)  # decided enough for stop tokens to come up
    prompts = torch.randint(8, 16, (3, 4))
    count, new = 2, 7
    expected = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=count,
        max_new_tokens=new,
        eos_token_id=stops or None,
        pad_token_id=PAD,
    )[:, 4:]
    beams = Beams(3, num_beams, torch.tensor(stops, dtype=torch.int64), PAD)
    for _ in range(new):
        text = torch.cat((prompts[:, None].expand(-1, num_beams, -1), beams.tokens), 2)
        logits = model(text.flatten(0, 1)).logits[:, -1].unflatten(0, (3, num_beams))
        beams.extend(logits.log_softmax(-1))
        if beams.done:
            break
    found = beams.best(count)
    assert found.shape == expected.shape
    assert torch.equal(found, expected)
