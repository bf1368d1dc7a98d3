"""What the demo took: time and memory, in ``demo.json`` and on the page ``README.md`` of its folder.

    time      of a part, summed over the runs until it was done; run again for nothing, it is not counted again
    memory    the largest sum over the demo's processes, Ray's included, of their proportional set size: memory that
              several share is counted once. Where the system has no such size, what is each one's own

Other programs' memory is not counted, nor files that the system keeps in memory.
"""

import os
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import psutil
from pydantic import NonNegativeFloat, NonNegativeInt, ValidationError

from configs.schema import Model
from pipeline.provenance import code_revision
from pipeline.shards.storage import Storage

RECORD = "demo.json"
PAGE = "README.md"
_SAMPLE_EVERY_S = 5.0
"""Often enough for what lasts minutes: to look at 2 GB takes the kernel a twentieth of a second of one core."""


class Part(Model):
    """One command of the demo."""

    command: str
    """As a user would type it."""
    page: str
    """What it leaves to be looked at, relative to the demo's folder."""
    seconds: NonNegativeFloat = 0.0
    """What it took until it was done."""
    done: bool = False
    """Whether it has come to its end."""
    peak_memory_bytes: NonNegativeInt = 0
    """The most that all processes of the demo had at once during it, in any of its runs."""


class DemoTimes(Model):
    """``demo.json``."""

    cpus: NonNegativeInt
    """CPUs of Ray, and threads of the training."""
    code_revision: str
    """Of the run that made the record last."""
    parts: dict[str, Part]
    """By name, in the order in which they were begun."""


class DemoRecord:
    """Takes down what each part takes, whether or not it comes to its end.

    Args:
        folder: of the demo; made when the first part has ended.
        cpus: as the demo was told.

    Attributes:
        times: the record so far.

    Raises:
        UserError: ``folder`` is no folder, nor can it be one.
    """

    def __init__(self, folder: Path, cpus: int) -> None:
        self._storage = Storage.open(str(folder))
        try:
            times = DemoTimes.model_validate_json(self._storage.read(RECORD))
        except (FileNotFoundError, ValidationError):  # nothing depends on it: a damaged one is begun anew
            times = DemoTimes(cpus=cpus, code_revision="", parts={})
        self.times = times.model_copy(update={"cpus": cpus, "code_revision": code_revision()})

    @contextmanager
    def part(self, name: str, command: Sequence[str], page: str) -> Generator[None]:
        """Around a part: its time and memory go into the record, also after an exception.

        Args:
            name: of the part, the same in every run.
            command: as a user would type it.
            page: what it leaves to be looked at, relative to the folder; linked once the part is done.
        """
        before = self.times.parts.get(name, Part(command="", page=""))
        started, done = time.monotonic(), before.done
        peak = PeakMemory()
        try:
            with peak:
                yield
            done = True
        finally:
            seconds = time.monotonic() - started
            # Done before, it was run for nothing: unless it took longer, because what it had made was removed.
            total = max(before.seconds, seconds) if before.done else before.seconds + seconds
            memory = max(before.peak_memory_bytes, peak.bytes)
            part = Part(command=" ".join(command), page=page, seconds=total, done=done, peak_memory_bytes=memory)
            self.times = self.times.model_copy(update={"parts": {**self.times.parts, name: part}})
            with suppress(OSError):  # where it cannot be written, a part has failed, and its message says why
                self._write()

    def _write(self) -> None:
        self._storage.write(RECORD, self.times.model_dump_json(indent=1).encode())
        self._storage.write(PAGE, _page(self.times).encode())


class PeakMemory:
    """The most memory that this process and all below it have had while the context was open, looked at now and then.

    Attributes:
        bytes: so far.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        this = psutil.Process(os.getpid())
        while True:
            self.bytes = max(self.bytes, sum(map(_memory, [this, *this.children(recursive=True)])))
            if self._ended.wait(_SAMPLE_EVERY_S):
                return


def _memory(process: psutil.Process) -> int:
    try:
        info = process.memory_full_info()
    except psutil.Error:  # it has ended
        return 0
    return getattr(info, "pss", info.uss)


def _page(times: DemoTimes) -> str:
    rows = [_row(name, part) for name, part in times.parts.items()]
    total = sum(part.seconds for part in times.parts.values()) / 60
    memory = max((part.peak_memory_bytes for part in times.parts.values()), default=0) / 2**30
    parts = "\n".join(["| part | minutes | GiB | | command |", "|---|---:|---:|---|---|", *rows])
    return f"""# The demo

Each part that is done is a link to its page; that of the evaluation shows what the student is worth beside its teacher.
The same command goes on with what is not done. Remove this folder, and everything is gone.

{parts}

Together {total:.1f} minutes with {times.cpus} CPUs, and at most {memory:.1f} GiB of memory at once, over all
processes. Made with {times.code_revision}.
"""


def _row(name: str, part: Part) -> str:
    shown, state = (f"[{name}]({part.page})", "") if part.done else (name, "not done")
    memory = part.peak_memory_bytes / 2**30
    return f"| {shown} | {part.seconds / 60:.1f} | {memory:.1f} | {state} | `{part.command}` |"
