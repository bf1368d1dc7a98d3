"""A run directory: one experiment, whose identity does not change while it is trained.

    RUN_DIR/run.json            the TrainSpec, when it was begun and by which code
    RUN_DIR/config.yaml         the whole configuration of the last command
    RUN_DIR/checkpoints/        named folders, and last_checkpoint.json beside them; RUN_DIR/grids/, metrics.jsonl,
                                tensorboard/, export/, README.md

The directory belongs to one command at a time: two that trained in it would prune each other's checkpoints.
"""

import fcntl
import json
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from configs.errors import UserError
from configs.fingerprint import differences, fingerprint
from configs.json_text import parse_json
from configs.train_schema import TrainConfig, TrainSpec
from configs.yaml_file import to_yaml
from pipeline.provenance import code_revision, library_versions
from pipeline.shards.storage import Storage
from trainer.compatibility import two_columns

RUN = "run.json"
CONFIG = "config.yaml"


def check(run_dir: Path, spec: TrainSpec) -> None:
    """Make sure that a directory is empty, or this run's. Changes nothing.

    Raises:
        UserError: the directory holds something else, or a run of another spec: what differs, in two columns.
    """
    path = run_dir / RUN
    if path.exists():
        _compare(path, spec)
        return
    there = (info.path for info in Storage.open(str(run_dir.absolute())).list())  # but for what was never finished
    if foreign := next((path for path in there if path != _LOCK), None):
        raise UserError(f"output: {run_dir} is not empty ({foreign}) and not a run directory; name a new one")


def begin(run_dir: Path, config: TrainConfig, spec: TrainSpec) -> None:
    """Write what a run is, once, and how it is run this time, into a directory that has been checked and is locked.

    What killed processes were writing when they died is removed.
    """
    storage = Storage.open(str(run_dir.absolute()))
    for leftover in list(storage.leftovers()):
        storage.delete(leftover.path)
    if not (run_dir / RUN).exists():
        about = {
            "fingerprint": fingerprint(spec),
            "spec": spec.model_dump(mode="json"),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_revision": code_revision(),
            "versions": library_versions(),
        }
        storage.write(RUN, json.dumps(about, indent=1).encode())
    storage.write(CONFIG, to_yaml(config.model_dump(mode="json")).encode())


def _compare(path: Path, spec: TrainSpec) -> None:
    try:
        there = TrainSpec.model_validate(parse_json(path.read_bytes())["spec"])
    except (ValueError, KeyError, TypeError, ValidationError):
        raise UserError(f"output: {path} is not the record of a training run; name another directory") from None
    if differing := differences(there.model_dump(mode="json"), spec.model_dump(mode="json")):
        table = two_columns("run directory", "this command", differing)
        raise UserError(
            f"output: {path.parent} holds another run; restore these settings or name a new output\n{table}"
        )


_LOCK = ".lock"


@contextmanager
def locked(run_dir: Path) -> Generator[None]:
    """Keep other commands out of a run directory; the system lets go when this process ends, however it does.

    Raises:
        UserError: another process is training in it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / _LOCK).open("wb")
    except OSError as error:
        raise UserError(f"output: {run_dir}: {error.strerror}; name a directory that can be written") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"output: {run_dir} is in use by another process; wait for it or name another") from None
        yield
