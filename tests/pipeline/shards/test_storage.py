"""The storage contract, on a local folder and on S3."""

import errno
import hashlib
import os
import re
import signal
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import obstore
import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import S3Store
from support.patience import PATIENCE_S

from configs.errors import UserError
from pipeline.shards.storage import Storage

REPOSITORY = Path(__file__).parents[3]
PATHS = ["commits/000001.json", "a b/ä+%20&=#x.tar", "deep/er/and/deeper", "commits-old/x"]


def contents(storage: Storage) -> dict[str, bytes]:
    return {info.path: storage.read(info.path) for info in storage.list()}


# ------------------------------------------------------------------------------------------------ objects, both kinds


def test_objects_come_back_under_their_names(storage: Storage) -> None:
    assert storage.is_empty()
    expected = {path: path.encode() * 3 for path in PATHS}
    for path, data in expected.items():
        storage.write(path, data)
    assert contents(storage) == expected
    assert contents(Storage.open(storage.uri)) == expected
    assert not storage.is_empty()
    assert {info.path: info.size for info in storage.list()} == {path: len(data) for path, data in expected.items()}
    assert all(abs(info.modified - datetime.now(UTC)) < timedelta(minutes=1) for info in storage.list())


def test_a_listing_takes_whole_folder_names(storage: Storage) -> None:
    for path in PATHS:
        storage.write(path, b"")
    assert [info.path for info in storage.list("commits")] == ["commits/000001.json"]
    assert [info.path for info in storage.list("commits/")] == ["commits/000001.json"]
    assert list(storage.list("comm")) == []


def test_write_replaces_and_create_does_not(storage: Storage) -> None:
    storage.write("x", b"first")
    assert storage.create("x", b"second") is False
    assert storage.read("x") == b"first"
    storage.write("x", b"third, longer")
    assert storage.read("x") == b"third, longer"
    storage.delete("x")
    assert storage.create("x", b"fourth") is True
    assert contents(storage) == {"x": b"fourth"}


def test_missing_objects(storage: Storage) -> None:
    storage.write("folder/x", b"")
    for access in (storage.read, storage.size, storage.reader, lambda path: storage.read_range(path, 0, 1)):
        for path in ("nothing", "folder"):
            with pytest.raises(FileNotFoundError, match=path):
                access(path)
    assert not storage.exists("folder")
    assert storage.exists("folder/x")
    storage.delete("nothing")


def test_ranges(storage: Storage) -> None:
    storage.write("x", b"0123456789")
    assert storage.read_range("x", 3, 4) == b"3456"
    for start, length in ((8, 4), (20, 1)):
        with pytest.raises(OSError, match="x"):
            storage.read_range("x", start, length)


@pytest.mark.parametrize("path", ["", "/x", "x/", "a//b", "a/./b", "../x", "a/../../x", "x#1", "a\nb"])
def test_paths_that_no_store_could_hold_are_refused(storage: Storage, path: str) -> None:
    for access in (storage.read, storage.exists, storage.delete, lambda p: storage.write(p, b"")):
        with pytest.raises(ValueError, match="not an object path"):
            access(path)
    assert storage.is_empty()


@pytest.mark.parametrize(("name", "shown"), [(b"a\nb", r"a\nb"), (b"a\x1b", r"a\x1b"), (b"a\xff", "a%FF")])
def test_a_file_that_somebody_put_there_under_such_a_name_is_named(tmp_path: Path, name: bytes, shown: str) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    folder.mkdir()
    (folder / "x.png").write_bytes(b"")
    named = f"{tmp_path}: no store could hold '{tmp_path}/{shown}/x.png', which lies there; rename it"
    with pytest.raises(UserError, match=re.escape(named)):
        list(Storage.open(str(tmp_path)).list())


