"""Hugging Face causal language models, run with something before their decoder blocks.

Forward pre-hooks on the blocks look up what to run in a context variable that holds the call in
progress. Nothing about a call is stored on a module, so calls from several threads, or of several
models in one another, do not see each other.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from flamingo_kernels.huggingface import plain_options
from flamingo_kernels.language.checkpointing import checkpoint_blocks
from flamingo_kernels.language.config import HuggingFaceLanguageConfig
from flamingo_kernels.language.protocol import (
    BeforeBlock,
    Head,
    LanguageModelOutput,
    check_inputs,
    positions,
)


class HuggingFaceCache:
    """A transformers `Cache` as a `LanguageModelCache`.

    Attributes
    ----------
    past_key_values : the wrapped `Cache`, for transformers' own functions.
    masked : an attention mask came with the tokens it holds.
    """

    def __init__(self, past_key_values: Any, masked: bool) -> None:
        self.past_key_values = past_key_values
        self.masked = masked

    @property
    def length(self) -> int:
        """Tokens held per row, padding included."""
        return _held(self.past_key_values)

    def index_select(self, rows: Tensor) -> HuggingFaceCache:
        """A cache of its own whose row i is row `rows[i]` of this one, which stays as it is."""
        selected = copy.copy(self.past_key_values)
        # Reordering puts new tensors into the layer objects, so those are copied first.
        selected.layers = [copy.copy(layer) for layer in selected.layers]
        selected.reorder_cache(rows)
        return HuggingFaceCache(selected, self.masked)


# (first new token, one past the last, rows of the batch) -> what runs before the blocks for them.
BeforeBlocksOf = Callable[[int, int, int], BeforeBlock]


class _Call:
    """One forward in progress, or one generation: a run of forwards."""

    def __init__(
        self,
        owner: object,
        before_block: BeforeBlock | None,
        before_blocks_of: BeforeBlocksOf | None = None,
        without_logits: bool = False,
    ) -> None:
        self.owner = owner
        self.before_block = before_block
        self.before_blocks_of = before_blocks_of
        self.blocks_run = 0
        # The input of the output product, and its result for none of the tokens.
        self.without_logits = without_logits
        self.hidden: Tensor | None = None
        self.empty_logits: Tensor | None = None
        self.version = 0

    def nothing_follows_the_product(self, logits: Tensor) -> bool:
        """Whether these, the model's, are what the product gave, untouched."""
        return logits is self.empty_logits and logits._version == self.version


_running: ContextVar[_Call | None] = ContextVar("flamingo_kernels_running_call", default=None)


class _BeforeBlockHook:
    """Pre-hook of block `index`; a class, so that copies of the model carry working hooks."""

    def __init__(self, owner: object, index: int) -> None:
        self.owner = owner
        self.index = index

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = _running.get()
        if call is None or call.owner is not self.owner or call.before_block is None:
            return None
        if self.index != call.blocks_run:
            raise RuntimeError(
                f"block {self.index} ran where block {call.blocks_run} was due: the blocks of "
                "this model do not run once each in order"
            )
        call.blocks_run += 1
        if args:
            return (call.before_block(self.index, args[0]), *args[1:]), kwargs
        if "hidden_states" not in kwargs:
            raise RuntimeError(
                f"{type(block).__name__} takes its input neither as the first argument nor as "
                f"`hidden_states`, but as {sorted(kwargs)}"
            )
        hidden = call.before_block(self.index, kwargs["hidden_states"])
        return args, {**kwargs, "hidden_states": hidden}


class _BeforeModelHook:
    """Pre-hook of the whole model: in a generation, says which tokens the blocks are to see."""

    def __init__(self, owner: object) -> None:
        self.owner = owner

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = _running.get()
        if call is None or call.owner is not self.owner or call.before_blocks_of is None:
            return
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise RuntimeError(
                f"generate ran {type(model).__name__} without input_ids, on {sorted(kwargs)}: "
                "which tokens the blocks are to see cannot be told; leave out the option that asks "
                "for it"
            )
        cache = kwargs.get("past_key_values")
        start = 0 if cache is None else _held(cache)
        rows, tokens = ids.shape
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] != start + tokens:
            raise RuntimeError(
                f"the cache of {type(model).__name__}, a {type(cache).__name__}, says that it "
                f"holds {start} tokens, but {tokens} new ones make {mask.shape[1]}: decode with "
                "use_cache=False"
            )
        call.before_block = call.before_blocks_of(start, start + tokens, rows)
        call.blocks_run = 0


