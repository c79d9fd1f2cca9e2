"""The whole model: frozen NFNet and decoder, trained resampler and gated cross-attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cross_attention import GatedCrossAttentionBlock
from .decoder import Decoder
from .nfnet import NFNet
from .pointwise import working_dtype
from .resampler import PerceiverResampler
from .spans import key_spans, media_spans

IGNORED_LABEL = -100


class FlamingoOutput(NamedTuple):
    """loss is None without labels; logits ``[B, T, V]``."""

    loss: Tensor | None
    logits: Tensor


class Flamingo(nn.Module):
    """Flamingo with an NFNet encoder and a Chinchilla-style decoder.

    Parameters
    ----------
    config : object
        vision, language, cross_attention, and a resampler or a projector (see those modules, and
        README.md), image_token_id, pad_token_id, eos_token_id and end_of_chunk_token_id.
        Cross-attention layer n comes before the n-th decoder block i with ``i % every == offset``.

    Raises
    ------
    ValueError
        For backbones other than ``nfnet`` and ``decoder``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        if (config.vision.kind, config.language.kind) != ("nfnet", "decoder"):
            raise ValueError(
                f"backbones are {config.vision.kind!r} and {config.language.kind!r}; "
                "the reference has only 'nfnet' and 'decoder'"
            )
        self.config = config
        self.vision_encoder = NFNet(config.vision).requires_grad_(False).eval()
        self.language_model = Decoder(config.language).requires_grad_(False)
        if config.resampler is None:
            width = config.vision.output_dim
            self.projector = nn.Linear(width, config.projector.dim, config.projector.bias)
        else:
            self.perceiver = PerceiverResampler(config.resampler)
        cross = config.cross_attention
        self.insertions = [
            i for i in range(config.language.depth) if i % cross.every == cross.offset
        ]
        self.gated_cross_attn_layers = nn.ModuleList(
            GatedCrossAttentionBlock(cross, config.language.dim, config.media_dim)
            for _ in self.insertions
        )

    def train(self, mode: bool = True) -> Flamingo:
        """As for any module, but the frozen encoder stays deterministic (no stochastic depth)."""
        super().train(mode)
        self.vision_encoder.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        num_images: Tensor | None = None,
        num_frames: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        assign: str = "previous",
    ) -> FlamingoOutput:
        """Next-token logits and their loss.

        Parameters
        ----------
        input_ids : Tensor
            Integers ``[B, T]``.
        pixel_values : Tensor, optional
            ``[B, I, F, 3, H, W]``, normalised; None for text alone.
        num_images : Tensor, optional
            Integers ``[B]``: how many of the I slots each row fills (default all).
        num_frames : Tensor, optional
            Integers ``[B, I]``: how many of the F frames each item has (default all). Slots and
            frames beyond are never read.
        attention_mask : Tensor, optional
            ``[B, T]``, 0 at padding.
        labels : Tensor, optional
            Integers ``[B, T]``, aligned with input_ids; see ``next_token_loss``.
        assign : str
            Which image text is assigned, ``previous`` or ``next``.

        Raises
        ------
        ValueError
            If a row has another number of ``<image>`` tokens than of images, or a count is out of
            range.
        """
        slots = 0 if pixel_values is None else pixel_values.shape[1]
        counts = [slots] * len(input_ids) if num_images is None else num_images.tolist()
        self._check_counts(input_ids, counts, slots)
        images = self._encode(pixel_values, counts, num_frames)
        first, last = media_spans(
            input_ids, self.config.image_token_id, self.config.cross_attention.attend, assign
        )
        if self.config.resampler is None:  # items of one key each
            first, last = key_spans(first, last, [[len(image) for image in row] for row in images])
            images = [[key[None] for image in row for key in image] for row in images]
        media = self._stack(images)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask

        x = self.language_model.token_embedding(input_ids)
        for i, block in enumerate(self.language_model.blocks):
            if i in self.insertions:
                cross_attention = self.gated_cross_attn_layers[self.insertions.index(i)]
                x = cross_attention(x, media, first, last)
            x = block(x, real)
        logits = self.language_model.to_logits(x)
        if labels is None:
            return FlamingoOutput(None, logits)
        return FlamingoOutput(self.next_token_loss(logits, labels, attention_mask), logits)

    def next_token_loss(
        self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """Mean cross-entropy of ``labels[:, t + 1]`` under ``logits[:, t]``.

        Left out: labels of -100, ``<image>`` labels, and pairs of which either side is padding.
        Without a mask the pad token is padding, unless it doubles as the end of a text.
        """
        config = self.config
        targets = labels[:, 1:]
        kept = (targets != IGNORED_LABEL) & (targets != config.image_token_id)
        if attention_mask is not None:
            # A left-padded row must lose the same terms as the row alone, whose first token is not
            # predicted from anything.
            real = attention_mask.bool()
            kept = kept & real[:, 1:] & real[:, :-1]
        elif config.pad_token_id not in (config.eos_token_id, config.end_of_chunk_token_id):
            kept = kept & (targets != config.pad_token_id)
        scores = logits[:, :-1][kept].to(working_dtype(logits))  # [K, V]
        chosen = scores[torch.arange(len(scores), device=scores.device), targets[kept]]
        highest = scores.detach().amax(-1, keepdim=True)
        log_total = highest[:, 0] + torch.exp(scores - highest).sum(-1).log()
        return (log_total - chosen).sum() / max(len(scores), 1)

    def _check_counts(self, input_ids: Tensor, counts: list[int], slots: int) -> None:
        for row, (tokens, images) in enumerate(zip(input_ids.tolist(), counts, strict=True)):
            if not 0 <= images <= slots:
                raise ValueError(f"num_images[{row}] is {images}, outside [0, {slots}]")
            marked = tokens.count(self.config.image_token_id)
            if marked != images:
                raise ValueError(f"row {row} has {marked} <image> tokens but {images} images")

    def _encode(
        self, pixel_values: Tensor | None, counts: list[int], num_frames: Tensor | None
    ) -> list[list[Tensor]]:
        """The latents, or projected features, ``[R, dim]`` of each image of each row."""
        rows: list[list[Tensor]] = [[] for _ in counts]
        for row, images in enumerate(counts):
            for item in range(images):
                total = pixel_values.shape[2]
                frames = total if num_frames is None else int(num_frames[row, item])
                if not 1 <= frames <= total:
                    raise ValueError(f"num_frames[{row}, {item}] is {frames}, outside [1, {total}]")
                with torch.no_grad():
                    features = self.vision_encoder(pixel_values[row, item, :frames])
                if self.config.resampler is None:
                    rows[row].append(self.projector(features).flatten(0, 1))
                else:
                    rows[row].append(self.perceiver(features[None])[0])
        return rows

    def _stack(self, images: list[list[Tensor]]) -> Tensor:
        """Items ``[R, dim]`` of each row as ``[B, I, R, dim]``, zeros where a row has fewer."""
        if self.config.resampler is None:
            nothing = self.projector.weight.new_zeros(1, self.config.media_dim)
        else:
            nothing = torch.zeros_like(self.perceiver.latents)
        slots = max(map(len, images))
        if slots == 0:
            return nothing.new_zeros(len(images), 0, *nothing.shape)
        return torch.stack([torch.stack(row + [nothing] * (slots - len(row))) for row in images])
