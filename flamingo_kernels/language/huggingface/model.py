"""A Hugging Face causal language model as a ``LanguageModel``."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flamingo_kernels.bare_modules import is_plain_linear
from flamingo_kernels.language.config import HuggingFaceLanguageConfig
from flamingo_kernels.language.huggingface.cache import HuggingFaceCache, cache_name, returned_cache
from flamingo_kernels.language.huggingface.hooks import (
    BlockHookFactory,
    BlockPreHook,
    Call,
    HeadHooks,
    ModelHooks,
    NewTokenHooks,
)
from flamingo_kernels.language.huggingface.states import StateChecks
from flamingo_kernels.language.huggingface.structure import (
    check_causal,
    find_blocks,
    inner_model,
    text_config,
)
from flamingo_kernels.language.new_tokens import NewTokenRows
from flamingo_kernels.language.protocol import (
    BlockHook,
    Head,
    LanguageModelOutput,
    check_inputs,
    positions,
)
from flamingo_kernels.language.recompute import checkpoint_blocks
from flamingo_kernels.transformers_models import build_model, check_declared_sizes, plain_options


class HuggingFaceLanguageModel(nn.Module):
    """A transformers causal language model as a ``LanguageModel``; see its ``__call__``.

    Parameters
    ----------
    model : nn.Module
        The language model, also inside a model of PEFT or compiled. It becomes the submodule
        ``model``. Nothing is added to it but hooks, which :meth:`unwrap` removes.

    Attributes
    ----------
    blocks_name : str
        Name of the list of decoder blocks in the model of transformers.
    cache_name : str
        Name under which ``model`` takes its cache; it depends on the version of transformers.

    Raises
    ------
    ValueError
        The decoder blocks are ambiguous (``find_blocks``), or the model is not a causal language
        model with a head and a cache (``check_causal``). The model is not changed.
    RuntimeError
        From ``forward`` with ``before_block``: the blocks do not run once each in order, the model
        was unwrapped, or it uses activation checkpointing of its own while training. That would
        recompute blocks in the backward, outside the call, without ``before_block``.
        From ``forward`` and ``generate`` with a cache: the model would read it wrongly (recurrent
        states that padding went into, that it forgets, or that do not follow beams).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        inner = inner_model(model)
        self.blocks_name, blocks = find_blocks(inner)
        check_causal(inner)
        self.model = model
        self.cache_name: str = cache_name(inner) or ""
        self.num_blocks = len(blocks)
        # Models like OPT derive positions from the mask; models like MPT have none.
        self._takes_position_ids = "position_ids" in inspect.signature(inner.forward).parameters
        self._owner = object()
        self._handles = [
            block.register_forward_pre_hook(BlockPreHook(self._owner, i), with_kwargs=True)
            for i, block in enumerate(blocks)
        ]
        self._check_states = StateChecks()
        whole = ModelHooks(self._owner, self._check_states)
        self._handles.append(inner.register_forward_pre_hook(whole.before, with_kwargs=True))
        self._handles.append(inner.register_forward_hook(whole.after, with_kwargs=True))
        self._ends: tuple[nn.Module | None, ...] = ()
        self._end_handles: list[Any] = []
        self._hook_ends()

    @classmethod
    def from_config(cls, config: HuggingFaceLanguageConfig) -> HuggingFaceLanguageModel:
        """Build the model that ``config`` describes, with random weights (or on the meta device).

        Raises
        ------
        ImportError
            transformers is not installed.
        ValueError
            The model's sizes are not the ones that ``config`` declares.
        """
        wrapped = cls(build_model("AutoModelForCausalLM", "language model", config))
        check_declared_sizes(
            config, dim=wrapped.dim, depth=wrapped.num_blocks, vocab_size=wrapped.vocab_size
        )
        return wrapped

    @property
    def config(self) -> HuggingFaceLanguageConfig:
        """What :meth:`from_config` needs to build a model like this one."""
        config = self._inner.config
        return HuggingFaceLanguageConfig(
            model_type=config.model_type,
            options=plain_options(config.to_diff_dict()),
            dim=self.dim,
            depth=self.num_blocks,
            vocab_size=self.vocab_size,
        )

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return text_config(self._inner).hidden_size

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary; follows ``model.resize_token_embeddings``."""
        return text_config(self._inner).vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text; Gemma 3 and Llama 3 have several."""
        sources = (text_config(self._inner), getattr(self._inner, "generation_config", None))
        found: list[int] = []
        for source in sources:
            ids = getattr(source, "eos_token_id", None)
            found += ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids]
        return tuple(dict.fromkeys(found))

    @property
    def _inner(self) -> Any:
        return inner_model(self.model)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, inside ``model``."""
        blocks = self._inner.get_submodule(self.blocks_name)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: HuggingFaceCache | None = None,
        before_block: BlockHook | None = None,
        use_cache: bool = False,
        head: Head | None = None,
        new_tokens: NewTokenRows | None = None,
    ) -> LanguageModelOutput:
        check_inputs(input_ids, attention_mask, cache)
        self._hook_ends()
        held = 0 if cache is None else cache.length
        options: dict[str, Any] = {"use_cache": use_cache or cache is not None}
        if cache is not None:
            options[self.cache_name] = cache.past_key_values
            if held:
                with Call(self._owner, None).running():
                    self._check_states(
                        self.model,
                        cache.past_key_values,
                        self.cache_name,
                        input_ids,
                        attention_mask,
                    )
        if attention_mask is not None:
            options["attention_mask"] = attention_mask
            if self._takes_position_ids:
                options["position_ids"] = positions(attention_mask, input_ids.shape[1])
        elif held and self._takes_position_ids:
            # Bamba counts from 0 again unless it is told.
            new = torch.arange(held, held + input_ids.shape[1], device=input_ids.device)
            options["position_ids"] = new.expand_as(input_ids)

        if head is not None and not options["use_cache"] and self._gives_its_product():
            call = Call(self._owner, before_block, without_logits=True, new_tokens=new_tokens)
            output = self._run(call, input_ids, options)
            if call.nothing_follows_the_product(output.logits):
                linear = self._inner.get_output_embeddings()
                result = head(call.hidden, linear.weight, linear.bias)
                return LanguageModelOutput(None, None, result)
            self._head_is_last = False
        call = Call(self._owner, before_block, new_tokens=new_tokens)
        output = self._run(call, input_ids, options)

        if not options["use_cache"]:
            return LanguageModelOutput(output.logits, None)
        masked = attention_mask is not None or (cache is not None and cache.masked)
        grown = self._checked_cache(output, held + input_ids.shape[1], masked)
        return LanguageModelOutput(output.logits, grown)

    def _checked_cache(self, output: Any, tokens: int, masked: bool) -> HuggingFaceCache:
        """Return the cache in ``output``; RuntimeError unless it holds that many tokens."""
        returned = returned_cache(output)
        if returned is None:
            raise RuntimeError(
                f"{type(self._inner).__name__} returns no {self.cache_name}: use it with "
                "use_cache=False only"
            )
        cache = HuggingFaceCache(returned, masked)
        if cache.length != tokens:
            raise RuntimeError(
                f"the cache of {type(self._inner).__name__}, a "
                f"{type(returned).__name__}, says that it holds {cache.length} "
                f"tokens after {tokens}: use it with use_cache=False only"
            )
        return cache

    def _run(self, call: Call, input_ids: Tensor, options: dict[str, Any]) -> Any:
        call.shape = input_ids.shape
        if call.block_hook is not None:
            self._check_can_run_hooks()
        with call.running():
            output = self.model(input_ids=input_ids, **options)
        if call.block_hook is not None and call.blocks_run != self.num_blocks:
            raise RuntimeError(
                f"{type(self._inner).__name__} ran {call.blocks_run} of its {self.num_blocks} "
                "blocks, so `before_block` was not called for all"
            )
        if call.new_tokens is not None and not call.embedded:
            raise RuntimeError(
                f"{type(self._inner).__name__} did not run its input embeddings, so rows of new "
                "tokens cannot replace theirs: leave them frozen with config.new_token_ids=()"
            )
        return output

    def new_token_rows(self, token_ids: Sequence[int]) -> NewTokenRows:
        """Return rows for these tokens that can be trained while ``model`` is frozen."""
        embedding, head = _input_embeddings(self._inner), self._inner.get_output_embeddings()
        return NewTokenRows(token_ids, embedding, head)

    def generate(
        self,
        input_ids: Tensor,
        before_blocks_of: BlockHookFactory,
        new_tokens: NewTokenRows | None = None,
        **options: Any,
    ) -> Any:
        """Run the ``generate`` of transformers, with a function before each block.

        Parameters
        ----------
        input_ids : Tensor
            Integer [B, T], all tokens, including those that a cache in ``options`` holds.
        before_blocks_of : callable
            ``before_blocks_of(start, end, rows) -> before_block`` for the forward that reads tokens
            start..end-1 of ``rows`` sequences. Beam search and several sequences per prompt make
            ``rows`` a multiple of B; the sequences of one prompt stand side by side.
        new_tokens : NewTokenRows, optional
            As in ``forward``.
        options
            Options of the ``generate`` of transformers.

        Raises
        ------
        RuntimeError, TypeError, ValueError
            As ``forward``, and what the ``generate`` of transformers raises.
        """
        self._check_can_run_hooks()
        self._hook_ends()
        with_beams = options.get("num_beams", 1) > 1
        call = Call(
            self._owner, None, before_blocks_of, new_tokens=new_tokens, with_beams=with_beams
        )
        with call.running():
            return self.model.generate(input_ids=input_ids, **options)

    def unwrap(self) -> nn.Module:
        """Remove the hooks and return the model as it was given."""
        checkpoint_blocks(self.blocks, None)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._unhook_ends()
        return self.model

    def _hook_ends(self) -> None:
        """Hook the input embeddings and the output product, which a resize replaces.

        Nothing is hooked after :meth:`unwrap`.
        """
        if not self._handles:
            return
        embedding, head = ends = _input_embeddings(self._inner), self._inner.get_output_embeddings()
        if len(self._ends) == 2 and all(map(operator.is_, ends, self._ends)):
            return
        self._unhook_ends()
        self._ends = ends
        rows, product = NewTokenHooks(self._owner), HeadHooks(self._owner)
        if embedding is not None:
            self._end_handles.append(
                embedding.register_forward_hook(rows.after_embedding, prepend=True)
            )
        self._end_handles.append(head.register_forward_hook(rows.after_head, prepend=True))
        # False once it is known that something else follows the output product.
        self._head_is_last = type(head) is nn.Linear
        if self._head_is_last:
            self._end_handles.append(head.register_forward_pre_hook(product.before))
            self._end_handles.append(head.register_forward_hook(product.after))

    def _unhook_ends(self) -> None:
        for handle in self._end_handles:
            handle.remove()
        self._end_handles, self._ends = [], ()

    def _gives_its_product(self) -> bool:
        """Whether the output product is a plain one, as far as is known the last step.

        It is looked at in every call, since hooks and adapters come and go.
        """
        tracked = not torch.is_inference_mode_enabled()  # whether tensors are written to
        linear = self._inner.get_output_embeddings()
        return self._head_is_last and tracked and is_plain_linear(linear, self._is_own_hook)

    def _is_own_hook(self, hook: Any) -> bool:
        return getattr(getattr(hook, "__self__", None), "owner", None) is self._owner

    def _check_can_run_hooks(self) -> None:
        if not self._handles:
            raise RuntimeError("this model was unwrapped: it cannot run `before_block` any more")
        if not (self.training and torch.is_grad_enabled()):
            return
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            raise RuntimeError(
                f"activation checkpointing inside {type(self._inner).__name__} would leave out "
                "`before_block` when it computes again: turn it off there and use "
                "FlamingoModel.gradient_checkpointing_enable"
            )


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    return getattr(model, "get_input_embeddings", lambda: None)()
