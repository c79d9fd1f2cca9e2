"""Problems of the whole model: a training step, a decoding step."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

import reference
from benchmarks.cases import Case, ModelShape
from benchmarks.problems.base import Problem
from benchmarks.problems.modules import functional, parameters_of, randomise
from flamingo_kernels import FlamingoConfig, FlamingoModel


def model_config(name: str) -> FlamingoConfig:
    """Return the package's ``tiny``, or ``medium``: the same parts, 512 wide and 8 deep."""
    config = FlamingoConfig.from_name("tiny")
    if name == "tiny":
        return config
    replace = dataclasses.replace
    return replace(
        config,
        name=name,
        language=replace(config.language, dim=512, depth=8, heads=8, head_dim=64),
        resampler=replace(config.resampler, dim=512, heads=8, head_dim=64, num_latents=64),
        cross_attention=replace(config.cross_attention, heads=8, head_dim=64),
    )


def make_model(problem: Problem, kernel: str) -> FlamingoModel:
    """Build a model with the problem's weights."""
    model = FlamingoModel(problem.fixed["config"], kernel)
    model.load_state_dict(problem.fixed["state"])
    return model.to(problem.dtype).to(problem.device)


def _model(case: Case, device: torch.device) -> Problem:
    shape: ModelShape = case.shape
    config = model_config(shape.model)
    model = FlamingoModel(config, "torch")
    randomise(model.perceiver)
    randomise(model.gated_cross_attn_layers)
    ids = torch.randint(0, 256, (shape.batch, shape.tokens))
    places = torch.arange(shape.images) * (shape.tokens - 1) // shape.images
    ids[:, places] = config.image_token_id
    size = config.vision.image_size
    pixels = torch.randn(shape.batch, shape.images, 1, 3, size, size)
    return Problem(
        case,
        device,
        getattr(torch, case.dtype),
        {},
        None,
        lambda leaves: torch.empty(0),
        lambda leaves: torch.empty(0),
        fixed={
            "config": config,
            "state": model.state_dict(),
            "input_ids": ids.to(device),
            "pixel_values": pixels.to(device),
        },
        strict=False,
    )


def _reference_model(problem: Problem) -> nn.Module:
    model = reference.Flamingo(problem.fixed["config"]).double()
    model.load_state_dict(problem.fixed["state"])
    return model.to(problem.device)


def _model_training(case: Case, device: torch.device) -> Problem:
    """Return loss and gradients of the trainable parameters, without an optimiser step."""
    problem = _model(case, device)
    problem.leaves = {
        name: leaf.detach().clone()
        for name, leaf in parameters_of(make_model(problem, "torch")).items()
    }
    problem.seed = torch.ones((), device=device)
    ids, pixels = problem.fixed["input_ids"], problem.fixed["pixel_values"]
    problem.exact = functional(
        _reference_model(problem), lambda m, t: m(ids, pixels.double(), labels=ids).loss
    )
    problem.plain = functional(
        make_model(problem, "torch"), lambda m, t: m(ids, pixels, labels=ids).loss
    )
    problem.tokens = case.shape.batch * case.shape.tokens
    return problem


def _model_decode(case: Case, device: torch.device) -> Problem:
    """Extend the prompt by its last token; ``exact`` recomputes the whole prompt."""
    problem = _model(case, device)
    ids, pixels = problem.fixed["input_ids"], problem.fixed["pixel_values"]
    problem.exact = lambda leaves: _reference_model(problem)(ids, pixels.double()).logits[:, -1:]
    problem.plain = lambda leaves: make_model(problem, "torch")(ids, pixels).logits[:, -1:]
    problem.tokens = case.shape.batch
    return problem


BUILDERS = {"model_training": _model_training, "model_decode": _model_decode}
