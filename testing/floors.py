"""Print the lower bounds of pyproject.toml as exact versions, which pip takes as constraints."""

from __future__ import annotations

import sys
from pathlib import Path

import tomllib
from packaging.requirements import Requirement


def floors(pyproject: Path, extras: list[str]) -> list[str]:
    """Return ``name==version`` of every dependency of the package and of ``extras``."""
    project = tomllib.loads(pyproject.read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][e] for e in extras)]
    pins = set()
    for requirement in (Requirement(text) for dependencies in lists for text in dependencies):
        bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"{pyproject}: {requirement} has no single lower bound (>=)")
        marker = f"; {requirement.marker}" if requirement.marker else ""
        pins.add(f"{requirement.name}=={bounds[0]}{marker}")
    return sorted(pins)


if __name__ == "__main__":
    print(*floors(Path("pyproject.toml"), sys.argv[1:]), sep="\n")
