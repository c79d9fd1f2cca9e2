"""Few-shot prompts: the text of the papers, and what is refused."""

from __future__ import annotations

import doctest

import pytest

from flamingo_kernels.data import prompts
from flamingo_kernels.data.prompts import CAPTION, OPEN_FLAMINGO_VQA, VQA, build_prompt


def test_the_papers_prompts() -> None:
    """Figure 8 of the first version, and the zero-shot form of appendix A.2."""
    tokens = {"end_of_chunk_token": "<EOC>", "bos_token": "<BOS>"}
    shots = [{"answer": "A cat."}, {"answer": "Three dogs."}]
    few = build_prompt(CAPTION, shots, {}, **tokens)
    assert few == "<BOS><image>Output: A cat.<EOC><image>Output: Three dogs.<EOC><image>Output:"
    zero = build_prompt(CAPTION, shots, {}, examples_have_images=False, **tokens)
    assert zero == "<BOS>Output: A cat.<EOC>Output: Three dogs.<EOC><image>Output:"
    ours = build_prompt(OPEN_FLAMINGO_VQA, [{"question": "a?", "answer": "b"}], {"question": "c?"})
    assert ours == (
        "<image>Question:a? Short answer:b<|endofchunk|><image>Question:c? Short answer:"
    )
    memes = build_prompt(prompts.HATEFUL_MEMES, [], {"text": 'so "funny" {0}'})
    assert memes == (
        '<image>is an image with written: "so "funny" {0}" on it. Is it hateful? Answer:'
    )
    assert doctest.testmod(prompts).failed == 0


def test_prompt_errors() -> None:
    with pytest.raises(ValueError, match="an example lacks answer; it has question"):
        build_prompt(VQA, [{"question": "?"}], {"question": "?"})
    with pytest.raises(ValueError, match="the query lacks question; it has nothing"):
        build_prompt(VQA, [], {})
    with pytest.raises(ValueError, match="question of the query holds '<image>', which would"):
        build_prompt(VQA, [], {"question": "<image>?"})
    with pytest.raises(ValueError, match=r"answer of example 0 holds '<\|endofchunk\|>'"):
        build_prompt(CAPTION, [{"answer": "<|endofchunk|>"}], {})
