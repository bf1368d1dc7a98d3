"""A tar that is opened has the bytes that were committed; remote ones are fetched once and kept within the limit."""

import os
import subprocess
import sys
import threading
import time
from itertools import chain
from pathlib import Path

import pytest
from support.forge import flip
from support.latents import write_latents
from support.patience import PATIENCE_S

from configs.errors import RunStopped, UserError
from pipeline.shards import shard_cache
from pipeline.shards.dataset import Dataset
from pipeline.shards.shard_cache import ShardCache
from pipeline.shards.storage import Storage
from pipeline.shards.writer import DamagedShard


@pytest.fixture
def local(tmp_path):
    write_latents(tmp_path / "root", tmp_path, num_samples=12, samples_per_shard=3)
    return Dataset.open(Storage.open(str(tmp_path / "root")))


@pytest.fixture
def remote(s3_root, tmp_path):
    write_latents(s3_root, tmp_path, num_samples=12, samples_per_shard=3)
    return Dataset.open(Storage.open(s3_root))


def cache_of(dataset, tmp_path, max_bytes=10**9):
    return ShardCache(dataset.storage, tmp_path / "cache", max_bytes)


def content(cache, commit):
    with cache.open(commit) as file:
        return os.pread(file.fileno(), 10**9, 0)


def names(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def name_of(commit):
    return commit.path.removeprefix("shards/")


@pytest.fixture
def downloads(monkeypatch):
    """Paths that are downloaded."""
    log = []
    original = Storage.download

    def download(self, path, local):
        log.append(path)
        original(self, path, local)

    monkeypatch.setattr(Storage, "download", download)
    return log


def test_local_shards_are_read_in_place(local, tmp_path, downloads):
    cache = cache_of(local, tmp_path)
    for shard in range(4):
        commit = local.commit(shard)
        assert content(cache, commit) == local.storage.read(commit.path)
    assert downloads == []
    assert not (tmp_path / "cache").exists()


DAMAGE = {
    "a byte is flipped": (lambda data: flip(data, 700), "is damaged: its sha256 is not the one recorded"),
    "the end is missing": (lambda data: data[:-512], "is damaged: 19,968 bytes of 20,480; its sha256"),
    "the shard is missing": (None, "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["local", "remote"])
def test_damage_is_found_before_a_byte_is_used(request, kind, damage, tmp_path):
    dataset = request.getfixturevalue(kind)
    commit = dataset.commit(2)
    edit, message = DAMAGE[damage]
    whole = dataset.storage.read(commit.path)
    dataset.storage.delete(commit.path)
    if edit is not None:
        dataset.storage.write(commit.path, edit(whole))
    cache = cache_of(dataset, tmp_path)
    with pytest.raises(DamagedShard) as caught:
        cache.open(commit)
    assert str(caught.value).startswith(f"shard 2: {commit.path} {message}")
    if kind == "remote":
        assert names(tmp_path) == [".lock"]
    content(cache, dataset.commit(1))  # the others are fine


def test_a_shard_is_hashed_once_and_again_when_its_file_changes(local, tmp_path, monkeypatch):
    cache, commit = cache_of(local, tmp_path), local.commit(0)
    hashed = []
    original = shard_cache.hashlib.file_digest
    monkeypatch.setattr(shard_cache.hashlib, "file_digest", lambda *a: hashed.append(1) or original(*a))
    content(cache, commit)
    content(cache, commit)
    assert len(hashed) == 1
    path = Path(local.storage.uri) / commit.path
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(flip(data, 700))
    with pytest.raises(DamagedShard):
        cache.open(commit)
    path.write_bytes(data)
    assert content(cache, commit) == data


def test_remote_shards_are_downloaded_once(remote, tmp_path, downloads):
    commits = [remote.commit(shard) for shard in range(4)]
    for _ in range(2):
        for cache in (cache_of(remote, tmp_path), cache_of(remote, tmp_path)):
            for commit in commits:
                assert content(cache, commit) == remote.storage.read(commit.path)
    assert downloads == [commit.path for commit in commits]
    assert names(tmp_path) == [".lock", *(name_of(commit) for commit in commits)]


def test_a_damaged_copy_is_fetched_again(remote, tmp_path, downloads):
    commit = remote.commit(0)
    whole = content(cache_of(remote, tmp_path), commit)
    (tmp_path / "cache" / name_of(commit)).write_bytes(flip(whole, 700))
    assert content(cache_of(remote, tmp_path), commit) == whole
    assert len(downloads) == 2


def test_the_shards_opened_longest_ago_go_first(remote, tmp_path, downloads):
    commits = [remote.commit(shard) for shard in range(4)]
    cache = cache_of(remote, tmp_path, max_bytes=2 * commits[0].num_bytes)
    for shard in (0, 1, 0, 2):  # 1 was opened longest ago when 2 comes
        content(cache, commits[shard])
    assert names(tmp_path) == [".lock", name_of(commits[0]), name_of(commits[2])]
    content(cache, commits[3])
    assert names(tmp_path) == [".lock", name_of(commits[2]), name_of(commits[3])]
    tiny = cache_of(remote, tmp_path, max_bytes=1)  # room for none: the newest stays, the others go
    with tiny.open(commits[0]) as kept:
        content(tiny, commits[1])
        assert names(tmp_path) == [".lock", name_of(commits[1])]
        assert os.pread(kept.fileno(), 10**9, 0) == remote.storage.read(commits[0].path)
    assert downloads[-2:] == [commits[0].path, commits[1].path]


OPEN_ALL = """
import sys
from pathlib import Path
from pipeline.shards.dataset import Dataset
from pipeline.shards.shard_cache import ShardCache
from pipeline.shards.storage import Storage

original = Storage.download
def download(self, path, local):
    print(path, flush=True)
    original(self, path, local)
Storage.download = download
dataset = Dataset.open(Storage.open(sys.argv[1]))
cache = ShardCache(dataset.storage, Path(sys.argv[2]), 10**9)
commits = [dataset.commit(shard) for shard in range(4)]
print("ready", flush=True)
sys.stdin.readline()
for commit in commits:
    cache.open(commit).close()
"""


def test_two_processes_at_once_download_once(remote, tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN_ALL, remote.storage.uri, str(tmp_path / "cache")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    said = [process.communicate("go\n", timeout=PATIENCE_S)[0].split("\n")[:-1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(chain(*said)) == [remote.commit(shard).path for shard in range(4)]


def test_threads_wait_for_the_one_that_downloads(remote, tmp_path, downloads, monkeypatch):
    commit = remote.commit(0)
    slow, entered = Storage.download, threading.Event()

    def download(self, path, local):
        entered.set()
        time.sleep(0.2)
        slow(self, path, local)

    monkeypatch.setattr(Storage, "download", download)
    first = threading.Thread(target=lambda: content(cache_of(remote, tmp_path), commit))
    first.start()
    entered.wait()
    content(cache_of(remote, tmp_path), commit)
    first.join()
    assert downloads == [commit.path]


def test_what_a_killed_process_left_is_removed(remote, tmp_path):
    cache = cache_of(remote, tmp_path)
    for name in (".staging-0123456789abcdef", "a.tar.part"):
        (tmp_path / "cache" / name).write_bytes(b"half")
    content(cache, remote.commit(0))
    assert names(tmp_path) == [".lock", name_of(remote.commit(0))]


def test_a_full_disk_and_a_folder_that_cannot_be_made_are_named(remote, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "s3://somewhere")

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "download", full)
        patched.setattr(shard_cache, "_free_bytes", lambda _: 5)
        with pytest.raises(RunStopped, match=r"cache: no room for a shard of [\d,]+ bytes, 5 are free; set runtime"):
            cache_of(remote, tmp_path).open(remote.commit(0))
        patched.setattr(shard_cache, "_free_bytes", lambda _: 10**12)
        with pytest.raises(OSError, match="No space"):  # the storage's own trouble
            cache_of(remote, tmp_path).open(remote.commit(0))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^runtime.cache_dir: .*/file/cache cannot be written to"):
        ShardCache(remote.storage, tmp_path / "file" / "cache", 1)
