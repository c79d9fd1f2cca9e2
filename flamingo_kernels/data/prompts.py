"""Few-shot prompts as text (Flamingo, appendix B.1.5; OpenFlamingo's evaluation)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

Fields = Mapping[str, str]


@dataclass(frozen=True)
class PromptTemplate:
    """The text of one task.

    Attributes
    ----------
    query : str
        A format string with named fields.
    separator : str
        Stands between the query and the answer.

    Examples
    --------
    >>> build_prompt(VQA, [{"question": "What?", "answer": "A cat."}], {"question": "Where?"})
    '<image>Question: What? Answer: A cat.<|endofchunk|><image>Question: Where? Answer:'
    """

    query: str
    separator: str = " "

    @property
    def fields(self) -> tuple[str, ...]:
        """The names that a query must give; an example gives ``answer`` too."""
        return tuple(name for _, name, _, _ in Formatter().parse(self.query) if name)

    def fill(self, values: Fields, answered: bool) -> str:
        """Return the text of a query, or of an example with its answer.

        Raises
        ------
        ValueError
            A field is missing.
        """
        wanted = (*self.fields, "answer") if answered else self.fields
        missing = [name for name in wanted if name not in values]
        if missing:
            raise ValueError(
                f"{'an example' if answered else 'the query'} lacks {', '.join(missing)}; it has "
                f"{', '.join(values) or 'nothing'}"
            )
        # Not str.format: a value may hold braces, and a template no attribute access.
        text = "".join(
            literal + (values[name] if name else "")
            for literal, name, _, _ in Formatter().parse(self.query)
        )
        return text + self.separator + values["answer"] if answered else text


CAPTION = PromptTemplate("Output:")
VQA = PromptTemplate("Question: {question} Answer:")
HATEFUL_MEMES = PromptTemplate('is an image with written: "{text}" on it. Is it hateful? Answer:')
OPEN_FLAMINGO_CAPTION = PromptTemplate("Output:", separator="")
OPEN_FLAMINGO_VQA = PromptTemplate("Question:{question} Short answer:", separator="")
OPEN_FLAMINGO_HATEFUL_MEMES = PromptTemplate(
    "is an image with: '{text}' written on it. Is it hateful? Answer:", separator=""
)


def build_prompt(
    template: PromptTemplate,
    examples: Sequence[Fields],
    query: Fields,
    *,
    examples_have_images: bool = True,
    image_token: str = "<image>",
    end_of_chunk_token: str = "<|endofchunk|>",
    bos_token: str = "",
) -> str:
    """Return examples with answers, then the query without, each after its ``<image>``.

    The paper's zero-shot prompts have two examples without images
    (``examples_have_images=False``), which show the form of the answer. A single one is "highly
    detrimental" (appendix A.2).

    Parameters
    ----------
    template : PromptTemplate
    examples : sequence of mappings of str to str
        The fields of each example by name, and its ``answer``.
    query : mapping of str to str
        The fields of the query. The images belong to examples and query in this order.
    examples_have_images : bool
    image_token, end_of_chunk_token, bos_token : str
        As the tokenizer writes them.

    Raises
    ------
    ValueError
        A field is missing, or a value holds the image or the end-of-chunk token.
    """
    for number, values in enumerate((*examples, query)):
        for name, value in values.items():
            for token in (image_token, end_of_chunk_token):
                if token in value:
                    where = f"example {number}" if number < len(examples) else "the query"
                    raise ValueError(f"{name} of {where} holds {token!r}, which would count")
    shown = image_token if examples_have_images else ""
    parts = [shown + template.fill(values, True) + end_of_chunk_token for values in examples]
    return bos_token + "".join(parts) + image_token + template.fill(query, False)
