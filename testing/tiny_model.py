"""The tiny model with open gates, and ragged batches of interleaved text."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flamingo_kernels import FlamingoConfig, FlamingoModel
from flamingo_kernels.model.config import ProjectorConfig

TINY = FlamingoConfig.from_name("tiny")


def make_model(
    kernel: str = "auto",
    *,
    projector: ProjectorConfig | None = None,
    open_gates: bool = True,
    **cross: object,
) -> FlamingoModel:
    """Build the tiny model with random weights; ``cross`` changes its cross-attention config."""
    torch.manual_seed(0)
    config = replace(TINY, cross_attention=replace(TINY.cross_attention, **cross))
    if projector is not None:
        config = replace(config, resampler=None, projector=projector)
    model = FlamingoModel(config, kernel)
    for parameter in model.language_model.parameters():
        if parameter.ndim == 2:  # away from its small initial weights: logits worth comparing
            parameter.data.mul_(4)
    if open_gates:
        open_gates_of(model)
    return model.eval()


def open_gates_of(model: FlamingoModel) -> None:
    """Set the gates to random values from torch's global generator."""
    for name, parameter in model.trainable_parameters().items():
        if name.endswith("_gate"):
            parameter.data.uniform_(0.5, 1.0)


@dataclass
class Batch:
    """Arguments of a forward, with padding and with NaN in unused image slots."""

    input_ids: Tensor
    pixel_values: Tensor
    attention_mask: Tensor
    num_images: Tensor
    rows: list[list[int]]

    def arguments(self) -> dict[str, Tensor]:
        """Return the keyword arguments of the whole batch."""
        return {
            "input_ids": self.input_ids,
            "pixel_values": self.pixel_values,
            "attention_mask": self.attention_mask,
            "num_images": self.num_images,
        }

    def alone(self, row: int) -> dict[str, Tensor]:
        """Return the arguments of one row without padding or spare slots."""
        count = int(self.num_images[row])
        ids = torch.tensor([self.rows[row]])
        return {"input_ids": ids, "pixel_values": self.pixel_values[row : row + 1, :count]}

    def positions(self, row: int) -> Tensor:
        """Return the indices of a row's tokens in the padded batch."""
        return self.attention_mask[row].nonzero()[:, 0]


def ragged_batch(side: str = "right", counts: tuple[int, ...] = (0, 1, 5), seed: int = 0) -> Batch:
    """Build rows of 9, 14 and 23 tokens with ``counts`` images; unused image slots hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [9, 14, 23][: len(counts)]
    rows = []
    for length, count in zip(lengths, counts, strict=True):
        ids = torch.randint(0, 256, (length,), generator=generator)
        ids[torch.randperm(length - 1, generator=generator)[:count]] = TINY.image_token_id
        rows.append(ids.tolist())
    longest, slots = max(lengths), max(max(counts), 1)
    input_ids = torch.full((len(rows), longest), TINY.pad_token_id)
    mask = torch.zeros_like(input_ids)
    for i, ids in enumerate(rows):
        start = longest - len(ids) if side == "left" else 0
        input_ids[i, start : start + len(ids)] = torch.tensor(ids)
        mask[i, start : start + len(ids)] = 1
    pixels = torch.randn(len(rows), slots, 1, 3, 32, 32, generator=generator)
    for i, count in enumerate(counts):
        pixels[i, count:] = float("nan")
    return Batch(input_ids, pixels, mask, torch.tensor(counts), rows)
