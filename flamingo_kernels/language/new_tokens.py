"""Trained rows of the embeddings of a language model that is frozen otherwise.

Flamingo (Alayrac et al., 2022) adds an end-of-chunk token to the vocabulary and learns it.
OpenFlamingo learns the rows of all tokens that it adds.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_kernels.bare_modules import is_plain_tensor


class TokenRows(NamedTuple):
    """Ids int64 [R]; rows of input embeddings and product [R, dim]; bias [R] of it, or None."""

    token_ids: Tensor
    embedding: Tensor
    head: Tensor
    head_bias: Tensor | None


class NewTokenRows(nn.Module):
    """Rows of the input and output embeddings of R tokens, in place of the frozen ones.

    The frozen embeddings are neither copied nor changed. Until the rows are, logits have the bits
    of the frozen model (of a quantised output product: its values, to rounding).

    Parameters
    ----------
    token_ids : sequence of int
        Ids of the tokens.
    embedding, head : nn.Module
        The input embeddings and the output product. If they share one weight, a token has one row
        for both.

    Attributes
    ----------
    token_ids : Tensor
        int64 [R].
    embedding, head, head_bias : Parameter or None
        [R, dim], [R, dim] or None (tied), [R] or None (no bias), in at least float32. They start
        as the frozen rows.

    Raises
    ------
    ValueError
        The input embeddings are no ``nn.Embedding``, or a weight is not in floating point.
    """

    token_ids: Tensor

    def __init__(
        self, token_ids: Sequence[int], embedding: nn.Module | None, head: nn.Module
    ) -> None:
        super().__init__()
        embedding, head = _base_layer(embedding), _base_layer(head)
        if not isinstance(embedding, nn.Embedding):
            raise ValueError(
                f"cannot train the rows of new tokens {list(token_ids)}: the input embeddings are "
                f"{type(embedding).__name__}, not nn.Embedding; leave these rows to it with "
                "new_token_ids = [] in the language model's config"
            )
        ids = torch.tensor(token_ids, dtype=torch.int64)
        rows = _first_value(embedding, "weight", ids)
        self.register_buffer("token_ids", ids.to(rows.device), persistent=False)
        # The least id of another token.
        self.another_token = next(i for i in itertools.count() if i not in set(token_ids))
        self.embedding = nn.Parameter(rows)
        self.head = self.head_bias = None
        if not _are_tied(head, embedding):
            self.head = nn.Parameter(_first_value(head, "weight", ids))
        if getattr(head, "bias", None) is not None:
            self.head_bias = nn.Parameter(_first_value(head, "bias", ids))

    def forward(self) -> TokenRows:
        """Return the rows. Offloading and sharding bring parameters with the call of a module."""
        head = self.embedding if self.head is None else self.head
        return TokenRows(self.token_ids, self.embedding, head, self.head_bias)

    def embed(self, embedding: nn.Module, input_ids: Tensor, embedded: Tensor) -> Tensor:
        """Replace rows in the output [B, T, dim] of the input embeddings for ``input_ids``."""
        rows, dtype = self(), embedded.dtype
        chosen = input_ids[..., None] == rows.token_ids
        # A product and no lookup: the gradient is a sum in a fixed order.
        new = chosen.to(dtype) @ _embedded(_base_layer(embedding), rows.embedding.to(dtype))
        return torch.where(chosen.any(-1, keepdim=True), new, embedded)

    def correct(self, head: nn.Module, hidden: Tensor, logits: Tensor) -> Tensor:
        """Replace the logits of the tokens in the output [..., V] of the product ``head``.

        ``hidden`` is its input [..., dim]. What is added to the product (LoRA) stays.
        """
        head = _base_layer(head)
        return self.correct_product(hidden, logits, _frozen(head, "weight"), _frozen(head, "bias"))

    def correct_product(
        self, hidden: Tensor, logits: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Do as :meth:`correct`, for ``logits`` of ``weight`` [V, dim] and ``bias`` [V]."""
        ids, _, rows, own_bias = self()
        rows = rows.to(hidden.dtype)
        own_bias = None if own_bias is None else own_bias.to(hidden.dtype)
        old: Tensor | float = 0.0
        if is_plain_tensor(weight):
            # The difference of the rows, so that the product keeps its bits where there is none.
            old = logits[..., ids]
            rows = rows - weight[ids.to(weight.device)].to(rows)
            if own_bias is not None and bias is not None:
                own_bias = own_bias - bias[ids.to(bias.device)].to(own_bias)
        new = F.linear(hidden, rows, own_bias) + old
        return logits.index_copy(-1, ids, new.to(logits.dtype))


def _embedded(embedding: nn.Module, rows: Tensor) -> Tensor:
    """Return [R, dim], what ``embedding`` would give if it held ``rows`` [R, dim].

    Some kinds scale or normalise them (Gemma).
    """
    twin = copy.copy(embedding)
    vars(twin).update(_parameters={"weight": rows}, padding_idx=None)
    return type(embedding).forward(twin, torch.arange(len(rows), device=rows.device))


def _base_layer(module: nn.Module | None) -> Any:
    """Return the layer inside an adapter of PEFT, or ``module``."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _frozen(module: nn.Module, name: str) -> Any:
    """Return a tensor of ``module``, or None; also what accelerate has offloaded (cpu, disk)."""
    tensor = getattr(module, name, None)
    hook = getattr(module, "_hf_hook", None)
    if tensor is None or not tensor.is_meta:
        return tensor
    for part in (hook, *getattr(hook, "hooks", ())):  # one hook, or a sequence
        if (offloaded := getattr(part, "weights_map", None)) is not None:
            return offloaded[name]
    return tensor


def _are_tied(head: nn.Module, embedding: nn.Module) -> bool:
    """Whether two modules share their weight; of what is offloaded the values tell."""
    if head.weight is embedding.weight:
        return True
    if not (head.weight.is_meta and embedding.weight.is_meta):
        return False
    weights = _frozen(head, "weight"), _frozen(embedding, "weight")
    return not any(weight.is_meta for weight in weights) and torch.equal(*weights)


@torch.no_grad()
def _first_value(module: nn.Module, name: str, ids: Tensor) -> Tensor:
    """Return rows ``ids`` of a tensor of ``module``, as numbers in at least float32."""
    tensor = _frozen(module, name)
    if not is_plain_tensor(tensor):
        tensor = tensor.dequantize()
    if not tensor.is_floating_point():
        raise ValueError(
            f"cannot train the rows of new tokens {ids.tolist()}: the {name} of a "
            f"{type(module).__name__} is {tensor.dtype}; keep this layer in floating point, or "
            "leave the rows frozen with config.new_token_ids=()"
        )
    rows = tensor[ids.to(tensor.device)]
    return rows.to(torch.promote_types(rows.dtype, torch.float32), copy=True)
