"""The site builds without a warning, and its API reference has every public name."""

from __future__ import annotations

import inspect
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from testing.markdown import ROOT, pages

# What pages name that a fresh clone does not have.
OUTPUTS = {"build/docs"}
# The example of the page about adding an op.
INVENTED = "soft_cap"
PACKAGES = ("ops", "nn", "model", "language", "vision", "convert", "data", "train")

pytest.importorskip("sphinx")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; warnings are failures, as in ``make docs``."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", out],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return out


def test_lines_are_within_100_columns() -> None:
    """Tables, pictures and what is generated aside; the formatters hold Python and C++."""
    tracked = subprocess.run(
        ["git", "ls-files", "*.md", "*.toml", "*.txt", "Makefile", "*.yml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert tracked
    for name in tracked:
        if "results/" in name:
            continue
        text = re.sub(
            r"<!-- figures.*?end of figures -->", "", (ROOT / name).read_text(), flags=re.S
        )
        wide = [line for line in text.splitlines() if len(line) > 100]
        assert [line for line in wide if not re.match(r"\s*(\||!\[)", line)] == [], name


def public_names(package: ModuleType) -> list[tuple[str, object]]:
    """Names of ``__all__``; without one, the functions and classes of each public module."""
    if hasattr(package, "__all__"):
        return [(name, getattr(package, name)) for name in package.__all__]
    found: list[tuple[str, object]] = []
    for info in pkgutil.iter_modules(package.__path__):
        module = import_module(f"{package.__name__}.{info.name}")
        found += [
            (name, value)
            for name, value in vars(module).items()
            if not name.startswith("_")
            and (inspect.isfunction(value) or inspect.isclass(value))
            and value.__module__ == module.__name__
        ]
    return found


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site: Path) -> None:
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, uri: uri)
    documented = {
        name
        for kind, entries in getattr(inventory, "data", inventory).items()
        if kind.startswith("py:")
        for name in entries
    }
    missing = []
    for package in PACKAGES:
        for name, value in public_names(import_module(f"flamingo_kernels.{package}")):
            home = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
            if not {f"flamingo_kernels.{package}.{name}", home} & documented:
                missing.append(f"flamingo_kernels.{package}.{name}")
    assert not missing


def test_the_typed_usage_has_every_public_name() -> None:
    """mypy reads that file in ``make lint``."""
    text = (ROOT / "tests/docs/typed_usage.py").read_text()
    words = set(re.findall(r"\w+", text))
    for package in PACKAGES:
        module = import_module(f"flamingo_kernels.{package}")
        assert set(getattr(module, "__all__", ())) <= words


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_pages_name_exist(page: Path) -> None:
    """Paths in backticks are of the repository or of the package; links of README are files."""
    text = page.read_text()
    named = set(re.findall(r"`([\w.-]+/[\w./-]*)`", text))
    named |= {path.partition("#")[0] for path in re.findall(r"\]\((?!http)([^)#\s]+)", text)}
    places = (page.parent, ROOT, ROOT / "flamingo_kernels")
    missing = [path for path in named if not any((place / path).exists() for place in places)]
    missing = [path for path in missing if path not in OUTPUTS and INVENTED not in path]
    assert missing == []


def test_names_of_the_package_itself_have_a_home_in_the_reference() -> None:
    import flamingo_kernels

    page = (ROOT / "docs/api/index.md").read_text()
    assert [name for name in flamingo_kernels.__all__ if f"`{name}`" not in page] == []


@pytest.mark.slow
def test_the_site_needs_no_network(site: Path) -> None:
    """No page loads a script, a style, a font or a picture from elsewhere."""
    for page in site.rglob("*.html"):
        for line in page.read_text().splitlines():
            for loads in ('<script src="http', '<img src="http', "@import url(http"):
                assert loads not in line, f"{page.name}: {line.strip()}"
            if "<link" in line and 'rel="stylesheet"' in line:
                assert 'href="http' not in line, f"{page.name}: {line.strip()}"
