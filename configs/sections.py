"""The shape of a model: which keys are sections, and how layers of nested mappings merge along it.

A *section* is a field filled by a model of its own. When it is a tagged union, the value of its tag (``kind``,
``name``) says which model that is. Mappings here are as YAML gives them: not validated, so any key may be missing,
unknown or of a wrong type.
"""

from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from configs.schema import Model

Tree = dict[str, Any]
"""Nested mappings, not validated."""


def tag_of(field: FieldInfo) -> str | None:
    """The key that chooses the variant of a tagged union; None for any other field."""
    return field.discriminator if isinstance(field.discriminator, str) else None


def variants(field: FieldInfo) -> dict[str | None, type[Model]]:
    """What may fill a field: {tag value: model} for a tagged union, {None: model} for a section, else nothing."""
    is_union = get_origin(field.annotation) in (Union, UnionType)
    candidates = get_args(field.annotation) if is_union else (field.annotation,)
    models = [candidate for candidate in candidates if isinstance(candidate, type) and issubclass(candidate, Model)]
    tag = tag_of(field)
    return {model.model_fields[tag].default if tag else None: model for model in models}


def entries(field: FieldInfo) -> dict[str | None, type[Model]]:
    """What fills a list of sections, as :func:`variants` has it: {None: model}; nothing for any other field."""
    inner = get_args(field.annotation)[0] if get_origin(field.annotation) is tuple else None
    return {None: inner} if isinstance(inner, type) and issubclass(inner, Model) else {}


def section(field: FieldInfo, values: object) -> type[Model] | None:
    """The model that fills ``field`` when it holds ``values``; None for a plain value or when the tag does not say."""
    tag = tag_of(field)
    chosen = values.get(tag) if tag and isinstance(values, dict) else None
    return variants(field).get(chosen if isinstance(chosen, str) else None)


def merge(model: type[Model] | None, *layers: Tree) -> Tree:
    """Each layer over the ones before, key by key.

    A layer that changes the tag of a tagged union replaces that section: its older keys belong to another model.

    Args:
        model: The shape of the mappings; None when it is not known, where mappings merge without exception.
        layers: The mappings, the most important last.
    """
    merged: Tree = {}
    for layer in layers:
        for key, new in layer.items():
            old = merged.get(key)
            field = model.model_fields.get(key) if model else None
            if not isinstance(old, dict) or not isinstance(new, dict) or (field and _retagged(field, old, new)):
                merged[key] = new
            else:
                merged[key] = merge(section(field, {**old, **new}) if field else None, old, new)
    return merged


def open_required(model: type[Model], tree: Tree) -> Tree:
    """``tree`` with an empty section for every required one it lacks, so that a mistake names the key to give."""
    opened = dict(tree)
    for name, field in model.model_fields.items():
        if variants(field) and field.is_required():
            opened.setdefault(name, {})
        inner = section(field, opened.get(name))
        if inner and isinstance(opened.get(name), dict):
            opened[name] = open_required(inner, opened[name])
    return opened


def _retagged(field: FieldInfo, old: Tree, new: Tree) -> bool:
    tag = tag_of(field)
    return tag in old and tag in new and old[tag] != new[tag]
