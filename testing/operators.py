"""Arguments for every torch operator of the package, without the kernel's name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from testing.cases import media_case
from testing.key_ranges import range_case


def operator_calls() -> dict[str, tuple[Any, ...]]:
    """Return name -> arguments, in fp32 on the CPU."""
    calls: dict[str, tuple[Any, ...]] = {}
    for sees, gated in (("last", True), ("previous", False), ("keys", True)):
        if sees == "keys":
            case = range_case(torch.float32, gated=gated, nan=False)
            k, v, spans = case.k.unsqueeze(2), case.v.unsqueeze(2), case.spans.spans
        else:
            case = media_case(torch.float32, attend=sees, gated=gated, nan=False)
            k, v, spans = case.k, case.v, case.spans
        inputs = (case.q, k, v, spans.first, spans.last, case.gate, 0.3)
        single_item = spans.single_item
        media, kv_heads = k.shape[1], k.shape[3]
        calls[f"media_attention_forward {sees}"] = (*inputs, single_item)
        calls[f"media_attention_backward {sees}"] = (
            torch.randn(case.q.shape), None, *inputs, single_item,
        )  # fmt: skip
        calls[f"media_attention_segments {sees}"] = (
            spans.first, spans.last, media, kv_heads, single_item,
        )  # fmt: skip

    q, k, v = torch.randn(2, 4, 6, 8), *torch.randn(2, 2, 5, 2, 8)
    for lengths in (None, torch.tensor([5, 2])):
        inputs = (q, k, v, *torch.randn(2, 2, 4, 2, 8).unbind(), lengths)
        ragged = "" if lengths is None else " ragged"
        out, lse = torch.randn_like(q), torch.randn(2, 6, 4)
        calls[f"latent_attention_forward{ragged}"] = (*inputs, 0.3)
        calls[f"latent_attention_backward{ragged}"] = (
            torch.randn_like(q), *inputs, out, lse, 0.3,
        )  # fmt: skip

    x, y, one, many = torch.randn(3, 8), torch.randn(3, 8), torch.randn(1), torch.randn(8)
    for what, gate in (("scalar", one), ("vector", many)):
        calls[f"gated_residual_forward {what}"] = (x, y, gate)
        calls[f"gated_residual_backward {what}"] = (x, y, gate)
    for what, gate in (("gated", one), ("plain", None)):
        calls[f"gated_activation_forward {what}"] = (x, gate, "gelu")
        calls[f"gated_activation_backward {what}"] = (y, x, gate, "gelu")
    for what, parameter in (("affine", many), ("plain", None)):
        mean, rstd = torch.randn(3), torch.rand(3) + 0.5
        calls[f"layer_norm_forward {what}"] = (x, parameter, parameter, 1e-5)
        calls[f"layer_norm_backward {what}"] = (y, x, parameter, mean, rstd, parameter is not None)
    return calls


def check_operator(name: str, kernel: str) -> None:
    """Check an operator by ``torch.library.opcheck``: schema, fake results, dynamic shapes."""
    operator = getattr(torch.ops.flamingo_kernels, name.split()[0]).default
    arguments = [
        # opcheck would take a tensor that is given twice for an alias.
        value.clone() if isinstance(value, Tensor) else value
        for value in operator_calls()[name]
    ]
    torch.library.opcheck(operator, (*arguments, kernel))
