from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
import sys
import threading

import pytest
import torch
from torch import nn

from flamingo_kernels.language import (
    HuggingFaceCache,
    HuggingFaceLanguageConfig,
    HuggingFaceLanguageModel,
    LanguageModel,
    LanguageModelCache,
    build_language_model,
)
from flamingo_kernels.language.huggingface.hooks import Call
from testing.backbones import (
    DEPTH,
    DIM,
    LANGUAGE_OPTIONS,
    SPECIAL,
    VOCAB,
    language_model,
    sharpen,
)
from testing.budgets import assert_close_to_reference

transformers = pytest.importorskip("transformers")

MODEL_TYPES = list(LANGUAGE_OPTIONS)


def config(model_type: str = "llama", **changes) -> HuggingFaceLanguageConfig:
    values = {
        "model_type": model_type,
        "options": {**SPECIAL, **LANGUAGE_OPTIONS[model_type]},
        "dim": DIM,
        "depth": DEPTH,
        "vocab_size": VOCAB,
    }
    return HuggingFaceLanguageConfig(**{**values, **changes})


def build(model_type: str = "llama") -> HuggingFaceLanguageModel:
    """In fp32: transformers' MPT takes its softmax there of fp64's minimum, -inf, in fp64."""
    torch.manual_seed(0)
    return sharpen(build_language_model(config(model_type)).eval())


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    # Id 1 is OPT's padding index, whose embedding is zero.
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _no_graph():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_meta(model_type):
    with torch.device("meta"):
        wrapped = build_language_model(config(model_type))
    assert {p.device.type for p in wrapped.parameters()} == {"meta"}
    assert isinstance(wrapped, LanguageModel)
    assert (wrapped.dim, wrapped.num_blocks, wrapped.vocab_size) == (DIM, DEPTH, VOCAB)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_hooks_that_do_nothing_change_no_bit(model_type):
    wrapped = build(model_type)
    ids = tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    seen = []

    def identity(i, hidden):
        seen.append((i, tuple(hidden.shape)))
        return hidden

    for attention_mask in (None, mask):
        plain = wrapped(ids, attention_mask).logits
        assert torch.equal(plain, wrapped(ids, attention_mask, before_block=identity).logits)
        added = wrapped(ids, attention_mask, before_block=lambda i, x: x + 0.0).logits
        assert torch.equal(plain, added)
    assert seen == [(i, (2, 6, DIM)) for i in range(DEPTH)] * 2
    assert torch.equal(wrapped(ids).logits, wrapped.unwrap()(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_before_block_takes_part(model_type):
    wrapped = build(model_type)
    ids = tokens(1, 4)
    noise = torch.randn(1, 4, DIM)
    plain = wrapped(ids).logits
    for block in range(DEPTH):
        changed = wrapped(ids, before_block=lambda i, x, b=block: x + noise * (i == b)).logits
        assert not torch.equal(changed, plain)
    assert torch.equal(wrapped(ids).logits, plain)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_left_padded_row_equals_the_row_alone(model_type):
    wrapped = build(model_type)
    rows = [tokens(7), tokens(3, seed=1)]
    ids = torch.stack([rows[0], torch.cat((tokens(4, seed=2), rows[1]))])
    mask = torch.tensor([[1] * 7, [0] * 4 + [1] * 3])
    logits = wrapped(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for i, row in enumerate(rows):
        alone = wrapped(row[None]).logits[0]
        assert_close_to_reference(logits[i, 7 - len(row) :], alone, torch.float32, f"row {i}")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_chunks_with_a_cache_equal_one_shot(model_type, padded):
    wrapped = build(model_type)
    ids = tokens(2, 9)
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9]) if padded else None
    scale = torch.linspace(0.5, 1.5, DIM)

    def before_block(i, hidden):
        return hidden * scale + i

    expected = wrapped(ids, mask, before_block=before_block).logits
    cache, chunks = None, []
    for start, end in ((0, 5), (5, 7), (7, 8), (8, 9)):
        output = wrapped(
            ids[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            cache=cache,
            before_block=before_block,
            use_cache=True,
        )
        cache = output.cache
        chunks.append(output.logits)
    assert isinstance(cache, HuggingFaceCache)
    assert isinstance(cache, LanguageModelCache)
    assert cache.length == 9
    real = slice(None) if mask is None else mask.bool()
    assert_close_to_reference(torch.cat(chunks, 1)[real], expected[real], torch.float32, "logits")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_index_select_forks_the_cache(model_type):
    wrapped = build(model_type)
    ids, rows = tokens(3, 5), torch.tensor([2, 0, 0, 1])
    cache = wrapped(ids, use_cache=True).cache
    fork = cache.index_select(rows)
    for held, prefix in ((fork, ids[rows]), (cache, ids)):
        new = tokens(len(prefix), 2, seed=len(prefix))
        logits = wrapped(new, cache=held).logits
        expected = wrapped(torch.cat((prefix, new), 1)).logits[:, -2:]
        assert_close_to_reference(logits, expected, torch.float32, "logits")
        assert held.length == 7


def test_state_is_that_of_the_model():
    wrapped = build()
    assert set(wrapped.state_dict()) == {f"model.{name}" for name in wrapped.model.state_dict()}
    assert wrapped.blocks is wrapped.model.model.layers


def test_gradients_flow_through_frozen_blocks():
    wrapped = build().requires_grad_(False)
    with torch.enable_grad():
        delta = torch.zeros(1, 4, DIM, requires_grad=True)
        wrapped(tokens(1, 4), before_block=lambda i, x: x + delta).logits.square().sum().backward()
    assert delta.grad.abs().max() > 0


def test_unwrap_removes_every_hook():
    wrapped = build()
    model = wrapped.unwrap()
    assert all(not block._forward_pre_hooks for block in model.model.layers)
    with pytest.raises(RuntimeError, match="this model was unwrapped"):
        wrapped(tokens(1, 3), before_block=lambda i, x: x)
    assert wrapped(tokens(1, 3)).logits.isfinite().all()


def test_the_model_called_by_itself_is_not_touched():
    wrapped = build()
    ids = tokens(1, 4)
    plain = wrapped.model(input_ids=ids).logits

    def fail(i, hidden):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        wrapped(ids, before_block=fail)
    assert torch.equal(wrapped.model(input_ids=ids).logits, plain)


def test_a_model_inside_another_call_is_not_touched():
    outer, inner = build(), build("gpt2")
    ids = tokens(1, 4)
    plain = inner.model(input_ids=ids).logits
    results = []

    def before_block(i, hidden):
        results.append(inner.model(input_ids=ids).logits)
        results.append(inner(ids, before_block=lambda i, x: x).logits)
        return hidden

    outer(ids, before_block=before_block)
    assert len(results) == 2 * DEPTH
    assert all(torch.equal(logits, plain) for logits in results)


def test_threads_do_not_see_each_other():
    wrapped = build()
    ids = tokens(1, 4)
    shifts = [0.0, 1.0, 2.0, 3.0]
    expected = [wrapped(ids, before_block=lambda i, x, s=s: x + s).logits for s in shifts]
    barrier = threading.Barrier(len(shifts), timeout=30)
    results: dict[int, torch.Tensor] = {}

    def work(k: int) -> None:
        def before_block(i, hidden):
            barrier.wait()
            return hidden + shifts[k]

        with torch.no_grad():
            results[k] = wrapped(ids, before_block=before_block).logits

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(shifts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[k], expected[k]) for k in range(len(shifts)))


def test_a_copy_carries_its_own_hooks():
    wrapped = build()
    twin = copy.deepcopy(wrapped)
    ids = tokens(1, 4)
    expected = wrapped(ids, before_block=lambda i, x: x + 1).logits
    wrapped.unwrap()
    assert torch.equal(twin(ids, before_block=lambda i, x: x + 1).logits, expected)
    assert all(not block._forward_pre_hooks for block in twin.unwrap().model.layers)


class FakeConfig:
    num_hidden_layers = 2
    hidden_size = 4
    vocab_size = 5


class FakeBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, *args, **kwargs):
        return args[0] if args else next(iter(kwargs.values()))


