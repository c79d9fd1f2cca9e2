"""Backbones that a model borrows: frozen while it runs, given back as they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


class Loan:
    """Freezes the parts that a model borrows, and can undo it.

    Parameters
    ----------
    parts : sequence of nn.Module
        The vision encoder and the language model, as the model uses them. All of their parameters
        lose ``requires_grad``.

    Attributes
    ----------
    given : dict of str to (nn.Module or int)
        What the caller passed for each part, by the part's name, before it was wrapped. Without an
        entry :meth:`end` returns what is inside the wrapper.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self.given: dict[str, Any] = {}
        self._modes = [(m, m.training) for part in parts for m in part.modules()]
        self._trainable = [p for part in parts for p in part.parameters() if p.requires_grad]
        for part in parts:
            part.requires_grad_(False)

    def end(
        self, vision_encoder: nn.Module, language_model: nn.Module
    ) -> tuple[nn.Module | int, nn.Module]:
        """Restore modes and ``requires_grad``, unwrap both parts and return what was given."""
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        for module, training in self._modes:
            module.training = training
        # A wrapper that the caller gave is returned as it is, with its hooks.
        given = self.given.get("language_model")
        if language_model is not given and hasattr(language_model, "unwrap"):
            language_model = language_model.unwrap()
        inner = getattr(vision_encoder, "module", vision_encoder)
        return self.given.get("vision_encoder", inner), language_model
