"""DDPM++ and ADM as files: ``config.json``, which says what network it is, and ``model.safetensors``.

    FOLDER/config.json          the architecture, as :class:`EdmArchitecture` has it
    FOLDER/model.safetensors    its weights, under the parameters' published names (``model.enc.32x32_conv.weight``)

A one-step student is such a folder too, whose config.json says at which noise level it takes its step.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from configs.errors import UserError
from configs.schema import Model

if TYPE_CHECKING:
    from torch import nn

    from pipeline.teachers.edm.preconditioning import EdmNetwork

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

Size = Annotated[int, Field(ge=1, le=4096)]


class EdmArchitecture(Model):
    """Everything besides its weights that makes the network what it is; named as in NVIDIA's constructors."""

    kind: Literal["edm"] = "edm"
    """What this folder is."""
    architecture: Literal["ddpm++", "adm"]
    """DDPM++ (Song et al. 2021; SongUNet) or ADM (Dhariwal and Nichol 2021; DhariwalUNet)."""
    img_resolution: Size
    """Height and width of the images."""
    img_channels: Literal[3] = 3
    """Red, green, blue."""
    label_dim: NonNegativeInt = 0
    """Number of classes; 0 for an unconditional network."""
    sigma_data: PositiveFloat = 0.5
    """Standard deviation of the data that the preconditioning assumes."""
    model_channels: Annotated[int, Field(ge=4, multiple_of=2)]
    """Channels of the first level, before its multiplier; half of the noise embedding are sines, half cosines."""
    channel_mult: tuple[PositiveInt, ...]
    """Multiplier of model_channels at each level; every level halves height and width."""
    channel_mult_emb: PositiveInt = 4
    """Width of the noise embedding, in model_channels."""
    num_blocks: PositiveInt
    """Residual blocks of a level."""
    attn_resolutions: tuple[PositiveInt, ...]
    """Heights at which blocks have self-attention."""
    noise_scale: PositiveFloat = 1.0
    """Factor of log(sigma) / 4 in what the network is told of the noise: 1 in NVIDIA's networks, 1000 in OpenAI's."""
    one_step_sigma: PositiveFloat | None = None
    """Of a student: the noise level it was trained at, and from which its one step goes to the image."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if not self.channel_mult or self.img_resolution % 2 ** (len(self.channel_mult) - 1):
            raise ValueError(
                f"img_resolution {self.img_resolution} cannot be halved {len(self.channel_mult) - 1} times"
            )
        return self


@dataclass(frozen=True)
class PublishedFolder:
    """A folder of DDPM++ or ADM; an :class:`~pipeline.teachers.edm.folder.EdmFolder`, which says what its parts are.

    Attributes:
        path: the folder.
        architecture: what its config.json says.
    """

    path: Path
    architecture: EdmArchitecture

    @property
    def config(self) -> Path:
        """``config.json``."""
        return self.path / CONFIG

    @property
    def weights(self) -> Path:
        """``model.safetensors``."""
        return self.path / WEIGHTS

    @property
    def kind(self) -> str:
        """``ddpm++`` or ``adm``."""
        return self.architecture.architecture

    @property
    def num_classes(self) -> int:
        """As ``label_dim`` has it."""
        return self.architecture.label_dim

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """As ``img_channels`` and ``img_resolution`` have it."""
        size = self.architecture.img_resolution
        return (self.architecture.img_channels, size, size)

    @property
    def one_step_sigma(self) -> float | None:
        """As ``one_step_sigma`` has it."""
        return self.architecture.one_step_sigma

    @property
    def settings(self) -> dict[str, Any]:
        """All of config.json but the step of a student."""
        return self.architecture.model_dump(mode="json", exclude={"one_step_sigma"})

    def empty_network(self) -> "EdmNetwork":
        """The network that config.json describes."""
        from pipeline.teachers.edm.networks import empty_network

        return empty_network(self.architecture, self.config)

    def stored(self, network: "EdmNetwork") -> "nn.Module":
        """All of it: the published names begin where the preconditioning does."""
        return network

    def write_student(self, path: Path, sigma: float) -> "PublishedFolder":
        """Write config.json."""
        architecture = self.architecture.model_copy(update={"one_step_sigma": sigma})
        write_architecture(architecture, path)
        return PublishedFolder(path, architecture)


def open_published(path: Path) -> PublishedFolder:
    """Look at a folder, which has a config.json, without reading its weights.

    Raises:
        UserError: it is not complete, or not of an architecture that we have.
    """
    folder = PublishedFolder(path, read_architecture(path / CONFIG))
    if not folder.weights.is_file():
        raise UserError(f"{folder.weights}: missing; copy or convert the folder again")
    return folder


def read_architecture(path: Path) -> EdmArchitecture:
    """Read a config.json.

    Raises:
        UserError: it is not that of an EDM teacher.
    """
    try:
        return EdmArchitecture.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: not the config of an EDM teacher ({where + ': ' if where else ''}{first['msg']}); give a folder "
            "that stages/convert_edm.py made"
        ) from None


def write_architecture(architecture: EdmArchitecture, folder: Path) -> None:
    """Write the config.json of a folder."""
    content = architecture.model_dump(mode="json", exclude_none=True)
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
