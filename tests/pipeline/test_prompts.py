"""Prompt tables: what is kept, what it is called, and what is refused."""

import hashlib
import json
import re
import tracemalloc
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.prompt_tables import open_table, rows_of, save

from configs.errors import UserError
from configs.schema import PromptsConfig
from pipeline import prompts as prompts_module
from pipeline.prompts import normalise, prepare_prompts
from pipeline.seen_digests import SeenDigests

FORMATS = ["txt", "csv", "jsonl", "parquet"]
TRICKY = "".join(map(chr, [0, 9, 10, 13, 0x1B, 0x85, 0xA0, 0xAD, 0x2028, 0x202E, 0x200D, 0xFEFF, 0x301, 0x41, 0x1F642]))
texts_strategy = st.lists(st.text(st.sampled_from(TRICKY + 'ab ,"é漢ي') | st.characters(codec="utf-8"), max_size=8))
function_scoped = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


# ------------------------------------------------------------------------------------------------------ normalisation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a \t\r\n cat  ", "a cat"),
        ("a\x00b\x1bc\x85d", "a b c d"),
        ("e\u0301te\u0301", "été"),
        ("a\u2028b\u00a0c\u3000d", "a b c d"),
        ("👩\u200d🎤 \u202eabc", "👩\u200d🎤 \u202eabc"),
        ("\x7f \x9f", ""),
        ("x" * 100_000 + "\n", "x" * 100_000),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@given(st.text(st.sampled_from(TRICKY) | st.characters(codec="utf-8")))
def test_normalised_text_is_canonical(text: str) -> None:
    result = normalise(text)
    assert normalise(result) == result
    assert unicodedata.is_normalized("NFC", result)
    assert result == " ".join(result.split())
    assert not any(unicodedata.category(character) == "Cc" for character in result)
    kept = [c for c in unicodedata.normalize("NFC", text) if not c.isspace() and unicodedata.category(c) != "Cc"]
    assert [c for c in result if c != " "] == kept


# ----------------------------------------------------------------------------------------------- what is kept, and why


@function_scoped
@given(texts_strategy, st.integers(0, 4), st.integers(1, 6), st.none() | st.integers(1, 5))
def test_a_table_is_what_a_plain_loop_would_keep(
    prepare: Callable, small_pieces: None, texts: list[str], min_chars: int, max_chars: int, limit: int | None
) -> None:
    expected: list[str] = []
    dropped = dict.fromkeys(prompts_module.REASONS, 0)
    for text in texts:
        if len(expected) == limit:
            break
        prompt = normalise(text)
        if prompt == "":
            dropped["empty"] += 1
        elif len(prompt) < min_chars:
            dropped["too_short"] += 1
        elif len(prompt) > max_chars:
            dropped["too_long"] += 1
        elif prompt in expected:
            dropped["duplicate"] += 1
        else:
            expected.append(prompt)
    options = {"min_chars": min_chars, "max_chars": max_chars, "limit": limit}
    if not expected:
        with pytest.raises(UserError, match=f"no prompt is left of {len(texts)} rows"):
            prepare(texts, **options)
        return
    report, rows = prepare(texts, **options)
    assert rows == [(hashlib.sha256(prompt.encode()).hexdigest()[:16], prompt) for prompt in expected]
    assert report.info.dropped == dropped
    assert report.info.count == len(expected)
    assert report.info.read == len(expected) + sum(dropped.values())
    assert report.info.digest == hashlib.sha256("".join(f"{i}\t{p}\n" for i, p in rows).encode()).hexdigest()


@settings(function_scoped, max_examples=15)
@given(texts_strategy.map(lambda texts: ["a prompt", None, *texts]))
def test_every_format_gives_the_same_table(prepare: Callable, texts: list[str | None]) -> None:
    results = [prepare(texts, suffix) for suffix in FORMATS[1:]]
    assert all(rows == results[0][1] for _, rows in results)
    assert len({report.info.digest for report, _ in results}) == 1
    assert len({(report.info.read, *report.info.dropped.values()) for report, _ in results}) == 1
    of_lines = [re.sub(r"[\r\n]", " ", text or "") for text in texts]
    assert prepare(of_lines, "txt")[1] == results[0][1]


