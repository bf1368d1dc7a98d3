"""What verify_shards and status say of a dataset, and what repair and garbage collection change: that, and no more."""

import json
import os
import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from support.forge import flip, members, recommit, record, rewrite, tar_of
from support.toy import files, shard_bytes, toy_config

from configs.errors import RunStopped, UserError
from configs.schema import StatusConfig, VerifyShardsConfig
from pipeline import lease as lease_module
from pipeline.generate import generate_pairs
from pipeline.inspect_dataset import status, verify_shards
from pipeline.lease import Lease
from pipeline.processes import process_identity
from pipeline.shards import verify as verify_module
from pipeline.shards.local_write import STAGING_PREFIX
from pipeline.shards.storage import Storage
from pipeline.teachers.mixture import MixtureTeacher


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    config = toy_config(folder / "root", folder)
    generate_pairs(config)
    return config, folder / "root"


@pytest.fixture
def root(pristine, tmp_path):
    shutil.copytree(pristine[1], tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def tomorrow(monkeypatch):
    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(UTC) + timedelta(days=1, minutes=1)

    monkeypatch.setattr(verify_module, "datetime", Tomorrow)


def check(root, **flags):
    verify_shards(VerifyShardsConfig(root=str(root), **flags))


def make_again(root, pristine):
    generate_pairs(pristine[0].model_copy(update={"output": str(root)}))
    committed = {record(root, shard)["path"].removeprefix("shards/") for shard in range(5)}
    assert {name: data for name, data in shard_bytes(root).items() if name in committed} == shard_bytes(pristine[1])
    assert files(root / "manifest").keys() == files(pristine[1] / "manifest").keys()
    check(root)


def damage(root, shard=2):
    rewrite(root, lambda data: flip(data, 1200), shard)


def swap_outputs(root, shard=2):
    """Give the samples of a shard each other's x0: every hash agrees, yet the spec does not describe them."""
    entries = members(root, shard)
    x0 = [data for name, data in entries if "x0" in name]
    forged = iter(x0[1:] + x0[:1])
    recommit(root, tar=tar_of([(n, next(forged) if "x0" in n else d) for n, d in entries]), shard=shard)
    (root / "SEALED.json").unlink()


# --------------------------------------------------------------------------------------------------------- repair


def test_repair_makes_exactly_the_damaged_shards_again(root, pristine, capsys):
    damage(root)
    (root / record(root, 4)["path"]).unlink()
    with pytest.raises(RunStopped, match=r"2 problems; --repair withdraws"):
        check(root)
    kept = {name: data for name, data in files(root / "commits").items() if name not in ("000002.json", "000004.json")}
    check(root, repair=True)
    assert files(root / "commits") == kept
    make_again(root, pristine)
    assert "5 of 5 shards whole, 40 pairs" in capsys.readouterr().out


def test_a_sealed_dataset_that_lost_a_commit_is_repaired(root, pristine):
    (root / "commits/000004.json").unlink()
    with pytest.raises(RunStopped, match="1 problems"):
        check(root)
    check(root, repair=True)
    assert not (root / "SEALED.json").exists()
    assert len(files(root / "commits")) == 4
    make_again(root, pristine)


def test_what_is_beyond_repair_is_said_and_no_shard_pays_for_it(root):
    damage(root, 3)
    path = root / "prompts.parquet"
    right = path.read_bytes()
    path.write_bytes(flip(right, len(right) // 4))
    with pytest.raises(RunStopped, match=r"1 problems; prompts.parquet is beyond repair: put the right one back"):
        check(root, repair=True)
    assert sorted(files(root / "commits")) == [f"00000{i}.json" for i in (0, 1, 2, 4)]
    path.write_bytes(right)
    check(root)


def test_repair_withdraws_shards_that_differ_from_the_teacher(root, pristine, capsys):
    swap_outputs(root)
    check(root)
    with pytest.raises(RunStopped, match=r"8 problems; --repair withdraws"):
        check(root, deep=40)
    assert "shard 2: sample 000000016 differs from the teacher" in capsys.readouterr().out
    check(root, deep=40, repair=True)
    assert sorted(files(root / "commits")) == [f"00000{i}.json" for i in (0, 1, 3, 4)]
    assert "differs from the teacher" in json.loads((root / "parked/000002.json").read_bytes())["reason"]
    make_again(root, pristine)


def test_deep_looks_at_the_whole_shards_of_a_damaged_dataset(root, capsys):
    swap_outputs(root)
    damage(root, 0)
    with pytest.raises(RunStopped, match="9 problems"):
        check(root, deep=40)
    assert "teacher run again on 32 samples" in capsys.readouterr().out


def test_rejected_samples_are_made_again_on_request(tmp_path, monkeypatch, pristine):
    original = MixtureTeacher.sample

    def sample(self, noise, *args, sample_ids, **kwargs):
        x0 = original(self, noise, *args, sample_ids=sample_ids, **kwargs)
        x0[[i in (13, 31) for i in sample_ids]] = float("nan")
        return x0

    root = tmp_path / "root"
    with monkeypatch.context() as patched:
        patched.setattr(MixtureTeacher, "sample", sample)
        generate_pairs(toy_config(root, tmp_path, runtime={"max_rejected_fraction": 0.1}))
    assert [len(record(root, shard)["rejected"]) for shard in range(5)] == [0, 1, 0, 1, 0]
    check(root, repair=True)
    assert len(files(root / "commits")) == 5
    with pytest.raises(UserError, match=r"--redo_rejected: .* add --repair"):
        check(root, redo_rejected=True)
    check(root, repair=True, redo_rejected=True)
    assert sorted(files(root / "commits")) == [f"00000{i}.json" for i in (0, 2, 4)]
    make_again(root, pristine)


# -------------------------------------------------------------------------------------------------------- garbage


def test_unreferenced_files_are_counted_and_old_ones_deleted(root, request, capsys):
    strays = [
        root / "shards/00000000-000001-000000000000.tar",
        root / "index/000001-000000000000.parquet",
        root / f"shards/{STAGING_PREFIX}0123456789abcdef",
        root / f"commits/{STAGING_PREFIX}0123456789abcdef",
    ]
    before = files(root)
    for stray in strays:
        stray.write_bytes(b"of a writer that came second, or was killed")
    check(root)
    assert "4 files are named by no commit record" in capsys.readouterr().out
    check(root, gc=True)
    assert all(stray.exists() for stray in strays)  # younger than a day: somebody may be about to commit it
    request.getfixturevalue("tomorrow")
    check(root, gc=True)
    assert files(root) == before


@pytest.mark.usefixtures("tomorrow")
def test_nothing_is_deleted_of_a_sealed_dataset_that_lost_a_commit(root):
    (root / "commits/000004.json").unlink()
    before = files(root)
    with pytest.raises(RunStopped, match=r"1 problems.*; --gc deleted nothing"):
        check(root, gc=True)
    assert files(root) == before
    with pytest.raises(RunStopped, match="--gc deleted nothing, shards were withdrawn"):
        check(root, gc=True, repair=True)
    assert files(root / "shards") == {
        name.removeprefix("shards/"): d for name, d in before.items() if "shards/" in name
    }


@pytest.mark.usefixtures("tomorrow")
@pytest.mark.parametrize("spoil", [damage, lambda r: (r / "commits/000003.json").write_text("{")])
def test_nothing_is_deleted_of_a_damaged_dataset(root, spoil):
    spoil(root)
    before = files(root)
    with pytest.raises(RunStopped, match=r"1 problems.*; --gc deleted nothing"):
        check(root, gc=True)
    assert files(root) == before


def test_garbage_of_an_unfinished_dataset_is_left_alone(root):
    (root / "SEALED.json").unlink()
    with pytest.raises(UserError, match="not sealed"):
        check(root, gc=True)


@pytest.mark.parametrize("flag", ["repair", "gc"])
def test_nobody_repairs_or_deletes_under_a_live_run(root, monkeypatch, flag):
    (root / "shards/stray.tar").write_bytes(b"")
    damage(root)
    monkeypatch.setattr(lease_module.time, "sleep", lambda _: None)
    with Lease(Storage.open(str(root)), 0.01):
        before = files(root / "commits")
        with pytest.raises(UserError, match=f"process {os.getpid()} .* is working on this output"):
            check(root, **{flag: True})
        assert files(root / "commits") == before
        with pytest.raises(RunStopped, match="1 problems"):
            check(root)  # looking is free
    assert not (root / "lease.json").exists()


# --------------------------------------------------------------------------------------------------------- status


def state(root, capsys):
    status(StatusConfig(root=str(root)))
    return capsys.readouterr().out.partition("state ")[2].strip()


def hold(root, **about):
    lease = {"id": "x", "host": socket.gethostname(), "pid": 1, "process": None, "period_s": 10.0, "beat": 17} | about
    (root / "lease.json").write_text(json.dumps(lease))


def test_status_knows_who_holds_a_dataset(root, capsys):
    assert state(root, capsys) == "sealed: complete, manifest and data card written"
    (root / "commits/000004.json").unlink()
    assert state(root, capsys) == "sealed, yet 1 commit records are lost; run verify_shards.py --repair"
    (root / "SEALED.json").unlink()
    todo = "1 shards to make, run generate_pairs.py with the same config"
    assert state(root, capsys) == f"no run holds it; {todo}"
    hold(root, host="elsewhere", pid=12)
    assert state(root, capsys) == (
        "process 12 on elsewhere holds it, heartbeat 17; should that number stand still for 30 s, it has died and the "
        "next run takes over"
    )
    hold(root, pid=os.getpid(), process=process_identity(os.getpid()))
    assert state(root, capsys).startswith(f"process {os.getpid()} on {socket.gethostname()} holds it, heartbeat 17")


def test_status_sees_that_the_owner_of_a_lease_was_killed(root, capsys):
    (root / "SEALED.json").unlink()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = process_identity(child.pid)
    child.kill()
    child.wait()
    hold(root, pid=child.pid, process=identity)
    assert state(root, capsys).startswith(f"no run holds it (process {child.pid} on {socket.gethostname()} was killed)")


def test_status_names_a_damaged_lease(root):
    (root / "SEALED.json").unlink()
    (root / "lease.json").write_text("{")
    with pytest.raises(UserError, match=r"lease.json: damaged, .* delete it"):
        status(StatusConfig(root=str(root)))


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    for look in (check, lambda root: status(StatusConfig(root=str(root)))):
        with pytest.raises(UserError, match=r"no run.json, so not a pair dataset"):
            look(tmp_path)
