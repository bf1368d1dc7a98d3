"""Prompt tables, read: random access, in a bucket, damaged."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.prompt_tables import open_table, save

from configs.errors import UserError
from configs.schema import PromptsConfig
from pipeline import prompts as prompts_module
from pipeline.prompts import PromptTable, is_prompt_table, prepare_prompts
from pipeline.shards.storage import Storage

BROKEN_TEXT = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
)
function_scoped = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


def test_what_is_a_prompt_table(prepare: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(["a"])
    assert is_prompt_table(tmp_path / "table.parquet")
    assert not is_prompt_table(save(tmp_path / "other.parquet", ["a"]))
    assert not is_prompt_table(tmp_path / "in.jsonl")
    with pytest.raises(UserError, match=r"nothing.parquet: no such file"):
        is_prompt_table(tmp_path / "nothing.parquet")
    with pytest.raises(UserError, match=r"other.parquet: not a prompt table; make one with stages/prepare_prompts.py"):
        open_table(tmp_path / "other.parquet")
    monkeypatch.setattr(prompts_module, "TABLE_VERSION", 0)
    with pytest.raises(UserError, match=r"made by a newer version \(format 1\)"):
        is_prompt_table(tmp_path / "table.parquet")


@function_scoped
@given(st.data())
def test_any_rows_are_those_of_the_file(prepare: Callable, small_pieces: None, data: st.DataObject) -> None:
    number = data.draw(st.integers(1, 12))
    report, rows = prepare([f"prompt {i}" for i in range(number)])
    table = open_table(report.output)
    assert (table.num_prompts, table.digest) == (number, report.info.digest)
    for _ in range(4):
        start = data.draw(st.integers(0, number))
        stop = data.draw(st.integers(start, number))
        ids, prompts = table.rows(start, stop)
        assert list(zip(ids, prompts, strict=True)) == rows[start:stop]
        some = np.array(sorted(data.draw(st.lists(st.integers(0, number - 1)))), np.int64)
        assert [f"{i:016x}" for i in table.ids(some).tolist()] == [rows[row][0] for row in some]
    for start, stop in ((-1, 1), (0, number + 1), (1, 0)):
        with pytest.raises(IndexError, match=r"table.parquet: no rows"):
            table.rows(start, stop)


def test_only_the_row_groups_asked_for_are_read(
    prepare: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(prompts_module, "_ROW_GROUP", 100)
    digests = [hashlib.sha512(str(i).encode()).hexdigest() * 40 for i in range(1000)]
    prepare(digests, max_chars=100_000)
    read: list[int] = []
    read_range = Storage.read_range
    monkeypatch.setattr("pipeline.shards.storage.BUFFER_BYTES", 1024)
    monkeypatch.setattr(
        Storage,
        "read_range",
        lambda self, path, start, length: (read.append(length), read_range(self, path, start, length))[1],
    )
    table = open_table(tmp_path / "table.parquet")
    read.clear()
    assert table.rows(250, 350)[1] == digests[250:350]
    two_groups = sum(read)
    read.clear()
    assert table.rows(350, 400)[1] == digests[350:400]
    assert read == []
    table.rows(0, 1000)
    assert 4 * two_groups < sum(read) < 6 * two_groups


def test_tables_in_a_bucket(s3_root: str, tmp_path: Path) -> None:
    storage = Storage.open(s3_root)
    source = save(tmp_path / "in.csv", ["first\nline", "second"])
    storage.upload("in.csv", Path(source))
    report = prepare_prompts(PromptsConfig(path=f"{s3_root}/in.csv"), f"{s3_root}/tables/prompts.parquet")
    assert report.written
    assert is_prompt_table(report.output)
    table = PromptTable.open(storage, "tables/prompts.parquet")
    assert table.rows(0, 2)[1] == ["first line", "second"]
    table.verify()
    assert not prepare_prompts(PromptsConfig(path=source), report.output).written


def test_damage_is_noticed(prepare: Callable, tmp_path: Path) -> None:
    report, rows = prepare([f"prompt {number}" for number in range(500)])
    open_table(report.output).verify()
    content = bytearray(Path(report.output).read_bytes())
    content[len(content) // 4] ^= 1
    (tmp_path / "flipped.parquet").write_bytes(content)
    with pytest.raises(OSError, match=r"flipped.parquet: row group 0 cannot be read"):
        open_table(tmp_path / "flipped.parquet").rows(0, 1)

    footer = {b"potstill.prompts": pq.read_metadata(report.output).metadata[b"potstill.prompts"]}
    for changed, message in [
        (rows[::-1], "the prompts are not those of its digest"),
        ([(rows[1][0], rows[0][1]), *rows[1:]], f"{rows[1][0]} is not the id of its prompt"),
    ]:
        ids, prompts = zip(*changed, strict=True)
        table = pa.table({"prompt_id": ids, "prompt": prompts}).replace_schema_metadata(footer)
        pq.write_table(table, tmp_path / "forged.parquet")
        with pytest.raises(UserError, match=message):
            open_table(tmp_path / "forged.parquet").verify()


@pytest.mark.parametrize(
    ("footer", "columns", "message"),
    [
        (b"{", {}, "its footer is damaged"),
        (b"[]", {}, "its footer is damaged"),
        (b'{"format_version": "1"}', {}, "its footer is damaged"),
        (b'{"format_version": 1, "digest": "0", "count": -2}', {}, "its footer is damaged"),
        (None, {"prompt_id": ["a", "b", "c"], "prompt": ["x", "y", "z"]}, "its rows or columns are not those"),
        (None, {"prompt_id": [1, 2], "prompt": ["x", "y"]}, "its rows or columns are not those"),
        (None, {"prompt": ["x", "y"]}, "its rows or columns are not those"),
        (None, {"prompt_id": ["a", None], "prompt": ["x", "y"]}, "row group 0 cannot be read"),
        (None, {"prompt_id": ["a", "b"], "prompt": BROKEN_TEXT}, "row group 0 cannot be read"),
    ],
)
def test_a_forged_table_is_refused_in_one_line(prepare: Callable, tmp_path: Path, footer, columns, message) -> None:
    report, _ = prepare(["x", "y"])
    right = pq.read_metadata(report.output).metadata[b"potstill.prompts"]
    table = pa.table(columns or {"prompt_id": ["a", "b"], "prompt": ["x", "y"]})
    pq.write_table(table.replace_schema_metadata({b"potstill.prompts": footer or right}), tmp_path / "forged.parquet")
    with pytest.raises((UserError, OSError), match=f"forged.parquet: {message}") as caught:
        open_table(tmp_path / "forged.parquet").verify()
    assert "\n" not in str(caught.value)
