"""The config of diffusers' ``UNet2DModel``, checked: those networks that EDM's preconditioning can be around.

It is read without diffusers, which a login node need not import, and which takes more: it ignores keys that it does not
know, and a network with other inputs or outputs is as good to it as any.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from configs.errors import UserError
from configs.json_text import parse_json
from configs.schema import Model
from pipeline.teachers.digest import without_volatile
from pipeline.teachers.edm.architecture import Size

UNET = "UNet2DModel"
"""The class of the network, as configs name it."""

DownBlock = Literal["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"]
UpBlock = Literal["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"]


class UNet2DConfig(Model):
    """The constructor's arguments and their defaults."""

    sample_size: Size | tuple[Size, Size]
    """Height and width of the images."""
    in_channels: Literal[3] = 3
    """Red, green, blue."""
    out_channels: Literal[3] = 3
    """Likewise; three more are a learned variance."""
    center_input_sample: bool = False
    """Whether the network begins with x -> 2 x - 1."""
    time_embedding_type: Literal["positional"] = "positional"
    """How c_noise enters."""
    time_embedding_dim: PositiveInt | None = None
    """Width of the noise embedding; None for four times the first level's channels."""
    freq_shift: int = 0
    """1 for frequencies that reach 1 / 10,000 (Song), 0 for those that do not (Ho)."""
    flip_sin_to_cos: bool = True
    """Cosines first."""
    down_block_types: tuple[DownBlock, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    """One for each level."""
    mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D"
    """At the lowest level."""
    up_block_types: tuple[UpBlock, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    """One for each level, the lowest first."""
    block_out_channels: tuple[PositiveInt, ...] = (224, 448, 672, 896)
    """Channels of each level."""
    layers_per_block: PositiveInt = 2
    """Residual blocks of a level."""
    mid_block_scale_factor: PositiveFloat = 1.0
    """Divisor of the sums in the middle."""
    downsample_padding: NonNegativeInt = 1
    """Of a convolution that halves."""
    downsample_type: Literal["conv", "resnet"] = "conv"
    """What halves after blocks with attention."""
    upsample_type: Literal["conv", "resnet"] = "conv"
    """What doubles after blocks with attention."""
    dropout: NonNegativeFloat = 0.0
    """What it was trained with; never used here."""
    act_fn: str = "silu"
    """Non-linearity."""
    attention_head_dim: PositiveInt | None = 8
    """Channels of an attention head; None for a single one."""
    norm_num_groups: PositiveInt = 32
    """Groups of the normalisations."""
    attn_norm_num_groups: PositiveInt | None = None
    """Those of the attention in the middle."""
    norm_eps: PositiveFloat = 1e-5
    """Of the normalisations."""
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """Whether noise level and class shift the activations, or scale them too."""
    add_attention: bool = True
    """In the middle."""
    class_embed_type: None = None
    """Set where classes are not numbers."""
    num_class_embeds: PositiveInt | None = None
    """Number of classes; None for an unconditional network."""
    num_train_timesteps: PositiveInt | None = None
    """Of networks whose noise levels are counted; no part of one with a positional embedding."""
    one_step_sigma: PositiveFloat | None = None
    """Ours, of a student: the noise level it was trained at, and from which its one step goes to the image."""

    @model_validator(mode="after")
    def _square_and_halved(self) -> Self:
        sizes = {self.sample_size} if isinstance(self.sample_size, int) else set(self.sample_size)
        halvings = len(self.block_out_channels) - 1
        if len(sizes) > 1:
            raise ValueError(f"sample_size: {self.sample_size} is not square; give a network of square images")
        if self.size % 2**halvings:
            raise ValueError(f"sample_size: {self.size} cannot be halved {halvings} times, once between two levels")
        return self

    @property
    def size(self) -> int:
        """Height of an image, which is its width."""
        return self.sample_size if isinstance(self.sample_size, int) else self.sample_size[0]

    def arguments(self) -> dict[str, Any]:
        """What the network is made with: all of it but dropout, and but what is ours."""
        return self.model_dump(exclude={"dropout", "one_step_sigma"}) | {"sample_size": self.size}


_REASONS = {
    "in_channels": "images here are red, green and blue",
    "out_channels": "an EDM network predicts an image, and no variance with it",
    "sample_size": "it is needed: height and width of the images that the network was trained on",
    "time_embedding_type": "EDM's noise levels are no timesteps to be counted, and enter by a positional embedding",
    "class_embed_type": "classes here are numbers, which num_class_embeds is for",
    "down_block_types": "only blocks of image and noise level can be in an EDM teacher",
    "up_block_types": "only blocks of image and noise level can be in an EDM teacher",
}
"""Key -> why it has to be what it has to be."""


def read_unet_config(path: Path) -> UNet2DConfig:
    """Read a network's config.json.

    Raises:
        UserError: it is of another network, or of one that cannot be an EDM teacher; the first such key is named.
    """
    content = read_config(path)
    if (name := content.get("_class_name")) != UNET:
        raise UserError(f"{path}: _class_name: {name!r} is no {UNET}; give the folder of a network that is one")
    try:
        return UNet2DConfig.model_validate(without_volatile(content))
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        found = f" ({first['input']!r} is there)" if key and first["type"] != "missing" else ""
        reason = f"{UNET} has no such argument" if first["type"] == "extra_forbidden" else _REASONS.get(key)
        because = f"; {reason}" if reason else ""
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {key + ': ' if key else ''}{message}{found}{because}") from None


def read_config(path: Path) -> dict[str, Any]:
    """A config file of diffusers, as it is.

    Raises:
        UserError: it is no JSON object.
    """
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; copy or download the folder again")
    return content
