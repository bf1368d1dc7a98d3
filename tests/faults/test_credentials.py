"""Credentials come from the environment, and go nowhere: not into what is printed, raised or stored."""

import logging
import traceback
from datetime import timedelta

import pytest
from support.injecting_proxy import Fault, injecting_proxy
from support.toy import toy_config

from configs.errors import RunStopped, UserError
from configs.schema import StatusConfig, VerifyShardsConfig
from pipeline.generate import generate_pairs
from pipeline.inspect_dataset import status, verify_shards
from pipeline.shards import storage as storage_module
from pipeline.shards.dataset import Dataset
from pipeline.shards.reader import PairReader
from pipeline.shards.storage import Storage

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIA-the-access-key",
    "AWS_SECRET_ACCESS_KEY": "the-secret/key+of=us",
    "AWS_SESSION_TOKEN": "the-session-token",
}
ECHO = ("<Error><Code>AccessDenied</Code>" + "".join(f"<X>{secret}</X>" for secret in SECRETS.values())).encode()
"""A server that quotes what it was sent, as S3 does when it refuses a signature."""


@pytest.fixture
def proxy(s3_server, s3_root, s3_environment, monkeypatch):
    quick = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2), "base": 2}
    retry = {"max_retries": 2, "retry_timeout": timedelta(seconds=20), "backoff": quick}
    monkeypatch.setattr(storage_module, "_RETRY", retry)
    with injecting_proxy(s3_server) as running:
        s3_environment(running.endpoint)
        for name, secret in SECRETS.items():
            monkeypatch.setenv(name, secret)
        yield running


def found_in(text: str) -> list[str]:
    return [name for name, secret in SECRETS.items() if secret in text]


def test_nothing_that_a_run_prints_logs_or_writes_holds_a_credential(proxy, s3_root, tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    failures = iter([Fault(status=503, body=ECHO), Fault(status=500, body=ECHO), Fault(cut_at=10)] * 3)
    proxy.script = lambda method, path: next(failures, None) if len(proxy.log) % 5 == 0 else None
    generate_pairs(toy_config(s3_root, tmp_path))
    proxy.script = lambda method, path: None
    status(StatusConfig(root=s3_root))
    verify_shards(VerifyShardsConfig(root=s3_root, repair=True))
    storage = Storage.open(s3_root)
    options = {"seed": 0, "window": 1, "holdout": 0, "selection": None, "allow_partial": False}
    reader = PairReader(s3_root, cache_folder=tmp_path / "cache", cache_bytes=10**9, **options)
    reader.read([0])
    seen = capfd.readouterr()
    texts = [
        seen.out,
        seen.err,
        caplog.text,
        repr(storage),
        repr(Dataset.open(storage)),
        repr(reader),
        str(vars(reader)),
    ]
    texts += [storage.read(info.path).decode("latin-1") for info in storage.list()]
    texts += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert len(texts) > 20
    assert [found_in(text) for text in texts] == [[]] * len(texts)


ACTS = {
    "open": lambda storage: Storage.open(storage.uri),
    "read": lambda storage: storage.read("x"),
    "range": lambda storage: storage.read_range("x", 0, 5),
    "write": lambda storage: storage.write("x", b"data"),
    "create": lambda storage: storage.create("y", b"data"),
    "delete": lambda storage: storage.delete("x"),
    "list": lambda storage: list(storage.list()),
}


@pytest.mark.parametrize(
    "fault", [Fault(status=403, body=ECHO), Fault(status=503, body=ECHO), Fault(reply_is_lost=True)]
)
@pytest.mark.parametrize("act", ACTS)
def test_no_error_holds_a_credential(proxy, s3_root, monkeypatch, act, fault):
    for name in ("_FIRST_RETRY", "_RETRY"):
        monkeypatch.setattr(storage_module, name, storage_module._RETRY | {"max_retries": 1})
    storage = Storage.open(s3_root)
    storage.write("x", b"data")
    proxy.script = lambda method, path: fault
    with pytest.raises((UserError, RunStopped, OSError), match=r"s3://") as caught:
        ACTS[act](storage)
    said = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert found_in(said) == []
    assert "\n" not in str(caught.value)


def test_a_login_in_the_endpoint_is_not_repeated(proxy, s3_environment, s3_root):
    s3_environment(proxy.endpoint.replace("://", "://the-user:the-secret-word@"))
    proxy.script = lambda method, path: Fault(status=500)
    with pytest.raises(UserError, match="out of reach") as caught:
        Storage.open(s3_root)
    assert "the-secret-word" not in "".join(traceback.format_exception(caught.value))
