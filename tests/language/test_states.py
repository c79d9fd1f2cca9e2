"""Language models whose caches hold recurrent or convolution states beside keys and values."""

from __future__ import annotations

import copy

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from flamingo_kernels import FlamingoModel
from flamingo_kernels.language import HuggingFaceLanguageModel
from testing.backbones import HYBRID_OPTIONS, IMAGE, clip, language_model, open_gates
from testing.budgets import assert_close_to_reference

transformers = pytest.importorskip("transformers")
FORGETFUL = "jamba"  # transformers starts its states anew for several tokens
BY_LIST = "minimax"  # its states are no part of the layers, and do not follow beams
STATELESS_CACHE = "recurrent_gemma"  # it keeps its states in itself
hybrids_go_on = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.16"),
    reason="this transformers forgets the states of hybrids, which are refused",
)
GOES_ON = [name for name in HYBRID_OPTIONS if name not in (FORGETFUL, STATELESS_CACHE)]


def wrap(model_type: str) -> HuggingFaceLanguageModel:
    return HuggingFaceLanguageModel(built(model_type))


def built(model_type: str) -> torch.nn.Module:
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    return language_model(model_type).float()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert_close_to_reference(actual, expected, torch.float32, terms=expected.abs().max().item())


@pytest.fixture(autouse=True)
def _no_graph():
    with torch.no_grad():
        yield


@hybrids_go_on
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("model_type", GOES_ON)
def test_pieces_and_copies_equal_one_shot(model_type: str, masked: bool) -> None:
    """Two rounds: what the first copy reads must change neither the cache nor the second."""
    wrapped, ids = wrap(model_type), tokens(2, 6)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0

    def masks(rows: Tensor, length: int) -> Tensor | None:
        return torch.nn.functional.pad(mask[rows], (0, length - 6), value=1) if masked else None

    cache = wrapped(ids, masks(torch.arange(2), 6), use_cache=True).cache
    for seed, rows in enumerate((torch.tensor([1, 0, 1]), torch.tensor([0]), torch.arange(2))):
        fork = cache if len(rows) == 2 else cache.index_select(rows)
        new = tokens(len(rows), 5, seed=seed + 1)
        got = [wrapped(new[:, :3], masks(rows, 9), cache=fork).logits]
        got += [wrapped(new[:, i : i + 1], masks(rows, i + 7), cache=fork).logits for i in (3, 4)]
        whole = wrapped(torch.cat((ids[rows], new), 1), masks(rows, 11)).logits
        assert_close(torch.cat(got, 1), whole[:, 6:])


def flamingo(model_type: str) -> FlamingoModel:
    lm = built(model_type)
    torch.manual_seed(4)
    return open_gates(FlamingoModel.from_backbones(clip(), lm)).eval()


def turn(seed: int) -> dict[str, Tensor]:
    ids = tokens(2, 5, seed=seed)
    ids[:, 1] = IMAGE
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": ids, "pixel_values": torch.randn(2, 1, 1, 3, 16, 16, generator=generator)}


@pytest.mark.parametrize("model_type", [*GOES_ON, FORGETFUL])
def test_beams_equal_those_without_a_cache(model_type: str) -> None:
    model = flamingo(model_type)
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 5, "stop_token_ids": []}
    if model_type == BY_LIST:
        with pytest.raises(RuntimeError, match=r"cannot follow beams: .* leaves out .'linear_cach"):
            model.generate(**turn(0), **options)
        return
    expected = model.generate(**turn(0), use_cache=False, **options)
    assert torch.equal(model.generate(**turn(0), **options), expected)


@hybrids_go_on
@pytest.mark.parametrize("model_type", GOES_ON)
def test_turns_equal_one_text(model_type: str) -> None:
    model, first, second = flamingo(model_type), turn(0), turn(1)
    options = {"max_new_tokens": 3, "stop_token_ids": []}
    said, cache = model.generate(**first, **options, return_cache=True)
    copied = cache.select_rows(torch.arange(2))
    text = torch.cat((said, second["input_ids"]), 1)
    pixels = torch.cat((first["pixel_values"], second["pixel_values"]), 1)
    expected = model.generate(text, pixels, use_cache=False, **options)[:, said.shape[1] :]
    for held in (copied, cache):
        assert torch.equal(model.generate(**second, cache=held, **options), expected)


