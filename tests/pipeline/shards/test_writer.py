import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.shards.layout import IndexRow, commit_path, key
from pipeline.shards.members import decode_array, split_members
from pipeline.shards.records import Commit, DamagedRecord, Timing
from pipeline.shards.storage import Storage
from pipeline.shards.writer import DamagedShard, ShardWriter, commit_shard, encode_index

TIMING = Timing(
    attempt=1, host="h", device="cpu", started="now", sample_seconds=0, total_seconds=0, code_revision="r", versions={}
)


def row(sample_id, status="ok", reason=""):
    return IndexRow(
        key=key(sample_id), shard=0, row=-1, offset=-1, length=0, prompt_id="p", prompt="a cat", prompt_truncated=False,
        seed=0, noise_digest="d", guidance_scale=1.0, made_in_float32=False, status=status, reason=reason,
    )  # fmt: skip


def write(path, contents, rejected=()):
    with ShardWriter(path) as writer:
        for sample_id, members in enumerate(contents):
            if sample_id in rejected:
                writer.reject(row(sample_id, "rejected", "why not"))
            else:
                writer.add(row(sample_id), members)
        written = writer.finish()
        return written, path.read_bytes()


members = st.dictionaries(
    st.sampled_from(["json", "txt", "x0.npy", "noise.npy", "png"]), st.binary(max_size=1500), min_size=1
)


@settings(max_examples=40, deadline=None)
@given(st.lists(members, min_size=1, max_size=6), st.sets(st.integers(0, 5)))
def test_every_sample_lies_where_the_index_says(tmp_path_factory, contents, rejected):
    path = tmp_path_factory.mktemp("shard") / "a.tar"
    written, tar = write(path, contents, rejected)
    assert [r.key for r in written.rows] == [key(i) for i in range(len(contents))]
    stored = [r for r in written.rows if r.status == "ok"]
    assert [r.row for r in stored] == list(range(len(stored)))
    for r in stored:
        assert split_members(tar[r.offset : r.offset + r.length]) == contents[int(r.key)]
    for before, after in pairwise(stored):
        assert before.offset + before.length == after.offset
    for r in written.rows:
        assert (r.status == "rejected") == (int(r.key) in rejected)


def test_bytes_depend_on_the_content_alone(tmp_path):
    contents = [{"json": b"{}", "txt": b"x" * i} for i in range(5)]
    first = write(tmp_path / "a.tar", contents)
    second = write(tmp_path / "b.tar", contents)
    assert first[1] == second[1]
    assert first[0].sha256 == second[0].sha256
    with tarfile.open(fileobj=io.BytesIO(first[1])) as tar:
        assert {(m.mtime, m.uname, m.gname, m.uid, m.gid) for m in tar} == {(0, "", "", 0, 0)}


def test_an_error_leaves_nothing_behind(tmp_path):
    with ShardWriter(tmp_path / "a.tar") as writer, pytest.raises(ValueError, match="doesn't map to a bytes"):
        writer.add(row(0), {"txt": 5})
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_back_is_not_published(tmp_path):
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.add(row(0), {"txt": b"x"})
        writer._tar.write({"__key__": key(7), "txt": b"a sample nobody asked for"})
        with pytest.raises(DamagedShard, match="1 samples were written, 2 can be read back"):
            writer.finish()


def commit(root, tmp_path, content, name):
    with ShardWriter(tmp_path / name) as writer:
        writer.add(row(0), {"txt": content})
        return commit_shard(Storage.open(str(root)), "f" * 64, 0, writer.finish(), TIMING)


@pytest.mark.parametrize("same_bytes", [True, False])
def test_the_first_commit_wins_and_its_files_stay(tmp_path, same_bytes):
    root = tmp_path / "root"
    contents = [b"same"] * 8 if same_bytes else [b"other %d" % i for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        commits = list(pool.map(lambda i: commit(root, tmp_path, contents[i], f"{i}.tar"), range(8)))
    storage = Storage.open(str(root))
    (standing,) = {c.sha256 for c in commits}
    record = Commit.from_json(storage.read(commit_path(0)), commit_path(0))
    assert record.sha256 == standing
    assert [info.path for info in storage.list("commits/")] == [commit_path(0)]
    tar = storage.read(record.path)
    index = pq.read_table(io.BytesIO(storage.read(record.index_path))).to_pylist()
    assert split_members(tar[index[0]["offset"] : index[0]["offset"] + index[0]["length"]])["txt"] in contents
    assert len(list(storage.list("shards/"))) == (1 if same_bytes else 8)


def test_the_index_is_reproducible():
    rows = [row(i) for i in range(10)]
    assert encode_index(rows) == encode_index(rows)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda record: record | {"surprise": 1}, "not a commit record"),
        (lambda record: {k: v for k, v in record.items() if k != "sha256"}, "not a commit record"),
        (lambda record: record | {"shard": 3}, "holds the commit record of shard 3"),
    ],
)
def test_an_edited_commit_record_is_damage(tmp_path, edit, message):
    record = json.loads(commit(tmp_path / "root", tmp_path, b"x", "a.tar").to_json())
    with pytest.raises(DamagedRecord, match=message):
        Commit.from_json(json.dumps(edit(record)).encode(), commit_path(0))


def test_pickled_arrays_are_refused():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        decode_array(buffer.getvalue())
