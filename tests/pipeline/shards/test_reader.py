"""The reader gives what the shards hold, every sample once an epoch, or says which shard is damaged."""

import gc
import io
import json
import os
import shutil
import threading
import time
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.forge import SHARD, flip, index_with, members, recommit, record, reindexed, rewrite, tar_of
from support.latents import write_latents
from support.patience import PATIENCE_S
from support.toy import samples, toy_config

from configs.errors import RunStopped, UserError
from pipeline.generate import generate_pairs
from pipeline.noise import noise
from pipeline.shards.members import decode_array, decode_image
from pipeline.shards.open_shard import ShardOpener
from pipeline.shards.reader import PairReader
from pipeline.shards.records import DamagedRecord
from pipeline.shards.selection import write_selection
from pipeline.shards.storage import Storage
from pipeline.shards.writer import DamagedShard


def open_reader(root, **changes):
    defaults = {
        "seed": 5,
        "window": 2,
        "holdout": 0,
        "selection": None,
        "cache_folder": os.devnull,
        "cache_bytes": 10**9,
        "allow_partial": False,
    }
    return PairReader(str(root), **{**defaults, **changes})


def epoch(reader, number=0, batch=7):
    """All pairs of an epoch as (key, noise, target, prompt), read in batches."""
    start, stop = number * reader.num_samples, (number + 1) * reader.num_samples
    found = []
    for first in range(start, stop, batch):
        pairs = reader.read(range(first, min(first + batch, stop)))
        found += zip(pairs.keys, pairs.noise, pairs.target, pairs.prompts, strict=True)
    return found


def select(folder, ids, root):
    fingerprint = json.loads((root / "run.json").read_bytes())["fingerprint"]
    write_selection(str(folder / "some.parquet"), np.array(sorted(ids)), fingerprint=fingerprint, query="")
    return str(folder / "some.parquet")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    generate_pairs(toy_config(folder / "root", folder))
    return folder / "root"


@pytest.fixture
def root(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "root")
    return tmp_path / "root"


# ----------------------------------------------------------------------------------------------------------- contents


FIELDS = {
    "as a run writes them": {"x0": "pixels"},
    "without noise": {"x0": "pixels", "noise": False},
    "x0 in float32": {"x0": "pixels", "x0_dtype": "float32", "image": "none", "prompt": False},
    "images only": {"x0": "none", "image": "webp"},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_contents_are_those_of_the_shards(tmp_path, fields):
    root = tmp_path / "root"
    config = toy_config(root, tmp_path)
    spec = config.spec.model_copy(update={"fields": config.spec.fields.model_copy(update=fields)})
    generate_pairs(config.model_copy(update={"spec": spec}))
    reader, expected = open_reader(root), samples(root)
    assert reader.target == ("image" if fields["x0"] == "none" else "x0")
    found = epoch(reader)
    assert sorted(key for key, *_ in found) == sorted(expected)
    for key, z, target, prompt in found:
        stored, row = expected[key]
        z_expected = decode_array(stored["noise.npy"]) if "noise.npy" in stored else noise(7, int(key), (3, 8, 8))
        assert z.dtype == torch.float16
        np.testing.assert_array_equal(z.numpy(), z_expected)
        assert prompt == row["prompt"]
        if reader.target == "x0":
            x0 = decode_array(stored["x0.npy"])
            assert target.numpy().dtype == x0.dtype
            np.testing.assert_array_equal(target.numpy(), x0)
        else:
            image = decode_image(stored["webp"]).transpose(2, 0, 1).astype(np.float64) / 127.5 - 1
            assert target.dtype == torch.float32
            np.testing.assert_allclose(target.numpy(), image, atol=1e-7)
            assert target.abs().max() <= 1


def test_targets_of_a_latent_teacher(tmp_path):
    write_latents(tmp_path / "latent", tmp_path, num_samples=6, samples_per_shard=4)
    pairs = open_reader(tmp_path / "latent").read(range(6))
    torch.testing.assert_close(pairs.target, pairs.noise + 1, rtol=0, atol=0)
    fields = {"x0": "none", "image": "png"}
    write_latents(tmp_path / "image", tmp_path, num_samples=6, samples_per_shard=4, fields=fields)
    reader = open_reader(tmp_path / "image")
    pairs = reader.read(range(6))
    assert (reader.target, pairs.target.shape) == ("image", (6, 3, 8, 8))
    expected = torch.tensor([int(key) / 127.5 - 1 for key in pairs.keys])
    torch.testing.assert_close(pairs.target, expected[:, None, None, None].expand(6, 3, 8, 8))


def test_npy_members_of_another_writer(root):
    # Format 2.0 is as good an .npy file, and its header is longer.
    def rewritten(name, data):
        if not name.endswith(".npy"):
            return data
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, decode_array(data), version=(2, 0))
        return buffer.getvalue()

    before = {key: (z, target) for key, z, target, _ in epoch(open_reader(root))}
    tar = tar_of((name, rewritten(name, data)) for name, data in members(root))
    recommit(root, tar, reindexed(root, tar))
    (root / "SEALED.json").unlink()
    for key, z, target, _ in epoch(open_reader(root, allow_partial=True)):
        assert torch.equal(z, before[key][0])
        assert torch.equal(target, before[key][1])


