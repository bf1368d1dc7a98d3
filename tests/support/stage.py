"""Run a stage as a user does: a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from support.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


def environment(ray_address: str | None = None, **changes: str) -> dict[str, str]:
    """That of this process, but for the cluster to join and ``changes``."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return {**environment, **({} if ray_address is None else {"RAY_ADDRESS": ray_address}), **changes}


def start(stage: str, *arguments: object, ray_address: str | None = None) -> "subprocess.Popen[str]":
    """Start ``stages/{stage}.py`` from the repository root, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, f"stages/{stage}.py", *map(str, arguments)],
        cwd=ROOT,
        env=environment(ray_address),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(stage: str, *arguments: object, ray_address: str | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a stage to its end."""
    process = start(stage, *arguments, ray_address=ray_address)
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        kill(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def kill(process: "subprocess.Popen[str]") -> None:
    """kill -9, with everything in its process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def wait_for_commits(root: Path, count: int, process: "subprocess.Popen[str]") -> None:
    """Wait until at least ``count`` shards are committed while ``process`` runs."""
    deadline = time.monotonic() + PATIENCE_S
    while len(list((root / "commits").glob("*.json"))) < count:
        assert process.poll() is None, f"ended early:\n{process.communicate()}"
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.01)
