"""LPIPS: how different two images look to a network that was trained to name things.

    d(a, b) = sum_l mean over positions of sum_c w_lc (f_lc(a) - f_lc(b))^2                (Zhang et al. 2018, Eq. 1)

f_l are VGG16's activations at the end of its five blocks (relu1_2, relu2_2, relu3_3, relu4_3, relu5_3), scaled to unit
length across the channels at every position; the weights w >= 0 were fitted to human judgements of similarity.

The ``lpips`` package defines the metric and brings w. VGG16's own weights (0.5 GB) are torchvision's, under the name
and in the folder where torch.hub keeps them. Their sha256 is part of the name and is checked at every start: a damaged
file would change what is learnt without a word.

This is the only module that imports lpips, which imports torchvision.

References:
    Zhang et al. 2018, The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, arXiv 1801.03924.
"""

import hashlib
import socket
import warnings
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor

from configs.errors import UserError

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
"""torchvision's VGG16 of ImageNet; the last part of the name begins the file's sha256."""

SILENCE_S = 30.0
"""A server that sends nothing for so long is given up."""


def vgg16_file() -> Path:
    """Return where VGG16's weights are; download them if they are not there yet.

    Every process may call it, but let one of a machine go first, or each downloads its own copy.

    Returns:
        A file in torch.hub's folder whose sha256 has been checked.

    Raises:
        UserError: the file is neither there nor can be downloaded, or is damaged.
    """
    name = VGG16_URL.rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    sha256 = Path(name).stem.rpartition("-")[2]
    if not path.exists():
        try:
            _download(path, sha256)
        except (OSError, HTTPException, RuntimeError) as error:
            raise UserError(
                f"loss.regression: lpips needs {path}, and it cannot be downloaded ({error}); put {VGG16_URL} there, "
                "or set loss.regression: l2 or pseudo_huber"
            ) from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(sha256):
        raise UserError(
            f"{path}: damaged, its sha256 begins {found[: len(sha256)]} instead of {sha256}; remove it and it is "
            f"downloaded again from {VGG16_URL}, or set loss.regression: l2 or pseudo_huber"
        )
    return path


def load_lpips(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Load the metric: frozen, in float32.

    Args:
        device: where its networks go.

    Returns:
        (image, image) -> d: shapes (B, 3, H, W) twice, black -1 to white 1, H and W at least 16 -> (B,).

    Raises:
        UserError: see :func:`vgg16_file`.
    """
    import lpips

    vgg16 = torch.load(vgg16_file(), map_location="cpu", weights_only=True)
    fitted = torch.load(Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", map_location="cpu", weights_only=True)
    # Built without numbers: the package would draw 138 million of them from the global generator first.
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torchvision, about how the package calls it
        metric = lpips.LPIPS(net="vgg", pnet_rand=True, pretrained=False, verbose=False)
    # It cuts VGG16 into slices but keeps the layers' numbers: slice2.5.weight is features.5.weight.
    trunk = {f"net.{name}": vgg16["features." + name.partition(".")[2]] for name in metric.net.state_dict()}
    metric.load_state_dict({**trunk, **fitted}, strict=False, assign=True)
    metric.to(device).eval().requires_grad_(False)
    return lambda image, other: metric(image, other).flatten()


def _download(path: Path, sha256: str) -> None:
    """Fetch VGG16_URL to ``path`` with progress on stderr; whole and checked, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_S)  # torch.hub sets none and would wait for ever
    try:
        torch.hub.download_url_to_file(VGG16_URL, str(path), hash_prefix=sha256)
    finally:
        socket.setdefaulttimeout(timeout)
