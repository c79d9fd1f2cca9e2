"""A Chinchilla-style decoder-only language model.

Hoffmann et al. 2022 (arXiv 2203.15556) after Rae et al. 2021 (Gopher, arXiv 2112.11446): pre-norm
RMSNorm, GELU feed-forward of four times the width, tied embeddings. The relative positions of the
original have no public weights; rotary positions replace them, which saves one dim x dim projection
per block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_kernels.language.config import DecoderConfig
from flamingo_kernels.language.new_tokens import NewTokenRows
from flamingo_kernels.language.protocol import (
    BlockHook,
    Head,
    LanguageModelOutput,
    check_inputs,
    positions,
)
from flamingo_kernels.nn.layers import RMSNorm
from flamingo_kernels.ops.attention import attend
from flamingo_kernels.precision import accumulator

_INIT_STD = 0.02


class DecoderCache:
    """Rotated keys and values of the tokens read so far, [B, H, length, D] for each block.

    Buffers double when full, so a step copies O(1) tokens on average. ``length`` grows only after
    every block has been extended: a forward that fails midway leaves the cache as it was.

    Attributes
    ----------
    length : int
        Tokens held per row, padding included.
    masked : bool
        Whether an attention mask came with them.
    """

    def __init__(self, num_blocks: int) -> None:
        self.length = 0
        self.masked = False
        self._blocks: list[tuple[Tensor, Tensor] | None] = [None] * num_blocks

    @property
    def batch_size(self) -> int | None:
        """Rows held; None before the first token."""
        held = self._held(-1)
        return None if held is None else held[0].shape[0]

    def extend(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``key`` and ``value`` [B, H, T, D] to those of a block and return all of them."""
        held = self._held(block)
        if held is None:
            self._blocks[block] = (key, value)
            return key, value
        held = held[0].to(key.dtype), held[1].to(value.dtype)  # autocast may have begun or ended
        self._blocks[block] = held
        if key.requires_grad or value.requires_grad or held[0].requires_grad:
            # Writing into a buffer that autograd has saved would corrupt its backward.
            keys, values = (
                torch.cat((old[:, :, : self.length], new), dim=2)
                for old, new in zip(held, (key, value), strict=True)
            )
            self._blocks[block] = (keys, values)
            return keys, values
        end = self.length + key.shape[2]
        if end > held[0].shape[2]:
            held = (self._grown(held[0], end), self._grown(held[1], end))
            self._blocks[block] = held
        for buffer, new in zip(held, (key, value), strict=True):
            buffer[:, :, self.length : end] = new
        return held[0][:, :, :end], held[1][:, :, :end]

    def _held(self, block: int) -> tuple[Tensor, Tensor] | None:
        """Return the buffers of a block; None before the first token."""
        return self._blocks[block] if self.length else None

    def _grown(self, buffer: Tensor, needed: int) -> Tensor:
        rows, heads, capacity, head_dim = buffer.shape
        grown = buffer.new_empty(rows, heads, max(needed, 2 * capacity), head_dim)
        grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown

    def index_select(self, rows: Tensor) -> DecoderCache:
        """Return a separate cache whose row i is row ``rows[i]`` of this one."""
        selected = DecoderCache(len(self._blocks))
        selected.length = self.length
        selected.masked = self.masked
        for block in range(len(self._blocks)):
            if (held := self._held(block)) is not None:
                keys, values = (old[:, :, : self.length].index_select(0, rows) for old in held)
                selected._blocks[block] = (keys, values)
        return selected


