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
from pathlib import Path
from types import TracebackType
from typing import Any

from configs.errors import RunStopped, UserError
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
            "process": _process_identity(os.getpid()),
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
            if not _ended_here(found):
                print(
                    f"waiting {3 * self._period_s:g} s to see whether {_name(found)} still works on this output",
                    flush=True,
                )
                deadline = time.monotonic() + 3 * self._period_s
                while time.monotonic() < deadline:
                    time.sleep(self._period_s / 4)
                    seen = self._read()
                    if seen is None:
                        break
                    if seen != found:
                        raise UserError(
                            f"{self._storage.uri}: {_name(seen)} is working on this output; wait for it or stop it"
                        )
            if self._read() == found:
                self._storage.delete(LEASE)

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
                    self._lost = _name(current)
                    return
            except OSError:
                continue  # storage that is away or full is the workers' to report; the next beat tries again

    def _record(self) -> bytes:
        return json.dumps({**self._owner, "beat": self._beat}, indent=1).encode()

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._storage.read(LEASE))
        except FileNotFoundError:
            return None


def _name(lease: dict[str, Any]) -> str:
    return f"process {lease['pid']} on {lease['host']}"


def _process_identity(pid: int) -> str | None:
    """Boot, pid namespace and start time of a process of this machine: never reused. None if it does not run."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        start_ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
    return f"{boot}/{namespace}/{pid}/{start_ticks}"


def _ended_here(lease: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine (same boot, same pid namespace) that runs no more."""
    owner, here = lease["process"], _process_identity(os.getpid())
    if owner is None or here is None or owner.split("/")[:2] != here.split("/")[:2]:
        return False
    return _process_identity(lease["pid"]) != owner
