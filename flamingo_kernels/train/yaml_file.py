"""Values of a YAML file: safe types, every key once, and bounded in size."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

from flamingo_kernels.fields import shortened

if TYPE_CHECKING:
    from yaml import MappingNode, Node, ScalarNode

_BYTES = 2**20
_VALUES = 100_000  # with every alias (*name) written out
_INTEGERS = range(-(2**63), 2**63)
_MERGE, _INT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:int"


class _RefusedError(Exception):
    """YAML that is not read all the same."""


def read_yaml(path: str | PathLike) -> Any:
    """Return what a YAML file holds, of plain types, in UTF-8 or (with a byte order mark) UTF-16.

    Raises
    ------
    FileNotFoundError, ImportError
        No such file, or no PyYAML.
    ValueError
        The file is not YAML, it needs other than plain types, a key is given twice, or the file is
        too large, also by aliases; the message names the file and the line.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            'a training configuration needs PyYAML: pip install "flamingo_kernels[train]"'
        ) from error
    with open(path, "rb") as file:
        data = file.read(_BYTES + 1)
    if len(data) > _BYTES:
        raise ValueError(f"{path} has more than {_BYTES:,} bytes: it is no training configuration")
    try:
        loader = yaml.SafeLoader(data)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, set(), {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except _RefusedError as error:
        raise ValueError(f"{path}, {error}") from None
    except (LookupError, AttributeError, TypeError, ArithmeticError) as error:  # !!bool x, !!int ''
        raise ValueError(f"{path} has a value that does not fit its tag: {error!r:.100}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not YAML: {shortened(' '.join(str(error).split()))}") from None


def _size(node: Node, above: set[Node], known: dict[Node, int]) -> int:
    """Return the number of values in a node, each as often as it is named; check all of them."""
    from yaml import CollectionNode, MappingNode, ScalarNode

    if node in known:
        return known[node]
    if node in above:
        raise _problem(node, "a value contains itself")
    above.add(node)
    size = 1
    if isinstance(node, MappingNode):
        _check_keys(node)
        size += sum(_size(part, above, known) for pair in node.value for part in pair)
    elif isinstance(node, CollectionNode):
        size += sum(_size(part, above, known) for part in node.value)
    elif isinstance(node, ScalarNode) and node.tag == _INT:
        _check_integer(node)
    if size > _VALUES:
        raise _problem(node, f"more than {_VALUES:,} values, counting what aliases (*) repeat")
    above.discard(node)
    known[node] = size
    return size


def _check_keys(node: MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key.value, str) or key.tag == _MERGE:
            continue
        if (first := lines.get((key.tag, key.value))) is not None:
            name = shortened(key.value)
            raise _problem(key, f"{name} is given twice in one mapping, first in line {first}")
        lines[key.tag, key.value] = key.start_mark.line + 1


def _check_integer(node: ScalarNode) -> None:
    from yaml import SafeLoader

    # Longer than any integer of 64 bits, in every base that YAML has.
    if len(node.value) > 100 or SafeLoader("").construct_yaml_int(node) not in _INTEGERS:
        raise _problem(node, f"an integer of more than 64 bits: {shortened(node.value)}")


def _problem(node: Node, what: str) -> _RefusedError:
    return _RefusedError(f"line {node.start_mark.line + 1}: {what}")
