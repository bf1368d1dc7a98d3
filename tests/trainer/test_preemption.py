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


def test_the_handlers_that_were_there_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), StopSignal():
        _ = 1 / 0
    with StopSignal():
        during = [signal.getsignal(number) for number in SIGNALS]
    assert all(handler is not other for handler, other in zip(before, during, strict=True))
    assert [signal.getsignal(number) for number in SIGNALS] == before
