"""From a YAML file and a command line to one validated model.

Layers, each over the one before: the file that ``extends:`` names, the ``--config`` file, the flags. They are merged
as they are and validated once, so that a mistake is one of the whole configuration, and all mistakes are reported at
once: one :class:`~configs.errors.UserError`, a line each, ``FILE: dotted.key: reason`` or ``--flag: reason``.
"""

import inspect
import reprlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from configs.errors import UserError, did_you_mean
from configs.flags import Flags
from configs.schema import Model
from configs.sections import Tree, entries, merge, open_required, variants
from configs.yaml_file import read_layers, to_yaml

M = TypeVar("M", bound=Model)


def parse(model: type[M], *, description: str | None = None, argv: Sequence[str] | None = None) -> M:
    """Read the configuration of a script from its command line and the file that ``--config`` names.

    ``--help`` and ``--print-config`` print to stdout and end the process with code 0.

    Args:
        model: What the script takes.
        description: First paragraph of ``--help``; None is the docstring of ``model``.
        argv: The arguments without the program; None is those of this process.

    Raises:
        UserError: The file or the command line is wrong: a line for every mistake.
    """
    argv = sys.argv[1:] if argv is None else argv
    config = Flags(model, {}).parse(argv, add_help=False)[0].get("config")
    layers = read_layers(Path(config)) if config is not None else {}
    flags = Flags(model, merge(model, *layers.values()))
    given, unknown = flags.parse(argv, description=flags.describe(description or inspect.getdoc(model) or ""))
    print_config = given.pop("print_config", False)
    given.pop("config", None)
    layers[_COMMAND_LINE] = given

    mistakes = flags.refusals(unknown)
    try:
        result = model.model_validate(open_required(model, merge(model, *layers.values())))
    except ValidationError as error:
        mistakes += [_line(mistake, model, layers, flags) for mistake in error.errors(include_url=False)]
    else:
        if not mistakes and print_config:
            print(to_yaml(result.model_dump(mode="json")), end="")
            sys.exit(0)
        if not mistakes:
            return result
    raise UserError("\n".join(mistakes))


# ---------------------------------------------------------------------------------------------------- mistakes

_COMMAND_LINE = "command line"
"""The layer that is not a file."""

_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping of keys to values",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "model_type": "a mapping of keys to values",
    "string_type": "text (in quotes)",
    "tuple_type": "a list",
}
"""pydantic's type of error -> what belongs there, where pydantic's own words are not for users."""


def _line(mistake: ErrorDetails, model: type[Model], layers: Mapping[str, Tree], flags: Flags) -> str:
    """``FILE: dotted.key: reason``, or ``--flag: reason`` for a value from the command line."""
    keys, beside = _locate(model, mistake["loc"])
    if mistake["type"] in ("union_tag_invalid", "union_tag_not_found"):  # pydantic blames the section for its tag
        keys.append(mistake.get("ctx", {})["discriminator"].strip("'"))
    key = ".".join(map(str, keys))
    files = [name for name in layers if name != _COMMAND_LINE]

    if mistake["type"] in ("missing", "union_tag_not_found"):
        ways = [f"give {flags.spelling[key]}"] if key in flags.spelling else []
        ways.append("set it here" if files else "set it in a file (--config)")
        choice = f": {flags.file_only[key]}" if key in flags.file_only else ""
        return ": ".join([*files[-1:], key, f"missing, {' or '.join(ways)}{choice}"])

    holders = [name for name, tree in layers.items() if tree and _holds(tree, keys)]
    origin = [_COMMAND_LINE, *files[-1:], *holders][-1]
    where = [flags.spelling.get(key, key)] if origin == _COMMAND_LINE else [origin, key]
    return ": ".join([*filter(None, where), _reason(mistake, str(keys[-1]) if keys else "", beside)])


def _reason(mistake: ErrorDetails, key: str, beside: Sequence[str]) -> str:
    kind, value, context = mistake["type"], mistake["input"], mistake.get("ctx", {})
    if kind in ("extra_forbidden", "invalid_key"):
        return f"unknown key{did_you_mean(key, beside)}"
    if kind == "union_tag_invalid":
        return f"must be one of {context['expected_tags']}, not {context['tag']!r}"
    if kind == "value_error":
        return str(context["error"])
    expected = f"must be {_EXPECTED[kind]}" if kind in _EXPECTED else mistake["msg"].replace("Input should", "must")
    return f"{expected}, not {'empty' if value is None else reprlib.repr(value)}"


def _locate(model: type[Model], location: Sequence[int | str]) -> tuple[list[int | str], list[str]]:
    """The keys in a location of pydantic's, which names union variants as well; and the fields beside the last key."""
    keys: list[int | str] = []
    inner, choices, beside = model, dict[str | None, type[Model]](), list[str]()
    for part in location:
        if isinstance(part, str) and part in choices:  # the tag of a variant
            inner, choices = choices[part], {}
        elif inner is None:  # inside a plain value
            break
        elif isinstance(part, int):  # the number of an entry in a list of sections
            keys.append(part)
        else:
            keys.append(part)
            beside = list(inner.model_fields)
            field = inner.model_fields.get(str(part))
            choices = (variants(field) or entries(field)) if field else {}
            inner = choices.pop(None, None)
    return keys, beside


def _holds(tree: object, keys: Sequence[int | str]) -> bool:
    if not keys:
        return True
    if isinstance(tree, list) and isinstance(keys[0], int):
        return keys[0] < len(tree) and _holds(tree[keys[0]], keys[1:])
    return isinstance(tree, dict) and keys[0] in tree and _holds(tree[keys[0]], keys[1:])
