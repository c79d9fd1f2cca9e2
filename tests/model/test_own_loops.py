"""FlamingoModel in training loops of others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from flamingo_kernels import FlamingoModel
from testing.budgets import assert_gradients_close
from testing.processes import join_group
from testing.tiny_model import TINY, make_model


def batch(rank: int, step: int) -> dict[str, Tensor]:
    """Return a rank's batch: rank 1 has no image in step 1, and no rank has one in step 2."""
    generator = torch.Generator().manual_seed(2 * step + rank)
    ids = torch.randint(0, 256, (2, 6), generator=generator)
    if step + rank >= 2:
        return {"input_ids": ids, "labels": ids}
    ids[:, 1] = TINY.image_token_id
    pixels = torch.randn(2, 1, 1, 3, 32, 32, generator=generator)
    return {"input_ids": ids, "labels": ids, "pixel_values": pixels}


def gradients(model: FlamingoModel) -> dict[str, Tensor]:
    """Return all gradients, which must be there, and remove them."""
    found = {name: p.grad for name, p in model.trainable_parameters().items()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_every_parameter_has_a_gradient_without_images(use_reentrant, kernel: str) -> None:
    model = make_model(kernel).train()
    if use_reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    text = batch(0, 2)
    for ignored in (False, True):  # labels that are all ignored: the loss is 0
        labels = text["labels"].masked_fill(torch.tensor(ignored), -100)
        model(text["input_ids"], labels=labels, return_logits=ignored).loss.backward()
        found = gradients(model)
        assert all(gradient is not None for gradient in found.values())
        assert not any(g.any() for name, g in found.items() if name.startswith("perceiver."))
        assert any(g.any() for g in found.values()) != ignored


def run_rank(rank: int, folder: str) -> None:
    join_group(rank, folder)
    model = make_model().train()
    parallel = DistributedDataParallel(model)
    for step in range(3):
        parallel(**batch(rank, step)).loss.backward()
        save_file(gradients(model), f"{folder}/{step}.{rank}.safetensors")
    del parallel  # and its use of the group, before the group; no process leaves another alone
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_without_images(tmp_path: Path) -> None:
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    alone = make_model().train()
    for step in range(3):
        for rank in range(2):
            (alone(**batch(rank, step)).loss / 2).backward()
        expected = gradients(alone)
        for rank in range(2):
            found = load_file(tmp_path / f"{step}.{rank}.safetensors")
            assert_gradients_close(found, expected, torch.float32)


def test_outputs_by_name_and_index() -> None:
    inputs = batch(0, 0)
    with torch.no_grad():
        out = make_model()(**inputs)
        plain = make_model()(**{**inputs, "labels": None})
    assert out["loss"] is out[0] is out.loss
    assert out[1:] == (out.logits,)
    assert out.keys() == ["loss", "logits"]
    assert dict(plain).keys() == {"logits"}
    assert plain[1] is plain.logits
    with pytest.raises(KeyError, match="'loss' is not among the outputs: logits"):
        plain["loss"]
    config = make_model().config
    config.use_cache = False
    with pytest.raises(AttributeError, match=r"cannot assign True to 'use_cache'.*forward"):
        config.use_cache = True
    with pytest.raises(AttributeError, match=r"cannot assign 3 to 'pad_token_id'.*replace"):
        config.pad_token_id = 3
