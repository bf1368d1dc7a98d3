"""The networks of another run to begin with, so that a schedule of several phases is a chain of runs.

    student, fake score, average      those of the other run's checkpoint
    optimizers, warm-up, step, data   this run's own, from the beginning

What the checkpoint has no file for begins as it would without it: the fake score as the teacher's network, the average
as the student. The identity of a run covers the weights it begins with by content, wherever they lie.
"""

import hashlib
import json
from pathlib import Path

from pydantic import ValidationError
from torch import nn

from configs.errors import UserError
from configs.schema import TeacherIdentity
from trainer.checkpoints.checkpoints import CHECKPOINTS, newest_folder, read_state
from trainer.checkpoints.sealed_folder import COMPLETE, Seal, damage
from trainer.checkpoints.tensor_file import load_network

NETWORKS = ("student", "fake_score", "student_ema")


class InitialWeights:
    """The networks of a checkpoint.

    Args:
        path: a run directory, whose latest checkpoint is taken, or the folder of a checkpoint.
        teacher: of this run; that of the other run must be the same.

    Attributes:
        digest: sha256 of the sha256 of each network's file, by name.

    Raises:
        UserError: there is no checkpoint, or it is of another teacher, or a file of it is missing.
    """

    def __init__(self, path: Path, teacher: TeacherIdentity) -> None:
        folder = path if (path / COMPLETE).exists() else newest_folder(path)
        if folder is None:
            raise UserError(f"init_from: {path} has no {CHECKPOINTS}, nor is it one; name the directory of a run")
        try:
            sealed = Seal.model_validate_json((folder / COMPLETE).read_bytes()).files
            there = read_state(folder).spec.teacher
        except (FileNotFoundError, ValidationError):
            raise UserError(f"init_from: {folder} is damaged ({damage(folder)}); name another checkpoint") from None
        if there.weights_digest != teacher.weights_digest:
            raise UserError(f"init_from: {folder} is of a student of another teacher; name a run with this one")
        self._folder = folder
        self._files = {name: f"{name}.safetensors" for name in NETWORKS if f"{name}.safetensors" in sealed}
        contents = {name: sealed[file].sha256 for name, file in self._files.items()}
        self.digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()

    def check(self) -> None:
        """Read all of it. Raises UserError if it is not what was written."""
        if (problem := damage(self._folder)) is not None:
            raise UserError(f"init_from: {self._folder} is damaged ({problem}); name another checkpoint")

    def load(self, name: str, network: nn.Module) -> None:
        """Load a network in place, if the checkpoint has it. Raises UserError if it is of another shape."""
        if name in self._files:
            load_network(self._folder / self._files[name], network)
