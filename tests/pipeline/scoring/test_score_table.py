"""Tables say whose values they hold, come back as they were written, and are refused when they are not those."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.toy import files

from configs.errors import UserError
from pipeline.scoring.score_table import (
    claim,
    create_table,
    read_column,
    read_record,
    read_scores,
    record_of,
    score_names,
    table_path,
)
from pipeline.shards.dataset import Dataset
from pipeline.shards.manifest import read_commits
from pipeline.shards.storage import Storage
from pipeline.shards.writer import DamagedShard

COLUMNS = {"clip": None, "features": 4}
COUNTS = [7, 8, 0, 8, 8]


def scorer(**identity):
    return SimpleNamespace(identity={"kind": "fake", **identity}, columns=COLUMNS)


def fill(dataset, name="fake", values=None, **identity):
    """Write a table for every shard; ``values`` are those of all stored samples."""
    record = record_of(dataset, name, scorer(**identity))
    claim(dataset, record)
    clip, features = values or (np.arange(31, dtype=np.float32), np.zeros((31, 4), np.float32))
    ends = np.cumsum(COUNTS)
    for commit, end, count in zip(read_commits(dataset), ends, COUNTS, strict=True):
        rows = slice(end - count, end)
        create_table(dataset, record, commit, {"features": features[rows], "clip": clip[rows]})
    return record


def float32(shape):
    return hnp.arrays(np.float32, shape, elements=st.floats(width=32, allow_nan=False))


@settings(max_examples=10)
@given(float32(31), float32((31, 4)))
def test_values_come_back_bit_by_bit(pristine, tmp_path_factory, clip, features):
    root = tmp_path_factory.mktemp("t")
    for name, data in files(pristine).items():
        if not name.startswith(("shards", "previews")):  # tables outlive the images
            (root / name).parent.mkdir(exist_ok=True, parents=True)
            (root / name).write_bytes(data)
    dataset = Dataset.open(Storage.open(str(root)))
    fill(dataset, values=(clip, features))
    assert read_column(dataset, "fake", "clip").tobytes() == clip.tobytes()
    assert read_column(dataset, "fake", "features").tobytes() == features.tobytes()


def test_a_table_names_its_shard_and_its_scorer(root, dataset):
    record = fill(dataset)
    commit = read_commits(dataset)[1]
    footer = json.loads(pq.read_metadata(root / table_path("fake", commit)).metadata[b"potstill.scores"])
    assert footer == {
        "format_version": 1,
        "name": "fake",
        "fingerprint": dataset.run.fingerprint,
        "shard_sha256": commit.sha256,
        "digest": record.digest,
        "identity": {"kind": "fake"},
    }
    assert table_path("fake", commit) == f"scores/fake/000001-{commit.sha256[:12]}.parquet"
    assert score_names(dataset) == ["fake"]
    assert read_record(dataset, "fake") == record


def test_only_the_columns_that_are_asked_for_are_read(dataset):
    fill(dataset)
    assert [table.column_names for table in read_scores(dataset, "fake", ["clip"])] == [["key", "clip"]] * 5
    assert [len(table) for table in read_scores(dataset, "fake")] == COUNTS
    with pytest.raises(UserError, match="fake: has no column feature, did you mean 'features'"):
        read_scores(dataset, "fake", ["feature"])


def test_a_table_is_never_replaced(root, dataset):
    record = fill(dataset)
    before = files(root)
    commit = read_commits(dataset)[0]
    other = {"clip": np.ones(7, np.float32), "features": np.ones((7, 4), np.float32)}
    assert create_table(dataset, record, commit, other) is False
    claim(dataset, record)
    with pytest.raises(UserError, match="model is None there, 'B' here"):
        claim(dataset, record_of(dataset, "fake", scorer(model="B")))
    assert files(root) == before


def test_a_shard_that_was_made_again_has_no_scores(root, dataset):
    fill(dataset)
    path = root / "commits/000003.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"sha256": "0" * 64}))
    with pytest.raises(UserError, match="1 of 5 shards have no scores, the first is 3"):
        read_scores(dataset, "fake")


def test_tables_that_are_not_the_right_ones_are_refused(root, dataset):
    fill(dataset)
    fill(dataset, "other", model="B")
    first, second, *_, last = [root / table_path("fake", commit) for commit in read_commits(dataset)]
    whole = second.read_bytes()
    for data, message in (
        (whole[:-9], "shard 1: .* is no table of scores"),
        (first.read_bytes(), "shard 1: .* is of another shard or another scorer"),
        (last.read_bytes(), "shard 1: .* is of another shard or another scorer"),
        ((root / "scores/other" / second.name).read_bytes(), "shard 1: .* is of another shard or another scorer"),
    ):
        second.write_bytes(data)
        with pytest.raises(DamagedShard, match=message):
            list(read_scores(dataset, "fake"))
    table = pq.read_table(last)
    for forged in (table.slice(1), table.select(["key", "clip"])):
        second.write_bytes(whole)
        pq.write_table(forged, last)  # with the footer of the right one
        with pytest.raises(DamagedShard, match="shard 4: "):
            list(read_scores(dataset, "fake"))


def test_a_name_without_scores_is_one_line(root, dataset):
    with pytest.raises(UserError, match="no scores of this name, there are none; make them with score_pairs"):
        read_scores(dataset, "clap")
    fill(dataset, "clip")
    with pytest.raises(UserError, match="there are clip, did you mean 'clip'"):
        read_scores(dataset, "clap")
    record = root / "scores/clip/scorer.json"
    about = json.loads(record.read_bytes())
    for changes in ({"format_version": 2}, {"fingerprint": "0" * 64}, {"digest": None}):
        record.write_text(json.dumps(about | changes))
        with pytest.raises(UserError, match="another version"):
            read_scores(dataset, "clip")
