"""Storage on S3 when the network or the server has its ways: pages, retries, refusals."""

from collections.abc import Callable
from datetime import timedelta
from itertools import islice
from urllib.parse import parse_qs, urlsplit

import pytest

from configs.errors import UserError
from pipeline.shards import storage as storage_module
from pipeline.shards.storage import Storage

EMPTY_LISTING = b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"


def test_a_listing_fetches_pages_as_they_are_needed(scripted_s3: Callable[..., list[str]]) -> None:
    def reply(method: str, path: str) -> tuple[int, bytes]:
        page = int(parse_qs(urlsplit(path).query).get("continuation-token", ["0"])[0])
        keys = "".join(
            f"<Contents><Key>root/{number:06d}</Key><Size>1</Size>"
            "<LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
            for number in range(page * 1000, page * 1000 + 1000)
        )
        more = f"<NextContinuationToken>{page + 1}</NextContinuationToken>" if page < 19 else ""
        return 200, f"<ListBucketResult>{keys}{more}</ListBucketResult>".encode()

    log = scripted_s3(reply)
    storage = Storage.open("s3://bucket/root")
    log.clear()
    assert [info.path for info in islice(storage.list(), 500)] == [f"{number:06d}" for number in range(500)]
    assert len(log) <= 3
    assert [info.path for info in storage.list()] == [f"{number:06d}" for number in range(20_000)]


def test_server_errors_are_retried(scripted_s3: Callable[..., list[str]]) -> None:
    failures = iter([503, 500])

    def reply(method: str, path: str) -> tuple[int, bytes]:
        return (200, EMPTY_LISTING) if "list-type" in path else (next(failures, 200), b"content")

    log = scripted_s3(reply)
    storage = Storage.open("s3://bucket")
    assert storage.read("x") == b"content"
    assert [line for line in log if "list-type" not in line] == ["GET /bucket/x"] * 3
    failures = iter([503])
    assert storage.create("x", b"") is True


def test_retries_end(scripted_s3: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_RETRY", {"max_retries": 2, "retry_timeout": timedelta(seconds=10)})
    log = scripted_s3(lambda method, path: (200, EMPTY_LISTING) if "list-type" in path else (503, b"slow down"))
    storage = Storage.open("s3://bucket")
    with pytest.raises(OSError, match=r"503.*s3://bucket/x"):
        storage.write("x", b"data")
    assert log.count("PUT /bucket/x") == 3


REFUSAL = (
    b"<Error><Code>SignatureDoesNotMatch</Code><AWSAccessKeyId>an-access-key</AWSAccessKeyId>"
    b"<StringToSign>a-secret-key</StringToSign></Error>"
)


def test_refused_credentials_are_the_users_to_mend_and_never_shown(scripted_s3: Callable[..., list[str]]) -> None:
    scripted_s3(lambda method, path: (403, REFUSAL))
    with pytest.raises(UserError, match=r"s3://bucket/x: access denied .*SignatureDoesNotMatch") as caught:
        Storage.open("s3://bucket/x")
    assert "an-access-key" not in str(caught.value)
    assert "a-secret-key" not in str(caught.value)
    assert "list-type" not in str(caught.value)  # a query string may hold a signature
    assert "\n" not in str(caught.value)


def test_rights_lost_on_the_way(scripted_s3: Callable[..., list[str]]) -> None:
    scripted_s3(lambda method, path: (200, EMPTY_LISTING) if "list-type" in path else (403, REFUSAL))
    storage = Storage.open("s3://bucket/x")
    for access in (storage.read, lambda path: storage.create(path, b"")):
        with pytest.raises(UserError, match="s3://bucket/x/y: access denied"):
            access("y")


def test_no_credentials_are_noticed_at_once(
    scripted_s3: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_s3(lambda method, path: (200, EMPTY_LISTING))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        Storage.open("s3://bucket/x")


def test_a_bucket_that_does_not_exist(s3_root: str) -> None:
    with pytest.raises(UserError, match=r"s3://no-such-bucket/x: out of reach .*NoSuchBucket"):
        Storage.open("s3://no-such-bucket/x")


def test_an_endpoint_that_does_not_answer(s3_environment: Callable[[str], None]) -> None:
    s3_environment("http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"s3://bucket: out of reach .*check bucket, endpoint and network"):
        Storage.open("s3://bucket")


def test_credentials_in_an_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="put them in the environment") as caught:
        Storage.open("s3://a-key:a-secret@bucket/x")
    assert "a-secret" not in str(caught.value)
