"""Run the trainer as a user does: processes of its own, one or several, killed or left to end."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
from support.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


def start_trainer(
    config: Path, output: Path, *arguments: object, processes: int = 1, accelerate: bool = False
) -> "subprocess.Popen[str]":
    """Start ``trainer/run.py`` from the repository root, in a process group of its own.

    Args:
        config: YAML file.
        output: run directory.
        arguments: further flags.
        processes: more than one are started by torchrun, on the CPU, and talk through gloo.
        accelerate: one process, started by ``accelerate launch``.
    """
    launcher = [sys.executable]
    if accelerate:
        launcher += ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"]
        launcher += ["--mixed_precision=no", "--dynamo_backend=no"]
    elif processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, "trainer/run.py", "--config", config, "--output", output, *arguments]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_tree(process: "subprocess.Popen[str]") -> None:
    """kill -9 of a process and all that it has started: a launcher gives its workers process groups of their own."""
    parent = psutil.Process(process.pid)
    for one in (parent, *parent.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    """Wait until a file is there while a process runs."""
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert process.poll() is None, f"ended early:\n{process.communicate()}"
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)
