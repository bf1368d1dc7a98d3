"""Configurations, prompts and JSON that are made to hurt: a line for the mistake, in bounded memory, and no file."""

import json
import os
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bounds import MEGABYTE, at_most
from support.forge import members
from support.mutations import of_tree
from support.toy import toy_config

from configs.errors import UserError
from configs.json_text import parse_json
from configs.load import parse
from configs.schema import GeneratePairsConfig, PromptsConfig
from configs.yaml_file import read_layers
from pipeline.generate import generate_pairs
from pipeline.prompts import prepare_prompts
from pipeline.shards.dataset import Dataset
from pipeline.shards.storage import Storage
from pipeline.shards.verify import verify

# ------------------------------------------------------------------------------------------------------------ YAML


def aliases(levels: int, width: int, value: str) -> str:
    """Lists of lists ... of one value: width ** levels of them in a few lines."""
    lines = [f"a0: &a0 {value}"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]" for level in range(1, levels + 1)]
    return "\n".join(lines) + "\n"


YAML = {
    "aliases of aliases": (aliases(9, 9, "lol"), "more than 100,000 values with all aliases written out"),
    "merges of merges": (
        "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)),
        "more than 100,000 values with all aliases written out",
    ),
    "a list in itself": ("output: &a [*a]\n", "line 1, column 9: an alias stands for what it is a part of"),
    "a mapping in itself": ("spec: &a\n  fields: *a\n", "an alias stands for what it is a part of"),
    "nested too deeply": ("output: " + "[" * 5000, "nested too deeply"),
    "too long": ("# " + "x" * MEGABYTE, "has more than 1,048,576 bytes"),
    "code": ("output: !!python/object/apply:os.mkdir [CANARY]\n", "could not determine a constructor for the tag"),
    "a class": ("output: !!python/name:os.system\n", "could not determine a constructor for the tag"),
    "a number of 5,000 digits": ("spec: {seed: " + "9" * 5000 + "}\n", "Exceeds the limit"),
    "another encoding": ("output: é\n".encode("latin-1"), "invalid continuation byte|unacceptable character"),
    "null bytes": (b"output: a\0b\n", "unacceptable character|special characters are not allowed"),
}


@pytest.mark.parametrize(("text", "message"), YAML.values(), ids=YAML)
def test_yaml_that_is_made_to_hurt(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    data = text if isinstance(text, bytes) else text.replace("CANARY", str(tmp_path / "canary")).encode()
    path.write_bytes(data)
    with at_most(64 * MEGABYTE), pytest.raises(UserError, match=message) as caught:
        read_layers(path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_device_is_no_configuration():
    with at_most(16 * MEGABYTE), pytest.raises(UserError, match="/dev/zero has more than 1,048,576 bytes"):
        read_layers(Path("/dev/zero"))


def test_aliases_that_a_person_would_write_are_taken(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(aliases(3, 9, "{a: 1}") + "again: *a1\n")
    assert read_layers(path)[str(path)]["a3"][8][8][8] == {"a": 1}


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_any_tree_is_a_configuration_or_a_line_for_each_mistake(tmp_path_factory, seed):
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    tree = {
        "output": "/x",
        "teacher": {"kind": "mixture"},
        "prompts": {"path": "p"},
        "spec": {"sampler": {"name": "ddim"}},
    }
    path.write_text(json.dumps(of_tree(Random(seed), tree)))  # JSON is YAML, but for what it cannot say
    with suppress(UserError):  # anything else fails the test
        parse(GeneratePairsConfig, argv=["--config", str(path)])


# --------------------------------------------------------------------------------------------------------- prompts


ODD = [
    "../../etc/passwd",
    "/etc/passwd",
    "\u202egnp.exe",
    "\u2066a\u2069",
    "a\0b\x1b[2J",
    "C:\\x",
    "$(reboot)",
    "%s%n",
    "-rf",
]


def test_odd_prompts_are_prompts_and_name_no_files(tmp_path):
    """Path-like, right-to-left, control characters: text like any other, and it is never a part of a name."""
    (tmp_path / "prompts.txt").write_text("\n".join(ODD) + "\n", newline="")
    config = toy_config(tmp_path / "root", tmp_path, spec={"pairs_per_prompt": 1})
    generate_pairs(config)
    assert len(verify(Dataset.open(Storage.open(str(tmp_path / "root")))).whole) == 2
    names = {path.name for path in tmp_path.rglob("*")} - {"root", "prompts.txt"}
    assert not any(character in name for name in names for character in "\0\x1b\u202e\u2066$%\\ ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "root"]
    entries = members(tmp_path / "root", 0)
    assert {data.decode() for name, data in entries if name.endswith("txt")} >= {"\u202egnp.exe", "a b [2J", ODD[0]}


def test_a_line_of_a_megabyte_and_brackets_without_end(tmp_path):
    (tmp_path / "long.txt").write_bytes(b"x" * MEGABYTE + b"\na cat\n")
    with at_most(32 * MEGABYTE):
        assert prepare_prompts(PromptsConfig(path=str(tmp_path / "long.txt")), tmp_path / "a.parquet").info.count == 1
    (tmp_path / "deep.jsonl").write_bytes(b'{"prompt": ' + b"[" * 200_000 + b"\n")
    with pytest.raises(UserError, match=r"deep.jsonl:1: not JSON \(nested too deeply\)"):
        prepare_prompts(PromptsConfig(path=str(tmp_path / "deep.jsonl")), tmp_path / "b.parquet")


@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_json_or_a_value_error(data):
    with suppress(ValueError):
        parse_json(data)
