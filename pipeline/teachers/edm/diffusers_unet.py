"""diffusers' ``UNet2DModel`` as F: its own forward pass, told of noise level and class in float32.

What is not diffusers' own here: a class comes as a one-hot row, whose embedding is row @ weight, so that a row of zeros
(no class) adds nothing; and the layers that are told of noise level and class stay in float32 when the others are cast,
or when autocast is around them. Dropout is left out: a frozen teacher, and a student that is a function of its noise
(Yin et al. 2024, App. B), have no use for it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from pipeline.teachers.edm.float32_linear import Float32Linear
from pipeline.teachers.edm.preconditioning import Backbone

_TOLD = "time_emb_proj"
"""The layer of a residual block that is told of noise level and class."""


class DiffusersUNet(Backbone):
    """A UNet2DModel with random weights.

    Args:
        arguments: of its constructor, which raises whatever it has to say against them.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.unet = _Float32Embeddings(**arguments)
        if (classes := self.unet.class_embedding) is not None:
            self.unet.class_embedding = _OneHotEmbedding(classes.num_embeddings, classes.embedding_dim)
        _keep_float32(self.unet.time_embedding, "linear_1", "linear_2")
        for block in self.unet.modules():
            if isinstance(block, ResnetBlock2D):
                _keep_float32(block, _TOLD)
                getattr(block, _TOLD).register_forward_hook(partial(_as_precise_as, block.conv1))

    def forward(self, x: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
        """Evaluate; see :meth:`Backbone.forward`."""
        labels = condition if condition.shape[1] else None
        return self.unet(x, noise, class_labels=labels, return_dict=False)[0]

    def image_layers(self) -> Iterator[nn.Module]:
        """Convolutions, normalisations and the projections of the attention."""
        for layer in self.unet.modules():
            if isinstance(layer, nn.Conv2d | nn.GroupNorm | nn.Linear) and not isinstance(layer, Float32Linear):
                yield layer

    def enable_gradient_checkpointing(self) -> None:
        """From now on the backward pass computes the activations of each residual block again."""
        self.unet.enable_gradient_checkpointing()


class _Float32Embeddings(UNet2DModel):
    @property
    def dtype(self) -> torch.dtype:
        """Where the forward pass asks for it: the precision of the noise embedding, which is not cast."""
        return torch.float32


class _OneHotEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        """(B, K) -> (B, embedding_dim), both float32."""
        with torch.autocast(input.device.type, enabled=False):
            return input @ self.weight


def _keep_float32(module: nn.Module, *names: str) -> None:
    """Put in the place of linear layers some that autocast leaves alone, with random weights."""
    for name in names:
        layer = getattr(module, name)
        setattr(module, name, Float32Linear(layer.in_features, layer.out_features))


def _as_precise_as(convolution: nn.Conv2d, layer: nn.Module, inputs: tuple[Tensor, ...], told: Tensor) -> Tensor:
    """What a float32 layer says, in the precision of the convolution whose output it is added to."""
    device = told.device.type  # under autocast that is autocast's, whatever the weight has
    autocast = torch.is_autocast_enabled(device)
    return told.to(torch.get_autocast_dtype(device) if autocast else convolution.weight.dtype)
