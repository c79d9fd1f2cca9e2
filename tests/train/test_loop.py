"""One update: what is accumulated and clipped, and what stays untouched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from flamingo_kernels.train import TrainingError, loop
from flamingo_kernels.train.checkpoints.folder import list_checkpoints
from testing.budgets import assert_close_to_reference, unit
from testing.shard_files import write_lines
from testing.tiny_model import TINY, open_gates_of
from testing.tiny_run import make_trainer


def test_gradients_are_the_weighted_sum_over_datasets(values) -> None:
    values["optimizer"]["clip"] = 1e9
    trainer = make_trainer(values)
    open_gates_of(trainer.model)
    alone = copy.deepcopy(trainer.model)
    batches = {name: next(loader) for name, loader in make_trainer(values).loaders.items()}
    report = trainer.step()
    losses = {name: alone(**batch, return_logits=False).loss for name, batch in batches.items()}
    total = losses["pages"] + 0.2 * losses["pairs"]
    total.backward()
    assert report["losses"] == {name: loss.item() for name, loss in losses.items()}
    assert report["loss"] == pytest.approx(total.item(), rel=unit(torch.float32))
    wanted = alone.trainable_parameters()
    magnitude = max(p.grad.abs().max().item() for p in wanted.values())
    for name, parameter in trainer.model.trainable_parameters().items():
        assert_close_to_reference(
            parameter.grad, wanted[name].grad, torch.float32, name, terms=magnitude
        )


def test_gradients_are_clipped_to_a_global_norm(values) -> None:
    values["optimizer"]["clip"] = 1e-3
    trainer = make_trainer(values)
    report = trainer.step()
    gradients = [p.grad.norm() for p in trainer.masters.parameters.values() if p.grad is not None]
    assert report["gradient_norm"] > 1e-3
    before = torch.tensor(report["gradient_norm"])
    expected = 1e-3 * before / (before + 1e-6)  # torch keeps the divisor from 0 by so much
    assert_close_to_reference(torch.stack(gradients).norm(), expected, torch.float32)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_frozen_parts_hold_nothing_and_never_change(compute: str, values) -> None:
    values["model"]["compute"] = compute
    trainer = make_trainer(values)
    trainable = trainer.model.trainable_parameters()
    frozen = {n: p for n, p in trainer.model.named_parameters() if n not in trainable}
    before = {name: p.clone() for name, p in frozen.items()}
    for _ in range(2):
        trainer.step()
    optimised = {id(p) for p in trainer.optimizer.state}
    optimised |= {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    for name, parameter in frozen.items():
        assert parameter.grad is None and id(parameter) not in optimised
        assert torch.equal(parameter, before[name]) and parameter.dtype == getattr(torch, compute)
    assert optimised == {id(p) for p in trainer.masters.parameters.values()}


def test_training_learns_and_checkpointing_activations_changes_no_bit(values) -> None:
    values["steps"] = 12
    plain = make_trainer(values)
    losses = [plain.step()["loss"] for _ in range(12)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    values["model"]["activation_checkpointing"] = True
    again = make_trainer(values)
    assert [again.step()["loss"] for _ in range(4)] == losses[:4]


@pytest.fixture
def barren(values, tmp_path) -> dict[str, Any]:
    """A configuration whose pages hold so much text before their image that no window has it."""
    page = {"texts": ["a" * 5000, None, "b"], "images": [None, "0.png", None]}
    write_lines(tmp_path / "pages.jsonl", [page] * 4)
    values["datasets"][0] |= {"max_tokens": 8, "loss_before_first_image": False}
    return values


def test_labels_all_ignored(barren) -> None:
    barren["datasets"] = barren["datasets"][:1]
    report = make_trainer(barren).step()
    assert report["losses"] == {"pages": 0.0} and report["gradient_norm"] == 0.0


@pytest.mark.parametrize("alone", [False, True])
def test_a_run_without_a_label_is_an_error(alone: bool, barren, caplog) -> None:
    """Also where another dataset has labels."""
    barren["datasets"] = barren["datasets"][: 1 if alone else 2]
    trainer = make_trainer(barren)
    message = r"^0 of 48 labels of pages are left in 3 batch\(es\) up to step 3, .* is .*step_0+2$"
    with pytest.raises(TrainingError, match=message):
        trainer.run()
    assert trainer.step_number == 2
    (warning,) = (r.getMessage() for r in caplog.records if "labels" in r.getMessage())
    assert "0 of 16 labels of pages are left in 1 batch(es) up to step 1, so that no" in warning
    assert "with max_tokens 8 and loss_before_first_image false" in warning


def test_batches_without_labels_are_borne_for_a_while(barren, monkeypatch, caplog) -> None:
    """A run that continues with its last step, and one that finds its first label late."""
    trainer = make_trainer(barren)
    trainer.step(), trainer.step(), trainer.save()
    continued = make_trainer(barren)
    assert continued.resume()
    continued.run()
    assert continued.step_number == 3

    monkeypatch.setattr(loop, "_BARREN_BATCHES", 3)
    barren |= {"steps": 9, "output": barren["output"] + "2"}
    late = make_trainer(barren)
    late.step(), late.step()
    with pytest.raises(TrainingError, match="0 of 48 labels of pages are left in 3 batch"):
        late.step()
    barren["datasets"][0]["loss_before_first_image"] = True
    caplog.clear()
    trainer = make_trainer(barren)
    trainer.run()
    assert trainer.step_number == 9 and not caplog.records


def test_loss_before_the_first_image_is_an_option(values, tmp_path) -> None:
    page = {"texts": ["before", None, "after"], "images": [None, "0.png", None]}
    write_lines(tmp_path / "pages.jsonl", [page])
    values["datasets"] = [{**values["datasets"][0], "max_tokens": 50}]
    batch = next(make_trainer(values).loaders["pages"])
    image = batch["input_ids"][0].tolist().index(TINY.image_token_id)
    batch["labels"][:, :image] = -100
    values["datasets"][0]["loss_before_first_image"] = False
    trainer = make_trainer(values)
    expected = trainer.model(**batch, return_logits=False).loss.item()
    assert trainer.step()["loss"] == expected
    values["datasets"][0]["loss_before_first_image"] = True
    assert make_trainer(values).step()["loss"] != expected


def test_nan_loss_stops_before_any_change(values, tmp_path) -> None:
    trainer = make_trainer(values)
    trainer.step()
    saved = trainer.save()
    parameters = trainer.model.trainable_parameters()
    with torch.no_grad():
        parameters["perceiver.latents"][0, 0] = float("nan")
        parameters["gated_cross_attn_layers.0.attn_gate"].fill_(1.0)
    before = {name: p.clone() for name, p in parameters.items()}
    message = (
        rf"the loss of pages is nan at step 2, process 0, samples .*pages\.jsonl: byte .*is {saved}"
    )
    with pytest.raises(TrainingError, match=message):
        trainer.step()
    assert all(torch.equal(p, before[n]) or "latents" in n for n, p in parameters.items())
    assert list_checkpoints(trainer.output) == [saved] and trainer.step_number == 1


def test_a_gradient_that_is_not_finite_is_named(values) -> None:
    trainer = make_trainer(values)
    name = "gated_cross_attn_layers.1.ff_gate"
    trainer.model.trainable_parameters()[name].register_hook(lambda g: g * float("inf"))
    with pytest.raises(
        TrainingError, match=rf"gradient of {name} is not finite at step 1; no check"
    ):
        trainer.step()
    assert trainer.step_number == 0
    assert not any(state["step"] for state in trainer.optimizer.state.values())