@pytest.mark.parametrize("how", ["forward", "generate", "prefill_chunk_size"])
def test_a_model_that_forgets_its_states_is_refused(how: str) -> None:
    model = flamingo(FORGETFUL)
    cache = model(**turn(0), use_cache=True).cache
    before = copy.deepcopy(cache.language.past_key_values)
    with pytest.raises(RuntimeError, match=r"Jamba\w+ forgets its (conv|recurrent)_states when"):
        if how == "forward":
            model(**turn(1), cache=cache)
        elif how == "generate":
            model.generate(**turn(1), cache=cache)
        else:
            model.generate(**turn(1), prefill_chunk_size=2)
    assert cache.language.length == before.get_seq_length()
    model(tokens(2, 1), cache=cache)  # one token is right
    model.generate(**turn(1), max_new_tokens=2)


@hybrids_go_on
def test_padding_before_more_text_is_refused() -> None:
    model, options = flamingo("granitemoehybrid"), {"max_new_tokens": 4, "return_cache": True}
    said, _ = model.generate(**turn(0), stop_token_ids=[], **options)
    # The first row ends before the second.
    stop = next(token for token in said[0, 5:-1].tolist() if token not in said[1])
    _, cache = model.generate(**turn(0), stop_token_ids=[stop], **options)
    for go_on in (model.generate, model):
        with pytest.raises(RuntimeError, match=r"rows \[0\] of a cache go on after padding, but"):
            go_on(**turn(1), cache=cache)
    model.generate(
        input_ids=turn(1)["input_ids"][1:],
        pixel_values=turn(1)["pixel_values"][1:],
        cache=cache.select_rows(torch.tensor([1])),
    )


@hybrids_go_on
def test_answers_of_several_lengths_are_scored() -> None:
    """Padding at the end of an answer goes into states that nothing reads."""
    model, given = flamingo("granitemoehybrid"), turn(0)
    scores = model.score_answers(answers=[[5], [6, 7, 8]], **given)
    for column, answer in enumerate(([5], [6, 7, 8])):
        text = torch.cat((given["input_ids"], torch.tensor([answer]).expand(2, -1)), 1)
        said = model(text, given["pixel_values"]).logits.log_softmax(-1)[:, 4:-1]
        expected = said.gather(2, text[:, 5:, None]).sum((1, 2))
        assert_close(scores[:, column], expected)


def test_states_in_the_model_cannot_follow_beams() -> None:
    model = flamingo(STATELESS_CACHE)
    expected = model.generate(**turn(0), max_new_tokens=4, use_cache=False)
    assert torch.equal(model.generate(**turn(0), max_new_tokens=4), expected)
    with pytest.raises(RuntimeError, match="keeps its recurrent_states in itself and not in its c"):
        model.generate(**turn(0), num_beams=2)
    with pytest.raises(RuntimeError, match=r"returns no \w+: use it with use_cache=False"):
        model(**turn(0), use_cache=True)


def test_a_cache_that_counts_no_tokens_is_refused() -> None:
    """That of a MiniMax whose first layer keeps no keys."""
    if BY_LIST not in transformers.CONFIG_MAPPING:
        pytest.skip("this transformers has no MiniMax")
    lm = language_model(BY_LIST, layer_types=["linear_attention", "full_attention"]).float()
    model = FlamingoModel.from_backbones(clip(), lm).eval()
    for options in ({}, {"num_beams": 2}, {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]] * 2)}):
        with pytest.raises(
            RuntimeError, match="a MiniMaxCache, says that it holds 0 tokens after 5"
        ):
            model.generate(**turn(0), **options)
        model.generate(**turn(0), **options, use_cache=False, max_new_tokens=2)


def test_a_cache_that_cannot_select_rows_says_what_it_leaves_out() -> None:
    class Extra(transformers.DynamicCache):
        def reorder_cache(self, rows):
            super().reorder_cache(rows)

    wrapped = wrap("granitemoehybrid")
    cache = wrapped(tokens(2, 3), use_cache=True).cache
    cache.past_key_values.__class__ = Extra
    cache.past_key_values.more = [torch.ones(2, 4)]
    with pytest.raises(
        RuntimeError, match=r"of type Extra cannot select rows .reorder_cache leaves out .'more'"
    ):
        cache.index_select(torch.tensor([0]))
