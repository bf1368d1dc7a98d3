"""A signal asks for a stop and does nothing else. That all processes agree on it: test_two_processes.py."""

import os
import signal

import pytest
from accelerate import Accelerator

from trainer.preemption import SIGNALS, StopSignal


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_nothing_else(accelerator, number):
    with StopSignal() as stop:
        assert not stop.should_stop(accelerator)
        os.kill(os.getpid(), number)
        assert stop.received == number.name
        assert stop.should_stop(accelerator)


def test_the_second_interrupt_does_not_wait(accelerator):
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGINT"  # the first
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.should_stop(accelerator)


LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_end_of_a_launcher_asks_for_a_stop(accelerator, monkeypatch, launcher):
    monkeypatch.setenv(launcher, "no")
    with StopSignal() as stop:
        assert not stop.should_stop(accelerator)
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert stop.should_stop(accelerator)
        assert stop.received == "the end of its launcher"


def test_the_end_of_a_shell_does_not(accelerator, monkeypatch):
    for launcher in LAUNCHERS:
        monkeypatch.delenv(launcher, raising=False)
    with StopSignal() as stop:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert not stop.should_stop(accelerator)


def test_the_handlers_that_were_there_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), StopSignal():
        _ = 1 / 0
    with StopSignal():
        during = [signal.getsignal(number) for number in SIGNALS]
    assert all(handler is not other for handler, other in zip(before, during, strict=True))
    assert [signal.getsignal(number) for number in SIGNALS] == before
