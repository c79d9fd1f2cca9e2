"""Code blocks of Markdown pages, and how tests run them."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
# An HTML comment that starts so holds Python that runs in its place and that no reader sees.
HIDDEN = "<!-- run first\n"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``line`` is that of its first line of text, from 1."""

    page: Path
    line: int
    language: str
    text: str


def pages() -> list[Path]:
    """Return README.md and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """Yield the code blocks of a page in order, hidden ones as Python."""
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.map is None:
            continue
        line = token.map[0] + 2
        if token.type == "fence":
            language = token.info.split()[0] if token.info.strip() else ""
            yield Block(page, line, language, token.content)
        elif token.type == "html_block" and token.content.startswith(HIDDEN):
            text = token.content.removeprefix(HIDDEN).rstrip().removesuffix("-->")
            yield Block(page, line, "python", text)


def run_python(page: Path) -> None:
    """Run the Python blocks of a page in one namespace; an exception names the page's line."""
    namespace: dict[str, Any] = {"__name__": f"page_{page.stem}"}
    for block in blocks(page):
        if block.language == "python":
            # Empty lines before it, so that a traceback has the line of the page.
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(page), "exec"), namespace)


def commands(block: Block) -> list[list[str]]:
    """Return the commands of a shell block as words, without comments and environment variables."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            found.append(words)
    return found


def check_command(words: list[str]) -> None:
    """Raise AssertionError unless the command exists and takes these arguments."""
    program, arguments = words[0], words[1:]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets), f"make has no target {arguments}"
    elif program == "flamingo-kernels":
        _parse("flamingo_kernels", arguments)
    elif program in ("python", "torchrun"):
        assert "-m" in arguments, f"{words}: only python -m MODULE is checked"
        place = arguments.index("-m")
        _parse(arguments[place + 1], arguments[place + 2 :])
    elif program == "pip":
        _check_install(arguments)
    elif program == "pytest":
        paths = [word for word in arguments if not word.startswith("-")]
        assert all((ROOT / path).exists() for path in paths), words
    else:
        raise AssertionError(f"{program}: no command that these tests know")


class _ParsedError(Exception):
    """The command line was understood."""


def _parse(module: str, arguments: list[str]) -> None:
    """Let the module's own parser read the arguments, and go no further."""
    original = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        original(self, args, namespace)
        raise _ParsedError

    said = io.StringIO()
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse),
        mock.patch.object(sys, "argv", [module, *arguments]),
        warnings.catch_warnings(),
        contextlib.redirect_stderr(said),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # a module that is imported already
        try:
            runpy.run_module(module, run_name="__main__")
        except _ParsedError:
            return
        except SystemExit:
            raise AssertionError(f"{module} {' '.join(arguments)}: {said.getvalue()}") from None
    raise AssertionError(f"{module} parsed no command line")


def _check_install(words: list[str]) -> None:
    assert words[0] == "install", words
    known = (ROOT / "pyproject.toml").read_text()
    for word in words[1:]:
        assert word == "." or word.startswith((".[", "-")), f"{word}: the package is not published"
        for extra in re.findall(r"\[([a-z,]+)\]", word):
            for name in extra.split(","):
                assert re.search(rf"^{name} = \[", known, re.MULTILINE), f"no extra {name}"