def test_files_go_up_and_down_unchanged(storage: Storage, tmp_path: Path) -> None:
    data = np.random.Philox(1).random_raw(20_000_000 // 8).tobytes()
    (tmp_path / "up").write_bytes(data)
    storage.write("big", b"old")
    storage.upload("big", tmp_path / "up")
    storage.download("big", tmp_path / "down")
    assert hashlib.sha256((tmp_path / "down").read_bytes()).digest() == hashlib.sha256(data).digest()
    assert storage.size("big") == len(data)
    with pytest.raises(FileNotFoundError, match="not there"):
        storage.upload("other", tmp_path / "not there")
    with pytest.raises(FileNotFoundError, match="other"):
        storage.download("other", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["down", "up"]


def test_large_uploads_to_s3_are_made_in_parts(s3_root: str, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(bytes(20_000_000))
    Storage.open(s3_root).upload("big", tmp_path / "up")
    bucket, _, prefix = s3_root.removeprefix("s3://").partition("/")
    assert obstore.head(S3Store(bucket), f"{prefix}/big")["e_tag"].endswith('-3"')  # 3 parts of 8 MiB


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 2000)), max_size=20), st.integers(0, 2500))
def test_a_reader_reads_what_a_file_would(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[int, int]], size: int
) -> None:
    folder = tmp_path_factory.mktemp("reader")
    (folder / "x").write_bytes(np.random.Philox(2).random_raw(320).tobytes()[:size])
    with (folder / "x").open("rb") as expected, Storage.open(str(folder)).reader("x") as reader:
        for position, length in moves:
            assert reader.seek(position) == expected.seek(position)
            assert reader.read(length) == expected.read(length)
            assert reader.tell() == expected.tell()
        assert reader.seek(-min(size, 7), os.SEEK_END) == size - min(size, 7)
        assert reader.read() == (folder / "x").read_bytes()[-7:]


def test_a_reader_serves_libraries_that_want_a_file(storage: Storage, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(__file__, "this.py")
    storage.upload("x.tar", tmp_path / "x.tar")
    with storage.reader("x.tar") as file, tarfile.open(fileobj=file) as tar:
        assert tar.extractfile("this.py").read() == Path(__file__).read_bytes()


# ------------------------------------------------------------------------------------------------------- create races

RACER = """
import sys
from pipeline.shards.storage import Storage
storage = Storage.open(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    print(storage.create("commits/" + line.strip(), sys.argv[2].encode() * 1000), flush=True)
"""


def test_of_eight_racing_processes_exactly_one_creates(storage: Storage) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, storage.uri, str(number)],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for name in map(str, range(25)):
        for racer in racers:
            racer.stdin.write(name + "\n")
            racer.stdin.flush()
        answers = [racer.stdout.readline().strip() for racer in racers]
        assert sorted(answers) == ["False"] * 7 + ["True"]
        winner = str(answers.index("True")).encode()
        assert storage.read(f"commits/{name}") == winner * 1000
    for racer in racers:
        racer.communicate()
        assert racer.returncode == 0
    assert len(list(storage.list())) == 25
    assert list(storage.leftovers()) == []


# ------------------------------------------------------------------------------------------------------ local folders


def test_data_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, link, replace = os.fsync, os.link, Path.replace

    def recorded_fsync(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name if folder else 'data'}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "link", lambda source, target: (events.append("name"), link(source, target)))
    monkeypatch.setattr(Path, "replace", lambda source, target: (events.append("name"), replace(source, target)))
    storage = Storage.open(str(tmp_path / "root"))
    storage.create("commits/1", b"x")
    assert events == [f"sync {tmp_path.name}", "sync root", "sync data", "name", "sync commits"]
    events.clear()
    storage.write("commits/1", b"y")
    assert events == ["sync data", "name", "sync commits"]


def test_a_link_whose_reply_was_lost_is_still_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def lossy(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "exists", target)

    monkeypatch.setattr(os, "link", lossy)
    assert Storage.open(str(tmp_path)).create("x", b"mine") is True


