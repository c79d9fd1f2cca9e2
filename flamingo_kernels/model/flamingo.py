"""FlamingoModel: frozen vision encoder and language model, trainable bridge between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from flamingo_kernels.language import BlockHook as BeforeBlock
from flamingo_kernels.language import build_language_model, checkpoint_blocks
from flamingo_kernels.model import backbones, checkpoint, generation, scoring
from flamingo_kernels.model.cache import FlamingoCache, append_media, writable
from flamingo_kernels.model.config import FlamingoConfig, ResamplerConfig
from flamingo_kernels.model.context import Context
from flamingo_kernels.model.inputs import MediaInputs, check_media, check_text
from flamingo_kernels.model.loss import next_token_loss, next_token_loss_of_hidden
from flamingo_kernels.model.untouched import untouched_unless_done
from flamingo_kernels.nn import GatedCrossAttentionBlock, MediaKeyValue, PerceiverResampler
from flamingo_kernels.ops import MediaSpans, plan_media_attention
from flamingo_kernels.ops.dispatch import check_kernel_name
from flamingo_kernels.vision import build_vision_encoder

FROZEN_PARTS = ("vision_encoder", "language_model")


def build_resampler(config: ResamplerConfig, kernel: str) -> PerceiverResampler:
    """The resampler that ``config`` describes, with random weights."""
    return PerceiverResampler(
        config.dim,
        depth=config.depth,
        dim_head=config.head_dim,
        heads=config.heads,
        num_latents=config.num_latents,
        max_num_frames=config.max_num_frames,
        ff_mult=config.ff_mult,
        input_dim=config.input_dim,
        activation=config.activation,
        qk_norm=config.qk_norm,
        final_norm=config.final_norm,
        kernel=kernel,
    )


@dataclass(frozen=True)
class FlamingoOutput:
    """``loss`` scalar or None, ``logits`` [B, T, V] or None, ``cache`` or None."""

    loss: Tensor | None
    logits: Tensor | None
    cache: FlamingoCache | None = None


class FlamingoModel(nn.Module):
    """Flamingo (Alayrac et al., 2022): a frozen language model that sees interleaved images.

    Parameters
    ----------
    config : FlamingoConfig
        Shapes of all components.
    kernel : {"auto", "triton", "cpp", "torch"}
        Kernel of every op; ``"auto"`` takes the best for the tensors' device at each call, an
        explicit one never falls back.
    vision_encoder, language_model : nn.Module, optional
        Frozen parts to use in place of freshly initialised ones; see ``vision.VisionEncoder`` and
        ``language.LanguageModel`` for what they must offer.

    Raises
    ------
    ValueError
        Unknown kernel name, or a frozen part whose sizes are not those of the config.
    TypeError
        A frozen part without the attributes that the protocols ask for.
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
            language = config.language
            _check_part(
                "language_model",
                language_model,
                dim=language.dim,
                num_blocks=language.depth,
                vocab_size=language.vocab_size,
            )
        self.vision_encoder = vision_encoder or build_vision_encoder(config.vision)
        self.language_model = language_model or build_language_model(config.language)
        cross = config.cross_attention
        self.perceiver = build_resampler(config.resampler, kernel)
        self.gated_cross_attn_layers = nn.ModuleList(
            GatedCrossAttentionBlock(
                config.language.dim,
                config.resampler.dim,
                dim_head=cross.head_dim,
                heads=cross.heads,
                ff_mult=cross.ff_mult,
                attend=cross.attend,
                ff_dim=cross.ff_dim,
                media_norm=cross.media_norm,
                rms_norm_eps=cross.rms_norm_eps,
                qk_norm=cross.qk_norm,
                gate=cross.gate,
                activation=cross.activation,
                feed_forward_without_media=cross.feed_forward_without_media,
                kernel=kernel,
            )
            for _ in config.cross_attention_blocks
        )
        # Tensors of the frozen parts that are not those of the published backbones: a checkpoint
        # holds them beside the trainable ones.
        self.saved_frozen: set[str] = set()
        self._use_reentrant: bool | None = None  # None: no activation checkpointing
        # For unwrap: what was given, before it was wrapped, and how.
        self._given: dict[str, Any] = {}
        self._unfrozen = [
            p for part in self._frozen_modules() for p in part.parameters() if p.requires_grad
        ]
        self._modes = [(m, m.training) for part in self._frozen_modules() for m in part.modules()]
        for part in self._frozen_modules():
            part.requires_grad_(False)
        self.train(self.training)

    @classmethod
    def from_backbones(
        cls,
        vision_encoder: nn.Module | int,
        language_model: nn.Module,
        config: FlamingoConfig | None = None,
        kernel: str = "auto",
    ) -> FlamingoModel:
        """A model around a vision encoder and a language model that exist; neither is copied.

        Parameters
        ----------
        vision_encoder : nn.Module or int
            A transformers vision model (CLIP, SigLIP, ...), any module [N, 3, H, W] -> [N, S, D],
            or a ``vision.VisionEncoder``. An int is the number of channels D of features that take
            the place of pixels in every call.
        language_model : nn.Module
            A transformers causal language model, or a ``language.LanguageModel``. Its blocks are
            found by structure; hooks on them and on the output product are all that is added, and
            :meth:`unwrap` removes them.
        config : FlamingoConfig, optional
            Default: the paper's architecture, one cross-attention layer before every block, with
            the token ids that ``language.add_media_tokens`` has put into the language model's
            configuration.
        kernel : {"auto", "triton", "cpp", "torch"}
            As in the constructor.

        Raises
        ------
        TypeError, ValueError
            A model that cannot be wrapped, with the reason, or a config of other sizes. The models
            are then as they were.
        """
        given = {"vision_encoder": vision_encoder, "language_model": language_model}
        with untouched_unless_done(*given.values()):
            parts = {
                "vision_encoder": backbones.wrap_vision_encoder(vision_encoder, config),
                "language_model": backbones.wrap_language_model(language_model),
            }
            model = cls(config or backbones.config_of(**parts), kernel, **parts)
            # Next to the frozen parts, whose dtype may be narrower than is good for training.
            device = next(language_model.parameters()).device
            for part in (model.perceiver, model.gated_cross_attn_layers):
                part.to(device)
        model._given = given
        return model

    def unwrap(self) -> tuple[nn.Module | int, nn.Module]:
        """The vision encoder and language model that were given, bit for bit and in their mode.

        Hooks that came with wrapping are removed, ``requires_grad`` is restored; this model cannot
        run any more.
        """
        self.gradient_checkpointing_disable()
        for parameter in self._unfrozen:
            parameter.requires_grad_(True)
        for module, training in self._modes:
            module.training = training
        language_model = self.language_model
        # A wrapper that was given is given back with its hooks.
        given = self._given.get("language_model")
        if language_model is not given and hasattr(language_model, "unwrap"):
            language_model = language_model.unwrap()
        vision_encoder = getattr(self.vision_encoder, "module", self.vision_encoder)
        return self._given.get("vision_encoder", vision_encoder), language_model

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Keep the input of each cross-attention layer and LM block only, and compute again.

        Gradients stay the same. Named and called as in transformers;
        ``gradient_checkpointing_kwargs`` may hold ``use_reentrant`` (default False).

        Raises
        ------
        ValueError
            Any other option.
        """
        options = dict(gradient_checkpointing_kwargs or {})
        use_reentrant = bool(options.pop("use_reentrant", False))
        if options:
            raise ValueError(f"unknown checkpointing options {sorted(options)}; use_reentrant only")
        self._use_reentrant = use_reentrant
        checkpoint_blocks(self.language_model.blocks, use_reentrant)

    def gradient_checkpointing_disable(self) -> None:
        """Undo :meth:`gradient_checkpointing_enable`."""
        self._use_reentrant = None
        checkpoint_blocks(self.language_model.blocks, None)

    def _frozen_modules(self) -> tuple[nn.Module, ...]:
        return tuple(getattr(self, name) for name in FROZEN_PARTS)

    def train(self, mode: bool = True) -> FlamingoModel:
        """Training mode for the trainable parts; the frozen ones stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen_modules():
            part.eval()
        return self

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything outside the frozen vision encoder and language model.

        With those of the frozen parts that were given ``requires_grad`` afterwards, such as the
        embeddings of new tokens.
        """
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.split(".", 1)[0] not in FROZEN_PARTS or parameter.requires_grad
        }

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
        """Logits, and the loss where labels are given.

        Parameters
        ----------
        input_ids : Tensor
            int64 [B, T]; one ``<image>`` token (``config.image_token_id``) per image.
        pixel_values : Tensor, optional
            Normalised images [B, I, F, C, H, W]; F = 1 for images. None: no image in the batch.
            Or features [B, I, F, S, D] that the vision encoder gave, or would give.
        attention_mask : Tensor, optional
            [B, T], nonzero at real tokens; padding on either side. With a cache it covers the
            cached tokens as well.
        labels : Tensor, optional
            int64 [B, T], usually ``input_ids``; shifted inside. -100, ``<image>`` and padding are
            ignored; with nothing left the loss is 0.
        num_images : Tensor, optional
            Integer [B]: how many of the I slots each row fills (default: all). The others are never
            read.
        num_frames : Tensor, optional
            Integer [B, I]: how many of the F frames of each clip are real (default: all).
        assign : {"previous", "next"} or one of them per row
            Text belongs to the image before or after it (the paper's training augmentation, drawn
            once per document, appendix A.3.2).
        cache : FlamingoCache, optional
            Of an earlier call; ``input_ids`` and ``pixel_values`` then hold what is new. It is
            extended in place: use ``cache.select_rows`` for a copy that can be continued twice.
        use_cache : bool
            Return a cache for the next call; one that is given is always returned, grown.
        return_logits : bool
            False, with labels: leave the logits out, which the loss then does without where it can
            (torch 2.13, a frozen output product, no cache).

        Returns
        -------
        FlamingoOutput

        Raises
        ------
        TypeError, ValueError
            Input that does not fit; the message names the row or the value.
        """
        use_cache = use_cache or cache is not None
        if labels is None and not return_logits:
            raise ValueError("return_logits=False without labels: there is nothing to return")
        context = self.read(
            input_ids,
            pixel_values,
            attention_mask,
            labels,
            num_images=num_images,
            num_frames=num_frames,
            assign=assign,
            cache=cache,
        )
        length, new = context.input_ids.shape[1], input_ids.shape[1]
        mask = context.attention_mask
        if labels is not None:
            real = None if mask is None else mask[:, length - new :] != 0
            labels = self.counted_labels(labels, real)
        options: dict[str, Any] = {}
        if not return_logits and "head" in signature(self.language_model.forward).parameters:
            options["head"] = partial(next_token_loss_of_hidden, labels=labels)
        out = self.language_model(
            input_ids,
            attention_mask=mask,
            cache=None if cache is None else cache.language,
            before_block=self.cross_attention(context, length - new, length),
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

    def read(
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
    ) -> Context:
        """Check the arguments of :meth:`forward` and encode their media, once for all layers.

        The media of a cache are taken as they are; only new ones are encoded.
        """
        if cache is not None:
            _check_cache(cache)
        cached_tokens = 0 if cache is None else cache.input_ids.shape[1]
        vocab_size = self.config.language.vocab_size
        check_text(input_ids, attention_mask, labels, vocab_size, cached_tokens)
        if cache is not None and cache.input_ids.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"the cache holds {cache.input_ids.shape[0]} rows, input_ids {input_ids.shape[0]}"
            )
        if cache is not None and assign != "previous":
            raise ValueError(f"assign={assign!r} looks ahead and cannot be used with a cache")
        if attention_mask is not None:
            attention_mask = (attention_mask != 0).long()
        media_inputs = check_media(
            input_ids, self.config.image_token_id, pixel_values, num_images, num_frames
        )
        counts = (input_ids == self.config.image_token_id).sum(1)
        history, mask, owned = input_ids, attention_mask, False
        if cache is None or media_inputs is not None:
            media = self.encode_media(media_inputs, input_ids.shape[0])
            media_kv = [layer.project_media(media) for layer in self.gated_cross_attn_layers]
        if cache is not None:
            owned = cache.owned and writable(cache.media)
            if media_inputs is None:
                media_kv = cache.media
            else:
                media_kv = [
                    append_media(old, cache.num_images, new, counts, owned)
                    for old, new in zip(cache.media, media_kv, strict=True)
                ]
            counts = counts + cache.num_images
            history = torch.cat((cache.input_ids, input_ids), 1)
            if mask is None and cache.attention_mask is not None:
                mask = torch.cat((cache.attention_mask, torch.ones_like(input_ids)), 1)
        spans = self._spans(history, assign)
        return Context(tuple(media_kv), counts, history, mask, spans, owned)

    def _spans(self, input_ids: Tensor, assign: str | Sequence[str]) -> MediaSpans:
        config = self.config
        if isinstance(assign, str):
            attend = config.cross_attention.attend
            return MediaSpans.from_tokens(input_ids, config.image_token_id, attend, assign)
        if len(assign) != len(input_ids):
            raise ValueError(f"assign names {len(assign)} rows, input_ids has {len(input_ids)}")
        rows = [self._spans(ids[None], mode) for ids, mode in zip(input_ids, assign, strict=True)]
        return MediaSpans(
            torch.cat([spans.first for spans in rows]),
            torch.cat([spans.last for spans in rows]),
            all(spans.single_item for spans in rows),
        )

    def counted_labels(self, labels: Tensor, real: Tensor | None = None) -> Tensor:
        """Labels [B, T] with -100 wherever the loss leaves them out: ``<image>``, padding, and
        after padding. ``real`` [B, T] is True at tokens that are not padding.

        The first token of a left-padded row would be predicted from padding; the row alone does not
        predict it.
        """
        ignored = labels == self.config.image_token_id
        if self.config.pad_token_id not in (None, self.config.eos_token_id):
            ignored = ignored | (labels == self.config.pad_token_id)
        if real is not None:
            ignored = ignored | ~real
            ignored[:, 1:] |= ~real[:, :-1]
        return labels.masked_fill(ignored, -100)

    def encode_media(self, inputs: MediaInputs | None, batch: int) -> Tensor:
        """Latents [B, I, R, dim] of the media; slots that hold no image are zero."""
        parameter = self.perceiver.latents
        if inputs is None:
            return parameter.new_zeros(batch, 0, *parameter.shape)
        features = self._encode_frames(inputs)
        frames = inputs.frames and torch.tensor(inputs.frames, device=features.device)
        if inputs.counts is None:
            return self.perceiver(features, frames)
        # Resample only the slots that hold an image.
        used = torch.arange(inputs.slots) < torch.tensor(inputs.counts)[:, None]
        rows, slots = (index.to(features.device) for index in used.nonzero(as_tuple=True))
        packed_frames = None if frames is None else frames[rows, slots][None]
        packed = self.perceiver(features[rows, slots][None], packed_frames)[0]
        latents = packed.new_zeros(batch, inputs.slots, *packed.shape[1:])
        return latents.index_put((rows, slots), packed)

    def _encode_frames(self, inputs: MediaInputs) -> Tensor:
        """Features [B, I, F, S, D] of the frozen encoder, zero for frames that are padding.

        In the resampler's dtype; the encoder's may be another.
        """
        pixels = inputs.pixel_values
        latents = self.perceiver.latents
        weight = next(self.vision_encoder.parameters(), latents)
        real = inputs.real_frames()
        if pixels.ndim == 5:
            if pixels.shape[-1] != self.config.vision.output_dim:
                raise ValueError(
                    f"features must have {self.config.vision.output_dim} channels, got shape "
                    f"{tuple(pixels.shape)}"
                )
            features = pixels.to(latents.dtype)
            if real is None:
                return features
            return features.masked_fill(~real.to(pixels.device)[..., None, None], 0)
        with torch.no_grad():
            if real is None:
                features = self.vision_encoder(pixels.flatten(0, 2).to(weight.dtype))
                return features.unflatten(0, pixels.shape[:3]).to(latents.dtype)
            index = tuple(i.to(pixels.device) for i in real.nonzero(as_tuple=True))
            images = pixels[index].to(weight.dtype)
            if not len(images):  # not every encoder takes an empty batch
                images = images.new_zeros(1, *images.shape[1:])
            features = self.vision_encoder(images)[: len(index[0])].to(latents.dtype)
            padded = features.new_zeros(*pixels.shape[:3], *features.shape[1:])
            return padded.index_put(index, features)

    def cross_attention(self, context: Context, start: int, end: int) -> BeforeBlock:
        """What runs before the blocks for tokens start..end-1 of a context, or after its last."""
        spans = context.spans_of(start, end)
        if context.media:
            spans = plan_media_attention(spans, context.media[0].key, self.kernel)
        layers = {
            block: (layer, kv)
            for block, layer, kv in zip(
                self.config.cross_attention_blocks,
                self.gated_cross_attn_layers,
                context.media,
                strict=True,
            )
        }

        def before_block(block: int, hidden: Tensor) -> Tensor:
            if block not in layers:
                return hidden
            layer, kv = layers[block]
            dtype = kv.key.dtype  # the layer's; the frozen model's may be another
            inside = hidden.to(dtype)
            if self._use_reentrant is None or not torch.is_grad_enabled():
                out = run(inside, *kv, layer)
            else:
                # Arguments, not captured: the re-entrant mode needs all that gradients flow to.
                out = run_checkpointed(run, inside, *kv, layer, use_reentrant=self._use_reentrant)
            if torch.promote_types(dtype, hidden.dtype) == dtype:
                return out.to(hidden.dtype)
            # A narrower layer's part alone is rounded, not the residual stream of a wider model.
            return hidden + (out - inside).to(hidden.dtype)

        def run(hidden: Tensor, key: Tensor, value: Tensor, layer: nn.Module) -> Tensor:
            return layer(hidden, spans=spans, media_kv=MediaKeyValue(key, value))

        return before_block

    generate = generation.generate
    score_answers = scoring.score_answers

    def save_pretrained(self, path: str | PathLike, include_frozen: bool = False) -> None:
        """Write ``model.safetensors``, which holds the config too, into the directory ``path``.

        Only trainable tensors are written unless ``include_frozen``, and those of the frozen parts
        that are named in ``saved_frozen`` (embeddings that came with a converted checkpoint). The
        file is replaced in one step: a crash leaves the old one.
        """
        checkpoint.save(self, path, include_frozen)

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike,
        kernel: str = "auto",
        *,
        vision_encoder: nn.Module | None = None,
        language_model: nn.Module | None = None,
    ) -> FlamingoModel:
        """Load what :meth:`save_pretrained` wrote.

        Tensors keep the dtype they were saved in, those of a part that is given the part's own. A
        checkpoint of the trainable tensors only needs the frozen parts it was trained with,
        wrapped or as :meth:`from_backbones` takes them.

        Raises
        ------
        FileNotFoundError, ValueError
            Missing, corrupt, truncated or foreign checkpoint, or frozen parts that are neither in
            the checkpoint nor given; the message names the file and the tensors. Parts that were
            given are then as they were.
        """
        given = {"vision_encoder": vision_encoder, "language_model": language_model}
        with untouched_unless_done(*given.values()):
            model = checkpoint.load(cls, path, kernel, **given)
        model._given = {name: part for name, part in given.items() if part is not None}
        return model


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


def _check_cache(cache: FlamingoCache) -> None:
    if not isinstance(cache, FlamingoCache):
        raise TypeError(f"cache must be a FlamingoCache, got {type(cache).__name__}")
    if cache.language.length != cache.input_ids.shape[1]:
        raise ValueError(
            f"the cache was made after {cache.input_ids.shape[1]} tokens, but another call has "
            f"extended it in place to {cache.language.length}; continue from that call's cache, or "
            "take copies with cache.select_rows before"
        )