class FakeModel(nn.Module):
    """Calls its blocks in `order`, handing their input over as `keyword` or by position."""

    def __init__(self, order=(0, 1), keyword=None, lists=("layers",), count=2) -> None:
        super().__init__()
        self.config = FakeConfig()
        self.order, self.keyword = order, keyword
        self.head = nn.Identity()
        for name in lists:
            self.add_module(name, nn.ModuleList(FakeBlock() for _ in range(count)))

    def get_output_embeddings(self):
        return self.head

    def can_generate(self):
        return True

    def forward(self, input_ids, use_cache, past_key_values=None):
        hidden = torch.zeros(*input_ids.shape, 4)
        for i in self.order:
            block = self.layers[i]
            hidden = block(hidden) if self.keyword is None else block(**{self.keyword: hidden})
        return type("Output", (), {"logits": hidden})()


class Cached(FakeModel):
    """Takes and returns its cache under one of the names that transformers has had."""

    def __init__(self, name) -> None:
        super().__init__()
        self.name = name

    def run(self, input_ids, use_cache, cache):
        output = super().forward(input_ids, use_cache)
        if use_cache:
            states = torch.zeros(*input_ids.shape[:1], 1, input_ids.shape[1], 4)
            cache = transformers.DynamicCache() if cache is None else cache
            cache.update(states, states, 0)
            setattr(output, self.name, cache)
        return output