def test_a_killed_writer_leaves_nothing_but_an_identifiable_leftover(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "slow")
    root = tmp_path / "root"
    program = (
        "import sys; from pathlib import Path; from pipeline.shards.storage import Storage\n"
        "Storage.open(sys.argv[1]).upload('shards/x.tar', Path(sys.argv[2]))"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(root), str(tmp_path / "slow")],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    with (tmp_path / "slow").open("wb") as pipe:
        pipe.write(bytes(3 << 20))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    storage = Storage.open(str(root))
    assert storage.is_empty()
    (leftover,) = storage.leftovers()
    assert leftover.path.startswith("shards/.staging-")
    storage.delete(leftover.path)
    assert list(storage.leftovers()) == []


FORK = """
import os, sys
from pipeline.shards.storage import Storage
storage = Storage.open(sys.argv[1])
if sys.argv[2] == "used":
    storage.write("x", b"")
if os.fork() == 0:
    storage.write("y", b"")
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize(("state", "code", "stored"), [("unused", 0, {"y": b""}), ("used", 1, {"x": b""})])
def test_a_forked_child_is_refused_before_it_hangs(tmp_path: Path, state: str, code: int, stored: dict) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FORK, str(tmp_path), state],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert result.returncode == code
    assert ("start workers by spawn instead of fork" in result.stderr) == (code == 1)
    assert contents(Storage.open(str(tmp_path))) == stored


@pytest.fixture
def one_megabyte(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_shows_no_partial_object(one_megabyte: Path, tmp_path: Path) -> None:
    storage = Storage.open(str(one_megabyte / "root"))
    storage.write("kept", b"before")
    (tmp_path / "big").write_bytes(bytes(3 << 20))
    for attempt in (
        lambda: storage.write("kept", bytes(3 << 20)),
        lambda: storage.create("new", bytes(3 << 20)),
        lambda: storage.upload("new", tmp_path / "big"),
        lambda: Storage.open(str(tmp_path)).download("big", one_megabyte / "root" / "new"),
    ):
        with pytest.raises(OSError, match="No space left") as caught:
            attempt()
        assert caught.value.errno == errno.ENOSPC
        assert contents(storage) == {"kept": b"before"}
        assert list(storage.leftovers()) == []


def test_no_permission_is_the_users_to_mend(one_megabyte: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", one_megabyte], check=True)
    storage = Storage.open(str(one_megabyte / "root"))
    with pytest.raises(UserError, match="root/x: Read-only file system; "):
        storage.write("x", b"")


def test_opening_creates_nothing(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path / "root"))
    assert storage.is_empty()
    assert list(tmp_path.iterdir()) == []
    assert storage.uri == str(tmp_path / "root")


def test_the_same_folder_by_any_address(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "x").write_bytes(b"here")
    for uri in (f"{tmp_path}/a b/", f"{tmp_path}/c/../a b", f"file://{tmp_path}/a%20b"):
        assert Storage.open(uri).read("x") == b"here"
        assert Storage.open(uri).uri == str(tmp_path / "a b")


def test_the_folder_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_root: str) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("sub/x.txt", f"{tmp_path}/sub/x.txt", f"file://{tmp_path}/sub/x.txt"):
        storage, name = Storage.of_file(path)
        assert (storage.uri, name) == (str(tmp_path / "sub"), "x.txt")
    storage, name = Storage.of_file(s3_root + "/sub/x.txt")
    assert (storage.uri, name) == (s3_root + "/sub", "x.txt")


def test_a_listing_of_more_files_than_a_chunk(tmp_path: Path) -> None:
    (tmp_path / "commits").mkdir()
    for number in range(2_500):
        (tmp_path / f"commits/{number:06d}.json").touch()
    listed = [info.path for info in Storage.open(str(tmp_path)).list("commits")]
    assert sorted(listed) == [f"commits/{number:06d}.json" for number in range(2_500)]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("out", "out: not an absolute path; a worker"),
        ("file://out", "not an absolute path"),
        ("ftp://host/x", "ftp://host/x: not an absolute path, file://, s3://"),
        ("s3:///x", "s3:///x: not an absolute path"),
        (__file__, f"^{__file__}: is a file, not a folder"),
        (f"{__file__}/new/run", f"^{__file__}: is a file, not a folder"),
    ],
)
def test_roots_that_are_none(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Storage.open(uri)
