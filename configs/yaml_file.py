"""Strict YAML: a file, the file it extends, and back.

PyYAML's safe loader with three corrections. A key given twice is refused: PyYAML keeps the last and loses the other
setting silently. ``1e-3`` is a number: in YAML 1.1 it is text, for want of a dot. What a merged mapping (``<<``) set
itself outweighs what it merged in its turn: PyYAML 6.0.4 has it the other way round for keys of one letter.

And with two limits, since a few lines of aliases of aliases stand for more values than memory holds: on the length of a
file, and on the number of values in it when every alias is written out.
"""

import re
import reprlib
from pathlib import Path
from typing import Any

import yaml

from configs.errors import UserError
from configs.sections import Tree

MAX_BYTES = 1 << 20
"""Length of a file."""
MAX_VALUES = 100_000
"""Keys and values of a file, those behind aliases counted as often as they are named."""
_MAX_BRACKETS = 50
"""Within each other: PyYAML takes quadratic time for them."""


def read_layers(path: Path, named_by: str = "--config", above: tuple[Path, ...] = ()) -> dict[str, Tree]:
    """Read a file and the files it extends.

    Args:
        path: A mapping in YAML. ``extends: other.yaml`` in it names one parent, relative to the file's own folder.
        named_by: Who asks for the file, for the message when it cannot be read.
        above: The resolved paths of the files that extend this one.

    Returns:
        File name -> content without ``extends``, the oldest ancestor first.

    Raises:
        UserError: A file cannot be read, is too large, is not YAML, gives a key twice, is no mapping, or extends
            itself.
    """
    if path.resolve() in above:
        raise UserError(f"{named_by}: {path} ends up extending itself")
    tree = _read(path, named_by)
    if "extends" not in tree:
        return {str(path): tree}
    parent = tree.pop("extends")
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends: must be the name of one file, not {reprlib.repr(parent)}")
    return {**read_layers(path.parent / parent, f"{path}: extends", (*above, path.resolve())), str(path): tree}


def to_yaml(tree: Tree) -> str:
    """Text from which :func:`read_layers` reads an equal ``tree``, keys in the same order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def _read(path: Path, named_by: str) -> Tree:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise UserError(f"{named_by}: {path} has more than {MAX_BYTES:,} bytes, so it is not a configuration")
        tree = yaml.load(text, _Loader)
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply") from None
    except OSError as error:
        raise UserError(f"{named_by}: cannot read {path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{path}: {where}{error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # undecodable bytes, or a date such as 2026-13-01
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    if tree is None:  # an empty file, or comments only
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must be a mapping of keys to values, not {reprlib.repr(tree)}")
    return tree


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level == _MAX_BRACKETS:
            raise yaml.MarkedYAMLError(problem="brackets are nested too deeply", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _num_values(node, {}) > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_VALUES:,} values with all aliases written out")
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        last = {
            (key.tag, key.value): place for place, (key, _) in enumerate(node.value) if isinstance(key, yaml.ScalarNode)
        }
        node.value = [
            (key, value)
            for place, (key, value) in enumerate(node.value)
            if not isinstance(key, yaml.ScalarNode) or last[key.tag, key.value] == place
        ]


def _num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Nodes of a tree whose aliases are written out. MarkedYAMLError where one stands for what it is a part of."""
    if id(node) not in known:
        known[id(node)] = 0  # until it is known: no finished node counts nothing
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known[id(node)] = 1 + sum(_num_values(part, known) for part in parts)
    elif known[id(node)] == 0:
        raise yaml.MarkedYAMLError(problem="an alias stands for what it is a part of", problem_mark=node.start_mark)
    return known[id(node)]


class _Dumper(yaml.SafeDumper):
    pass


for _side in (_Loader, _Dumper):  # both, so that text that looks like such a number is written in quotes
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