def test_identity_is_the_content_and_its_order(prepare: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"prompt {number}" for number in range(40)]
    report, rows = prepare(texts)
    assert prepare([*texts[:20], " prompt  3", None, *texts[20:]], "csv")[0].info.digest == report.info.digest
    assert prepare(texts[::-1])[0].info.digest != report.info.digest
    assert prepare(texts[:-1])[0].info.digest != report.info.digest
    assert prepare([*texts[:-1], "another"])[0].info.digest != report.info.digest
    monkeypatch.setattr(prompts_module, "_ROW_GROUP", 7)
    smaller, smaller_rows = prepare(texts)
    assert (smaller.info.digest, smaller_rows) == (report.info.digest, rows)
    assert open_table(smaller.output).group_starts == [0, 7, 14, 21, 28, 35, 40]


def test_ids_do_not_depend_on_filters_or_position(prepare: Callable) -> None:
    texts = [f"{'long ' * (number % 5)}prompt {number}" for number in range(100)]
    ids = {prompt: prompt_id for prompt_id, prompt in prepare(texts)[1]}
    filtered = prepare(texts[::-3], min_chars=12, max_chars=25)[1]
    assert 5 < len(filtered) < 34
    assert all(ids[prompt] == prompt_id for prompt_id, prompt in filtered)


def test_the_same_prompts_give_the_same_bytes(prepare: Callable, tmp_path: Path) -> None:
    texts = [f"prompt {number}" for number in range(1000)]
    prepare(texts)
    first = (tmp_path / "table.parquet").read_bytes()
    prepare(texts)
    assert (tmp_path / "table.parquet").read_bytes() == first


def test_a_table_of_a_table_is_the_same(prepare: Callable, tmp_path: Path) -> None:
    report, rows = prepare(["b", " a ", "b", "c\u0327", None])
    again = prepare_prompts(PromptsConfig(path=report.output, column="not asked for"), tmp_path / "again.parquet")
    assert rows_of(again.output) == rows
    assert again.info.digest == report.info.digest
    assert sum(again.info.dropped.values()) == 0


def test_the_footer_tells_the_story_without_the_folder(prepare: Callable, tmp_path: Path) -> None:
    prepare(["a", "a", "", "b"], "csv")
    footer = pq.read_metadata(tmp_path / "table.parquet").metadata
    assert json.loads(footer[b"potstill.prompts"]) == {
        "format_version": 1,
        "digest": open_table(tmp_path / "table.parquet").digest,
        "count": 2,
        "read": 4,
        "dropped": {"empty": 1, "too_short": 0, "too_long": 0, "blocklisted": 0, "duplicate": 1},
        "source": "in.csv",
    }
    assert str(tmp_path).encode() not in (tmp_path / "table.parquet").read_bytes()


@pytest.mark.parametrize(
    ("prompt", "is_blocked"),
    [
        ("a CAT on a mat", True),
        ("cat", True),
        ("the cat's pyjamas", True),
        ("concatenate", False),
        ("cat_dog", False),
        ("hot-DOG!", True),
        ("hot, dog", True),
        ("a hot summer, a dog", False),
        ("STRASSE", True),
        ("the Cafe\u0301", True),
        ("nothing of it", False),
    ],
)
def test_blocklist(prepare: Callable, tmp_path: Path, prompt: str, is_blocked: bool) -> None:
    (tmp_path / "words").write_text("\ufeffCat\n\n hot  dog \nstraße\nCAFÉ\n", encoding="utf-8")
    report, rows = prepare(["kept", prompt], blocklist=str(tmp_path / "words"))
    assert [text for _, text in rows] == (["kept"] if is_blocked else ["kept", prompt.replace("e\u0301", "é")])
    assert report.info.dropped["blocklisted"] == is_blocked


