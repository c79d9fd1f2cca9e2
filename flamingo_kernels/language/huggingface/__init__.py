"""Hugging Face causal language models, with a function run before each decoder block."""

from flamingo_kernels.language.huggingface.cache import HuggingFaceCache
from flamingo_kernels.language.huggingface.model import HuggingFaceLanguageModel

__all__ = ["HuggingFaceCache", "HuggingFaceLanguageModel"]
