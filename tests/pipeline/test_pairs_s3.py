"""The same datasets in an object store: one code path, the same bytes."""

import pytest
from support.toy import shard_bytes, toy_config

from configs.errors import RunStopped
from configs.schema import StatusConfig, VerifyShardsConfig
from pipeline.generate import generate_pairs
from pipeline.inspect_dataset import status, verify_shards
from pipeline.shards.storage import Storage
from pipeline.teachers.mixture import MixtureTeacher


def objects(root):
    storage = Storage.open(root)
    return {info.path: storage.read(info.path) for info in storage.list()}


def shards_of(found):
    return {path.removeprefix("shards/"): data for path, data in found.items() if path.startswith("shards/")}


def test_a_run_that_fails_half_way_is_resumed_and_gives_the_local_bytes(s3_root, tmp_path, monkeypatch):
    generate_pairs(toy_config(tmp_path / "root", tmp_path))
    config = toy_config(s3_root, tmp_path)
    original = MixtureTeacher.sample

    def sample(self, *args, sample_ids, **kwargs):
        if max(sample_ids) >= 16:
            raise ValueError("the second half does not want to")
        return original(self, *args, sample_ids=sample_ids, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(MixtureTeacher, "sample", sample)
        with pytest.raises(RunStopped, match="3 of 5 shards are parked"):
            generate_pairs(config)
    before = {path: data for path, data in objects(s3_root).items() if path.startswith("commits/")}
    assert sorted(before) == ["commits/000000.json", "commits/000001.json"]
    generate_pairs(config)
    after = objects(s3_root)
    assert before.items() <= after.items()
    assert shards_of(after) == shard_bytes(tmp_path / "root")


def test_the_shards_are_those_of_a_local_run(s3_root, tmp_path, capsys):
    generate_pairs(toy_config(tmp_path / "root", tmp_path))
    generate_pairs(toy_config(s3_root, tmp_path))
    assert shards_of(objects(s3_root)) == shard_bytes(tmp_path / "root")
    capsys.readouterr()
    generate_pairs(toy_config(s3_root, tmp_path))
    assert "nothing to do" in capsys.readouterr().out
    verify_shards(VerifyShardsConfig(root=s3_root, deep=3))
    status(StatusConfig(root=s3_root))
    printed = capsys.readouterr().out
    assert "5 of 5 shards whole, 40 pairs" in printed
    assert "teacher run again on 3 samples" in printed
    assert "sealed: complete" in printed


def test_damage_in_the_store_is_found_and_repaired(s3_root, tmp_path):
    config = toy_config(s3_root, tmp_path)
    generate_pairs(config)
    storage = Storage.open(s3_root)
    (path,) = [info.path for info in storage.list("shards") if "-000003-" in info.path]
    whole = storage.read(path)
    storage.write(path, whole[:5000] + b"\xff" + whole[5001:])
    with pytest.raises(RunStopped, match="1 problems"):
        verify_shards(VerifyShardsConfig(root=s3_root))
    verify_shards(VerifyShardsConfig(root=s3_root, repair=True))
    generate_pairs(config)
    assert storage.read(path) == whole
    verify_shards(VerifyShardsConfig(root=s3_root))


def test_prompts_may_lie_in_the_store_too(s3_root, tmp_path):
    generate_pairs(toy_config(tmp_path / "root", tmp_path))
    Storage.open(s3_root).upload("table.parquet", tmp_path / "root/prompts.parquet")
    generate_pairs(toy_config(tmp_path / "again", tmp_path, prompts={"path": f"{s3_root}/table.parquet"}))
    assert shard_bytes(tmp_path / "again") == shard_bytes(tmp_path / "root")
