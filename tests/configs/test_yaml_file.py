"""Reading is strict, `extends` is followed, and what is written is read back equal."""

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from configs.errors import UserError
from configs.yaml_file import read_layers, to_yaml

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


@pytest.fixture(scope="module")
def scratch_file(tmp_path_factory):
    return tmp_path_factory.mktemp("yaml") / "tree.yaml"


@settings(max_examples=50)
@given(tree=st.dictionaries(st.text().filter(lambda key: key != "extends"), TREES, max_size=4))
@example(tree={"text": ["1e3", "1E-3", "1.e3", "null", "1"], "number": 1e-05})
def test_what_is_written_is_read_back(scratch_file, tree):
    scratch_file.write_text(to_yaml(tree), encoding="utf-8")
    assert read_layers(scratch_file) == {str(scratch_file): tree}
    assert list(read_layers(scratch_file)[str(scratch_file)]) == list(tree)


@pytest.mark.parametrize("text", ["1e-3", "+1E-3", "1.e-3", "1.0e-3", "0.001"])
def test_every_spelling_of_a_float_is_a_number(write, text):
    (tree,) = read_layers(Path(write(f"lr: {text}"))).values()
    assert tree == {"lr": 0.001}


def test_text_that_looks_like_a_number_stays_text_in_quotes(write):
    (tree,) = read_layers(Path(write("commit: '1e3'\nother: 12e\n"))).values()
    assert tree == {"commit": "1e3", "other": "12e"}


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n"])
def test_an_empty_file_has_no_keys(write, text):
    assert read_layers(Path(write(text))) == {"a.yaml": {}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nspec:\n  seed: 2\n  steps: 3\n  seed: 4\n", "a.yaml: line 5, column 3: seed is given twice"),
        ("a: {x: 1, x: 1}\n", "a.yaml: line 1, column 11: x is given twice"),
        ("spec:\n  seed: [1, 2\n", "a.yaml: line 3, column 1: expected ',' or ']', but got '<stream end>'"),
        ("a: b: c\n", "a.yaml: line 1, column 5: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", "a.yaml: line 2, column 1: but found another document"),
        (
            "a: !!python/object/apply:os.getcwd []\n",
            "a.yaml: line 1, column 4: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.getcwd'",
        ),
        ("a: 2026-13-01\n", "a.yaml: month must be in 1..12"),
        ("- a\n- b\n", "a.yaml: must be a mapping of keys to values, not ['a', 'b']"),
        ("just text\n", "a.yaml: must be a mapping of keys to values, not 'just text'"),
        ("extends: [a, b]\n", "a.yaml: extends: must be the name of one file, not ['a', 'b']"),
        ("extends:\n", "a.yaml: extends: must be the name of one file, not None"),
        ("extends: gone.yaml\n", "a.yaml: extends: cannot read gone.yaml: No such file or directory"),
        ("extends: ./a.yaml\n", "a.yaml: extends: a.yaml ends up extending itself"),
    ],
)
def test_a_bad_file_is_named_with_the_place(write, text, message):
    with pytest.raises(UserError) as error:
        read_layers(Path(write(text)))
    assert str(error.value) == message


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(UserError, match=r"a\.yaml: .*invalid start byte"):
        read_layers(tmp_path / "a.yaml")


def test_yaml_merge_keys_are_not_duplicates(write):
    text = "base: &base {x: 1, y: 1}\nsecond: &second {<<: *base, x: 2}\nthird: {<<: *second, y: 3}\n"
    (tree,) = read_layers(Path(write(text))).values()
    assert tree["second"] == {"x": 2, "y": 1}
    assert tree["third"] == {"x": 2, "y": 3}


def test_ancestors_come_first_and_are_relative_to_the_file_that_names_them(write):
    write("a: 1\n", "shared/root.yaml")
    write("extends: root.yaml\nb: 2\n", "shared/middle.yaml")
    child = write("extends: ../shared/middle.yaml\nc: 3\n", "runs/child.yaml")
    layers = read_layers(Path(child))
    assert list(layers.values()) == [{"a": 1}, {"b": 2}, {"c": 3}]
    assert [Path(name).resolve().name for name in layers] == ["root.yaml", "middle.yaml", "child.yaml"]


def test_a_long_cycle_is_refused(write):
    write("extends: b.yaml\n", "a.yaml")
    write("extends: c.yaml\n", "b.yaml")
    write("extends: a.yaml\n", "c.yaml")
    with pytest.raises(UserError, match=r"c\.yaml: extends: a\.yaml ends up extending itself"):
        read_layers(Path("a.yaml"))