# -------------------------------------------------------------------------------------------------------------- order


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 5), st.integers(1, 12), st.data())
def test_every_training_sample_once_an_epoch(tmp_path_factory, num_samples, per_shard, window, batch, data):
    folder = tmp_path_factory.mktemp("d")
    rejected = data.draw(st.frozensets(st.integers(0, num_samples - 1), max_size=num_samples - 1))
    write_latents(folder / "root", folder, num_samples=num_samples, samples_per_shard=per_shard, rejected=rejected)
    stored = sorted(set(range(num_samples)) - rejected)
    holdout = data.draw(st.integers(0, len(stored) - 1))
    reader = open_reader(folder / "root", window=window, holdout=holdout)
    held_out = reader.held_out().keys
    assert reader.num_samples == len(stored) - holdout
    for number in range(2):
        keys = [key for key, *_ in epoch(reader, number, batch)]
        assert sorted([*map(int, keys), *map(int, held_out)]) == stored


def test_the_stream_is_the_same_from_any_position_in_any_batches(root):
    whole = [key for number in range(3) for key, *_ in epoch(open_reader(root, holdout=3), number)]
    assert [key for number in range(3) for key, *_ in epoch(open_reader(root, holdout=3), number, batch=50)] == whole
    assert open_reader(root, holdout=3).read(range(50, 90)).keys == whole[50:90]
    assert open_reader(root, holdout=3).read([80, 3, 3]).keys == [whole[80], whole[3], whole[3]]
    assert whole[:37] != whole[37:74]
    assert [key for key, *_ in epoch(open_reader(root, holdout=3, seed=6))] != whole[:37]


def test_held_out_pairs(root):
    held_out = open_reader(root, holdout=4).held_out()
    assert held_out.keys == ["000000005", "000000015", "000000025", "000000035"]
    expected = samples(root)
    for key, z, x0, prompt in zip(held_out.keys, held_out.noise, held_out.target, held_out.prompts, strict=True):
        np.testing.assert_array_equal(z.numpy(), decode_array(expected[key][0]["noise.npy"]))
        np.testing.assert_array_equal(x0.numpy(), decode_array(expected[key][0]["x0.npy"]))
        assert prompt == expected[key][1]["prompt"]
    assert open_reader(root).held_out().keys == []


def test_a_selection_restricts_samples_and_held_out_ones(root, tmp_path):
    ids = {1, 2, 3, 5, 8, 13, 21, 34}
    reader = open_reader(root, selection=select(tmp_path, ids, root), holdout=2)
    held_out = {int(key) for key in reader.held_out().keys}
    assert held_out == {3, 21}
    for number in range(2):
        assert sorted(int(key) for key, *_ in epoch(reader, number)) == sorted(ids - held_out)
    assert list(reader.prompt_rows) == [0, 1, 2, 4]
    assert open_reader(root).prompt_rows == range(5)


# ------------------------------------------------------------------------------------------------------------- damage