class _HeadHooks:
    """Before and after the output product: keep its input, and let it see no tokens.

    If the model returns the very tensor that the product gave, not written to since, nothing but
    the product gives its logits: no scaling, no capping.
    """

    def __init__(self, owner: object) -> None:
        self.owner = owner

    def before(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        call = self._call()
        if call is None:
            return None
        (call.hidden,) = args
        return (call.hidden[:, :0],)

    def after(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        call = self._call()
        if call is not None:
            call.empty_logits, call.version = output, output._version

    def _call(self) -> _Call | None:
        call = _running.get()
        return call if call and call.owner is self.owner and call.without_logits else None


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks of a Hugging Face causal language model, and their name in it.

    They are the one `ModuleList` as long as the configuration's `num_hidden_layers` that is not
    inside another such list.

    Raises
    ------
    ValueError
        If the configuration has no `num_hidden_layers`, or no list or several lists fit.
    """
    model_name = type(model).__name__
    count = getattr(_text_config(model), "num_hidden_layers", None)
    if count is None:
        raise ValueError(f"cannot wrap {model_name}: its config has no num_hidden_layers")
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    fitting = [name for name, blocks in lists.items() if len(blocks) == count]
    outermost = [
        name for name in fitting if not any(name.startswith(f"{other}.") for other in fitting)
    ]
    if len(outermost) == 1:
        return outermost[0], lists[outermost[0]]
    if outermost:
        raise ValueError(
            f"cannot wrap {model_name}: several module lists have num_hidden_layers={count} "
            f"entries, so its decoder blocks are ambiguous: {', '.join(outermost)}"
        )
    found = ", ".join(f"{name} ({len(blocks)})" for name, blocks in lists.items()) or "none"
    raise ValueError(
        f"cannot wrap {model_name}: no module list has num_hidden_layers={count} entries; "
        f"module lists found: {found}"
    )


def check_causal(model: nn.Module) -> None:
    """Raise ValueError unless logits can be decoded from `model` token by token."""
    why = None
    parameters = inspect.signature(model.forward).parameters
    if getattr(_text_config(model), "is_encoder_decoder", False):
        why = "it is an encoder with a decoder; a causal language model is needed"
    elif getattr(model, "get_output_embeddings", lambda: None)() is None:
        why = "it has no language-model head (get_output_embeddings): take its ...ForCausalLM"
    elif not getattr(model, "can_generate", lambda: False)():
        why = "transformers cannot generate with it (can_generate), so it is not a causal model"
    elif "past_key_values" not in parameters:
        why = (
            "its forward takes no past_key_values, so that decoding step by step cannot tell which "
            f"tokens are new; it takes {', '.join(parameters)}"
        )
    elif any(hasattr(m, "create_position_ids_from_input_ids") for m in model.modules()):
        why = "its positions are counted from the padding token's id on, as RoBERTa's"
    if why is not None:
        raise ValueError(f"cannot wrap {type(model).__name__}: {why}")


class HuggingFaceLanguageModel(nn.Module):
    """A transformers causal language model as a `LanguageModel`, see its `__call__`.

    Parameters
    ----------
    model : the language model; it becomes the submodule `model` and is not otherwise changed
        than by hooks, which `unwrap` removes.

    Attributes
    ----------
    blocks_name : where in `model` its blocks are.

    Raises
    ------
    ValueError
        If the decoder blocks cannot be told (`find_blocks`), or it is no causal language model
        with a head and `past_key_values` (`check_causal`); it is then as it was.
    RuntimeError
        From `forward` with `before_block`: if blocks do not run once each in order, the model was
        unwrapped, or it uses activation checkpointing while training (its recomputation in the
        backward runs outside the call, where `before_block` is not known).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.blocks_name, blocks = find_blocks(model)
        check_causal(model)
        self.model = model
        self.num_blocks = len(blocks)
        # OPT and its like derive positions from the mask; MPT and its like have none.
        self._takes_position_ids = "position_ids" in inspect.signature(model.forward).parameters
        self._owner = object()
        self._handles = [
            block.register_forward_pre_hook(_BeforeBlockHook(self._owner, i), with_kwargs=True)
            for i, block in enumerate(blocks)
        ]
        self._handles.append(
            model.register_forward_pre_hook(_BeforeModelHook(self._owner), with_kwargs=True)
        )
        head, hooks = model.get_output_embeddings(), _HeadHooks(self._owner)
        # False once it is known that something else follows the output product.
        self._head_is_last = type(head) is nn.Linear
        if self._head_is_last:
            self._handles.append(head.register_forward_pre_hook(hooks.before))
            self._handles.append(head.register_forward_hook(hooks.after))

    @classmethod
    def from_config(cls, config: HuggingFaceLanguageConfig) -> HuggingFaceLanguageModel:
        """Build the model that `config` describes, with random weights (or on the meta device).

        Raises
        ------
        ImportError
            If transformers is not installed.
        ValueError
            If the model's sizes are not the ones `config` declares.
        """
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError as error:
            raise ImportError(
                f"building a {config.model_type!r} language model needs transformers: "
                'pip install "flamingo_kernels[hf]"'
            ) from error
        options = AutoConfig.for_model(config.model_type, **config.options)
        language_model = cls(AutoModelForCausalLM.from_config(options))
        built = {
            "dim": language_model.dim,
            "depth": language_model.num_blocks,
            "vocab_size": language_model.vocab_size,
        }
        for name, value in built.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"config declares {name}={getattr(config, name)}, but {config.model_type!r} "
                    f"with its options has {value}"
                )
        return language_model

    @property
    def config(self) -> HuggingFaceLanguageConfig:
        """What `from_config` needs to build a model like this one."""
        config = self.model.config
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
        return _text_config(self.model).hidden_size

    @property
    def vocab_size(self) -> int:
        """Rows of the logits; follows `model.resize_token_embeddings`."""
        return _text_config(self.model).vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text; Gemma 3 and Llama 3 have several."""
        sources = (_text_config(self.model), getattr(self.model, "generation_config", None))
        found: list[int] = []
        for source in sources:
            ids = getattr(source, "eos_token_id", None)
            found += ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids]
        return tuple(dict.fromkeys(found))

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, inside `model`."""
        return self.model.get_submodule(self.blocks_name)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: HuggingFaceCache | None = None,
        before_block: BeforeBlock | None = None,
        use_cache: bool = False,
        head: Head | None = None,
    ) -> LanguageModelOutput:
        check_inputs(input_ids, attention_mask, cache)
        held = 0 if cache is None else cache.length
        options: dict[str, Any] = {"use_cache": use_cache or cache is not None}
        if cache is not None:
            options["past_key_values"] = cache.past_key_values
        if attention_mask is not None:
            options["attention_mask"] = attention_mask
            if self._takes_position_ids:
                options["position_ids"] = positions(attention_mask, input_ids.shape[1])

        tracked = not torch.is_inference_mode_enabled()  # whether tensors are written to
        if head is not None and self._head_is_last and tracked and not options["use_cache"]:
            call = _Call(self._owner, before_block, without_logits=True)
            output = self._run(call, input_ids, options)
            if call.nothing_follows_the_product(output.logits):
                linear = self.model.get_output_embeddings()
                result = head(call.hidden, linear.weight, linear.bias)
                return LanguageModelOutput(None, None, result)
            self._head_is_last = False
        output = self._run(_Call(self._owner, before_block), input_ids, options)

        if not options["use_cache"]:
            return LanguageModelOutput(output.logits, None)
        masked = attention_mask is not None or (cache is not None and cache.masked)
        if getattr(output, "past_key_values", None) is None:
            raise RuntimeError(
                f"{type(self.model).__name__} returns no past_key_values: use it with "
                "use_cache=False only"
            )
        grown = HuggingFaceCache(output.past_key_values, masked)
        if grown.length != held + input_ids.shape[1]:
            raise RuntimeError(
                f"the cache of {type(self.model).__name__}, a "
                f"{type(output.past_key_values).__name__}, says that it holds {grown.length} "
                f"tokens after {held + input_ids.shape[1]}: use it with use_cache=False only"
            )
        return LanguageModelOutput(output.logits, grown)

    def _run(self, call: _Call, input_ids: Tensor, options: dict[str, Any]) -> Any:
        if call.before_block is not None:
            self._check_can_run_before_blocks()
        token = _running.set(call)
        try:
            output = self.model(input_ids=input_ids, **options)
        finally:
            _running.reset(token)
        if call.before_block is not None and call.blocks_run != self.num_blocks:
            raise RuntimeError(
                f"{type(self.model).__name__} ran {call.blocks_run} of its {self.num_blocks} "
                "blocks, so `before_block` was not called for all"
            )
        return output

    def generate(self, input_ids: Tensor, before_blocks_of: BeforeBlocksOf, **options: Any) -> Any:
        """transformers' own `generate`, with something run before each block.

        Parameters
        ----------
        input_ids : integer [B, T], all tokens, those that a cache in `options` holds included.
        before_blocks_of : ``before_blocks_of(start, end, rows) -> before_block`` for the forward
            that reads tokens start..end-1 of `rows` sequences; `rows` is a multiple of B where
            beams or several sequences are kept, those of one row side by side.
        options : of transformers' `generate`.

        Raises
        ------
        RuntimeError, TypeError, ValueError
            As `forward`, and what `generate` raises.
        """
        self._check_can_run_before_blocks()
        token = _running.set(_Call(self._owner, None, before_blocks_of))
        try:
            return self.model.generate(input_ids=input_ids, **options)
        finally:
            _running.reset(token)

    def unwrap(self) -> nn.Module:
        """Remove the hooks and return the model as it was given."""
        checkpoint_blocks(self.blocks, None)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self.model

    def _check_can_run_before_blocks(self) -> None:
        if not self._handles:
            raise RuntimeError("this model was unwrapped: it cannot run `before_block` any more")
        if not (self.training and torch.is_grad_enabled()):
            return
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            raise RuntimeError(
                f"activation checkpointing inside {type(self.model).__name__} would leave out "
                "`before_block` when it computes again: turn it off there and use "
                "FlamingoModel.gradient_checkpointing_enable"
            )


def _held(cache: Any) -> int:
    """Tokens per row in a transformers cache."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"a cache of type {type(cache).__name__} does not say how many tokens it holds "
            f"(get_seq_length: {error}): use this language model with use_cache=False only"
        ) from error


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"cannot wrap {type(model).__name__}: it has no config")
    return config.get_text_config() if hasattr(config, "get_text_config") else config
