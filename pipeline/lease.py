"""A lease keeps two runs from working on one output at once.

It saves machine time, not data: with or without it the first commit of a shard wins and nothing is lost. So it may be
simple: ``lease.json`` names its owner and a counter that a background thread advances every period. Whoever finds a
lease watches it for three periods. If the counter moves, somebody is alive; if not, the lease is taken over. No clock
of one host is ever compared with another's. If the owner was a process of this very machine that has ended, nobody
needs to wait.
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from types import TracebackType
from typing import Any

from configs.errors import RunStopped, UserError
from pipeline.processes import has_ended, process_identity
from pipeline.shards.layout import LEASE
from pipeline.shards.storage import Storage


class Lease:
    """Holds ``lease.json`` of an output while the context is open.

    Args:
        storage: the output.
        period_s: seconds between heartbeats.

    Raises:
        UserError: on entering, when another run is alive.
    """

    def __init__(self, storage: Storage, period_s: float) -> None:
        self._storage = storage
        self._period_s = period_s
        self._beat = 0
        self._owner = {
            "id": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": process_identity(os.getpid()),
            "period_s": period_s,
        }
        self._stop = threading.Event()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        self._acquire()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(Exception):  # never in front of the error on its way up; a lease left behind stands still
            current = self._read()
            if current is not None and current["id"] == self._owner["id"]:
                self._storage.delete(LEASE)

    def check(self) -> None:
        """Raise RunStopped when another run has taken the lease over (this process was suspended, say)."""
        if self._lost is not None:
            raise RunStopped(
                f"{self._storage.uri}: {self._lost} has taken this output over; nothing is lost, leave the work to it"
            )

    def _acquire(self) -> None:
        while not self._storage.create(LEASE, self._record()):
            found = self._read()
            if found is None:
                continue
            if not ended_here(found):
                self._watch(found)
            if self._read() == found:
                self._storage.delete(LEASE)

    def _watch(self, found: dict[str, Any]) -> None:
        """Return when the lease ``found`` has stood still for three of its owner's periods, or is gone."""
        wait_s = 3 * max(self._period_s, found["period_s"])
        print(f"waiting {wait_s:g} s to see whether {describe_owner(found)} still works on this output", flush=True)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            time.sleep(min(self._period_s / 4, 1.0))
            seen = self._read()
            if seen is None:
                return
            if seen != found:
                raise UserError(
                    f"{self._storage.uri}: {describe_owner(seen)} is working on this output; wait for it or stop it"
                )

    def _keep(self) -> None:
        while not self._stop.wait(self._period_s):
            try:
                self._beat += 1
                current = self._read()
                if current is None:  # somebody deleted the file: it is free to take again
                    self._storage.create(LEASE, self._record())
                elif current["id"] == self._owner["id"]:
                    self._storage.write(LEASE, self._record())
                else:
                    self._lost = describe_owner(current)
                    return
            except Exception:  # whatever storage has against us is the workers' to report; the next beat tries again
                continue

    def _record(self) -> bytes:
        return json.dumps({**self._owner, "beat": self._beat}, indent=1).encode()

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._storage.read(LEASE))
        except FileNotFoundError:
            return None


def describe_owner(lease: dict[str, Any]) -> str:
    """The owner of a lease record, for a message."""
    return f"process {lease['pid']} on {lease['host']}"


def ended_here(lease: dict[str, Any]) -> bool:
    """Whether the owner of a lease record was a process of this machine that runs no more."""
    return lease["process"] is not None and has_ended(lease["process"])
