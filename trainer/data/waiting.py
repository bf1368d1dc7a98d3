"""A word on stderr for whoever waits for long."""

import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager


class WaitingNotice:
    """Says what is waited for, every ``period_s`` seconds, from a thread of its own."""

    def __init__(self, period_s: float = 60.0) -> None:
        self._period_s = period_s
        self._waiting: tuple[str, float] | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def waiting_for(self, what: str) -> Generator[None, None, None]:
        """Within this context ``what`` is waited for."""
        self._waiting = what, time.monotonic()
        try:
            yield
        finally:
            self._waiting = None

    def close(self) -> None:
        """Say nothing more."""
        self._closed.set()

    def _watch(self) -> None:
        current, num_said = None, 0
        while not self._closed.wait(self._period_s / 4):
            if self._waiting is not current:
                current, num_said = self._waiting, 0
            if current is None:
                continue
            what, since = current
            seconds = time.monotonic() - since
            if seconds >= self._period_s * (num_said + 1):
                print(f"still waiting for {what}, for {seconds:.0f} s now", file=sys.stderr, flush=True)
                num_said += 1
