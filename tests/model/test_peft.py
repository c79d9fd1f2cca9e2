"""Adapters of PEFT in the bridge and in the language model."""

from __future__ import annotations

import pytest
import torch

from testing.budgets import assert_close_to_reference
from testing.tiny_model import make_model, ragged_batch

peft = pytest.importorskip("peft")
LN, LORA = peft.LNTuningConfig, peft.LoraConfig
ADAPTERS = {
    "norm_media": LN(target_modules=["norm_media"]),
    "all norms of the bridge": LN(
        target_modules=r".*(attn\.norm|norm_media|norm_latents|ff\.0|layers\.\d+\.1\.0)"
    ),
    "norms of the blocks": LN(target_modules=["attention_norm"]),
    "products of the bridge": LORA(r=2, target_modules=["to_kv", "to_out", "ff.1", "ff.3"]),
}


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=list(ADAPTERS))
def test_adapters_change_nothing_at_first_and_are_trained(adapter) -> None:
    arguments = ragged_batch().arguments()
    expected = make_model()(**arguments, labels=arguments["input_ids"]).loss
    model = peft.get_peft_model(make_model(), adapter)
    for wanted in (True, False):
        model.zero_grad()
        out = model(**arguments, labels=arguments["input_ids"], return_logits=wanted)
        assert_close_to_reference(out.loss, expected, torch.float32)
        out.loss.backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        first = {name for name in trained if "lora_A" in name}  # behind a product of zeros
        assert trained and all(trained[name].any() for name in trained.keys() - first)
