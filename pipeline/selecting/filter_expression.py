"""A small language over columns, compiled to pyarrow: nothing of it is ever executed by Python.

    expression  =  comparison | bool column | not expression | expression and expression | expression or expression
    comparison  =  a == b | a != b | a < b | a <= b | a > b | a >= b | a < b < c
                 | column in [constant, ...] | column not in [constant, ...] | 'part' in text column
    a, b        =  column or constant, not both constants
    column      =  guidance_scale | clip | clip.clip

It is Python's own syntax, of which only these forms are accepted. A constant takes the type of the column that it
meets: ``guidance_scale == 3.3`` compares as float32, in which the column has exactly that value. A conjunction at the
top is split, so that each of its parts can be counted.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import UserError, did_you_mean

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass(frozen=True)
class Condition:
    """One part of a conjunction.

    Attributes:
        text: as it was written, but for spaces.
        expression: of bool, over a table with these columns.
        columns: full names of the columns it needs.
    """

    text: str
    expression: pc.Expression
    columns: frozenset[str]


def parse_conditions(text: str, columns: Mapping[str, pa.DataType]) -> list[Condition]:
    """Compile an expression.

    Args:
        text: the expression; empty is no condition.
        columns: full name (``guidance_scale``, ``clip.clip``) -> type. The part after the dot will do where only one
            column has it.

    Raises:
        UserError: it is none, names an unknown or ambiguous column, or compares what cannot be compared.
    """
    if not text.strip():
        return []
    try:
        body = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else "too long or with null bytes"
        raise UserError(f"where: {text!r}: not an expression ({reason})") from None
    parts = body.values if isinstance(body, ast.BoolOp) and isinstance(body.op, ast.And) else [body]
    return [_Compiler(columns).condition(part) for part in parts]


@dataclass(frozen=True)
class _Column:
    name: str
    type: pa.DataType


class _Compiler:
    """Compiles one condition, and remembers which columns it met."""

    def __init__(self, columns: Mapping[str, pa.DataType]) -> None:
        self._columns = columns
        self._met: set[str] = set()

    def condition(self, node: ast.expr) -> Condition:
        expression = self._boolean(node)
        return Condition(ast.unparse(node), expression, frozenset(self._met))

    def _boolean(self, node: ast.expr) -> pc.Expression:
        match node:
            case ast.BoolOp(op, values):
                combine = operator.and_ if isinstance(op, ast.And) else operator.or_
                return reduce(combine, map(self._boolean, values))
            case ast.UnaryOp(ast.Not(), operand):
                return ~self._boolean(operand)
            case ast.Compare(left, ops, comparators):
                operands = [left, *comparators]
                pairs = zip(operands, ops, comparators, strict=False)
                return reduce(operator.and_, (self._comparison(a, op, b) for a, op, b in pairs))
            case ast.Name() | ast.Attribute():
                column = self._column(node)
                if not pa.types.is_boolean(column.type):
                    raise _refused(node, f"is {_kind(column.type)} and no condition; compare it with something")
                return pc.field(column.name)
        raise _refused(node, "not a condition; combine comparisons of columns by and, or, not")

    def _comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
        if isinstance(op, ast.In | ast.NotIn):
            found = self._membership(left, right)
            return found if isinstance(op, ast.In) else ~found
        if type(op) not in _COMPARE:
            raise _refused(right, "is and is not do not compare values; use == and !=")
        a, b = self._operand(left), self._operand(right)
        if isinstance(a, _Column) and isinstance(b, _Column):
            if _kind(a.type) != _kind(b.type):
                raise _refused(left, f"is {_kind(a.type)}, and {ast.unparse(right)} is {_kind(b.type)}")
            return _COMPARE[type(op)](pc.field(a.name), pc.field(b.name))
        if isinstance(a, _Column):
            return _COMPARE[type(op)](pc.field(a.name), pc.scalar(_typed(b, a.type, right)))
        if isinstance(b, _Column):
            return _COMPARE[type(op)](pc.scalar(_typed(a, b.type, left)), pc.field(b.name))
        raise _refused(left, "no column on either side of the comparison")

    def _membership(self, left: ast.expr, right: ast.expr) -> pc.Expression:
        """``column in [...]``, or ``'part' in column``."""
        if isinstance(right, ast.List | ast.Tuple | ast.Set):
            column = self._operand(left)
            if not isinstance(column, _Column):
                raise _refused(left, "is not a column; only a column can be in a list")
            values = [_typed(_constant(entry), column.type, entry) for entry in right.elts]
            return reduce(
                operator.or_, (pc.field(column.name) == pc.scalar(value) for value in values), pc.scalar(False)
            )
        part, column = self._operand(left), self._operand(right)
        if not isinstance(part, str) or not isinstance(column, _Column) or _kind(column.type) != "text":
            raise _refused(right, "in takes a list of constants, as in guidance_scale in [1, 3], or a text column")
        return pc.match_substring(pc.field(column.name), part)

    def _operand(self, node: ast.expr) -> Any:
        """A column, or a constant."""
        return self._column(node) if isinstance(node, ast.Name | ast.Attribute) else _constant(node)

    def _column(self, node: ast.expr) -> _Column:
        written = ast.unparse(node)
        found = [name for name in self._columns if name == written]
        found = found or [name for name in self._columns if name.rpartition(".")[2] == written]
        if not found:
            names = [*self._columns, *(name.rpartition(".")[2] for name in self._columns)]
            there = ", ".join(self._columns)
            raise UserError(f"where: {written}: no such column{did_you_mean(written, names)} (there are {there})")
        if len(found) > 1:
            raise UserError(f"where: {written}: could be {' or '.join(found)}; write one of these")
        (name,) = found
        if _kind(self._columns[name]) == "a vector":
            raise _refused(node, "is a vector; only numbers, texts and truths can be compared")
        self._met.add(name)
        return _Column(name, self._columns[name])


def _constant(node: ast.expr) -> Any:
    match node:
        case ast.Constant(bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)) if not isinstance(value, bool):
            return -value
    raise _refused(node, "neither a column nor a number, a text, True or False")


def _typed(value: Any, kind: pa.DataType, node: ast.expr) -> pa.Scalar:
    """A constant in the type of the column it meets; a fraction that meets whole numbers stays what it is."""
    found = _kind(pa.scalar(value).type) if not isinstance(value, int) or isinstance(value, bool) else "a number"
    if found != _kind(kind):
        raise _refused(node, f"is {found}, and is compared with {_kind(kind)}")
    try:
        return pa.scalar(value) if isinstance(value, float) and pa.types.is_integer(kind) else pa.scalar(value, kind)
    except (pa.ArrowException, OverflowError):
        raise _refused(node, f"is beyond the numbers of its column ({kind})") from None


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "true or false"
    if pa.types.is_string(kind):
        return "text"
    return "a vector" if pa.types.is_nested(kind) else "a number"


def _refused(node: ast.expr, reason: str) -> UserError:
    return UserError(f"where: {ast.unparse(node)}: {reason}")