def test_a_blocklist_line_that_blocks_nothing_is_refused(prepare: Callable, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("fine\n***\n")
    with pytest.raises(UserError, match=r"words:2: no word in this line"):
        prepare(["x"], blocklist=str(tmp_path / "words"))
    with pytest.raises(UserError, match=r"not there: no such file"):
        prepare(["x"], blocklist=str(tmp_path / "not there"))


# ---------------------------------------------------------------------------------------------------------- duplicates


@given(st.lists(st.lists(st.binary(min_size=16, max_size=16) | st.sampled_from([bytes(16), b"a" + bytes(15)]))))
def test_seen_digests_is_a_set(batches: list[list[bytes]]) -> None:
    seen, expected = SeenDigests(), set()
    for batch in batches:
        for digest, is_new in zip(batch, seen.add(batch), strict=True):
            assert is_new == (digest not in expected)
            expected.add(digest)


def test_seen_digests_takes_16_bytes_each_in_few_runs() -> None:
    seen, number = SeenDigests(), 200_000
    digests = [hashlib.sha256(str(i).encode()).digest()[:16] for i in range(number)]
    for start in range(0, number, 1000):
        assert seen.add(digests[start : start + 1000]).all()
        assert len(seen._runs) <= 9
    assert sum(run.nbytes for run in seen._runs) == 16 * number
    assert not seen.add(digests[::-7]).any()


@pytest.mark.parametrize("tail", [b"\1" * 8, bytes(7) + b"\1"])
def test_prompts_that_would_share_an_id_are_refused(
    prepare: Callable, monkeypatch: pytest.MonkeyPatch, tail: bytes
) -> None:
    seen = SeenDigests()
    seen.add([b"12345678" + bytes(8), b"12345679" + tail])
    seen.refuse_collisions()
    seen.add([b"12345678" + tail])
    with pytest.raises(UserError, match="id 3132333435363738; leave one out"):
        seen.refuse_collisions()

    monkeypatch.setattr(prompts_module, "_digest", lambda prompt: b"12345678" + prompt.encode().ljust(8))
    with pytest.raises(UserError, match="two different prompts have the id 3132333435363738"):
        prepare(["a", "b"])


def test_memory_does_not_hold_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts_module, "_CHUNK", 256)
    monkeypatch.setattr(prompts_module, "_ROW_GROUP", 512)

    def peak(number: int) -> int:
        source = save(tmp_path / f"{number}.txt", [f"{i} {'x' * 400}" for i in range(number)])
        tracemalloc.start()
        prepare_prompts(PromptsConfig(path=source), tmp_path / f"{number}.parquet")
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(10)  # what is imported or built once
    assert peak(20_000) - peak(2_000) < 18_000 * 100  # the texts alone take 400 bytes each


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"good\nb\xffd\n", r"x.txt:2: byte 2 of the line is not UTF-8"),
        ("x.txt", "two".encode("utf-16"), r"x.txt:1: byte 1 of the line is not UTF-8"),
        ("x.csv", b"prompt,n\nfine,1\n\xe9,2\n", r"x.csv:3: byte 1 of the line is not UTF-8"),
        ("x.csv", b'prompt,n\n"a\nb",1\nc\n', r"x.csv:4: 1 fields, the header has 2"),
        ("x.csv", b'prompt,n\n"a,1\nb,2\n', r"x.csv:3: .*a quote that is not closed"),
        ("x.csv", b"Prompts,url\na,b\n", r"no column prompt among Prompts, url, did you mean 'Prompts'\?"),
        ("x.csv", b"caption,url\na,b\n", r"no column prompt among caption, url; name one of them by prompts.column"),
        ("x.csv", b"", r"x.csv: no column prompt among none"),
        (
            "x.jsonl",
            b'{"prompt": "a"}\n{"promt": "b"}\n',
            r"x.jsonl:2: no column prompt among promt, did you mean 'promt'",
        ),
        ("x.jsonl", b'{"prompt": "a"}\n\n{"prompt": x}\n', r"x.jsonl:3: not JSON \(Expecting value at character 12\)"),
        ("x.jsonl", b'["a"]\n', r"x.jsonl:1: not a JSON object"),
        ("x.jsonl", b'{"prompt": 7}\n', r"x.jsonl:1: prompt is 7, not text"),
        ("x.jsonl", b'{"prompt": "\\ud800"}\n', r"x.jsonl:1: prompt holds half of a surrogate pair"),
        ("x.parquet", b"PAR1 not really", r"x.parquet: not a Parquet file, or a damaged one"),
        ("x.tsv", b"prompt\na\n", r"x.tsv: prompts are read from .txt, .csv, .jsonl, .parquet"),
        ("x.txt", b" \n\n", r"x.txt: no prompt is left of 2 rows \(2 empty\)"),
        ("x.txt", b"", r"x.txt: no prompt is left of 0 rows \(the file is empty\)"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        prepare_prompts(PromptsConfig(path=str(tmp_path / name)), tmp_path / "table.parquet")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_parquet_columns_that_are_not_text(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"n": [1], "broken": broken}), tmp_path / "x.parquet")
    for column, message in [
        ("n", "column n holds int64, not text"),
        ("broken", "rows from 0 on cannot be read .*'utf-8' codec can't decode"),
        ("brokn", r"no column brokn among n, broken, did you mean 'broken'\?"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare_prompts(PromptsConfig(path=str(tmp_path / "x.parquet"), column=column), tmp_path / "y.parquet")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_columns_of_every_kind_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"prompt": pa.array(["a", None, "b", "a"], kind)}), tmp_path / "x.parquet")
    report = prepare_prompts(PromptsConfig(path=str(tmp_path / "x.parquet")), tmp_path / "y.parquet")
    assert [prompt for _, prompt in rows_of(report.output)] == ["a", "b"]


