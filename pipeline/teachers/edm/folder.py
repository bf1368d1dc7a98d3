"""An EDM teacher as files: what teacher and student need of a folder, and which kinds of folder there are.

    config.json, model.safetensors                        DDPM++ or ADM, under their published names (architecture.py)
    unet/, scheduler/ as diffusers saves a pipeline       a UNet2DModel (diffusers_folder.py)

The folder of a one-step student is one of its teacher's kind, whose config says at which noise level it takes its step.
Nothing here builds a network or imports torch until it is asked for one: a login node can do it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from configs.errors import UserError
from configs.schema import EdmTeacherConfig
from pipeline.teachers.edm import architecture, diffusers_folder

if TYPE_CHECKING:
    from torch import nn

    from pipeline.teachers.edm.preconditioning import EdmNetwork

CONFIGS = (diffusers_folder.UNET_CONFIG, architecture.CONFIG)
"""The files by which the folders are known."""


class EdmFolder(Protocol):
    """A folder that is complete; made by :func:`open_folder`."""

    @property
    def path(self) -> Path:
        """The folder."""
        ...

    @property
    def config(self) -> Path:
        """The file that describes the network."""
        ...

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        ...

    @property
    def kind(self) -> str:
        """What its network is called, for messages."""
        ...

    @property
    def num_classes(self) -> int:
        """Classes of the network; 0 for an unconditional one."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        ...

    @property
    def one_step_sigma(self) -> float | None:
        """Of a student: the noise level from which its one step goes to the image. None for a teacher."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """Whatever besides the weights shapes the network's output, as JSON values."""
        ...

    def empty_network(self) -> "EdmNetwork":
        """The network with its preconditioning, on the meta device, without weights.

        Raises:
            UserError: there can be no network such as the config describes.
        """
        ...

    def stored(self, network: "EdmNetwork") -> "nn.Module":
        """The part of :meth:`empty_network`'s whose parameters the weight file has, under their names there."""
        ...

    def write_student(self, path: Path, sigma: float) -> Self:
        """Write everything but the weights of a student of this teacher.

        Args:
            path: its folder, which is there, and empty.
            sigma: the noise level from which its one step goes.

        Returns:
            The folder, which says where the weights belong.
        """
        ...


def open_folder(config: EdmTeacherConfig) -> EdmFolder:
    """Look at a folder without reading its weights.

    Raises:
        UserError: it is not there, not complete, or not of a network that we have.
    """
    path = Path(config.path).expanduser()
    if path.is_file():
        raise UserError(f"teacher.path: {path} is a file; make a folder of it with stages/convert_edm.py")
    if not path.is_dir():
        raise UserError(f"teacher.path: there is no folder {path}")
    if (path / diffusers_folder.UNET_CONFIG).is_file():
        return diffusers_folder.open_diffusers(path)
    diffusers_folder.refuse_network_alone(path)
    if not (path / architecture.CONFIG).is_file():
        raise UserError(
            f"teacher.path: {path} has no {architecture.CONFIG}; convert a checkpoint with stages/convert_edm.py, or "
            f"give a pipeline folder of diffusers, which has a {diffusers_folder.UNET_CONFIG}"
        )
    return architecture.open_published(path)
