"""Every code block of README.md and docs/ runs, or its commands exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flamingo_kernels.ops import dispatch
from testing import markdown
from testing.markdown import ROOT, Block, blocks, pages

CHECKED = ("python", "sh", "yaml", "json", "text", "{toctree}", "{eval-rst}")
# What a page's set-up needs and `pip install .[dev]` does not bring.
NEEDS = {"checkpoints.md": "einops_exts"}
PAGES = [page for page in pages() if any(b.language == "python" for b in blocks(page))]


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a page share a namespace; they run in an empty folder."""
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    monkeypatch.chdir(tmp_path)
    # A page may describe a new op to the dispatch.
    monkeypatch.setattr(dispatch, "CAPABILITIES", dict(dispatch.CAPABILITIES))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        markdown.run_python(page)


@pytest.mark.parametrize("page", pages(), ids=_name)
def test_commands_exist(page: Path) -> None:
    """The real parsers read every command line."""
    for block in blocks(page):
        if block.language == "sh":
            for words in markdown.commands(block):
                markdown.check_command(words)


@pytest.mark.parametrize("page", pages(), ids=_name)
def test_data_blocks_are_read(page: Path) -> None:
    """YAML blocks are training configurations; blocks of an unknown language are a mistake."""
    for block in blocks(page):
        assert block.language in CHECKED, f"{page.name}:{block.line}: {block.language!r}"
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            yaml = pytest.importorskip("yaml")
            from flamingo_kernels.train import TrainConfig

            TrainConfig.from_dict(yaml.safe_load(block.text))


def _page(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text)
    return page


def test_a_block_that_raises_is_a_failure_at_its_line(tmp_path: Path) -> None:
    page = _page(tmp_path, "# Title\n\n```python\nx = 1\n```\n\nText.\n\n```python\nx / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        markdown.run_python(page)
    assert caught.traceback[-1].lineno + 1 == 10


def test_hidden_blocks_run_before_what_follows(tmp_path: Path) -> None:
    page = _page(tmp_path, "<!-- run first\nx = [1]\n-->\n\n```python\nx.append(2)\n```\n")
    markdown.run_python(page)
    found = list(blocks(page))
    assert [(b.language, b.line) for b in found] == [("python", 2), ("python", 6)]


@pytest.mark.parametrize(
    "line",
    [
        "make tea",
        "flamingo-kernels generate --txt no",
        "flamingo-kernels fly",
        "python -m benchmarks run --suite none",
        "pip install flamingo_kernels[none]",
        "rm -rf /",
    ],
)
def test_wrong_commands_are_failures(line: str) -> None:
    block = Block(Path("page.md"), 1, "sh", line)
    with pytest.raises(AssertionError):
        for words in markdown.commands(block):
            markdown.check_command(words)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
