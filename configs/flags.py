"""The command line of a model, parsed by tyro into just what was given: nested mappings like those of a file.

One flag for every plain value, by its dotted key: ``--spec.guidance_scale 3``, ``--plan``, ``--no_plan``. A tagged
union has the flags of the variant that the file names. Its tag and free-form mappings have none: a flag that swaps a
whole section, or adds to a mapping that is not shown, would be easy to misread.
"""

import contextlib
import io
import itertools
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, TypedDict

import tyro
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from configs.errors import UserError, did_you_mean
from configs.schema import Model
from configs.sections import Tree, section, tag_of, variants


class Flags:
    """The flags of a model, some of whose values a file has set."""

    def __init__(self, model: type[Model], values: Tree) -> None:
        """Derive the flags of ``model``; ``values``, what its files say, choose variants and are shown as defaults."""
        self.spelling: dict[str, str] = {}
        """Dotted key -> what to type for it."""
        self.file_only: dict[str, str] = {}
        """Dotted key that has no flag -> what a file may say there."""
        self._undecided: dict[str, str] = {}
        """Dotted key of a section whose variant no file names -> that of its tag."""
        self._options = {
            "config": _option(str, "A YAML file with any of these keys.", metavar="FILE"),
            "print_config": _option(bool, "Print the whole configuration as YAML and exit."),
            **self._section_options(model, values, ""),
        }

    def parse(self, argv: Sequence[str], *, description: str = "", add_help: bool = True) -> tuple[Tree, list[str]]:
        """What ``argv`` gives, nested, with nothing filled in; and the arguments that are not of this model.

        Raises:
            UserError: A flag lacks its value, or that is none of its choices.
        """
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint):
                given, unknown = tyro.cli(
                    _mapping_of(self._options),
                    args=argv,
                    description=description,
                    add_help=add_help,
                    return_unknown_args=True,
                    use_underscores=True,
                    registry=_NUMBERS_AS_TEXT,
                )
        except SystemExit as end:
            if end.code:
                raise UserError(_sentence(complaint.getvalue())) from None
            raise
        return _without_empty(given), unknown

    def describe(self, description: str) -> str:
        """``description``, then the keys that have no flag."""
        keys = [f"  {key}: {text}" for key, text in self.file_only.items()]
        return "\n".join([description, *(["", "Only in the file:", *keys] if keys else [])])

    def refusals(self, unknown: Sequence[str]) -> list[str]:
        """Why the arguments that are not of this model are wrong: a line for each flag among them."""
        names = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
        if unknown and not names:
            return [f"unexpected argument {unknown[0]!r}"]
        return [f"{name}: {self._reason(name.lstrip('-'))}" for name in names]

    def _reason(self, key: str) -> str:
        file_only = [known for known in self.file_only if f"{key}.".startswith(f"{known}.")]
        undecided = [tag for known, tag in self._undecided.items() if key.startswith(f"{known}.")]
        if found := file_only + undecided:
            subject = "" if found[0] == key else f"{found[0]} "
            return f"{subject}can only be set in the file (--config): {self.file_only[found[0]]}"
        return f"unknown flag{did_you_mean(f'--{key}', [*self.spelling.values(), '--config', '--print_config'])}"

    def _section_options(self, model: type[Model], values: Tree, prefix: str, tag: str | None = None) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for name, field in model.model_fields.items():
            key, value = prefix + name, values.get(name, field.default)
            if name == tag:
                continue
            if variants(field):
                if inner := self._inner_options(key, field, values.get(name)):
                    options[name] = _option(_mapping_of(inner), field.description)
            elif tyro.conf.Suppress in field.metadata:
                self.file_only[key] = field.description or ""
            else:
                hint = "(required)" if value is PydanticUndefined else f"(default: {shlex.quote(str(value))})"
                place = name.upper() if tyro.conf.Positional in field.metadata else None
                options[name] = _option(
                    field.annotation, field.description, hint, metavar=place, markers=field.metadata
                )
                self.spelling[key] = place or f"--{key}"
        return options

    def _inner_options(self, key: str, field: FieldInfo, values: object) -> dict[str, Any]:
        tag = tag_of(field)
        if tag:
            others = {
                kind: [name for name in model.model_fields if name != tag] for kind, model in variants(field).items()
            }
            self.file_only[f"{key}.{tag}"] = " or ".join(
                f"{kind} ({', '.join(names)})" for kind, names in others.items()
            )
        model = section(field, values)
        if model is None:
            self._undecided[key] = f"{key}.{tag}"
            return {}
        return self._section_options(model, values if isinstance(values, dict) else {}, f"{key}.", tag)


def _number_as_text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str] | None:
    if info.type not in (int, float):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=info.type.__name__.upper(),
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    )


_NUMBERS_AS_TEXT = ConstructorRegistry()
"""Leaves the reading of numbers to the validation of the whole, which reports every mistake and in the same words."""
_NUMBERS_AS_TEXT.primitive_rule(_number_as_text)


def _option(
    kind: Any, text: str | None, hint: str = "", *, metavar: str | None = None, markers: Iterable[Any] = ()
) -> Any:
    return Annotated[(kind, *markers, tyro.conf.arg(help=text or "", help_behavior_hint=hint, metavar=metavar))]


def _mapping_of(options: dict[str, Any]) -> Any:
    """A type whose keys may all be absent: tyro leaves out what is not given."""
    return TypedDict("Options", options, total=False)  # pyright: ignore[reportArgumentType] (keys known at run time)


def _without_empty(given: Tree) -> Tree:
    """``given`` without the sections of which nothing is given."""
    inner = {key: _without_empty(value) if isinstance(value, dict) else value for key, value in given.items()}
    return {key: value for key, value in inner.items() if value != {}}


def _sentence(box: str) -> str:
    """The first paragraph inside the box that tyro draws around an error, in one line."""
    rows = (row.strip("│ ") for row in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:])
    return " ".join(itertools.takewhile(lambda row: row.strip("─╰╯"), rows))
