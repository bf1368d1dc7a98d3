"""Checkpoints of a run: everything a later process needs to go on as if it had never stopped.

    RUN_DIR/checkpoints/step_0000500/
        student.safetensors, fake_score.safetensors, student_ema.safetensors      weights, under the networks' names
        student_optimizer.safetensors, fake_score_optimizer.safetensors           moments, under parameter names
        trainer_state.json, data_cursor.json, config.yaml
        COMPLETE                                                                  sha256 of each of these
    RUN_DIR/last_checkpoint.json    the step of the latest: remembers that there was one, should all of them get lost

A checkpoint appears whole or not at all, and is read only when every byte is what was written: see
:mod:`trainer.checkpoints.sealed_folder`. No random state is in it, because no randomness is carried from one step to
the next. Its name is the step: the highest is the latest. Nothing depends on the number of processes.
"""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import nn
from torch.optim import Optimizer

from configs.errors import RunStopped, UserError
from configs.train_schema import TrainSpec
from pipeline.full_disk import FULL_DISK
from pipeline.shards.local_write import put_local
from trainer.checkpoints.optimizer_state import expected_tensors, load_state_tensors, state_tensors
from trainer.checkpoints.sealed_folder import damage, remove, remove_leftovers, sealed_folder
from trainer.checkpoints.tensor_file import load_network, read_tensors, tensor_names, write_tensors

CHECKPOINTS = "checkpoints"
LAST = "last_checkpoint.json"
STATE = "trainer_state.json"
CURSOR = "data_cursor.json"
CONFIG = "config.yaml"
_NAME = re.compile(r"step_(\d{7,})")


@dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False))
class TrainerState:
    """Where a run is, and what it is. The loop moves it on."""

    spec: TrainSpec
    """The identity of the run."""
    num_pairs: int
    """Pairs for training in all datasets together, those held out not counted."""
    world: int
    """Processes of the run that wrote this; another number may go on."""
    code_revision: str
    """Of the code that wrote this."""
    versions: dict[str, str]
    """Of the libraries that touch the numbers."""
    step: int = 0
    """Steps of the student that are done."""
    num_images: int = 0
    """Samples that the student has learnt from: of distribution matching, and of pairs."""
    nonfinite_samples: int = 0
    """How many of them gave no finite gradient."""
    seconds: float = 0.0
    """Wall time of all runs of this directory so far."""


_RECORD = TypeAdapter(TrainerState)


