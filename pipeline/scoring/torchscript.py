"""Features of a network that someone saved as TorchScript.

    features = network(low + (high - low) / 255 * resized image)         (B, 3, S, S) -> (B, width)

A TorchScript file is a program for torch's own interpreter. It is not a pickle, but it does run.
"""

import hashlib
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import Tensor

from configs.errors import UserError
from configs.evaluate_schema import TorchscriptFeaturesConfig
from pipeline.scoring.resizing import batch_of, channels_first, clean_resizer, middle_square


class TorchscriptFeatures:
    """A scorer with one column, ``features``. Float32; the network has the final word on its own precision.

    Args:
        config: the file, and what it takes.
        device: where to run it.

    Raises:
        UserError: there is no such file, it is not TorchScript, or it does not map images to vectors.
    """

    def __init__(self, config: TorchscriptFeaturesConfig, device: torch.device) -> None:
        path = Path(config.path).expanduser()
        self._network = load_torchscript(path, device, key="path")
        self._device = device
        self._size = config.resize
        self._resize = clean_resizer(config.input_size)
        self._low, self._high = config.input_range
        try:
            features = self._features(torch.zeros(2, 3, config.input_size, config.input_size))
        except RuntimeError as error:
            cause = str(error).strip().splitlines()[-1]
            raise UserError(f"path: {path} does not take images of input_size {config.input_size} ({cause})") from error
        if features.ndim != 2 or len(features) != 2:
            raise UserError(f"path: {path} gives {tuple(features.shape)} for 2 images, not one vector each")
        self.columns: dict[str, int | None] = {"features": features.shape[1]}
        self.identity: dict[str, JsonValue] = {
            "kind": config.kind,
            "weights_sha256": file_sha256(path),
            "input_size": config.input_size,
            "input_range": list(config.input_range),
            "resize": config.resize,
            "dtype": "float32",
        }

    def __call__(self, images: list[NDArray[np.uint8]], prompts: list[str]) -> dict[str, NDArray[np.float32]]:
        """Features of each image; prompts do not matter."""
        return {"features": self._features(batch_of(images, self._prepared)).cpu().numpy()}

    def _prepared(self, image: NDArray[np.uint8]) -> Tensor:
        return channels_first(self._resize(middle_square(image, self._size)))

    @torch.no_grad()
    def _features(self, pixels: Tensor) -> Tensor:
        scaled = self._low + pixels.to(self._device) * ((self._high - self._low) / 255)
        with torch.jit.optimized_execution(False):  # or the third call rounds differently from the first
            return self._network(scaled).float()


def load_torchscript(path: Path, device: torch.device, *, key: str) -> torch.jit.ScriptModule:
    """Load a TorchScript file in eval mode; ``key`` is the config's name of it.

    Raises:
        UserError: there is no such file, or it is not TorchScript.
    """
    if not path.is_file():
        raise UserError(f"{key}: there is no file {path}")
    try:
        with warnings.catch_warnings():  # torch has no further plans for the format, and reads it still
            warnings.simplefilter("ignore", FutureWarning)
            return torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise UserError(f"{key}: {path} is not a TorchScript file, or is damaged; copy or download it again") from error


def file_sha256(path: Path) -> str:
    """sha256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
