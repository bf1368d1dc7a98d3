"""A Ray cluster of several nodes on this machine whose processes can be killed one by one.

A head without CPUs, and nodes of one CPU each, every one a raylet in a session of its own: what is killed is found by
walking the processes that were started here, never by name.
"""

import contextlib
import os
import random
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import psutil
from support.stage import environment

from pipeline.ray_head import ray_head

NUM_NODES = 2
_ON_A_BUSY_MACHINE = {
    "RAY_worker_niceness": "0",  # else its workers yield to everybody, and hardly run
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
}


class Cluster:
    """Up while the context is open; :meth:`mend` replaces what was killed."""

    def __enter__(self) -> Self:
        self._resources = ExitStack()
        self._head = self._resources.enter_context(ray_head(num_cpus=0, num_gpus=0))
        self._folder = self._resources.enter_context(
            tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # a short path: it holds sockets
        )
        self._sessions: list[subprocess.Popen[bytes]] = []  # of all nodes there have been
        self._nodes = [self._start_node() for _ in range(NUM_NODES)]
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._sessions:
            kill_session(process.pid)
            process.wait()
        self._resources.close()

    @property
    def address(self) -> str:
        """For RAY_ADDRESS."""
        return self._head.address

    def actors(self) -> list[int]:
        """Process numbers of what holds a worker of the product."""
        return [actor for node in self._nodes for actor in _actors(node)]

    def kill_actor(self, rng: random.Random) -> list[int]:
        """Kill one actor; returns the actors that die of it, none if there is none to kill."""
        victims = rng.sample(self.actors(), 1) if self.actors() else []
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(victim).kill()
        return victims

    def kill_raylet(self, rng: random.Random) -> list[int]:
        """Kill the raylet of one node and nothing else: what it manages finds itself alone, and ends."""
        node = self._nodes.pop(rng.randrange(len(self._nodes)))
        doomed = _actors(node)
        for process in _below(node):
            if process.name() == "raylet":
                process.kill()
        self._nodes.append(self._start_node())
        return doomed

    def kill_node(self, rng: random.Random) -> list[int]:
        """Kill everything on one node, as a machine that is switched off."""
        node = self._nodes.pop(rng.randrange(len(self._nodes)))
        doomed = _actors(node)
        kill_session(node.pid)
        self._nodes.append(self._start_node())
        return doomed

    def kill_nodes(self) -> None:
        """Kill all nodes at once; :meth:`keep_up` starts others."""
        for node in self._nodes:
            kill_session(node.pid)

    def kill_head(self) -> list[int]:
        """Kill the head: the cluster is lost, though its nodes may not know it yet."""
        doomed = self.actors()
        kill_session(self._head.pid)
        return doomed

    @property
    def is_lost(self) -> bool:
        """Whether the head has been killed."""
        return not psutil.pid_exists(self._head.pid) or (
            psutil.Process(self._head.pid).status() == psutil.STATUS_ZOMBIE
        )

    def keep_up(self) -> None:
        """Start a node for every one that has ended by itself, as one does that cannot reach its head in time."""
        self._nodes = [node if node.poll() is None else self._start_node() for node in self._nodes]

    def renew(self) -> None:
        """Another cluster in the place of this one."""
        self.__exit__()
        self.__enter__()

    def _start_node(self) -> "subprocess.Popen[bytes]":
        ray = str(Path(sys.executable).with_name("ray"))
        # A folder of its own: two nodes that start at a time, or one and the head, may choose one name for a socket,
        # and then both die.
        folder = f"{self._folder}/{len(self._sessions)}"
        node = subprocess.Popen(
            [
                *(ray, "start", "--block", f"--address={self.address}", "--num-cpus=1", "--disable-usage-stats"),
                f"--temp-dir={folder}",
            ],
            env=environment(**_ON_A_BUSY_MACHINE),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._sessions.append(node)
        return node


def kill_session(pid: int) -> None:
    """kill -9 of everything in a session that was started here, orphans too."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == pid:
                process.kill()


def _below(node: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(node.pid).children(recursive=True)
    return []


def _actors(node: "subprocess.Popen[bytes]") -> list[int]:
    found = []
    for process in _below(node):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            if "ray::_Actor" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found