class CachedByOlderName(Cached):
    def forward(self, input_ids, use_cache, past_key_values=None):
        return self.run(input_ids, use_cache, past_key_values)


class CachedByNewerName(Cached):
    def forward(self, input_ids, use_cache, cache=None):
        return self.run(input_ids, use_cache, cache)


@pytest.mark.parametrize(
    ("kind", "name"), [(CachedByOlderName, "past_key_values"), (CachedByNewerName, "cache")]
)
def test_both_names_of_the_cache(kind, name):
    wrapped = HuggingFaceLanguageModel(kind(name))
    assert wrapped.cache_name == name
    cache = wrapped(tokens(1, 3), use_cache=True).cache
    assert cache.length == 3
    assert wrapped(tokens(1, 2), cache=cache).cache.length == 5
    starts = []
    call = Call(wrapped._owner, None, lambda *range_: starts.append(range_))
    with call.running():
        wrapped.model(input_ids=tokens(1, 1), use_cache=True, **{name: cache.past_key_values})
    assert starts == [(5, 6, 1)]


@pytest.mark.parametrize("keyword", [None, "hidden_states"])
def test_hidden_states_by_position_or_keyword(keyword):
    wrapped = HuggingFaceLanguageModel(FakeModel(keyword=keyword))
    assert wrapped.blocks_name == "layers"  # and not the experts of a block
    logits = wrapped(tokens(1, 2), before_block=lambda i, x: x + 10**i).logits
    assert torch.equal(logits, torch.full((1, 2, 4), 11.0))


def test_blocks_that_cannot_be_hooked():
    ids = tokens(1, 2)
    wrapped = HuggingFaceLanguageModel(FakeModel(keyword="x"))
    with pytest.raises(RuntimeError, match=r"FakeBlock takes its input neither .* but as \['x'\]"):
        wrapped(ids, before_block=lambda i, x: x)
    wrapped = HuggingFaceLanguageModel(FakeModel(order=(1, 0)))
    with pytest.raises(RuntimeError, match="block 1 ran where block 0 was due"):
        wrapped(ids, before_block=lambda i, x: x)
    wrapped = HuggingFaceLanguageModel(FakeModel(order=(0,)))
    with pytest.raises(RuntimeError, match="FakeModel ran 1 of its 2 blocks"):
        wrapped(ids, before_block=lambda i, x: x)


@pytest.mark.parametrize("shape", [(1, 2, 3, 4), (4, 1, 2, 4), (1, 5, 4), (2, 4)])
def test_hidden_states_of_another_shape_are_refused(shape):
    """Several streams before or behind the tokens, tokens of the model's own, or flat rows."""

    class Other(FakeModel):
        def forward(self, input_ids, use_cache, past_key_values=None):
            for block in self.layers:
                hidden = block(torch.zeros(shape))
            return type("Output", (), {"logits": hidden})()

    wrapped = HuggingFaceLanguageModel(Other())
    message = rf"FakeBlock takes hidden states of shape {re.escape(str(shape))}, but \[B, T, dim\]"
    with pytest.raises(RuntimeError, match=message):
        wrapped(tokens(1, 2), before_block=lambda i, x: x)


