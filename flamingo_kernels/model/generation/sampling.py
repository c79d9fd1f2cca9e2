"""Sampling of the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flamingo_kernels.fields import is_integer, is_number

# Logits over anything smaller may overflow float32.
LEAST_TEMPERATURE = 1e-4


def check_count(name: str, value: int) -> None:
    """Raise TypeError or ValueError, naming the option, unless it is an int of at least 1."""
    if not is_integer(value):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution from which tokens are drawn.

    Attributes
    ----------
    temperature : float
        Divides the logits; finite and at least 1e-4.
    top_k : int, optional
        Keep the k most likely tokens.
    top_p : float, optional
        Keep the most likely tokens whose probabilities sum to at least this (the nucleus).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if not is_number(self.temperature):
            raise TypeError(f"temperature must be a number, got {self.temperature!r}")
        if self.top_p is not None and not is_number(self.top_p):
            raise TypeError(f"top_p must be a number, got {self.top_p!r}")
        if not LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be finite and at least {LEAST_TEMPERATURE}, got "
                f"{self.temperature}"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw one token for each row of logits [B, V]; returns int64 [B]."""
        probabilities = self.restrict(logits).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    def restrict(self, logits: Tensor) -> Tensor:
        """Divide logits [B, V] by the temperature; -inf outside the top k and the nucleus."""
        logits = logits / self.temperature
        if self.top_k is not None:
            kth = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if self.top_p is not None:
            ordered, order = logits.sort(dim=-1, descending=True)
            probability = ordered.softmax(-1)
            outside = probability.cumsum(-1) - probability >= self.top_p
            logits = logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
        return logits
