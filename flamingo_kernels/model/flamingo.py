"""FlamingoModel: the network, made from backbones or a checkpoint, with generation and scoring."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from flamingo_kernels.model import saving, scoring
from flamingo_kernels.model.backbones import (
    as_language_model,
    as_vision_encoder,
    default_config,
    execution_device,
)
from flamingo_kernels.model.cache import FlamingoCache
from flamingo_kernels.model.config import FlamingoConfig
from flamingo_kernels.model.generation import (
    FlamingoGeneration,
    GenerationOptions,
    Sampling,
    choose_stops,
    decode,
    next_turn,
)
from flamingo_kernels.model.inputs import require_left_padding
from flamingo_kernels.model.network import FlamingoNetwork
from flamingo_kernels.model.restore_on_error import restore_on_error


class FlamingoModel(FlamingoNetwork):
    """Flamingo (Alayrac et al., 2022): a frozen language model that sees interleaved images.

    Parameters
    ----------
    config : FlamingoConfig
        Shapes of all components.
    kernel : {"auto", "triton", "cpp", "torch"}
        Kernel of every op. ``"auto"`` takes the best for the device of the tensors at each call; an
        explicit kernel never falls back.
    vision_encoder, language_model : nn.Module, optional
        Frozen parts to use instead of freshly initialised ones; see ``vision.VisionEncoder`` and
        ``language.LanguageModel`` for what they must offer.

    Raises
    ------
    ValueError
        Unknown kernel name, or a frozen part whose sizes are not those of the config.
    TypeError
        A frozen part without the attributes that the protocols ask for.
    """

    @classmethod
    def from_backbones(
        cls,
        vision_encoder: nn.Module | int,
        language_model: nn.Module,
        config: FlamingoConfig | None = None,
        kernel: str = "auto",
    ) -> FlamingoModel:
        """Build a model around an existing vision encoder and language model, without copying them.

        Parameters
        ----------
        vision_encoder : nn.Module or int
            A transformers vision model (CLIP, SigLIP, ...), any module [N, 3, H, W] -> [N, S, D],
            or a ``vision.VisionEncoder``. An int is the number of channels D of features that every
            call then takes in place of pixels.
        language_model : nn.Module
            A transformers causal language model, or a ``language.LanguageModel``. Its blocks are
            found by structure. Only hooks on them and on the output product are added, and
            :meth:`unwrap` removes them.
        config : FlamingoConfig, optional
            Default: the paper's architecture with one cross-attention layer before every block, and
            the token ids that ``language.add_media_tokens`` has stored in the language model's
            configuration.
        kernel : {"auto", "triton", "cpp", "torch"}
            As in the constructor.

        Raises
        ------
        TypeError, ValueError
            A model that cannot be wrapped, with the reason, or a config of other sizes. The
            backbones are left unmodified.
        """
        with restore_on_error(vision_encoder, language_model):
            parts = {
                "vision_encoder": as_vision_encoder(vision_encoder, config),
                "language_model": as_language_model(language_model),
            }
            model = cls(config or default_config(**parts), kernel, **parts)
            # Same device as the backbones, but not their dtype, which may be too narrow to train.
            device = execution_device(language_model)
            for part in (model.connector, model.gated_cross_attn_layers, model.new_tokens):
                if part is not None:
                    part.to(device)
        model.loan.given.update(vision_encoder=vision_encoder, language_model=language_model)
        return model

    def unwrap(self) -> tuple[nn.Module | int, nn.Module]:
        """Return the vision encoder and language model that were given, bit for bit.

        Hooks are removed; training modes and ``requires_grad`` are restored. This model cannot run
        any more.
        """
        self.gradient_checkpointing_disable()
        return self.loan.end(self.vision_encoder, self.language_model)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_beams: int = 1,
        num_return_sequences: int = 1,
        num_images: Tensor | None = None,
        num_frames: Tensor | None = None,
        stop_token_ids: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        cache: FlamingoCache | None = None,
        return_cache: bool = False,
        prefill_chunk_size: int | None = None,
        streamer: Any = None,
        **options: Any,
    ) -> Tensor | FlamingoGeneration:
        """Continue each prompt: greedily, by sampling or by beam search.

        ``<image>`` is never generated, because no image would come with it.

        Parameters
        ----------
        input_ids, pixel_values, attention_mask, num_images, num_frames
            As in :meth:`forward`; prompts of different lengths are padded on the left.
        max_new_tokens : int
            Upper bound on new tokens, at least 1.
        do_sample : bool
            Sample from the distribution instead of taking the most likely token.
        temperature, top_k, top_p
            Shape the sampled distribution; used with ``do_sample`` only. The temperature is at
            least 1e-4.
        num_beams : int
            Beams kept per prompt; the paper evaluates with 3.
        num_return_sequences : int
            Sequences per prompt, side by side: samples, or the best beams.
        stop_token_ids : sequence of int, optional
            A row ends after one of these. Default: end of chunk and end of text, with every id of
            it in the language model's own configuration. The rest of the row is filled with the
            padding token, or with a stop token if the config has no padding token.
        generator : torch.Generator, optional
            Source of randomness of ``do_sample``.
        use_cache : bool
            False recomputes the whole sequence at every step; same result, for checking.
        cache : FlamingoCache, optional
            Cache of an earlier turn, with the conversation so far; ``input_ids`` and
            ``pixel_values`` then hold what is new. Earlier images are not encoded again. It is
            extended in place; ``cache.select_rows`` copies it, also for several queries to one
            support set.
        return_cache : bool
            Also return the cache for the next turn. Not with beams, nor with options that end rows
            by anything but ``stop_token_ids``.
        prefill_chunk_size : int, optional
            Read the prompt in pieces of this many tokens, to bound the memory of long ones.
        streamer : object, optional
            Its ``put`` gets the prompt and then the tokens of each step; its ``end`` is called at
            the end. ``TextStreamer`` of transformers is one.
        options
            Other options of the ``generate`` of a Hugging Face language model. Those that have
            another name here, and guidance by a second prompt, are refused.

        Returns
        -------
        Tensor or FlamingoGeneration
            int64 [B * num_return_sequences, T + new tokens], ``input_ids`` included. With
            ``return_dict_in_generate`` among the options: the output of transformers, whose
            ``sequences`` are these.

        Raises
        ------
        TypeError, ValueError
            Options out of range, right-padded prompts, or what :meth:`forward` raises.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        settings = GenerationOptions(
            max_new_tokens=max_new_tokens,
            sampling=sampling if do_sample else None,
            generator=generator,
            num_beams=num_beams,
            num_return_sequences=num_return_sequences,
            stop_token_ids=choose_stops(stop_token_ids, self.config, self.language_model),
            use_cache=use_cache,
            return_cache=return_cache,
            prefill_chunk_size=prefill_chunk_size,
            streamer=streamer,
            transformers=options,
        )
        if cache is not None and not use_cache:
            raise ValueError("a cache was given together with use_cache=False")
        context = self.encode_context(
            input_ids,
            pixel_values,
            attention_mask,
            num_images=num_images,
            num_frames=num_frames,
            cache=cache,
        )
        require_left_padding(context.attention_mask, "generate")
        decoded = decode(self, context, None if cache is None else cache.language, settings)
        new = slice(0 if cache is None else cache.input_ids.shape[1], None)
        if decoded.output is not None:
            decoded.output.sequences = decoded.sequences[:, new]
            return decoded.output
        if not return_cache:
            return decoded.sequences[:, new]
        grown = next_turn(self, context, decoded, settings)
        return FlamingoGeneration(decoded.sequences[:, new], grown)

    @torch.no_grad()
    def score_answers(
        self,
        input_ids: Tensor,
        answers: Sequence[Sequence[int]],
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        num_images: Tensor | None = None,
        num_frames: Tensor | None = None,
        cache: FlamingoCache | None = None,
        normalise: bool = False,
        answers_at_once: int = scoring.ANSWERS_AT_ONCE,
    ) -> Tensor:
        """Compute the log-likelihood of each answer after each prompt (appendix A.2).

        Each prompt is read once for all answers.

        Parameters
        ----------
        input_ids, pixel_values, attention_mask, num_images, num_frames
            As in :meth:`forward`; prompts are padded on the left.
        answers : sequence of sequences of int
            Token ids of each answer, without ``<image>``; the same for every prompt.
        cache : FlamingoCache, optional
            Cache of what precedes the prompts, such as a support set; it is not changed.
        normalise : bool
            Take the mean over the tokens of an answer instead of the sum.
        answers_at_once : int
            Answers read in one batch, each with a copy of every prompt's cache: bounds the memory.

        Returns
        -------
        Tensor
            fp32 [B, answers].

        Raises
        ------
        TypeError, ValueError
            An answer without tokens or with an ``<image>``, right-padded prompts, or what
            :meth:`forward` raises.
        """
        scoring.check_answers(answers, answers_at_once, self.config.image_token_id)
        if cache is not None:
            cache = cache.select_rows(torch.arange(input_ids.shape[0], device=input_ids.device))
        prompt = self(
            input_ids,
            pixel_values,
            attention_mask,
            num_images=num_images,
            num_frames=num_frames,
            cache=cache,
            use_cache=True,
        )
        require_left_padding(prompt.cache.attention_mask, "score answers")
        return scoring.score(self, prompt, answers, normalise, answers_at_once)

    def save_pretrained(self, path: str | PathLike, include_frozen: bool = False) -> None:
        """Write ``model.safetensors``, which also holds the config, into a directory.

        The file is replaced in one step, so a crash leaves the old one.

        Parameters
        ----------
        path : str or PathLike
            The directory.
        include_frozen : bool
            Write all tensors. False: the trainable ones, and those of the frozen parts that
            ``saved_frozen`` names (embeddings that came with a converted checkpoint).

        Raises
        ------
        FileExistsError
            The directory holds weights that are not a checkpoint of this package.
        OSError
            The file cannot be written, as on a full disk; nothing is left of it.
        ValueError
            A tensor to be written is quantised, sharded or offloaded.
        """
        saving.save(self, path, include_frozen)

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

        Tensors keep the dtype in which they were saved; a part that is given keeps its own. A
        checkpoint of the trainable tensors only needs the frozen parts that it was trained with,
        wrapped or as :meth:`from_backbones` takes them.

        Raises
        ------
        FileNotFoundError, ValueError
            A missing, corrupt, truncated or foreign checkpoint, or frozen parts that are neither in
            the checkpoint nor given; the message names the file and the tensors. Parts that were
            given are left unmodified.
        """
        given = {"vision_encoder": vision_encoder, "language_model": language_model}
        with restore_on_error(*given.values()):
            model = saving.load(cls, path, kernel, **given)
        model.loan.given.update({name: p for name, p in given.items() if p is not None})
        return model