def test_blocks_that_cannot_be_found():
    with pytest.raises(ValueError, match=r"several module lists .*=2 .* ambiguous: layers, other"):
        HuggingFaceLanguageModel(FakeModel(lists=("layers", "other")))
    without = FakeModel(count=3)
    for block in without.layers:
        del block.experts
    with pytest.raises(ValueError, match=r"no module list has num_hidden_layers=2 .*layers \(3\)"):
        HuggingFaceLanguageModel(without)
    model = FakeModel()
    model.config = object()
    with pytest.raises(ValueError, match="cannot wrap FakeModel: its config has no num_hidden"):
        HuggingFaceLanguageModel(model)
    with pytest.raises(ValueError, match="cannot wrap Linear: it has no config"):
        HuggingFaceLanguageModel(nn.Linear(1, 1))


def _bidirectional():
    model = language_model("llama")
    for block in model.model.layers:
        block.self_attn.is_causal = False
    return model


def _gemma3n():
    options = {**SPECIAL, **LANGUAGE_OPTIONS["gemma3_text"], "num_hidden_layers": 2}
    return transformers.AutoConfig.for_model(
        "gemma3n_text",
        **options,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 2,
    )


def no_causal_language_models():
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        BertConfig,
        BertForMaskedLM,
        BertLMHeadModel,
        LlamaModel,
        RobertaConfig,
        RobertaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    small = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB}
    attention = {"num_attention_heads": 2, "intermediate_size": 32}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 3}

    def recurrent(model_type, **options):
        options = AutoConfig.for_model(model_type, **small, **options)
        return lambda: AutoModelForCausalLM.from_config(options)

    # Newer versions of transformers give recurrent models a cache argument.
    past = (
        "(its forward takes no past_key_values or cache, .* it takes input_ids, |its cache holds)"
    )
    return {
        "mamba": (recurrent("mamba", state_size=4), past),
        "falcon_mamba": (recurrent("falcon_mamba", state_size=4), past),
        "rwkv": (recurrent("rwkv", attention_hidden_size=32, intermediate_size=32), past),
        "LlamaModel": (
            lambda: LlamaModel(build().model.config),
            r"LlamaModel: it has no language-model head \(get_output_embeddings\)",
        ),
        "bert": (
            lambda: BertForMaskedLM(BertConfig(**small, **attention)),
            r"BertForMaskedLM: transformers cannot generate with it \(can_generate\)",
        ),
        "roberta": (
            lambda: RobertaForCausalLM(RobertaConfig(**small, **attention, is_decoder=True)),
            "RobertaForCausalLM: its positions are counted from the padding token's id on",
        ),
        "bert as an encoder": (
            lambda: BertLMHeadModel(BertConfig(**small, **attention)),
            "BertLMHeadModel: its attention is bidirectional, so text would see images that come",
        ),
        "causal only in name": (_bidirectional, "LlamaForCausalLM: its attention is bidirectional"),
        "bidirectional Gemma": (
            lambda: language_model("gemma3_text", use_bidirectional_attention=True),
            "Gemma3ForCausalLM: its attention is bidirectional",
        ),
        "several streams": (
            lambda: AutoModelForCausalLM.from_config(_gemma3n()),
            r"Gemma3nForCausalLM: its blocks pass on several residual streams \(altup_num_inputs\)",
        ),
        "t5": (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, num_heads=2, **t5)),
            "T5ForConditionalGeneration: it is an encoder with a decoder",
        ),
    }


