"""Backbones that accelerate keeps on the CPU or on disk, and brings back for each call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flamingo_kernels import FlamingoModel
from testing.backbones import IMAGE, clip, language_model, open_gates
from testing.budgets import assert_close_to_reference
from testing.tiny_model import make_model, ragged_batch

pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")


def to_cpu(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device="cpu")


def to_disk(model: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(model, folder, execution_device="cpu")


def in_part(model: nn.Module, folder: Path) -> None:
    """As ``device_map`` does: the embeddings on disk, so that the first parameter is not there."""
    places = dict.fromkeys(("model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    accelerate.dispatch_model(
        model, {"model.embed_tokens": "disk", **places}, "cpu", offload_dir=folder, force_hooks=True
    )


def build(change: Callable[[nn.Module, nn.Module], Any] = lambda vision, lm: None) -> FlamingoModel:
    vision, lm = clip(), language_model("llama")
    change(vision, lm)
    torch.manual_seed(4)
    return open_gates(FlamingoModel.from_backbones(vision, lm)).eval()


def arguments() -> dict[str, Tensor]:
    ids = torch.tensor([[3, IMAGE, 5, 6, 7], [IMAGE, 9, 3, 4, 8]])
    pixels = torch.randn(2, 1, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "pixel_values": pixels}


def assert_same(model: FlamingoModel) -> None:
    plain, given = build(), arguments()
    for part in (model, plain):
        part.zero_grad()
    for wanted in (False, True):  # the product of an offloaded head is summed in another order
        losses = [
            part(**given, labels=given["input_ids"], return_logits=wanted).loss
            for part in (model, plain)
        ]
        assert_close_to_reference(*losses, torch.float32)
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for name, parameter in model.trainable_parameters().items():
        assert torch.equal(parameter.grad, plain.trainable_parameters()[name].grad)
    assert torch.equal(model.generate(**given), plain.generate(**given))


@pytest.mark.parametrize("offload", [to_cpu, to_disk, in_part])
def test_the_bridge_lies_where_the_language_model_computes(offload, tmp_path) -> None:
    model = build(lambda vision, lm: offload(lm, tmp_path / "weights"))
    assert {p.device.type for p in model.trainable_parameters().values()} == {"cpu"}
    assert_same(model)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"cannot write \d+ parameters that are .* or offloaded"):
        model.save_pretrained(tmp_path / "whole", include_frozen=True)
    vision, lm = clip(), language_model("llama")
    offload(lm, tmp_path / "again")
    options = {"vision_encoder": vision, "language_model": lm}
    assert_same(FlamingoModel.from_pretrained(tmp_path / "saved", **options))


@pytest.mark.parametrize("offload", [to_cpu, to_disk, in_part])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_new_tokens_are_tied_as_the_weights_are(offload, tied, tmp_path) -> None:
    rows = []
    for change in (lambda lm: None, lambda lm: offload(lm, tmp_path)):
        lm = language_model("llama", tie_word_embeddings=tied)
        change(lm)
        rows.append(FlamingoModel.from_backbones(clip(), lm).new_tokens.state_dict())
    assert rows[0].keys() == rows[1].keys() and len(rows[0]) == 2 - tied
    assert all(map(torch.equal, rows[0].values(), rows[1].values()))


@pytest.mark.parametrize("offload", [to_cpu, to_disk])
def test_an_offloaded_vision_encoder(offload, tmp_path) -> None:
    assert_same(build(lambda vision, lm: offload(vision, tmp_path)))


def test_a_language_model_that_is_offloaded_afterwards(tmp_path) -> None:
    model = build()
    to_cpu(model.language_model.model, tmp_path)
    assert_same(model)


def test_a_whole_model_that_is_offloaded() -> None:
    model, plain, given = build(), build(), arguments()
    accelerate.cpu_offload(model, execution_device="cpu")
    text = given["input_ids"].clamp(max=90)
    with torch.no_grad():
        for turn in (given, {"input_ids": text}):
            assert torch.equal(model(**turn).logits, plain(**turn).logits)
        assert torch.equal(model.generate(**given), plain.generate(**given))
        caches = [part(**given, use_cache=True).cache for part in (model, plain)]
        logits = [p(text, cache=c).logits for p, c in zip((model, plain), caches, strict=True)]
    assert torch.equal(*logits)


def test_the_decoder_says_that_its_embeddings_cannot_be_offloaded(tmp_path) -> None:
    model = make_model()
    to_cpu(model.language_model, tmp_path)
    with pytest.raises(RuntimeError, match="token embeddings are offloaded, but they also give"):
        model(**ragged_batch().arguments())