def stopped(root, **changes):
    """How an epoch ends, and the keys that were read until then."""
    seen = []
    reader = open_reader(root, window=1, **changes)
    with pytest.raises(DamagedShard) as caught:
        seen.extend(key for position in range(reader.num_samples) for key in reader.read([position]).keys)
    return str(caught.value), {int(key) // 8 for key in seen}


def test_damage_to_a_tar_stops_before_its_first_sample(root):
    rewrite(root, lambda data: flip(data, 2 * 512 + 200))
    text, shards = stopped(root)
    assert text.startswith(f"shard {SHARD}: {record(root)['path']} is damaged")
    assert text.endswith(
        f"run `python stages/verify_shards.py {root} --repair`, then generate_pairs.py again, to have it made anew"
    )
    assert SHARD not in shards


def test_a_missing_tar_or_index_is_named_with_the_repair(root):
    (root / record(root)["path"]).unlink()
    text, shards = stopped(root)
    assert text.startswith(f"shard {SHARD}: {record(root)['path']} is missing; run `python stages/verify_shards.py")
    assert SHARD not in shards
    (root / record(root, 3)["index_path"]).unlink()
    (root / record(root, 1)["index_path"]).write_bytes(b"no index")
    with pytest.raises(DamagedShard, match=r"shard [123]: .*--repair"):
        epoch(open_reader(root, window=1))
    with pytest.raises(DamagedShard, match=r"shard 1: index/.* is damaged.*--repair"):
        open_reader(root, holdout=4).held_out()


def test_an_index_that_is_not_that_of_the_tar_is_found(root):
    # Record, index and tar have the right sha256: what they say of each other is wrong.
    (root / "SEALED.json").unlink()
    edits = {
        "offset": lambda column: [*column[1:], column[0]],
        "length": lambda column: [length + 512 for length in column],
        "key": lambda column: [*column[1:], "000000099"],
        "status": lambda column: ["rejected", *column[1:]],
    }
    whole = pq.read_table(root / record(root)["index_path"])
    for column, edit in edits.items():
        recommit(root, index=index_with(root, column, edit))
        text, shards = stopped(root, allow_partial=True)
        assert text.startswith(f"shard {SHARD}: ")
        assert "--repair" in text
        assert SHARD not in shards
        recommit(root, index=whole)
    assert len(epoch(open_reader(root, allow_partial=True))) == 40


def test_arrays_of_another_shape_and_other_noise_are_found(root, tmp_path):
    (root / "SEALED.json").unlink()
    wrong = {"x0.npy": np.zeros((3, 4, 4), np.float16), "noise.npy": np.zeros((3, 8, 8), np.float32)}
    whole = members(root)
    for suffix, array in wrong.items():
        np.save(tmp_path / "wrong.npy", array)
        data = (tmp_path / "wrong.npy").read_bytes()
        tar = tar_of((name, data if name.endswith(suffix) else old) for name, old in whole)
        recommit(root, tar, reindexed(root, tar))
        assert f"shard {SHARD}: sample 0000000" in stopped(root, allow_partial=True)[0]
    write_latents(tmp_path / "n", tmp_path, num_samples=24, samples_per_shard=8, fields={"noise": False})
    (tmp_path / "n" / "SEALED.json").unlink()
    recommit(tmp_path / "n", index=index_with(tmp_path / "n", "noise_digest", lambda c: c[::-1]))
    assert "its noise is not that of the index" in stopped(tmp_path / "n", allow_partial=True)[0]


@pytest.mark.parametrize("missing", ["all", "half of the last array"])
def test_a_tar_that_shrinks_while_it_is_open_is_found(root, missing):
    reader = open_reader(root, window=5)
    reader.read(range(40))
    for shard in range(5):
        path = root / record(root, shard)["path"]
        index = pq.read_table(root / record(root, shard)["index_path"]).to_pylist()
        os.truncate(path, 0 if missing == "all" else index[-1]["offset"] + index[-1]["length"] - 192)
    with pytest.raises(DamagedShard, match=r"^shard \d: sample 0000000\d\d: .*--repair"):
        epoch(reader, 1)


def test_edited_records_are_found_at_opening(root):
    path = root / f"commits/{SHARD:06d}.json"
    whole = json.loads(path.read_bytes())
    edits = [
        ({"sha256": "0" * 64}, "content_sha256 of SEALED.json is not that of the commit records"),
        ({"num_samples": 7}, "does not count its samples right"),
        ({"fingerprint": "0" * 64}, "belongs to dataset 000000000000"),
        ({"extra": 1}, "not a commit record"),
    ]
    for changes, message in edits:
        path.write_text(json.dumps(whole | changes))
        with pytest.raises(DamagedRecord, match=f"{message}.*--repair"):
            open_reader(root)
    path.unlink()
    with pytest.raises(DamagedRecord, match=r"num_shards of SEALED.json is not that of the commit records.*--repair"):
        open_reader(root)


# ----------------------------------------------------------------------------------------------------- user's mistakes


def test_what_cannot_be_read_is_refused_at_opening(root, tmp_path):
    def refusal(**changes):
        with pytest.raises(UserError) as caught:
            open_reader(**{"root": root, **changes})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "not a pair dataset" in refusal(root=tmp_path / "nowhere")
    assert "not an absolute path" in refusal(root="relative")
    assert "data.holdout: 40 pairs" in refusal(holdout=40)
    assert "no such file" in refusal(selection=str(tmp_path / "none.parquet"))
    write_selection(str(tmp_path / "other.parquet"), np.array([1]), fingerprint="0" * 64, query="")
    assert "selects from dataset 000000000000" in refusal(selection=str(tmp_path / "other.parquet"))
    assert "selects no sample" in refusal(selection=select(tmp_path, [], root))
    assert "1 of its samples are not in" in refusal(selection=select(tmp_path, [3, 40], root))
    (root / "SEALED.json").unlink()
    (root / f"commits/{SHARD:06d}.json").unlink()
    assert "is not finished, 4 of 5 shards exist; let generate_pairs.py end, or set data.allow_partial" in refusal()
    partial = open_reader(root, allow_partial=True)
    assert {int(key) // 8 for key, *_ in epoch(partial)} == {0, 1, 3, 4}
    assert "8 of its samples" in refusal(allow_partial=True, selection=select(tmp_path, range(40), root))
    for path in (root / "commits").iterdir():
        path.unlink()
    assert "no shard exists yet" in refusal(allow_partial=True)


# ----------------------------------------------------------------------------------------------------- remote, memory


def test_a_remote_dataset_gives_the_stream_of_a_local_one(s3_root, tmp_path):
    for root in (s3_root, tmp_path / "root"):
        write_latents(root, tmp_path, num_samples=30, samples_per_shard=4)
    remote = open_reader(s3_root, holdout=3, cache_folder=tmp_path / "cache", cache_bytes=70_000)
    local = open_reader(tmp_path / "root", holdout=3)
    assert (remote.content_sha256, remote.run.fingerprint) == (local.content_sha256, local.run.fingerprint)
    for number in range(2):
        for a, b in zip(epoch(remote, number), epoch(local, number), strict=True):
            assert (a[0], a[3]) == (b[0], b[3])
            torch.testing.assert_close(a[1:3], b[1:3], rtol=0, atol=0)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 70_000
    storage = Storage.open(s3_root)
    (path,) = [info.path for info in storage.list("shards") if "-000003-" in info.path]
    storage.write(path, flip(storage.read(path), 700))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(RunStopped, match=r"^shard 3: .* is damaged.*verify_shards.py 's3://[^']*' --repair"):
        epoch(open_reader(s3_root, cache_folder=tmp_path / "cache"))


def test_the_next_window_is_opened_while_this_one_is_read(tmp_path, monkeypatch):
    write_latents(tmp_path / "root", tmp_path, num_samples=32, samples_per_shard=2)
    opened, original = [], ShardOpener.open

    def spy(self, unit):
        opened.append((unit, threading.current_thread() is threading.main_thread()))
        return original(self, unit)

    monkeypatch.setattr(ShardOpener, "open", spy)
    reader = open_reader(tmp_path / "root", window=4)
    coming = list(dict.fromkeys(int(key) // 2 for key, *_ in epoch(open_reader(tmp_path / "root", window=4))))
    opened.clear()
    reader.read([0])
    for unit in coming[4:8]:
        reader._shards.get(unit)
    assert {unit for unit, _ in opened} == set(coming[:8])
    assert not any(in_main for _, in_main in opened)
    epoch(reader)
    seen = list(opened)
    following = dict.fromkeys(int(key) // 2 for key, *_ in epoch(open_reader(tmp_path / "root", window=4), 1))
    times = Counter(unit for unit, _ in seen)
    assert set(times) == set(range(16))
    assert max(times.values()) <= 2
    assert {unit for unit in times if times[unit] > 1} <= set(list(following)[:4])  # once each; the next window again


def test_open_files_and_threads_are_bounded_and_given_back(tmp_path):
    def count():
        return sum(
            os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(tmp_path)) for fd in os.listdir("/proc/self/fd")
        )

    write_latents(tmp_path / "root", tmp_path, num_samples=60, samples_per_shard=1)
    others = set(threading.enumerate())  # of earlier tests, and free to end meanwhile
    reader = open_reader(tmp_path / "root", window=3)
    for number in range(2):
        for first in range(number * 60, number * 60 + 60, 20):  # a batch takes seven windows
            reader.read(range(first, first + 20))
            assert 1 <= count() <= 2 * 3 + 1
    del reader
    gc.collect()
    deadline = time.monotonic() + PATIENCE_S
    while (set(threading.enumerate()) - others or count()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (set(threading.enumerate()) - others, count()) == (set(), 0)
