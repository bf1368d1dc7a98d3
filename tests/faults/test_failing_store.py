"""An S3 store that fails, dawdles, forgets and loses replies: what is written is whole, once, or refused by name."""

import json
import re
import socket
from collections import Counter
from datetime import timedelta
from random import Random

import obstore
import pytest
from obstore.exceptions import GenericError
from support.injecting_proxy import Fault, injecting_proxy
from support.latents import write_latents
from support.toy import shard_bytes, toy_config

from configs.errors import RunStopped
from configs.schema import VerifyShardsConfig
from pipeline.generate import generate_pairs
from pipeline.inspect_dataset import verify_shards
from pipeline.shards import storage as storage_module
from pipeline.shards.layout import sha256_hex
from pipeline.shards.reader import PairReader
from pipeline.shards.storage import Storage
from tests.support.racing import race

RETRIES = 4
DATA = bytes(range(256)) * 1024


@pytest.fixture
def proxy(s3_server, s3_root, s3_environment, monkeypatch):
    """A proxy in front of the S3 server, to which this process talks; retries as in earnest, only sooner."""
    backoff = {"init_backoff": timedelta(milliseconds=2), "max_backoff": timedelta(milliseconds=10), "base": 2}
    retry = {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=20), "backoff": backoff}
    monkeypatch.setattr(storage_module, "_RETRY", retry)
    with injecting_proxy(s3_server) as running:
        s3_environment(running.endpoint)
        yield running


@pytest.fixture
def storage(proxy, s3_root):
    return Storage.open(s3_root)


def times(number: int, fault: Fault):
    """This fault for the next so many requests."""
    left = iter(range(number))
    return lambda method, path: fault if next(left, None) is not None else None


# -------------------------------------------------------------------------------------------- one object, one fault


