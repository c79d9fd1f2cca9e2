"""Groups, rates and decay of the optimiser, and the float32 masters that it updates."""

from __future__ import annotations

import torch

from flamingo_kernels.train.config import OptimizerSection
from flamingo_kernels.train.optimizer import build_optimizer, warm_up
from testing.tiny_model import open_gates_of
from testing.tiny_run import make_trainer


def test_weight_decay_spares_the_resampler(values) -> None:
    """With zero gradients an update is the decay alone, lr x 0.1 of each value."""
    trainer = make_trainer(values)
    parameters = trainer.masters.parameters
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(parameters, OptimizerSection(lr=0.5)).step()
    for name, parameter in parameters.items():
        factor = 1.0 if name.startswith("perceiver.") else 1 - 0.5 * 0.1
        assert torch.equal(parameter, before[name] * factor), name
    assert not torch.equal(before["gated_cross_attn_layers.0.attn.to_q.weight"], torch.zeros(1))


def test_learning_rate_warms_up_and_stays() -> None:
    section = OptimizerSection(warmup_steps=4)
    assert [warm_up(section, s) for s in (1, 2, 4, 5, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert warm_up(OptimizerSection(warmup_steps=0), 1) == 1.0


def test_gates_may_have_a_rate_of_their_own(values) -> None:
    values["optimizer"] = {"lr": 1.0, "gate_lr": 3.0, "warmup_steps": 2}
    trainer = make_trainer(values)
    trainer.step()
    rates = {id(p): g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    for name, parameter in trainer.masters.parameters.items():
        expected = 1.5 if name.endswith("_gate") else 0.5
        assert rates[id(parameter)] == expected, name


def test_bfloat16_computes_over_float32_masters(values) -> None:
    """Updates that are too small for bfloat16 add up in the masters."""
    values["model"]["compute"] = "bfloat16"
    values["optimizer"] = {"lr": 1e-5, "warmup_steps": 0, "weight_decay": 0}
    trainer = make_trainer(values)
    open_gates_of(trainer.model)
    name = "gated_cross_attn_layers.0.attn.to_q.weight"
    master, computing = trainer.masters.parameters[name], trainer.masters.computing[name]
    assert master.dtype == torch.float32 and computing.dtype == torch.bfloat16
    started = master.detach().clone()
    for _ in range(3):
        trainer.step()
    assert computing.grad is None and master.grad.dtype == torch.float32
    moved = (master - started).abs()
    assert (moved > 0).float().mean() > 0.9 and moved.max() < 1e-4
    assert torch.equal(computing, master.to(torch.bfloat16))
    state = trainer.optimizer.state[master]
    assert state["exp_avg"].dtype == torch.float32
