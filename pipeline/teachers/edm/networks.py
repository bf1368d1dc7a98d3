"""F of EDM's networks, DDPM++ and ADM: what :mod:`~pipeline.teachers.edm.preconditioning` is around.

A U-Net: residual blocks at halving resolutions, self-attention at some, every encoder output handed across to the
decoder. The two kinds differ in how a block is told noise level and class, and in where attention is:

    ddpm++   embedding added before the second normalisation;      one head; in the decoder after a level's last block
    adm      scale and shift after the second normalisation;       heads of 64 channels; after every block

Sub-modules have the names of the published checkpoints, so weights load by name. Up- and downsampling is by the filter
[1, 1], which is nearest neighbour and the mean of 2 x 2. Left out: dropout, augmentation conditioning, dropping of
labels; a frozen teacher, and a student that is a function of its noise (Yin et al. 2024, App. B), have no use for them.

References:
    Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364.
    Song et al. 2021, Score-Based Generative Modeling through SDEs, arXiv 2011.13456 (DDPM++).
    Dhariwal and Nichol 2021, Diffusion Models Beat GANs on Image Synthesis, arXiv 2105.05233 (ADM).
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from configs.errors import UserError
from pipeline.teachers.edm.architecture import EdmArchitecture
from pipeline.teachers.edm.float32_linear import Float32Linear
from pipeline.teachers.edm.preconditioning import Backbone, EdmNetwork

MAX_PERIOD = 10_000
"""Longest period of the noise embedding, as positions have it (Vaswani et al. 2017)."""
HEAD_CHANNELS = 64
"""Channels of an attention head of ADM."""


def edm_network(architecture: EdmArchitecture) -> EdmNetwork:
    """The preconditioned network of an architecture. Its weights are random: load others by name.

    Raises:
        UserError: there can be no such network.
    """
    try:
        return EdmNetwork(UNet(architecture), architecture.sigma_data, architecture.noise_scale)
    except ValueError as error:
        # It is a normalisation's, whose groups have to be equal, or a block's, whose heads have to be.
        raise UserError(f"model_channels: there is no such network: {error}") from None


def empty_network(architecture: EdmArchitecture, where: Path) -> EdmNetwork:
    """The same on the meta device, without weights.

    Args:
        architecture: what it is.
        where: the file that says so, for the message.

    Raises:
        UserError: there can be no such network.
    """
    try:
        with torch.device("meta"):
            return edm_network(architecture)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


class UNet(Backbone):
    """DDPM++ or ADM.

    Args:
        architecture: what it is made of.
    """

    def __init__(self, architecture: EdmArchitecture) -> None:
        super().__init__()
        kind, width, mults = architecture.architecture, architecture.model_channels, architecture.channel_mult
        embedding = width * architecture.channel_mult_emb
        self._kind = kind
        self._width = width
        self._checkpoints = False

        if classes := architecture.label_dim:
            self.map_label = (
                Float32Linear(classes, width) if kind == "ddpm++" else Float32Linear(classes, embedding, bias=False)
            )
        self.map_layer0 = Float32Linear(width, embedding)
        self.map_layer1 = Float32Linear(embedding, embedding)

        def block(inputs: int, outputs: int, attention: bool, resample: Resample = None) -> Block:
            return Block(inputs, outputs, embedding, kind, attention, resample)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        channels = architecture.img_channels
        skips: list[int] = []
        for level, mult in enumerate(mults):
            size = architecture.img_resolution >> level
            attends = size in architecture.attn_resolutions
            if level == 0:
                first = width if kind == "ddpm++" else width * mult
                self.enc[f"{size}x{size}_conv"] = nn.Conv2d(channels, first, 3, padding=1)
                channels = first
            else:
                self.enc[f"{size}x{size}_down"] = block(channels, channels, False, "down")
            skips.append(channels)
            for i in range(architecture.num_blocks):
                self.enc[f"{size}x{size}_block{i}"] = block(channels, width * mult, attends)
                channels = width * mult
                skips.append(channels)

        for level, mult in reversed(list(enumerate(mults))):
            size = architecture.img_resolution >> level
            attends = size in architecture.attn_resolutions
            if level == len(mults) - 1:
                self.dec[f"{size}x{size}_in0"] = block(channels, channels, True)
                self.dec[f"{size}x{size}_in1"] = block(channels, channels, False)
            else:
                self.dec[f"{size}x{size}_up"] = block(channels, channels, False, "up")
            for i in range(architecture.num_blocks + 1):
                is_last = i == architecture.num_blocks
                inputs = channels + skips.pop()
                self.dec[f"{size}x{size}_block{i}"] = block(
                    inputs, width * mult, attends and (kind == "adm" or is_last)
                )
                channels = width * mult
        out_norm, out_conv = _norm(channels, kind), nn.Conv2d(channels, architecture.img_channels, 3, padding=1)
        if kind == "ddpm++":
            size = architecture.img_resolution
            self.dec[f"{size}x{size}_aux_norm"], self.dec[f"{size}x{size}_aux_conv"] = out_norm, out_conv
        else:
            self.out_norm, self.out_conv = out_norm, out_conv

    def forward(self, x: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
        """Evaluate.

        Args:
            x: c_in x_t, (B, 3, H, W), in the precision of the layers.
            noise: c_noise, (B,), float32.
            condition: (B, K), float32.

        Returns:
            (B, 3, H, W), in the precision of the layers.
        """
        embedding = self._embed(noise, condition)
        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = self._run(layer, x, embedding) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            if isinstance(layer, Block):
                if layer.inputs != x.shape[1]:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = self._run(layer, x, embedding)
        norm, conv = (self.out_norm, self.out_conv) if self._kind == "adm" else list(self.dec.values())[-2:]
        return conv(functional.silu(norm(x)))

    def image_layers(self) -> Iterator[nn.Module]:
        """Convolutions, those of the attention among them, and normalisations."""
        return (layer for layer in self.modules() if isinstance(layer, nn.Conv2d | nn.GroupNorm))

    def enable_gradient_checkpointing(self) -> None:
        """From now on the backward pass computes the activations of each block again."""
        self._checkpoints = True

    def _embed(self, noise: Tensor, condition: Tensor) -> Tensor:
        """What blocks are told of noise level and class, (B, embedding), float32, whatever autocast is around it."""
        count = self._width // 2
        last = count - 1 if self._kind == "ddpm++" else count  # Song's frequencies reach 1 / MAX_PERIOD, Ho's do not
        steps = torch.arange(count, dtype=torch.float32, device=noise.device) / last
        angles = noise[:, None] * MAX_PERIOD**-steps
        if self._kind == "ddpm++":
            e = torch.cat([angles.sin(), angles.cos()], dim=1)
            if condition.shape[1]:
                e = e + self.map_label(condition * math.sqrt(condition.shape[1]))
            return functional.silu(self.map_layer1(functional.silu(self.map_layer0(e))))
        e = torch.cat([angles.cos(), angles.sin()], dim=1)
        e = self.map_layer1(functional.silu(self.map_layer0(e)))
        if condition.shape[1]:
            e = e + self.map_label(condition)
        return functional.silu(e)

    def _run(self, block: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
        if self._checkpoints and torch.is_grad_enabled():
            return checkpoint(block, x, embedding, use_reentrant=False)
        return block(x, embedding)


Resample = Literal["up", "down"] | None
"""What a block does to height and width: doubles them, halves them, or leaves them."""


class Block(nn.Module):
    """Two convolutions around a residual connection, told noise level and class in between; then self-attention.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        embedding: width of what it is told.
        kind: of the network it is part of.
        attention: whether it has any.
        resample: what it does to height and width.

    Raises:
        ValueError: groups or heads cannot divide the channels.
    """

    def __init__(
        self, inputs: int, outputs: int, embedding: int, kind: str, attention: bool, resample: Resample
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self._resample: Resample = resample
        self._scales = kind == "adm"
        self._skip_scale = 1.0 if self._scales else math.sqrt(0.5)  # DDPM++ keeps the variance of a sum
        self._heads = (outputs // HEAD_CHANNELS if self._scales else 1) if attention else 0
        if self._heads and outputs % self._heads:
            raise ValueError(f"{outputs} channels cannot be divided among {self._heads} heads of attention")
        self.norm0 = _norm(inputs, kind)
        self.conv0 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.affine = Float32Linear(embedding, 2 * outputs if self._scales else outputs)
        self.norm1 = _norm(outputs, kind)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        # DDPM++ projects wherever it resamples; ADM only where the number of channels changes.
        projects = inputs != outputs or (resample is not None and not self._scales)
        self.skip = nn.Conv2d(inputs, outputs, 1) if projects else None
        if self._heads:
            self.norm2 = _norm(outputs, kind)
            self.qkv = nn.Conv2d(outputs, 3 * outputs, 1)
            self.proj = nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, inputs, H, W), (B, embedding) float32 -> (B, outputs, H', W')."""
        h = self.conv0(self._resampled(functional.silu(self.norm0(x))))
        told = self.affine(embedding)[:, :, None, None].to(h.dtype)
        if self._scales:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm1(h) * (scale + 1) + shift
        else:
            h = self.norm1(h + told)
        h = self.conv1(functional.silu(h))
        x = self._resampled(x)
        x = (h + (x if self.skip is None else self.skip(x))) * self._skip_scale
        return (x + self._attention(x)) * self._skip_scale if self._heads else x

    def _attention(self, x: Tensor) -> Tensor:
        """Every place looks at every other, (B, C, H, W)."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(batch, self._heads, channels // self._heads, 3, height * width)
        q, k, v = (part.transpose(2, 3) for part in qkv.unbind(3))
        attended = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(2, 3).reshape(x.shape))

    def _resampled(self, x: Tensor) -> Tensor:
        match self._resample:
            case "up":
                return functional.interpolate(x, scale_factor=2, mode="nearest")
            case "down":
                return functional.avg_pool2d(x, 2)
            case None:
                return x


def _norm(channels: int, kind: str) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6 if kind == "ddpm++" else 1e-5)
