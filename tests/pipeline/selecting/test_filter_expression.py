"""An expression means what Python would make of it, and nothing else is accepted."""

import operator
from functools import reduce

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from pipeline.selecting.filter_expression import parse_conditions

ROWS = [
    {"seed": seed, "guidance_scale": scale, "prompt": prompt, "prompt_truncated": seed % 3 == 0, "clip": clip}
    for seed in (-1, 0, 3)
    for scale in (1.0, 2.5)
    for prompt in ("a red ring", "a blue square", "")
    for clip in (-0.25, 0.5)
]
SCHEMA = pa.schema(
    [
        ("seed", pa.int64()),
        ("guidance_scale", pa.float32()),
        ("prompt", pa.string()),
        ("prompt_truncated", pa.bool_()),
        ("clip.clip", pa.float32()),
    ]
)
TABLE = pa.Table.from_pylist([{**row, "clip.clip": row["clip"]} for row in ROWS], SCHEMA)
COLUMNS = {field.name: field.type for field in SCHEMA}


def rows_that_meet(text, table=TABLE, columns=COLUMNS):
    """Numbers of the rows, by the compiled conditions."""
    numbered = table.append_column("row", pa.array(range(len(table))))
    conditions = parse_conditions(text, columns)
    kept = numbered.filter(reduce(operator.and_, (c.expression for c in conditions))) if conditions else numbered
    return sorted(kept["row"].to_pylist())


NUMBERS = st.sampled_from(["seed", "guidance_scale", "clip", "-1", "0", "3", "0.5", "-0.25", "2.5"])
TEXTS = st.sampled_from(["prompt", "'a red ring'", "'a'", "''"])
ORDERS = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])


def comparisons(operands):
    return st.builds(" ".join, st.tuples(operands, ORDERS, operands))


CONDITIONS = st.recursive(
    comparisons(NUMBERS).filter(lambda text: any(name in text for name in ("seed", "scale", "clip")))
    | comparisons(TEXTS).filter(lambda text: "prompt" in text)
    | st.sampled_from(
        [
            "prompt_truncated",
            "prompt_truncated == False",
            "seed in [0, 3]",
            "guidance_scale not in (2.5,)",
            "seed in []",
            "'red' in prompt",
            "'ring' not in prompt",
            "-1 < seed <= 2",
        ]
    ),
    lambda inner: (
        st.builds("({}) and ({})".format, inner, inner)
        | st.builds("({}) or ({})".format, inner, inner)
        | st.builds("not ({})".format, inner)
    ),
    max_leaves=6,
)


@settings(max_examples=150)
@given(CONDITIONS)
def test_an_expression_means_what_python_makes_of_it(text):
    expected = [at for at, row in enumerate(ROWS) if eval(text, {}, row)]
    assert rows_that_meet(text) == expected
    assert rows_that_meet(text.replace("clip", "clip.clip")) == expected


def test_numbers_compare_in_the_precision_of_their_column():
    table = pa.table({"guidance_scale": pa.array(np.array([3.3, 7.0], np.float32))})
    assert rows_that_meet("guidance_scale == 3.3", table) == [0]
    assert rows_that_meet("guidance_scale in [3.3]", table) == [0]
    assert rows_that_meet("guidance_scale > 3.3", table) == [1]
    table = pa.table({"seed": [2, 3]})
    assert rows_that_meet("seed > 2.5", table) == [1]
    assert rows_that_meet("seed == 9223372036854775807", pa.table({"seed": [2**63 - 1, 2**63 - 2]})) == [0]


def test_a_conjunction_is_split_and_says_which_columns_it_needs():
    found = parse_conditions("clip>.5 and (seed==1 or seed==2) and not 'x' in prompt", COLUMNS)
    assert [(c.text, sorted(c.columns)) for c in found] == [
        ("clip > 0.5", ["clip.clip"]),
        ("seed == 1 or seed == 2", ["seed"]),
        ("not 'x' in prompt", ["prompt"]),
    ]
    assert parse_conditions("  ", COLUMNS) == []
    assert len(parse_conditions("clip > 0.5 or seed == 1", COLUMNS)) == 1


def test_a_bare_name_is_the_only_column_of_that_name():
    columns = COLUMNS | {"big.clip": pa.float32(), "other.seed": pa.float32(), "other.value": pa.float32()}
    with pytest.raises(UserError, match=r"where: clip: could be clip\.clip or big\.clip; write one of these"):
        parse_conditions("clip > 0", columns)
    assert parse_conditions("big.clip > 0", columns)[0].columns == {"big.clip"}
    assert parse_conditions("value > 0", columns)[0].columns == {"other.value"}
    assert parse_conditions("seed > 0", columns)[0].columns == {"seed"}  # the index comes first


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("clip >", "not an expression"),
        ("clip = 3", "not an expression"),
        ("clip > 0; seed", "not an expression"),
        ("a\x00b", "not an expression"),
        ("(" * 300 + "seed == 1" + ")" * 300, "not an expression"),
        ("clap > 0.3", "clap: no such column, did you mean 'clip'?"),
        ("clip.clap > 0.3", "clip.clap: no such column"),
        ("clip", "clip: is a number and no condition"),
        ("True", "not a condition"),
        ("3 < 4", "3: no column on either side"),
        ("prompt > 3", "3: is a number, and is compared with text"),
        ("clip == 'high'", "'high': is text, and is compared with a number"),
        ("prompt_truncated == 1", "1: is a number, and is compared with true or false"),
        ("clip > True", "True: is true or false, and is compared with a number"),
        ("clip > prompt", "clip: is a number, and prompt is text"),
        ("seed == 9223372036854775808", "is beyond the numbers of its column (int64)"),
        ("seed is 3", "use == and !="),
        ("3 in clip", "in takes a list of constants"),
        ("prompt in prompt", "in takes a list of constants"),
        ("3 in [1, 2]", "only a column can be in a list"),
        ("seed in [clip]", "clip: neither a column nor a number"),
        ("clip + 1 > 2", "clip + 1: neither a column nor a number"),
        ("features > 0", "features: is a vector"),
        ("prompt.lower() == 'a'", "prompt.lower(): neither a column nor a number"),
        ("__import__('os').system('true')", "not a condition"),
        ("__import__('os').path == 'a'", "no such column"),
        ("(lambda: seed)() == 1", "neither a column nor a number"),
        ("[seed for seed in prompt]", "not a condition"),
        ("seed == 1j", "1j: neither a column nor a number"),
        ("clip == None", "None: neither a column nor a number"),
        ("seed == -True", "neither a column nor a number"),
        ("(seed := 3) == 3", "neither a column nor a number"),
    ],
)
def test_anything_else_is_refused_in_one_line(text, reason):
    with pytest.raises(UserError) as caught:
        parse_conditions(text, COLUMNS | {"deep.features": pa.list_(pa.float32(), 4)})
    assert str(caught.value).startswith("where: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
