"""clean-fid's Inception features: its networks and its resizing, on images in memory instead of files.

    mode                network                                          images come to 299 pixels by
    clean               StyleGAN's TorchScript port of the 2015 graph    PIL bicubic with antialiasing, in float
    legacy_tensorflow   the same                                         the network's own resizing (TensorFlow 1's)
    legacy_pytorch      pytorch-fid's port, weights as tensors           torch's bilinear without antialiasing

The features are those of ``cleanfid.fid.get_folder_features`` for the same images as files. EDM's and StyleGAN's own
FID are legacy_tensorflow. Weights lie where clean-fid looks for them, so that both share one download.
"""

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import Tensor

from configs.errors import UserError
from configs.evaluate_schema import InceptionFeaturesConfig
from pipeline.downloads import downloaded
from pipeline.scoring.resizing import batch_of, channels_first, middle_square, mode_resizer
from pipeline.scoring.torchscript import file_sha256, load_torchscript

CLEANFID_CACHE = Path("/tmp")
"""Where clean-fid keeps StyleGAN's file, hard-coded in ``cleanfid.features``."""


class InceptionFeatures:
    """A scorer with one column, ``features``, 2048 wide, float32.

    Args:
        config: mode and weights.
        device: where to run the network.

    Raises:
        UserError: the weights are not there and cannot be downloaded, or are of another network.
    """

    def __init__(self, config: InceptionFeaturesConfig, device: torch.device) -> None:
        path = Path(config.weights).expanduser() if config.weights else _cached_weights(config.mode)
        load = _pytorch_network if config.mode == "legacy_pytorch" else _torchscript_network
        self._network = load(path, device, resize_inside=config.mode == "legacy_tensorflow")
        self._device = device
        self._resize = mode_resizer(config.mode)
        self._size = config.resize
        self.columns: dict[str, int | None] = {"features": 2048}
        self.identity: dict[str, JsonValue] = {
            "kind": config.kind,
            "mode": config.mode,
            "weights_sha256": file_sha256(path),
            "resize": config.resize,
            "dtype": "float32",
        }

    @torch.no_grad()
    def __call__(self, images: list[NDArray[np.uint8]], prompts: list[str]) -> dict[str, NDArray[np.float32]]:
        """Features of each image; prompts do not matter."""
        pixels = batch_of(images, self._prepared).to(self._device)
        with torch.jit.optimized_execution(False):  # or the third call rounds differently from the first
            return {"features": self._network(pixels).float().cpu().numpy()}

    def _prepared(self, image: NDArray[np.uint8]) -> Tensor:
        return channels_first(self._resize(middle_square(image, self._size)))


def _torchscript_network(path: Path, device: torch.device, *, resize_inside: bool) -> Callable[[Tensor], Tensor]:
    from cleanfid.inception_torchscript import InceptionV3W

    script = load_torchscript(path, device, key="weights")
    if not hasattr(script, "layers"):
        raise UserError(f"weights: {path} is not clean-fid's Inception network, which has layers; get its file")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # as in load_torchscript
        os.symlink(path.resolve(), Path(folder, "inception-2015-12-05.pt"))  # clean-fid takes the folder of this name
        return InceptionV3W(folder, download=False, resize_inside=resize_inside).to(device).eval()


def _pytorch_network(path: Path, device: torch.device, *, resize_inside: bool) -> Callable[[Tensor], Tensor]:
    """pytorch-fid's network, which would fetch its weights itself, and unpickle whatever they hold."""
    from cleanfid import inception_pytorch

    assert not resize_inside
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"weights: there is no file {path}") from None
    except (UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, EOFError, AttributeError) as error:
        raise UserError(f"weights: {path} does not hold tensors alone; it is not loaded") from error
    fetch = inception_pytorch.load_state_dict_from_url
    inception_pytorch.load_state_dict_from_url = lambda *_, **__: weights
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # it draws weights before it is given any
            warnings.simplefilter("ignore", UserWarning)  # of torchvision, about how clean-fid calls it
            network = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False).to(device).eval()
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"weights: {path} is not pytorch-fid's Inception network; get clean-fid's file") from error
    finally:
        inception_pytorch.load_state_dict_from_url = fetch
    return lambda pixels: network(pixels / 255)[0].flatten(1)


def _cached_weights(mode: str) -> Path:
    """Where clean-fid keeps the weights; downloaded, whole or not at all, if they are not there yet."""
    from cleanfid.downloads_helper import inception_url
    from cleanfid.inception_pytorch import FID_WEIGHTS_URL

    if mode == "legacy_pytorch":
        url, folder = FID_WEIGHTS_URL, Path(torch.hub.get_dir(), "checkpoints")
    else:
        url, folder = inception_url, CLEANFID_CACHE
    return downloaded(url, folder / url.rpartition("/")[2], "weights", "give its path as weights")
