"""A lease keeps two runs from working on one output at once.

It saves machine time, not data: with or without it the first commit of a shard wins and nothing is lost. So it may be
simple: ``lease.json`` names its owner and a counter that a background thread advances every period. Whoever finds a
lease watches it for three periods. If the counter moves, somebody is alive; if not, the lease is taken over. No clock
of one host is ever compared with another's. If the owner was a process of this very machine that has ended, nobody
needs to wait.
"""

import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from types import TracebackType

from pydantic import NonNegativeFloat, ValidationError

from configs.errors import RunStopped, UserError
from configs.schema import Model
from pipeline.processes import has_ended, process_identity
from pipeline.shards.layout import LEASE
from pipeline.shards.storage import Storage


class LeaseRecord(Model):
    """What ``lease.json`` says."""

    id: str
    """Of one holding, never used again."""
    host: str
    """Of the owner."""
    pid: int
    """Of the owner, on its host."""
    process: str | None
    """Who the owner is beyond its number; see :func:`pipeline.processes.process_identity`."""
    period_s: NonNegativeFloat
    """Seconds between heartbeats."""
    beat: int
    """The counter."""

    @property
    def owner(self) -> str:
        """The owner, for a message."""
        return f"process {self.pid} on {self.host}"

    @property
    def ended_here(self) -> bool:
        """Whether the owner was a process of this machine that runs no more."""
        return self.process is not None and has_ended(self.process)


def read_lease(storage: Storage) -> LeaseRecord | None:
    """The lease of an output, or None while nobody holds it.

    Raises:
        UserError: it is not what a run wrote. Nobody can tell whether that run is alive, so a person has to say.
    """
    try:
        return LeaseRecord.model_validate_json(storage.read(LEASE))
    except FileNotFoundError:
        return None
    except ValidationError:
        raise UserError(
            f"{storage.uri}/{LEASE}: damaged, so it does not tell who works on this output; if no run does, delete it "
            "and run the same command again"
        ) from None


class Lease:
    """Holds ``lease.json`` of an output while the context is open.

    Args:
        storage: the output.
        period_s: seconds between heartbeats.

    Raises:
        UserError: on entering, when another run is alive, or its record is damaged.
    """

    def __init__(self, storage: Storage, period_s: float) -> None:
        self._storage = storage
        self._period_s = period_s
        self._owner = LeaseRecord(
            id=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            process=process_identity(os.getpid()),
            period_s=period_s,
            beat=0,
        )
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
            current = read_lease(self._storage)
            if current is not None and current.id == self._owner.id:
                self._storage.delete(LEASE)

    def check(self) -> None:
        """Raise RunStopped when another run has taken the lease over (this process was suspended, say)."""
        if self._lost is not None:
            raise RunStopped(
                f"{self._storage.uri}: {self._lost} has taken this output over; nothing is lost, leave the work to it"
            )

    def _acquire(self) -> None:
        while not self._storage.create(LEASE, self._record()):
            found = read_lease(self._storage)
            if found is None:
                continue
            if not found.ended_here:
                self._watch(found)
            if read_lease(self._storage) == found:
                self._storage.delete(LEASE)

    def _watch(self, found: LeaseRecord) -> None:
        """Return when the lease ``found`` has stood still for three of its owner's periods, or is gone."""
        wait_s = 3 * max(self._period_s, found.period_s)
        print(f"waiting {wait_s:g} s to see whether {found.owner} still works on this output", flush=True)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            time.sleep(min(self._period_s / 4, 1.0))
            seen = read_lease(self._storage)
            if seen is None:
                return
            if seen != found:
                raise UserError(f"{self._storage.uri}: {seen.owner} is working on this output; wait for it or stop it")

    def _keep(self) -> None:
        while not self._stop.wait(self._period_s):
            try:
                self._owner = self._owner.model_copy(update={"beat": self._owner.beat + 1})
                current = read_lease(self._storage)
                if current is None:  # somebody deleted the file: it is free to take again
                    self._storage.create(LEASE, self._record())
                elif current.id == self._owner.id:
                    self._storage.write(LEASE, self._record())
                else:
                    self._lost = current.owner
                    return
            except Exception:  # whatever storage has against us is the workers' to report; the next beat tries again
                continue

    def _record(self) -> bytes:
        return self._owner.model_dump_json(indent=1).encode()
