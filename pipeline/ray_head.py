"""A Ray head of one's own on this machine, for a demonstration or a test.

``ray stop`` stops every Ray process of the machine. This starts ``ray start --block`` on free ports instead, in a
session of its own, and ends exactly that: no other cluster is touched, and none is joined by accident.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.installed_command import installed_command

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class RayHead:
    """A running head.

    Attributes:
        address: for ``ray.init`` and RAY_ADDRESS, ``host:port``.
        jobs: for ``ray job submit --address``, an http URL.
        pid: process group of everything that belongs to it.
    """

    address: str
    jobs: str
    pid: int


@contextmanager
def ray_head(
    num_cpus: int, num_gpus: int | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[RayHead]:
    """Start a head on loopback, wait until it takes jobs, and stop it when the context is left.

    Args:
        num_cpus: CPUs it offers.
        num_gpus: GPUs it offers; None lets Ray count them.
        environment: variables that its jobs and actors have besides those of this process.

    Raises:
        UserError: Ray is not installed.
        RuntimeError: it does not come up; carries the end of Ray's own output.
    """
    ray = installed_command("ray", extra="ray")
    port, dashboard, agent, client = _free_ports(4)
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray puts sockets below it, whose paths are limited
    command = [
        ray, "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", f"--port={port}", f"--ray-client-server-port={client}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--num-cpus={num_cpus}", f"--temp-dir={folder}",
        *([] if num_gpus is None else [f"--num-gpus={num_gpus}"]),
    ]  # fmt: skip
    variables = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | dict(environment or {})
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables.get('PATH', '')}"
    log = folder / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        jobs = f"http://127.0.0.1:{dashboard}"
        _wait_until_up(process, f"{jobs}/api/version", log)
        yield RayHead(f"127.0.0.1:{port}", jobs, process.pid)
    finally:
        _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_up(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the Ray head did not come up:\n{log.read_text(errors='replace')[-2000:]}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # whatever outlived its parent
    except ProcessLookupError:
        pass


def _free_ports(count: int) -> list[int]:
    """Ports of loopback nobody listens on; all held until all are known, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]
    finally:
        for held in sockets:
            held.close()