class RotaryAngles:
    """Cosines and sines [B or 1, 1, T, D/2] of the positions of one forward, for all blocks."""

    def __init__(self, position: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> None:
        exponent = torch.arange(0, head_dim, 2, device=position.device, dtype=dtype) / head_dim
        angle = position[:, None, :, None].to(dtype) * theta**-exponent
        self.cos = angle.cos()
        self.sin = angle.sin()

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate each pair (i, i + D/2) of x [B, H, T, D] by its angle."""
        first, second = x.to(self.cos.dtype).chunk(2, dim=-1)
        rotated = (
            first * self.cos - second * self.sin,
            second * self.cos + first * self.sin,
        )
        return torch.cat(rotated, dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    """Causal multi-head attention with rotary positions, no biases."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.to_q = nn.Linear(config.dim, inner, bias=False)
        self.to_k = nn.Linear(config.dim, inner, bias=False)
        self.to_v = nn.Linear(config.dim, inner, bias=False)
        self.to_out = nn.Linear(inner, config.dim, bias=False)

    def forward(
        self,
        x: Tensor,
        angles: RotaryAngles,
        visible: Tensor | None,
        cache: DecoderCache | None,
        block: int,
    ) -> Tensor:
        query, key, value = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, H, T, D]
            for project in (self.to_q, self.to_k, self.to_v)
        )
        query, key = angles.rotate(query), angles.rotate(key)
        if cache is not None:
            key, value = cache.extend(block, key, value)
        out = attend(query, key, value, visible, is_causal=visible is None)
        return self.to_out(out.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.dim, config.ff_mult * config.dim, bias=False),
            nn.GELU(),
            nn.Linear(config.ff_mult * config.dim, config.dim, bias=False),
        )

    def forward(
        self,
        x: Tensor,
        angles: RotaryAngles,
        visible: Tensor | None,
        cache: DecoderCache | None,
        block: int,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles, visible, cache, block)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nn.Module):
    """A decoder-only language model; see ``LanguageModel.__call__`` for arguments and errors.

    Logits are in the dtype of the parameters; softmax, norms and rotary angles are computed in at
    least fp32. A padding token sees itself, which keeps its (meaningless) outputs finite. The
    logits of a row depend on its own tokens and mask alone.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = config.dim
        self.num_blocks = config.depth
        self.vocab_size = config.vocab_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.final_norm = RMSNorm(config.dim, config.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights of deviation 0.02, over sqrt(2 depth) where a block adds to the stream.

        The papers do not state their initialisation; this is GPT-2's, whose layout they follow.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=_INIT_STD)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        residual_std = _INIT_STD * (2 * self.num_blocks) ** -0.5
        for block in self.blocks:
            for name in ("attention.to_out", "feed_forward.2"):
                nn.init.normal_(block.get_submodule(name).weight, std=residual_std)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
        before_block: BlockHook | None = None,
        use_cache: bool = False,
        head: Head | None = None,
        new_tokens: NewTokenRows | None = None,
    ) -> LanguageModelOutput:
        check_inputs(input_ids, attention_mask, cache)
        rows, new = input_ids.shape
        if cache is None:
            cache = DecoderCache(self.num_blocks) if use_cache else None
        elif cache.batch_size not in (None, rows):
            raise ValueError(f"the cache holds {cache.batch_size} rows, input_ids has {rows}")
        cached = 0 if cache is None else cache.length

        index = torch.arange(cached + new, device=input_ids.device)
        if attention_mask is None:
            position = index[None, cached:]
        else:
            position = positions(attention_mask, new)
        visible = _visible_keys(index, cached, attention_mask)

        x = self.token_embedding(input_ids)
        if new_tokens is not None:
            x = new_tokens.embed(self.token_embedding, input_ids, x)
        angles = RotaryAngles(
            position, self.config.head_dim, self.config.rope_theta, accumulator(x.dtype)
        )
        for i, block in enumerate(self.blocks):
            if before_block is not None:
                x = before_block(i, x)
            x = block(x, angles, visible, cache, i)
        hidden, weight = self.final_norm(x), self.token_embedding.weight
        if weight.is_meta and not hidden.is_meta:
            raise RuntimeError(
                "the token embeddings are offloaded, but they also give the logits: keep "
                "language_model.token_embedding on the device"
            )
        logits = F.linear(hidden, weight) if head is None else None
        if new_tokens is not None and logits is not None:
            logits = new_tokens.correct(self.token_embedding, hidden, logits)

        if cache is not None:
            cache.length += new
            cache.masked = cache.masked or attention_mask is not None
        return LanguageModelOutput(
            logits, cache, None if head is None else head(hidden, weight, None)
        )

    def new_token_rows(self, token_ids: Sequence[int]) -> NewTokenRows:
        """Return rows for these tokens that can be trained while the rest is frozen."""
        return NewTokenRows(token_ids, self.token_embedding, self.token_embedding)


def _visible_keys(index: Tensor, cached: int, attention_mask: Tensor | None) -> Tensor | None:
    """Return the keys that each new token sees, [B or 1, 1, T, cached + T]; None: causal order."""
    if attention_mask is None and cached == 0:
        return None
    query = index[cached:, None]
    if attention_mask is None:
        return (index <= query)[None, None]
    real = attention_mask.bool()[:, None, None, :]
    return real & (index <= query) | (index == query)
