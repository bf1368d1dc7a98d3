"""Selections say which samples are meant, of which dataset, and are refused when they do not."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from pipeline.shards import selection
from pipeline.shards.selection import read_selection, write_selection

FINGERPRINT = "ab" * 32


def write(path, ids, **changes):
    return write_selection(
        str(path), np.array(ids, np.int64), fingerprint=FINGERPRINT, query="all good ones", **changes
    )


@settings(max_examples=30)
@given(st.sets(st.integers(0, 999_999_999), min_size=1, max_size=100), st.integers(1, 50))
def test_round_trip_and_digest(tmp_path_factory, ids, rows):
    path, ids = tmp_path_factory.mktemp("s") / "selection.parquet", sorted(ids)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(selection, "_ROWS", rows)
        info = write(path, ids)
        found = read_selection(str(path), FINGERPRINT)
    keys = [f"{i:09d}" for i in ids]
    assert found.sample_ids.tolist() == ids
    assert found.sample_ids.dtype == np.int64
    assert found.digest == info.digest == hashlib.sha256("\n".join(keys).encode()).hexdigest()
    assert pq.read_table(path)["key"].to_pylist() == keys
    assert (info.count, info.query, info.format_version) == (len(ids), "all good ones", 1)


def test_a_million_keys(tmp_path):
    ids = np.arange(0, 3_000_000, 3)
    write(tmp_path / "s.parquet", ids)
    np.testing.assert_array_equal(read_selection(str(tmp_path / "s.parquet"), FINGERPRINT).sample_ids, ids)


def test_in_an_object_store(s3_root):
    write(f"{s3_root}/s.parquet", [3, 7])
    assert read_selection(f"{s3_root}/s.parquet", FINGERPRINT).sample_ids.tolist() == [3, 7]


@pytest.mark.parametrize("ids", [[2, 1], [1, 1], [-1, 0], [0, 10**9]])
def test_ids_that_are_no_selection_are_not_written(tmp_path, ids):
    with pytest.raises(ValueError, match="strictly increasing"):
        write(tmp_path / "s.parquet", ids)


def refusal(path, fingerprint=FINGERPRINT):
    with pytest.raises(UserError) as caught:
        read_selection(str(path), fingerprint)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text


def forge(path, keys, **changes):
    """A selection with other keys than its footer speaks of, or another footer."""
    footer = json.dumps(write(path, [1, 2, 3]).model_dump() | changes)
    with pq.ParquetWriter(path, pa.schema([("key", pa.string())])) as writer:
        writer.write_table(pa.table({"key": pa.array(keys, pa.string())}))
        writer.add_key_value_metadata({"potstill.selection": footer})
    return path


def test_what_is_refused(tmp_path):
    path = tmp_path / "s.parquet"
    assert "no such file" in refusal(path)
    write(path, [])
    assert "selects no sample" in refusal(path)
    write(path, [1, 2, 3])
    assert "selects from dataset abababababab, and this is cdcdcdcdcdcd" in refusal(path, "cd" * 32)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert "damaged" in refusal(path)
    pq.write_table(pa.table({"key": ["000000001"]}), path)
    assert "not a selection" in refusal(path)
    assert "damaged" in refusal(forge(path, ["000000001", "two", "000000003"]))
    assert "damaged" in refusal(forge(path, ["000000001", None, "000000003"]))
    unordered = ["000000001", "000000003", "000000002"]
    digest = hashlib.sha256("\n".join(unordered).encode()).hexdigest()
    assert "not in order" in refusal(forge(path, unordered, digest=digest))
    assert "not those of its digest" in refusal(forge(path, ["000000001", "000000002", "000000004"]))
    assert "not those of its digest" in refusal(forge(path, ["000000001", "000000002"]))
    assert "format 2, this code knows 1 only" in refusal(forge(path, ["000000001"], format_version=2))
    forge(path, ["000000001"], count="many")
    assert "footer is damaged" in refusal(path)