def test_long_lines(prepare: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report, rows = prepare(["x" * 3_000_000, "a"], "txt")
    assert report.info.dropped["too_long"] == 1
    assert [prompt for _, prompt in rows] == ["a"]
    monkeypatch.setattr("pipeline.prompt_sources._MAX_LINE_BYTES", 1000)
    with pytest.raises(UserError, match=r"in.txt:2: a line of more than 1000 bytes"):
        prepare(["a", "x" * 1000], "txt")
    assert prepare(["a", "x" * 999], "txt")[0].info.count == 2


def test_csv_fields_are_bounded_as_lines_are(
    prepare: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "open.csv").write_bytes(b'prompt\n"' + b"a\n" * 2000)  # one field of all that follows
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.prompt_sources._MAX_LINE_BYTES", 1000)
        with pytest.raises(UserError, match=r"open.csv:\d+: field larger than .*a quote that is not closed"):
            prepare_prompts(PromptsConfig(path=str(tmp_path / "open.csv")), tmp_path / "open.parquet")
    _, rows = prepare(["x" * 200_000, "a"], "csv", max_chars=10**6)  # Python's own limit is 131,072 characters
    assert [len(prompt) for _, prompt in rows] == [200_000, 1]


def test_a_byte_order_mark_is_not_part_of_the_first_prompt(tmp_path: Path) -> None:
    for name, content in [("X.TXT", "a\n"), ("x.csv", "prompt\na\n"), ("x.jsonl", '{"prompt": "a"}\n')]:
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        report = prepare_prompts(PromptsConfig(path=str(tmp_path / name)), tmp_path / f"{name}.parquet")
        assert [prompt for _, prompt in rows_of(report.output)] == ["a"]


def test_an_output_is_never_replaced(prepare: Callable, tmp_path: Path) -> None:
    assert prepare(["a", "b"])[0].written
    table, before = tmp_path / "table.parquet", (tmp_path / "table.parquet").read_bytes()
    same = PromptsConfig(path=save(tmp_path / "same.txt", ["a", "a", "b"]))
    assert not prepare_prompts(same, table).written
    other = PromptsConfig(path=save(tmp_path / "other.txt", ["a"]))
    with pytest.raises(UserError, match=r"table.parquet: exists and does not hold these prompts"):
        prepare_prompts(other, table)
    assert table.read_bytes() == before
    save(tmp_path / "foreign.parquet", ["a"])
    with pytest.raises(UserError, match=r"foreign.parquet: exists and does not hold these prompts"):
        prepare_prompts(other, tmp_path / "foreign.parquet")
    with pytest.raises(UserError, match=r"table.csv: a prompt table is a .parquet file"):
        prepare_prompts(other, "table.csv")
