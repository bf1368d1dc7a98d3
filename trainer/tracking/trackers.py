"""Trackers besides ``metrics.jsonl``, through accelerate: TensorBoard files in the run directory, Weights & Biases."""

import hashlib
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from configs.train_schema import TrainConfig
from trainer.run_directory import RUN

if TYPE_CHECKING:
    from accelerate import Accelerator

PROJECT = "potstill"


def check_trackers(config: TrainConfig) -> None:
    """Make sure that each tracker of the configuration is installed: accelerate leaves out one that is not, silently.

    Raises:
        UserError: one is not.
    """
    for tracker in config.runtime.trackers:
        if find_spec(tracker) is None:
            raise UserError(f"runtime.trackers: {tracker} is not installed; pip install {tracker}, or leave it out")


def start_trackers(accelerator: "Accelerator", config: TrainConfig, step: int) -> None:
    """Begin to track; TensorBoard under the accelerator's logging directory, in ``potstill/``.

    Args:
        accelerator: made with ``log_with`` and a logging directory.
        config: shown with the run.
        step: the step that the run goes on from: TensorBoard is told to forget what it has of later ones.
    """
    options: dict[str, Any] = {"tensorboard": {"purge_step": step + 1}}
    if "wandb" in config.runtime.trackers:  # one run there, however often it goes on here
        identity = hashlib.sha256((Path(config.output) / RUN).read_bytes()).hexdigest()[:16]
        options["wandb"] = {"dir": config.output, "id": identity, "resume": "allow"}
    accelerator.init_trackers(PROJECT, config=flatten(config.model_dump(mode="json")), init_kwargs=options)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """``{"loss": {"dm_weight": 1.0}}`` as ``{"loss.dm_weight": 1.0}``; what is no number, text or truth, as JSON."""
    flat: dict[str, int | float | str | bool] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str) else json.dumps(value)
    return flat
