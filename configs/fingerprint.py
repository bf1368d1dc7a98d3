"""The identity of a model: sha256 over its canonical JSON.

Canonical means that equal models give equal bytes: keys sorted at every depth, no spaces, ASCII only, a float as the
shortest decimal that reads back as the same float64 (Python's ``repr``), a tuple as a list. NaN and infinity have no
JSON and are refused. The class name is hashed along, so two types with equal fields differ.

A fingerprint covers *every* field of its model. What must not be part of an identity belongs in another model; there
is no list of excluded fields to keep in step.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from configs.schema import Model

ABSENT: Final = "(absent)"
"""Stands in :func:`differences` for the value of a key that one side does not have."""


def fingerprint(model: Model) -> str:
    """Sha256 of the class name and the canonical JSON of ``model``, as 64 hexadecimal digits.

    Raises:
        ValueError: A float is NaN or infinite.
    """
    return hashlib.sha256(f"{type(model).__name__}{canonical_json(model)}".encode("ascii")).hexdigest()


def canonical_json(model: Model) -> str:
    """Every field of ``model``, defaults included, as canonical JSON.

    Raises:
        ValueError: A float is NaN or infinite.
    """
    return _canonical(model.model_dump())


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What two dumped models disagree on, for a message with two columns.

    Args:
        a: The fields of one model: ``model_dump()``, or the same read back from JSON.
        b: The fields of the other.

    Returns:
        ``(dotted key, value in a, value in b)`` of each difference, in the order of ``a`` and then of ``b``, with
        :data:`ABSENT` for a missing key. Empty exactly when both have the same canonical JSON.
    """
    found: list[tuple[str, Any, Any]] = []
    for key in {**a, **b}:
        left, right = a.get(key, ABSENT), b.get(key, ABSENT)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += [(f"{key}.{inner}", *values) for inner, *values in differences(left, right)]
        elif key not in a or key not in b or _canonical(left) != _canonical(right):
            found.append((key, left, right))
    return found


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
