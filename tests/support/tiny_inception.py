"""A stand-in for StyleGAN's Inception file: what clean-fid asks of it, with random weights."""

from pathlib import Path

import torch


class Layers(torch.nn.Module):
    """2048 numbers of normalized pixels: an 8x8 grid of colours times random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.randn(192, 2048, generator=torch.Generator().manual_seed(0)))

    def forward(self, normalized: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(normalized, 8).flatten(1) @ self.weights


class Inception(torch.nn.Module):
    """What clean-fid asks of StyleGAN's file: ``layers`` on normalized pixels, and a call that also resizes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, pixels: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        resized = torch.nn.functional.interpolate(pixels, (10, 10), mode="bilinear")
        return self.layers((resized - 128) / 128)


def build(path: Path) -> Path:
    """Save one as TorchScript; the same one each time."""
    torch.jit.script(Inception()).save(path)
    return path