@pytest.mark.parametrize("name", list(no_causal_language_models()))
def test_what_is_no_causal_language_model_is_refused_and_left_alone(name):
    build_it, reason = no_causal_language_models()[name]
    model = build_it()
    with pytest.raises(ValueError, match=f"cannot wrap .*{reason}"):
        HuggingFaceLanguageModel(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


class Forgetful(transformers.DynamicCache):
    """Of a hybrid whose first layer has no keys: it does not count."""

    def get_seq_length(self, layer_idx=0):
        return 0


class Uncounted(transformers.DynamicCache):
    def get_seq_length(self, layer_idx=0):
        raise NotImplementedError("no attention layer")


def test_caches_that_do_not_count_are_refused():
    wrapped, ids = build(), tokens(1, 4)
    run = wrapped.model.forward

    def with_cache(kind):
        def forward(*args, **kwargs):
            output = run(*args, **kwargs)
            if kwargs["use_cache"]:
                setattr(output, wrapped.cache_name, kind())
            return output

        return forward

    wrapped.model.forward = with_cache(Forgetful)
    message = "cache of LlamaForCausalLM, a Forgetful, says that it holds 0 tokens after 4"
    with pytest.raises(RuntimeError, match=message):
        wrapped(ids, use_cache=True)
    assert wrapped(ids).logits.isfinite().all()
    wrapped.model.forward = with_cache(Uncounted)
    with pytest.raises(RuntimeError, match=r"Uncounted does not say .* no attention layer\): use"):
        wrapped(ids, use_cache=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Forgetful, "a Forgetful, says that it holds 0 tokens, but 1 new ones make 5: decode"),
        (Uncounted, "a cache of type Uncounted does not say how many tokens it holds"),
    ],
)
def test_caches_that_do_not_count_are_refused_in_a_generation(kind, message):
    wrapped, ids = build(), tokens(1, 4)
    (seen,) = wrapped.model._forward_pre_hooks.values()
    call = Call(wrapped._owner, None, lambda start, end, rows: lambda i, x: x)
    with call.running():
        seen(wrapped.model, (), {"input_ids": ids, "attention_mask": torch.ones(1, 4)})
        with pytest.raises(RuntimeError, match=message):
            seen(
                wrapped.model,
                (),
                {
                    "input_ids": ids[:, :1],
                    "attention_mask": torch.ones(1, 5),
                    wrapped.cache_name: kind(),
                },
            )
        with pytest.raises(RuntimeError, match=r"without input_ids, on \['inputs_embeds'\]"):
            seen(wrapped.model, (), {"inputs_embeds": torch.zeros(1, 4, DIM)})


@pytest.mark.parametrize("last", [0, 3, None, "missing"])
def test_a_generation_whose_cache_miscounts_is_refused(last):
    """Also without a mask, which transformers leaves out where it is all ones."""
    wrapped, ids = build(), tokens(2, 4)

    class Miscounting(transformers.DynamicCache):
        if last == "missing":
            get_seq_length = property()
        else:

            def get_seq_length(self, layer_idx=0):
                return last

    run = wrapped.model.forward

    def forward(*args, **kwargs):
        output = run(*args, **kwargs)
        setattr(output, wrapped.cache_name, Miscounting())
        return output

    wrapped.model.forward = functools.wraps(run)(forward)
    hook = lambda start, end, rows: lambda i, x: x  # noqa: E731
    with pytest.raises(RuntimeError, match=r"a Miscounting, says|Miscounting does not say"):
        wrapped.generate(ids, hook, max_new_tokens=2)
    wrapped.model.forward = run
    assert wrapped.generate(ids, hook, max_new_tokens=2).shape == (2, 6)


def test_activation_checkpointing_is_refused():
    wrapped = build().train()
    wrapped.model.model.layers[1].gradient_checkpointing = True
    with torch.enable_grad():
        with pytest.raises(RuntimeError, match="checkpointing inside LlamaForCausalLM would leave"):
            wrapped(tokens(1, 3), before_block=lambda i, x: x)
    wrapped.eval()
    assert wrapped(tokens(1, 3), before_block=lambda i, x: x).logits.isfinite().all()


def test_argument_errors():
    wrapped = build()
    with pytest.raises(ValueError, match=r"= \(2, 3\), got shape \(2, 2\)"):
        wrapped(tokens(2, 3), attention_mask=torch.ones(2, 2))
    cache = wrapped(tokens(2, 3), torch.ones(2, 3, dtype=torch.int64), use_cache=True).cache
    with pytest.raises(ValueError, match="3 tokens read under an attention_mask"):
        wrapped(tokens(2, 1), cache=cache)


@pytest.mark.parametrize("name", ["dim", "depth", "vocab_size"])
def test_declared_sizes_must_be_the_models(name):
    with pytest.raises(ValueError, match=f"config declares {name}=7, but 'llama' with .* has"):
        build_language_model(config(**{name: 7}))


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "flamingo_kernels\[hf\]"'):
        build_language_model(config())


def test_config_round_trips_through_json():
    values = json.loads(json.dumps(dataclasses.asdict(config())))
    assert values.pop("kind") == "huggingface"
    assert HuggingFaceLanguageConfig(**values) == config()


def test_config_errors():
    with pytest.raises(ValueError, match="model_type must name an architecture, got ''"):
        HuggingFaceLanguageConfig(model_type="", dim=1, depth=1, vocab_size=1)
    with pytest.raises(ValueError, match="depth must be positive, got 0"):
        config(depth=0)
