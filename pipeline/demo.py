"""The whole way in minutes: pairs on a Ray head of its own, a student, an evaluation beside its teacher.

The student is trained in two runs, a chain: by regression on the pairs first, then with distribution matching. Every
part is the command that a user would type, and is printed as such. Each resumes by itself, so running the demo again
goes on where it stopped, or computes nothing. Whatever is started lives in a process group of its own and is ended with
it, also after Ctrl-C, SIGTERM or a failure.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from configs.demo_schema import DemoConfig
from configs.errors import RunStopped, UserError
from pipeline.demo_record import DemoRecord
from pipeline.installed_command import installed_command
from pipeline.ray_head import ray_head

_ROOT = Path(__file__).resolve().parents[1]
_KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""glibc's allocator gives large pages back and asks for them again, up to a third of a small network's time on CPUs."""
_ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
"""What arenas of several threads keep is a tenth of the memory of the pairs, whose processes are many."""
_PATIENCE_S = 20.0
"""Seconds that a part has to come to its end after it was asked to: the trainer writes a checkpoint first."""


def run_demo(config: DemoConfig) -> None:
    """Make pairs, train on them in two phases, evaluate, and say where the report is.

    Raises:
        UserError: Ray, accelerate or a part's config is not there, or the output can be no folder; nothing was started.
        RunStopped: a part failed; its own message is above.
    """
    output = Path(config.output).absolute()
    pairs, regression, run, evaluation = (output / name for name in ("pairs", "regression", "run", "evaluation"))
    started = time.monotonic()
    ray = installed_command("ray", extra="ray")
    accelerate_launch = installed_command("accelerate-launch", extra="train")  # `accelerate launch`, in half the time
    configs = (_ROOT / config.configs).absolute()
    for name in ("pairs.yaml", "train_regression.yaml", "train.yaml", "evaluate.yaml"):
        if not (configs / name).is_file():
            raise UserError(f"configs: {configs / name} is not there; give the folder that holds it with --configs")

    def script(path: str, settings: str, folder: Path) -> list[str]:
        return [path, "--config", str(configs / settings), "--output", str(folder)]

    os.environ.update(_KEEP_MEMORY)  # of the parts, and of the actors that the Ray head starts
    record = DemoRecord(output, config.cpus)
    launch = [accelerate_launch, "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
    launch += [f"--num_cpu_threads_per_process={config.cpus}"]  # not told, it lets the trainer have one
    launch += ["--dynamo_backend=no"]
    with _signals_raise():
        generate = ["--working-dir", ".", "--", "python", *script("stages/generate_pairs.py", "pairs.yaml", pairs)]
        typed = ["ray", "job", "submit", *generate]
        with (
            record.part("pairs", typed, "pairs/README.md"),
            ray_head(num_cpus=config.cpus, environment=_ONE_ARENA) as head,
        ):
            _run([ray, "job", "submit", "--address", head.jobs, *generate])
        learn = [*launch, *script("trainer/run.py", "train_regression.yaml", regression), "--data.pairs", str(pairs)]
        with record.part("regression", learn, "regression/README.md"):
            _run(learn)
        train = [*launch, *script("trainer/run.py", "train.yaml", run), "--data.pairs", str(pairs)]
        train += ["--init_from", str(regression)]
        with record.part("distribution matching", train, "run/README.md"):
            _run(train)
        evaluate = [sys.executable, *script("stages/evaluate.py", "evaluate.yaml", evaluation), "--student", str(run)]
        with record.part("evaluation", evaluate, "evaluation/report.html"):
            _run(evaluate)
    minutes = (time.monotonic() - started) / 60
    print(f"\n{minutes:.1f} minutes; open {evaluation}/report.html; remove everything with rm -r {output}")


def _run(command: Sequence[str]) -> None:
    """Run a part to its end; leave none of its processes behind, whatever ends this one."""
    print(f"\n$ {' '.join(command)}", flush=True)
    process = subprocess.Popen(command, cwd=_ROOT, start_new_session=True)
    try:
        code = process.wait()
    finally:
        _end(process)
    if code != 0:
        raise RunStopped(f"{command[0]} failed with exit code {code}; its message is above")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ask the process group to end, wait for all of it, then insist.

    The leader is a launcher, which may end at once: the trainer below it has a checkpoint to write.
    """
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + _PATIENCE_S
            while _alive(process.pid) and time.monotonic() < deadline:
                time.sleep(0.1)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def _alive(group: int) -> bool:
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM leaves the context as Ctrl-C does, so that everything is stopped on the way out.

    SIGINT is set as well: a shell that starts this in the background has it ignored.
    """

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
