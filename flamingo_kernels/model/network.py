"""FlamingoNetwork: what the model computes, from tokens and images to logits and the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flamingo_kernels.language import BlockHook, NewTokenRows, build_language_model
from flamingo_kernels.language.recompute import Recompute, recompute_blocks
from flamingo_kernels.model.bridge import build_connector, build_cross_attention, connector_name
from flamingo_kernels.model.cache import FlamingoCache, check_cache
from flamingo_kernels.model.config import FlamingoConfig
from flamingo_kernels.model.context import MediaContext, token_spans
from flamingo_kernels.model.inputs import check_labels, check_media, check_text
from flamingo_kernels.model.loan import Loan
from flamingo_kernels.model.loss import next_token_loss, next_token_loss_of_hidden
from flamingo_kernels.model.media import Media, encode_media, project_media
from flamingo_kernels.model.stops import default_stops
from flamingo_kernels.nn import MediaKeyValue
from flamingo_kernels.ops import plan_media_attention
from flamingo_kernels.ops.dispatch import check_kernel_name
from flamingo_kernels.vision import HuggingFaceVisionEncoder, build_vision_encoder

FROZEN_PARTS = ("vision_encoder", "language_model")
NEW_TOKENS = "new_tokens."  # prefix of the rows of new tokens in a state dict
Network = TypeVar("Network", bound="FlamingoNetwork")


@dataclass(frozen=True)
class FlamingoOutput:
    """Result of a forward.

    As outputs of transformers it can also be read by name, ``out["loss"]``, and by index:
    ``out[0]`` is the loss, ``out[1:]`` the tuple of the others that are not None.

    Attributes
    ----------
    loss : Tensor or None
        Scalar; None without labels.
    logits : Tensor or None
        [B, T, V]; None if they were left out.
    cache : FlamingoCache or None
        For the next call; None unless it was asked for or given.
    """

    loss: Tensor | None
    logits: Tensor | None
    cache: FlamingoCache | None = None

    def keys(self) -> list[str]:
        """Return the names of the attributes that are not None."""
        names = (field.name for field in fields(self))
        return [name for name in names if getattr(self, name) is not None]

    def __contains__(self, name: object) -> bool:
        """Whether an attribute of this name is not None."""
        return name in self.keys()

    def __getitem__(self, key: str | int | slice) -> Any:
        """Return an attribute by its name, or some by index; KeyError, IndexError."""
        if isinstance(key, str):
            if key not in self:
                raise KeyError(f"{key!r} is not among the outputs: {', '.join(self.keys())}")
            return getattr(self, key)
        if self.loss is None and key == 0:
            raise IndexError(
                "output 0 is the loss, and there is none without labels (label_smoothing_factor of "
                "transformers' Trainer takes them away: use 0)"
            )
        others = (getattr(self, name) for name in self.keys() if name != "loss")
        return (self.loss, *others)[key]


class FlamingoNetwork(nn.Module):
    """The modules of Flamingo and the forward through them; see ``FlamingoModel`` for parameters.

    :meth:`encode_context` turns images into keys and values for every cross-attention layer.
    :meth:`block_hook` runs those layers before the blocks of the frozen language model, which
    gives the logits. :meth:`forward` is both, and the loss.
    """

    def __init__(
        self,
        config: FlamingoConfig,
        kernel: str = "auto",
        *,
        vision_encoder: nn.Module | None = None,
        language_model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_kernel_name(kernel)
        self.config = config
        self.kernel = kernel
        if vision_encoder is not None:
            _check_part("vision_encoder", vision_encoder, output_dim=config.vision.output_dim)
        if language_model is not None:
            _check_part(
                "language_model",
                language_model,
                dim=config.language.dim,
                num_blocks=config.language.depth,
                vocab_size=config.language.vocab_size,
            )
        self.vision_encoder = vision_encoder or build_vision_encoder(config.vision)
        if isinstance(vision_encoder, HuggingFaceVisionEncoder):
            recorded = vision_encoder.recorded_in(config.vision)
            self.config = replace(config, vision=recorded)
        self.language_model = language_model or build_language_model(config.language)
        self.add_module(connector_name(config), build_connector(config, kernel))
        self.gated_cross_attn_layers = nn.ModuleList(
            build_cross_attention(config, kernel) for _ in config.cross_attention_blocks
        )
        self.new_tokens = _new_token_rows(config, self.language_model)
        # Tensors of the frozen parts that differ from the published backbones. A checkpoint holds
        # them beside the trainable ones.
        self.saved_frozen: set[str] = set()
        self._recompute: Recompute | None = None  # None: no activation checkpointing
        self.loan = Loan(self._frozen_parts())
        self.train(self.training)

    def _frozen_parts(self) -> tuple[nn.Module, ...]:
        return tuple(getattr(self, name) for name in FROZEN_PARTS)

    def train(self: Network, mode: bool = True) -> Network:
        """Set the mode of the trainable parts; the frozen ones stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    @property
    def connector(self) -> nn.Module:
        """The resampler ``perceiver``, or the linear ``projector``."""
        return self.get_submodule(connector_name(self.config))

    @property
    def device(self) -> torch.device:
        """Device of the connector, for inputs; meta where its parameters are offloaded."""
        return next(self.connector.parameters()).device

    @property
    def language_options(self) -> dict[str, Any]:
        """Arguments of every call of the language model."""
        return {} if self.new_tokens is None else {"new_tokens": self.new_tokens}

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters outside the frozen parts, by name.

        Parameters of the frozen parts whose ``requires_grad`` was set again are included. Those
        that the features do not depend on, such as the pooling head of a vision encoder, get no
        gradient.
        """
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.split(".", 1)[0] not in FROZEN_PARTS or parameter.requires_grad
        }

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Save only the input of each cross-attention layer and LM block, and recompute the rest.

        Gradients stay the same. Name and arguments are those of transformers.

        Parameters
        ----------
        activation_checkpointing_kwargs : mapping, optional
            Keywords of ``torch.utils.checkpoint.checkpoint``: ``use_reentrant`` (default False) and
            ``preserve_rng_state``; if not re-entrant also ``context_fn``, ``determinism_check``,
            ``debug`` and ``early_stop``.
        every_n_layers : int
            Recompute LM blocks 0, n, 2n, ..., and cross-attention layers 0, n, 2n, ... .
        offload : bool
            Hold the saved inputs in the memory of the host.

        Raises
        ------
        TypeError, ValueError
            Another option, or a value that it does not take.
        """
        options = activation_checkpointing_kwargs or {}
        self._recompute = Recompute(options, every_n_layers, offload)
        recompute_blocks(self.language_model.blocks, self._recompute)

    def activation_checkpointing_disable(self) -> None:
        """Undo :meth:`activation_checkpointing_enable`."""
        self._recompute = None
        recompute_blocks(self.language_model.blocks, None)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether :meth:`activation_checkpointing_enable` is in force."""
        return self._recompute is not None

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Call :meth:`activation_checkpointing_enable`; the older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """Call :meth:`activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The same as :attr:`is_activation_checkpointing`."""
        return self.is_activation_checkpointing

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        num_images: Tensor | None = None,
        num_frames: Tensor | None = None,
        assign: str | Sequence[str] = "previous",
        cache: FlamingoCache | None = None,
        use_cache: bool = False,
        return_logits: bool = True,
    ) -> FlamingoOutput:
        """Compute logits, and the loss if labels are given.

        Parameters
        ----------
        input_ids : Tensor
            int64 [B, T]; one ``<image>`` token (``config.image_token_id``) per image.
        pixel_values : Tensor, optional
            Normalised images [B, I, F, C, H, W]; F = 1 for images. Or features [B, I, F, S, D] in
            place of the vision encoder's. None: no image in the batch. Features with F = 3 that
            may be images [B, I, C, H, W] need ``num_frames``.
        attention_mask : Tensor, optional
            [B, T], nonzero at real tokens; padding on either side. With a cache it also covers the
            cached tokens.
        labels : Tensor, optional
            int64 [B, T], usually ``input_ids``; they are shifted inside. -100, ``<image>`` and
            padding are ignored. The loss is 0 if nothing is left. Padding is where
            ``attention_mask`` is 0; without a mask it is ``config.pad_token_id``, unless that
            token also ends texts.
        num_images : Tensor, optional
            Integer [B]: how many of the I slots each row fills (default: all). The others are never
            read.
        num_frames : Tensor, optional
            Integer [B, I]: how many of the F frames of each clip are real (default: all).
        assign : {"previous", "next"} or one of them per row
            Whether text belongs to the image before or after it. The paper draws one per document
            as training augmentation (appendix A.3.2).
        cache : FlamingoCache, optional
            Cache of an earlier call; ``input_ids`` and ``pixel_values`` then hold what is new. It
            is extended in place: continue twice from copies by ``cache.select_rows``.
        use_cache : bool
            Return a cache for the next call. A cache that is given is always returned, extended.
        return_logits : bool
            False, with labels, leaves out the logits. The loss is then computed without them where
            that is possible (torch 2.13, no cache, and a frozen output product that is a plain
            ``nn.Linear``: no hooks, adapter, offloading or quantisation).

        Returns
        -------
        FlamingoOutput

        Raises
        ------
        TypeError, ValueError
            Inputs that do not fit; the message names the row or the value.
        """
        use_cache = use_cache or cache is not None
        if labels is None and not return_logits:
            raise ValueError("return_logits=False without labels: there is nothing to return")
        context = self.encode_context(
            input_ids,
            pixel_values,
            attention_mask,
            num_images=num_images,
            num_frames=num_frames,
            assign=assign,
            cache=cache,
        )
        length, new = context.input_ids.shape[1], input_ids.shape[1]
        mask = context.attention_mask
        if labels is not None:
            check_labels(labels, input_ids, self.config.language.vocab_size)
            labels = self.mask_labels(
                labels, None if attention_mask is None else attention_mask[:, -new:] != 0
            )
        options = self.language_options
        if not return_logits and "head" in signature(self.language_model.forward).parameters:
            options["head"] = partial(
                next_token_loss_of_hidden, labels=labels, new_tokens=self.new_tokens
            )
        out = self.language_model(
            input_ids,
            attention_mask=mask,
            cache=None if cache is None else cache.language,
            before_block=self.block_hook(context, length - new, length),
            use_cache=use_cache,
            **options,
        )
        loss = out.head_output
        if labels is not None and loss is None:
            loss = next_token_loss(out.logits, labels)
        logits = out.logits if return_logits else None
        if not use_cache:
            return FlamingoOutput(loss, logits)
        return FlamingoOutput(loss, logits, FlamingoCache.after(context, out.cache).with_room())

    def encode_context(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        num_images: Tensor | None = None,
        num_frames: Tensor | None = None,
        assign: str | Sequence[str] = "previous",
        cache: FlamingoCache | None = None,
    ) -> MediaContext:
        """Check the arguments of :meth:`forward` and encode their media, once for all layers.

        Media of the cache are not encoded again.
        """
        config = self.config
        cached_tokens = 0
        if cache is not None:
            check_cache(cache)
            cached_tokens = cache.input_ids.shape[1]
        check_text(input_ids, attention_mask, config.language.vocab_size, cached_tokens)
        rows = input_ids.shape[0]
        if cache is not None and cache.input_ids.shape[0] != rows:
            raise ValueError(f"the cache holds {cache.input_ids.shape[0]} rows, input_ids {rows}")
        if cache is not None and assign != "previous":
            raise ValueError(f"assign={assign!r} looks ahead and cannot be used with a cache")
        inputs = check_media(input_ids, config.image_token_id, pixel_values, num_images, num_frames)

        media, lengths, extendable = None, None, False
        if cache is None or inputs is not None:
            encoded = encode_media(
                self.vision_encoder,
                self.connector,
                inputs,
                rows,
                input_ids.device,
                resample=config.resampler is not None,
            )
            media = project_media(self.gated_cross_attn_layers, encoded)
            lengths = None if encoded.lengths is None else encoded.lengths.to(input_ids.device)
        counts = (input_ids == config.image_token_id).sum(1)
        text, mask = input_ids, None if attention_mask is None else (attention_mask != 0).long()
        if cache is not None:
            cache = cache.in_dtype(
                self._media_dtype(input_ids.device) if media is None else media[0].key.dtype
            )
            media, lengths, extendable = cache.append_media(media, counts, lengths)
            counts = counts + cache.num_images
            text, mask = cache.append_text(input_ids, mask)
        attend = config.cross_attention.attend
        spans = token_spans(text, config.image_token_id, attend, assign, lengths)
        return MediaContext(media, counts, text, mask, spans, lengths, extendable)

    def _media_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype that media are projected to: that of the layers, or of autocast."""
        parameter = next(self.connector.parameters())
        none = Media(parameter.new_zeros(0, 0, 1, self.config.media_dim, device=device))
        return project_media(self.gated_cross_attn_layers[:1], none)[0].key.dtype

    def block_hook(self, context: MediaContext, start: int, end: int) -> BlockHook:
        """Return what runs before the LM blocks for tokens start..end-1.

        Tokens past the end of the context see the media that its last token sees.
        """
        spans = context.spans_of(start, end)
        if context.media:
            spans = plan_media_attention(spans, context.media[0].key, self.kernel)
        layers = {
            block: (place, layer, kv)
            for place, (block, layer, kv) in enumerate(
                zip(
                    self.config.cross_attention_blocks,
                    self.gated_cross_attn_layers,
                    context.media,
                    strict=True,
                )
            )
        }
        recompute = self._recompute

        def before_block(block: int, hidden: Tensor) -> Tensor:
            if block not in layers:
                return hidden
            place, layer, kv = layers[block]
            dtype = kv.key.dtype  # the layer's; the frozen model may have another
            inside = hidden.to(kv.key.device, dtype)  # blocks may lie on other devices
            if recompute is None or not recompute.covers(place) or not torch.is_grad_enabled():
                out = run(inside, *kv, layer)
            else:
                # The re-entrant mode needs everything that gradients flow to as an argument.
                out = recompute.run(run, inside, *kv, layer)
            if torch.promote_types(dtype, hidden.dtype) == dtype:
                return out.to(hidden)
            # Round the update of a narrower layer only, not the residual stream of a wider model.
            return hidden + (out - inside).to(hidden)

        def run(hidden: Tensor, key: Tensor, value: Tensor, layer: nn.Module) -> Tensor:
            return layer(hidden, spans=spans, media_kv=MediaKeyValue(key, value))

        return before_block

    def mask_labels(self, labels: Tensor, real: Tensor | None = None) -> Tensor:
        """Return labels with -100 at ``<image>``, at padding, and right after padding.

        A label after padding is ignored because the first token of a left-padded row would be
        predicted from padding; without the padding nothing predicts it.
        The padding token may also end a turn, so its id marks padding only where nothing else says
        what padding is: without ``real``, and only if generation does not stop at that token.

        Parameters
        ----------
        labels : Tensor
            int64 [B, T].
        real : Tensor, optional
            bool [B, T], True at tokens that are not padding (default: decided by the id).
        """
        ignored, pad = labels == self.config.image_token_id, self.config.pad_token_id
        if real is not None:
            ignored = ignored | ~real
            ignored[:, 1:] |= ~real[:, :-1]
        elif pad is not None and pad not in default_stops(self.config, self.language_model):
            ignored = ignored | (labels == pad)
        return labels.masked_fill(ignored, -100)


def _new_token_rows(config: FlamingoConfig, language_model: nn.Module) -> NewTokenRows | None:
    if not config.new_token_ids:
        return None
    if not hasattr(language_model, "new_token_rows"):
        raise ValueError(
            f"config.new_token_ids={config.new_token_ids}, but {type(language_model).__name__} has "
            "no method new_token_rows: leave the rows frozen with new_token_ids=()"
        )
    rows = language_model.new_token_rows(config.new_token_ids)
    assert isinstance(rows, NewTokenRows)
    return rows


def _check_part(name: str, module: nn.Module, **expected: int) -> None:
    for attribute, value in expected.items():
        if not isinstance(module, nn.Module) or not hasattr(module, attribute):
            raise TypeError(
                f"{name} must be a module with the attributes {', '.join(expected)}, got "
                f"{type(module).__name__}"
            )
        if getattr(module, attribute) != value:
            raise ValueError(
                f"{name}.{attribute} is {getattr(module, attribute)}, the config says {value}"
            )
