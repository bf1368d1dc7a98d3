"""Make a dataset while a schedule kills what makes it; run the same command again until it has nothing left to do."""

import random
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from faults.chaos.cluster import Cluster, kill_session
from faults.chaos.ledger import Entry
from faults.chaos.schedule import Fault, Victim
from support import stage

PATIENCE_S = 1500.0


@dataclass
class Blow:
    """A fault that has happened: when, and which shards it has undone."""

    at: float
    shards: set[int]
    num_commits: int


@dataclass
class DisturbedRun:
    """One schedule.

    Attributes:
        command: stage and arguments, with the output and ``--runtime.temp_dir temp``.
        root: the output.
        temp: folder in which workers write shards before they are committed.
        cluster: what it runs on.
    """

    command: tuple[object, ...]
    root: Path
    temp: Path
    cluster: Cluster
    log: list[str] = field(default_factory=list)

    def run(self, seed: int, faults: list[Fault]) -> Entry:
        """Run the command until it succeeds.

        Raises:
            AssertionError: it failed though nothing that it needs had been killed, or there is no progress.
        """
        entry, rng, due, blows = Entry("pairs", seed), random.Random(seed), deque(faults), list[Blow]()
        began = self._began = time.monotonic()
        driver, excused = self._start(entry), False
        while True:
            assert time.monotonic() - began < PATIENCE_S, f"no end: {self.log}"
            if (code := driver.poll()) is not None:
                if code == 0:
                    break
                assert excused, f"seed {seed}: exit code {code}\n{self._output()}"
                self._renew_lost_cluster()
                driver, excused = self._start(entry), False
            if due and self._is_due(due[0]):
                victim, before = due[0].victim, self._committed()
                lost, shards = self._in_flight()
                doomed = self._kill(victim, driver, rng)
                if doomed is not None:
                    due.popleft()
                    excused |= victim in (Victim.DRIVER, Victim.HEAD)
                    entry.injected.append(victim)
                    entry.lost_s += sum(lost.get(actor, 0.0) for actor in doomed)
                    undone = {shard for actor in doomed for shard in shards.get(actor, ())} - self._committed()
                    blows.append(Blow(time.monotonic(), undone, len(before)))
                    entry.recover_s.append(None)
            self._note_recovered(entry, blows)
            if not self.cluster.is_lost:
                self.cluster.keep_up()
            time.sleep(0.02)
        self._note_recovered(entry, blows)
        entry.seconds = time.monotonic() - began
        self._renew_lost_cluster()
        return entry

    def _start(self, entry: Entry) -> "subprocess.Popen[bytes]":
        entry.commands += 1
        self._started = time.monotonic()
        name, *arguments = map(str, self.command)
        self._log = self.temp.parent / f"driver-{entry.commands}.log"
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, f"stages/{name}.py", *arguments],
                cwd=stage.ROOT,
                env=stage.environment(self.cluster.address, TMPDIR=str(self.temp)),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _output(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def _committed(self) -> set[int]:
        return {int(path.stem) for path in (self.root / "commits").glob("*.json")}

    def _is_due(self, fault: Fault) -> bool:
        """Whether its moment has come; waits for the last bit of it."""
        if fault.commits == 0:
            return time.monotonic() >= self._started + fault.delay_s
        if len(self._committed()) < fault.commits:
            return False
        time.sleep(fault.delay_s)
        return True

    def _kill(self, victim: Victim, driver: "subprocess.Popen[bytes]", rng: random.Random) -> list[int] | None:
        """The actors that die; None when there was nothing to kill."""
        match victim:
            case Victim.DRIVER:
                if driver.poll() is not None:
                    return None
                actors = self.cluster.actors()
                kill_session(driver.pid)
                driver.wait()
                return actors
            case Victim.HEAD:
                return None if self.cluster.is_lost else self.cluster.kill_head()
            case Victim.ACTOR:
                return self.cluster.kill_actor(rng) or None
            case Victim.RAYLET:
                return self.cluster.kill_raylet(rng)
            case Victim.NODE:
                return self.cluster.kill_node(rng)

    def _in_flight(self) -> tuple[dict[int, float], dict[int, set[int]]]:
        """For each worker that is making shards: seconds since it began the oldest of them, and which they are.

        The names of the files it writes tell (``pipeline.pairs``): process, shard, and when it was begun.
        """
        seconds: dict[int, float] = {}
        shards: dict[int, set[int]] = {}
        for path in self.temp.glob("potstill-*.tar"):
            _, _, _, pid, _, shard, since = path.stem.split("-")
            if psutil.pid_exists(int(pid)):
                seconds[int(pid)] = max(seconds.get(int(pid), 0.0), time.monotonic() - int(since) / 1e9)
                shards.setdefault(int(pid), set()).add(int(shard))
        return seconds, shards

    def _note_recovered(self, entry: Entry, blows: list[Blow]) -> None:
        committed = self._committed()
        for number, blow in enumerate(blows):
            is_over = blow.shards <= committed if blow.shards else len(committed) > blow.num_commits
            if entry.recover_s[number] is None and is_over:
                entry.recover_s[number] = time.monotonic() - blow.at

    def _renew_lost_cluster(self) -> None:
        if self.cluster.is_lost:
            self.cluster.renew()
