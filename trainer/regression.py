"""The regression on pairs: how far the student's sample is from the teacher's for the same noise and prompt.

    L_reg = d(G(z), y),        (z, y) a pair                                       (Yin et al. 2024, Eq. 9 and Sec. 3.3)

With u = student - target and n elements in a sample, d is per sample one of

    l2              |u|^2 / n
    pseudo_huber    (sqrt(|u|^2 + c^2) - c) / sqrt(n),  c = 0.00054 sqrt(n)     =  sqrt(l2 + 0.00054^2) - 0.00054
    lpips           LPIPS with VGG16, on images                                        (trainer/perceptual.py)

None of them grows with the size of the sample, so loss.regression_weight means the same for any of them. Pseudo-Huber
is the L2 norm with its corner at 0 rounded off; Song and Dhariwal's is the numerator alone.

In pixel space both sides pass through the teacher's decoder. Neither is clipped: out of range the gradient of a clipped
student would be zero exactly where it has something to correct, and what was published does not clip either
(consistency models' and DMD2's LPIPS). The gradient reaches the student only; target, decoder and metric are frozen.

*Not* assumed: that samples are images (l2, pseudo_huber) or square, or that the caller's autocast is off.

References:
    Yin et al. 2024, One-step Diffusion with Distribution Matching Distillation, arXiv 2311.18828.
    Song and Dhariwal 2023, Improved Techniques for Training Consistency Models, arXiv 2310.14189, Sec. 3.3.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from configs.train_schema import LossConfig
from trainer.perceptual import load_lpips, vgg16_file

Distance = Callable[[Tensor, Tensor], Tensor]
"""(student, target) -> d: shapes (B, *), (B, *) -> (B,), float32."""

HUBER_C = 0.00054
"""c of pseudo-Huber for a sample of one element (Song and Dhariwal 2023, Sec. 3.3)."""

LPIPS_RESOLUTION = 224
"""What smaller images are enlarged to: the size that VGG16 was trained on."""


def check_regression(loss: LossConfig) -> None:
    """Raise UserError when the regression cannot be computed here; cheap, before anything large is loaded."""
    if loss.regression_weight > 0 and loss.regression == "lpips":
        vgg16_file()


def build_regression(
    loss: LossConfig,
    decode: Callable[[Tensor], Tensor] | None,
    device: torch.device,
    target: Literal["x0", "image"] = "x0",
) -> Distance:
    """Build the regression loss of one run.

    Args:
        loss: which distance, in which space.
        decode: the teacher's x0 -> image, (B, 3, H, W) in [-1, 1], with a gradient; None: x0 is the image.
        device: of the samples, and of the metric's networks.
        target: what the second argument of the result will be: x0 as stored, or an image that needs no decoding.

    Returns:
        (student's x0, target) -> loss of each sample, (B,), float32. The target may be as it is read: float16, on the
        CPU.

    Raises:
        UserError: LPIPS without its weights.
        ValueError: an image as target, to be compared in latent space.
    """
    distance = _distance(loss, device)
    if loss.regression_space == "latent":
        if target == "image":
            raise ValueError("regression_space latent compares x0, and the target is an image")
        decode = None

    def regression(x0: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x0.device.type, enabled=False):
            y = y.detach().to(x0.device, torch.float32)
            if decode is None:
                return distance(x0, y)
            with torch.no_grad():
                y = decode(y) if target == "x0" else y
            return distance(decode(x0), y)

    return regression


def l2(student: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample."""
    return (student - target).square().flatten(1).mean(1)


def pseudo_huber(student: Tensor, target: Tensor) -> Tensor:
    """Root mean squared error of each sample, but quadratic where it is below HUBER_C."""
    return (l2(student, target) + HUBER_C**2).sqrt() - HUBER_C


def resize(image: Tensor, resolution: int | None) -> Tensor:
    """Resize for LPIPS, bilinear, without antialiasing, corners not aligned (as the published losses do).

    Args:
        image: (B, 3, H, W).
        resolution: new height and width; None: LPIPS_RESOLUTION if height or width is smaller, else as it is.
    """
    if resolution is None:
        if min(image.shape[-2:]) >= LPIPS_RESOLUTION:
            return image
        resolution = LPIPS_RESOLUTION
    return torch.nn.functional.interpolate(image, (resolution, resolution), mode="bilinear", align_corners=False)


def _distance(loss: LossConfig, device: torch.device) -> Distance:
    if loss.regression == "l2":
        return l2
    if loss.regression == "pseudo_huber":
        return pseudo_huber
    size, metric = partial(resize, resolution=loss.lpips_resolution), load_lpips(device)
    return lambda student, target: metric(size(student), size(target))