class Checkpoints:
    """The checkpoints of a run directory. One process writes; any may load.

    Args:
        run_dir: the run directory.
        keep: latest checkpoints that are kept.
        milestone_every: those at multiples of this step are kept for ever; None: none is.
    """

    def __init__(self, run_dir: Path, keep: int, milestone_every: int | None) -> None:
        self._parent = run_dir / CHECKPOINTS
        self._last = run_dir / LAST
        self._keep = keep
        self._milestone_every = milestone_every

    def save(
        self,
        state: TrainerState,
        networks: Mapping[str, nn.Module],
        optimizers: Mapping[str, tuple[Optimizer, nn.Module]],
        cursor: Mapping[str, Any],
        config_yaml: str,
    ) -> Path:
        """Write the checkpoint of ``state.step``, then remove those that need not be kept.

        A step that has its checkpoint keeps it: equal steps of a run are equal.

        Args:
            state: where the run is.
            networks: by file name without suffix; plain modules, not wrapped.
            optimizers: likewise, each AdamW with the network whose parameters it updates.
            cursor: where the data stands; values are JSON.
            config_yaml: the configuration of this run.

        Returns:
            Its folder.

        Raises:
            RunStopped: it cannot be written, for want of space or otherwise. Checkpoints before it are untouched.
        """
        folder = self._parent / f"step_{state.step:07d}"
        try:
            if not folder.exists():
                remove_leftovers(self._parent)
                with sealed_folder(folder) as temporary:
                    for name, network in networks.items():
                        write_tensors(temporary / f"{name}.safetensors", network.state_dict())
                    for name, (optimizer, network) in optimizers.items():
                        write_tensors(temporary / f"{name}_optimizer.safetensors", state_tensors(optimizer, network))
                    (temporary / STATE).write_bytes(_RECORD.dump_json(state, indent=1))
                    (temporary / CURSOR).write_text(json.dumps(cursor, indent=1))
                    (temporary / CONFIG).write_text(config_yaml)
            self._settle()
        except OSError as error:
            raise RunStopped(
                f"{folder}: checkpoint not written ({error.strerror}); those before it are untouched: {_remedy(error)} "
                "and run the same command again"
            ) from error
        return folder

    def tidy(self) -> None:
        """Do what a process that died in :meth:`save` left undone, and remove half a checkpoint."""
        remove_leftovers(self._parent)
        self._settle()

    def latest(self) -> Path | None:
        """The folder of the highest step, after every byte of it has been checked; None when there has never been one.

        Raises:
            UserError: it is damaged: the line says how, which one is the next whole one, and how to go on from there.
                Or all of them are gone: no run begins again without a word.
        """
        folders = _folders(self._parent)
        if not folders and self._last.exists():
            raise UserError(
                f"{self._parent}: has no checkpoint, though {LAST} tells of one; put them back, or name a new output"
            )
        problems: dict[Path, str] = {}
        while folders:
            problem = damage(folders[-1])
            if problem is None:
                break
            problems[folders.pop()] = problem
        if not problems:
            return folders[-1] if folders else None
        newest, problem = next(iter(problems.items()))
        there_is = f"the latest whole one is {folders[-1].name}" if folders else "no whole one is left to go on from"
        lost = [*problems] if folders else [*problems, self._last]  # without it the run may begin again
        command = f"rm -r {shlex.join(map(str, lost))}"
        raise UserError(f"{newest}: damaged ({problem}); {there_is}: {command}, then run the same command again")

    @staticmethod
    def load(
        folder: Path,
        networks: Mapping[str, nn.Module],
        optimizers: Mapping[str, tuple[Optimizer, nn.Module]],
    ) -> tuple[TrainerState, dict[str, Any]]:
        """Load a checkpoint that :meth:`latest` has found whole into networks and optimizers, in place.

        Args:
            folder: of the checkpoint.
            networks: as in :meth:`save`; may be fewer.
            optimizers: likewise.

        Returns:
            Where the run is, and where the data stands.

        Raises:
            UserError: a file is missing, or a tensor's name, shape or dtype is not the network's: the first is named.
        """
        state = read_state(folder)
        for name, network in networks.items():
            load_network(folder / f"{name}.safetensors", network)
        for name, (optimizer, network) in optimizers.items():
            path = folder / f"{name}_optimizer.safetensors"
            tensors = read_tensors(path, expected_tensors(tensor_names(path), network))
            load_state_tensors(optimizer, network, tensors)
        return state, json.loads((folder / CURSOR).read_bytes())

    def _settle(self) -> None:
        """Note the latest checkpoint, then remove those that need not be kept."""
        folders = _folders(self._parent)
        if folders:
            put_local(self._last, json.dumps({"step": _step(folders[-1])}).encode(), create=False)
        for folder in folders[: -self._keep]:
            if self._milestone_every is None or _step(folder) % self._milestone_every != 0:
                remove(folder)


def newest_state(run_dir: Path) -> TrainerState | None:
    """Where the latest checkpoint of a run stands, unchecked; None when there is none. To tell, not to go on from."""
    folder = newest_folder(run_dir)
    return read_state(folder) if folder is not None else None


def newest_folder(run_dir: Path) -> Path | None:
    """The latest checkpoint of a run, unchecked; None when there is none."""
    return next(reversed(_folders(run_dir / CHECKPOINTS)), None)


def read_state(folder: Path) -> TrainerState:
    """Where a checkpoint stands.

    Raises:
        UserError: it was written by code of another version.
    """
    path = folder / STATE
    try:
        return _RECORD.validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(
            f"{path}: {key}: {problem['msg'].lower()}; go on with the code that wrote it, or begin a new output"
        ) from None


def _folders(parent: Path) -> list[Path]:
    """Of all checkpoints, by step."""
    return sorted(filter(_step, parent.iterdir()), key=_step) if parent.is_dir() else []


def _step(folder: Path) -> int:
    """The step that a folder's name tells; 0, of which there is no checkpoint, when it is not a checkpoint's."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else 0


def _remedy(error: OSError) -> str:
    return "make room" if error.errno in FULL_DISK else "mend that"
