"""A cluster that does not answer: the run ends in one line, and soon."""

import os
import socket

import pytest
import ray

from configs.errors import RunStopped, UserError
from pipeline.ray_executor import connect

ATTEMPTS = "RAY_gcs_server_port_wait_time_s"


@pytest.fixture
def nowhere(monkeypatch):
    """RAY_ADDRESS of a port that nobody listens to."""
    monkeypatch.delenv(ATTEMPTS, raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    return address


@pytest.mark.parametrize("error", [RuntimeError("Failed to connect to GCS. Last ..."), ConnectionError("refused")])
def test_it_is_one_line(nowhere, monkeypatch, error):
    seen = []

    def init(**_):
        seen.append(os.environ.get(ATTEMPTS))
        raise error

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RunStopped, match=f"RAY_ADDRESS {nowhere}: no Ray cluster answers there; start one"):
        connect()
    assert seen == ["1"]
    assert ATTEMPTS not in os.environ


def test_a_users_patience_is_left_alone(nowhere, monkeypatch):
    monkeypatch.setenv(ATTEMPTS, "7")
    monkeypatch.setattr(ray, "init", lambda **_: None)
    connect()
    assert os.environ[ATTEMPTS] == "7"


def test_what_is_no_address_is_a_mistake_in_one_line(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "somewhere")
    with pytest.raises(UserError, match="RAY_ADDRESS somewhere: Invalid address format: somewhere; give host:port"):
        connect()


def test_another_error_stays_what_it_is(nowhere, monkeypatch):
    def init(**_):
        raise RuntimeError("out of file descriptors")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RuntimeError, match="out of file descriptors"):
        connect()


@pytest.mark.faults
@pytest.mark.timeout(300)  # by itself Ray gives up after 14 minutes
def test_ray_itself_gives_up_after_one_attempt(nowhere):
    with pytest.raises(RunStopped, match="no Ray cluster answers there"):
        connect()
