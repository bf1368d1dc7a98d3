"""Scorers without a network, for tests. Imported as ``tests.support.scorers``, which actors can do too."""

import time
from itertools import count
from pathlib import Path

import numpy as np


class Brightness:
    """Mean of an image, the length of its prompt, and the mean of each of its channels.

    Args:
        device: ignored.
        scale: factor of all values; part of the identity.
        log: a file that gets a line for each batch.
        hold: a file; while it exists, all batches of a process but its first wait.
    """

    def __init__(self, device, scale=1.0, log=None, hold=None):
        self.columns = {"mean": None, "words": None, "channels": 3}
        self.identity = {"kind": "brightness", "scale": scale}
        self._scale, self._log, self._hold = np.float32(scale), log, hold
        self._batches = count(1)

    def __call__(self, images, prompts):
        is_first = next(self._batches) == 1
        while not is_first and self._hold is not None and Path(self._hold).exists():
            time.sleep(0.01)
        if self._log is not None:
            with Path(self._log).open("a") as file:
                file.write(f"{len(images)}\n")
        pixels = np.stack(images).astype(np.float32) * self._scale
        return {
            "mean": pixels.mean((1, 2, 3)),
            "words": np.array([len(prompt.split()) for prompt in prompts], np.float32),
            "channels": pixels.mean((1, 2)),
        }


class Faulty(Brightness):
    """Breaks its promise in the way that it is told."""

    def __init__(self, device, fault):
        super().__init__(device)
        self._fault = fault

    def __call__(self, images, prompts):
        values = super().__call__(images, prompts)
        match self._fault:
            case "nan":
                values["channels"][-1, 1] = np.nan
            case "short":
                values["mean"] = values["mean"][:-1]
            case "narrow":
                values["channels"] = values["channels"][:, :2]
            case "missing":
                del values["words"]
            case "double":
                values["mean"] = values["mean"].astype(np.float64)
        return values
