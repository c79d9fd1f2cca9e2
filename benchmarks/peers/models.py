"""The whole model with each kernel: a training step, a decoding step."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers import Implementation, peer
from benchmarks.peers.ours import kernels_used, register
from benchmarks.problems import Problem
from benchmarks.problems.models import make_model
from benchmarks.problems.modules import parameters_of

TRAINING, DECODE = "model_training", "model_decode"


def _setup(kernel: str, problem: Problem) -> Implementation:
    model = make_model(problem, kernel)
    ids, pixels = problem.fixed["input_ids"], problem.fixed["pixel_values"]
    backend = kernels_used(kernel, problem)
    if problem.case.op == TRAINING:
        model.train()
        return Implementation(
            lambda: model(ids, pixels, labels=ids).loss, parameters_of(model), backend, ours=True
        )
    model.eval().requires_grad_(False)
    with torch.no_grad():
        prompt = model(ids[:, :-1], pixels, use_cache=True).cache
    everything = torch.arange(ids.shape[0], device=ids.device)
    fresh = [prompt]

    def copy_cache() -> None:
        fresh[0] = prompt.select_rows(everything)  # a step extends its cache in place

    def step() -> Tensor:
        return model(ids[:, -1:], cache=fresh[0], use_cache=True).logits

    return Implementation(step, {}, backend, before=copy_cache, ours=True)


register("model", "This library's `FlamingoModel`", _setup, TRAINING, DECODE, auto=True)


@peer(
    "model-no-cache",
    "This library's `FlamingoModel` without a cache: every step computes the whole text and all "
    "images again.",
    DECODE,
)
def _recompute(problem: Problem) -> Implementation:
    model = make_model(problem, "torch").eval().requires_grad_(False)
    ids, pixels = problem.fixed["input_ids"], problem.fixed["pixel_values"]
    return Implementation(lambda: model(ids, pixels).logits[:, -1:], {}, "torch, no cache")