FAULTS = {
    "503": Fault(status=503, body=b"<Error><Code>SlowDown</Code></Error>"),
    "500": Fault(status=500),
    "the body is cut": Fault(cut_at=300),
    "the reply is lost": Fault(reply_is_lost=True),
}
READS = {
    "read": lambda storage, tmp: storage.read("x"),
    "range": lambda storage, tmp: storage.read_range("x", 0, len(DATA)),
    "download": lambda storage, tmp: (storage.download("x", tmp / "x"), (tmp / "x").read_bytes())[1],
    "file": lambda storage, tmp: storage.reader("x").read(len(DATA)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("how", READS)
def test_a_fault_that_passes_is_not_noticed(proxy, storage, tmp_path, how, fault):
    storage.write("x", DATA)
    proxy.script, before = times(2, FAULTS[fault]), len(proxy.log)
    assert READS[how](storage, tmp_path) == DATA
    assert len(proxy.log) - before >= 3
    assert [path.name for path in tmp_path.iterdir()] in ([], ["x"])


@pytest.mark.parametrize("fault", ["503", "the body is cut", "the reply is lost"])
@pytest.mark.parametrize("how", READS)
def test_a_fault_that_stays_ends_in_a_line_that_names_the_object(proxy, storage, s3_root, tmp_path, how, fault):
    storage.write("x", DATA)
    proxy.script, before = times(10**6, FAULTS[fault]), len(proxy.log)
    with pytest.raises(OSError, match=re.escape(f"{s3_root}/x")) as caught:
        READS[how](storage, tmp_path)
    assert len(proxy.log) - before <= 2 * (RETRIES + 1)  # a range reader asks for the size first
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_listing_that_breaks_off_goes_on_where_it_stopped(proxy, storage, s3_root, monkeypatch):
    monkeypatch.setattr(storage_module, "_LISTING_PAUSE_S", 0.001)
    names = [f"{number:03d}" for number in range(12)]
    for name in names:
        storage.write(name, b"")

    original = obstore.list

    def breaks_off(*args, **options):
        for at, chunk in enumerate(original(*args, **options | {"chunk_size": 5})):
            if at == 1:
                raise GenericError("Error getting list response body")
            yield chunk

    with monkeypatch.context() as patched:
        patched.setattr(obstore, "list", breaks_off)
        assert [info.path for info in storage.list()] == names
    proxy.script = times(2, Fault(cut_at=600))
    assert [info.path for info in storage.list()] == names
    proxy.script = lambda method, path: Fault(cut_at=600) if "list-type" in path else None
    with pytest.raises(OSError, match=re.escape(s3_root)):
        list(storage.list())


def test_a_reply_that_comes_too_slowly_is_asked_for_again(proxy, s3_root, monkeypatch):
    Storage.open(s3_root).write("x", DATA)
    monkeypatch.setattr(storage_module, "_CLIENT", {"connect_timeout": "60s", "read_timeout": "2s", "timeout": "60s"})
    proxy.script, before = times(1, Fault(pause_s=6)), len(proxy.log)
    assert Storage.open(s3_root).read("x") == DATA
    assert len(proxy.log) - before >= 2


def test_a_write_whose_reply_is_lost_is_done_once_more_and_whole(proxy, storage):
    proxy.script = times(2, Fault(reply_is_lost=True))
    storage.write("x", DATA)
    assert storage.read("x") == DATA
    proxy.script = times(1, Fault(reply_is_lost=True))
    assert storage.create("y", b"ours") is False  # it was: whoever is told so reads the object to learn who won
    assert storage.read("y") == b"ours"
    proxy.script = times(1, Fault(reply_is_lost=True))
    storage.delete("y")
    assert not storage.exists("y")


# ---------------------------------------------------------------------------------------------------- many parts


def test_a_part_that_fails_is_sent_again(proxy, storage, tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "_PART_BYTES", 5 << 20)
    data = Random(0).randbytes((12 << 20) + 1)
    (tmp_path / "big").write_bytes(data)
    failed = set()

    def script(method, path):
        if "partNumber" in path and path not in failed:
            failed.add(path)
            return Fault(status=503)
        return None

    proxy.script = script
    storage.upload("big", tmp_path / "big")
    assert len(failed) == 3
    assert storage.size("big") == len(data)
    assert storage.read_range("big", (5 << 20) - 7, 14) == data[(5 << 20) - 7 : (5 << 20) + 7]
    with storage.reader("big") as file:  # in ranges, some of which are cut
        proxy.script = times(3, Fault(cut_at=100_000))
        file.seek(4 << 20)
        assert file.read(3 << 20) == data[4 << 20 : 7 << 20]


def test_an_upload_that_ends_half_way_shows_nothing(proxy, storage, s3_root, tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "_PART_BYTES", 5 << 20)
    (tmp_path / "big").write_bytes(bytes(11 << 20))
    proxy.script = lambda method, path: Fault(status=503) if "partNumber=2" in path else None
    with pytest.raises(OSError, match=re.escape(f"{s3_root}/big")):
        storage.upload("big", tmp_path / "big")
    assert list(storage.list()) == []
    assert proxy.count("DELETE") == 1  # the parts that arrived are given back


def test_a_sender_that_goes_half_way_holds_up_nobody(proxy, storage, s3_root):
    """Of the test's own servers: one waited for the rest of an upload that had been given up."""
    host, port = proxy.endpoint.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sender:
        bucket = s3_root.split("/")[2]
        sender.sendall(f"PUT /{bucket}/half HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\n\r\nhalf".encode())
        sender.shutdown(socket.SHUT_WR)
        assert sender.recv(1) == b""  # no reply: the request was not passed on
    storage.write("x", DATA)
    assert [info.path for info in storage.list()] == ["x"]


# ------------------------------------------------------------------------------------------------- whole datasets


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("truth")
    generate_pairs(toy_config(folder / "root", folder))
    return folder / "root"


def shards_in(storage: Storage) -> dict[str, bytes]:
    return {info.path.removeprefix("shards/"): storage.read(info.path) for info in storage.list("shards")}


@pytest.mark.parametrize("seed", range(3))
def test_a_run_over_a_store_that_fails_at_random_makes_every_sample_once(proxy, s3_root, tmp_path, truth, seed):
    """No request fails more than twice in a row: by chance one would fail as often as it is tried."""
    random, injected, in_a_row = Random(seed), [], Counter()

    def script(method, path):
        if random.random() < 0.2 and in_a_row[method, path] < 2:
            in_a_row[method, path] += 1
            injected.append(random.choice(list(FAULTS.values())))
            return injected[-1]
        in_a_row[method, path] = 0
        return None

    proxy.script = script
    generate_pairs(toy_config(s3_root, tmp_path))
    proxy.script = lambda method, path: None
    assert len(injected) >= 10
    storage = Storage.open(s3_root)
    assert shards_in(storage) == shard_bytes(truth)
    verify_shards(VerifyShardsConfig(root=s3_root))
    assert len(list(storage.list("index"))) == len(list(storage.list("commits"))) == 5
    assert not storage.exists("lease.json")


def test_a_store_that_goes_away_stops_the_run_and_the_next_one_ends_it(proxy, s3_root, tmp_path, truth, monkeypatch):
    config = toy_config(s3_root, tmp_path, runtime={"max_errors_per_shard": 1})
    monkeypatch.setattr(storage_module, "_RETRY", storage_module._RETRY | {"max_retries": 1})

    def away(method, path):
        return Fault(status=503) if method == "PUT" and "/shards/" in path and proxy.count("PUT") > 12 else None

    proxy.script = away
    with pytest.raises(RunStopped, match=r"\d of 5 shards are parked, reasons in s3://"):
        generate_pairs(config)
    proxy.script = lambda method, path: None
    storage = Storage.open(s3_root)
    parked = [json.loads(storage.read(info.path))["reason"] for info in storage.list("parked")]
    assert parked
    assert all(re.search(r"503 Service Unavailable.*'s3://[^']*/shards/\S+\.tar'", reason) for reason in parked)
    generate_pairs(config)
    assert shards_in(storage) == shard_bytes(truth)


def test_a_listing_that_is_late_costs_nothing_but_time(proxy, s3_root, tmp_path, truth, capsys):
    """Records that are there and not listed yet: shards are adopted, not made again, and the dataset is sealed."""
    config = toy_config(s3_root, tmp_path)
    generate_pairs(config)
    storage = Storage.open(s3_root)
    before = {info.path: (info.modified, storage.read(info.path)) for info in storage.list() if "/" in info.path}
    storage.delete("SEALED.json")
    entry = re.compile(rb"<Contents><Key>[^<]*commits/00000[13]\.json</Key>.*?</Contents>", re.DOTALL)

    def forget(method, path):
        return Fault(edit=lambda body: entry.sub(b"", body)) if "list-type" in path else None

    proxy.script = forget
    assert len(list(storage.list("commits"))) == 3
    generate_pairs(config)
    proxy.script = lambda method, path: None
    assert "2 of 5 shards to make" in capsys.readouterr().out
    assert shards_in(storage) == shard_bytes(truth)
    after = {info.path: (info.modified, storage.read(info.path)) for info in storage.list() if "/" in info.path}
    unchanged = [path for path in before if path.startswith(("shards/", "index/", "commits/"))]
    assert len(unchanged) == 15
    assert {path: after[path] for path in unchanged} == {path: before[path] for path in unchanged}
    verify_shards(VerifyShardsConfig(root=s3_root))


def test_a_trainer_reads_through_faults_and_stops_at_a_shard_it_cannot_have(proxy, s3_root, tmp_path):
    write_latents(s3_root, tmp_path, num_samples=12, samples_per_shard=4)

    def reader(cache):
        options = {"seed": 0, "window": 1, "holdout": 0, "selection": None, "allow_partial": False}
        return PairReader(s3_root, cache_folder=tmp_path / cache, cache_bytes=10**9, **options)

    proxy.script = lambda method, path: Fault(cut_at=300) if ".tar" in path and proxy.count(f"GET {path}") < 3 else None
    assert sorted(reader("one").read(range(12)).keys) == [f"{number:09d}" for number in range(12)]
    proxy.script = lambda method, path: Fault(cut_at=300) if "-000001-" in path and ".tar" in path else None
    with pytest.raises(OSError, match=r"s3://.*/shards/[0-9a-f]{8}-000001-[0-9a-f]{12}\.tar"):
        reader("two").read(range(12))


# ------------------------------------------------------------------------------------------------------- the race


def test_of_eight_processes_that_commit_a_shard_one_wins_and_the_others_adopt(proxy, s3_root, tmp_path):
    """Over a store that loses replies to writes, so that even the winner may be told that it lost.

    The first two to each object are lost: no process is out of luck as often as it tries.
    """
    writes = Counter()

    def lose(method, path):
        if method != "PUT":
            return None
        writes[path] += 1
        return Fault(reply_is_lost=True) if writes[path] <= 2 else None

    proxy.script = lose
    said = race(s3_root, tmp_path, num_processes=8, num_shards=3)
    proxy.script = lambda method, path: None
    assert sum("commits" in path for path in writes) == 3
    storage = Storage.open(s3_root)
    for shard, answers in enumerate(said):
        record = json.loads(storage.read(f"commits/{shard:06d}.json"))
        assert {sha256 for sha256, _ in answers} == {record["sha256"]}
        assert sorted(is_own for _, is_own in answers) == [False] * 7 + [True]
        assert sha256_hex(storage.read(record["path"])) == record["sha256"]
        assert sha256_hex(storage.read(record["index_path"])) == record["index_sha256"]
