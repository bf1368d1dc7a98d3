"""An EDM teacher as diffusers saves a pipeline: a ``UNet2DModel``, and a scheduler that says how it is preconditioned.

    FOLDER/unet/config.json                               the network, as :class:`UNet2DConfig` has it
    FOLDER/unet/diffusion_pytorch_model.safetensors       its weights, float32
    FOLDER/scheduler/scheduler_config.json                one of these (sigma_data is in it, 0.5 if not):

        EDMEulerScheduler, EDMDPMSolverMultistepScheduler     c_noise =      log(sigma) / 4
        CMStochasticIterativeScheduler                        c_noise = 1000 log(sigma) / 4

c_in, c_skip and c_out are the same in all three (``precondition_outputs``; ``get_scalings``). The other scalings of the
last one, ``get_scalings_for_boundary_condition``, are those of a consistency model, which is no diffusion teacher, and
which nothing in a folder tells from one. What else a scheduler says is about sampling, and is not used.

Only safetensors are read, never a pickle. Nothing here imports torch or diffusers until a network is asked for.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from pipeline.teachers.edm.unet2d_config import UNET, UNet2DConfig, read_config, read_unet_config

if TYPE_CHECKING:
    from torch import nn

    from pipeline.teachers.edm.preconditioning import EdmNetwork

UNET_CONFIG = "unet/config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
NOISE_SCALES = {
    "EDMEulerScheduler": 1.0,
    "EDMDPMSolverMultistepScheduler": 1.0,
    "CMStochasticIterativeScheduler": 1000.0,
}
"""Class of the scheduler -> factor of log(sigma) / 4 in what its network is told of the noise."""


@dataclass(frozen=True)
class DiffusersFolder:
    """A folder of a UNet2DModel; an :class:`~pipeline.teachers.edm.folder.EdmFolder`, which says what its parts are.

    Attributes:
        path: the folder.
        unet: what its unet/config.json says.
        sigma_data: standard deviation of the data, of its scheduler.
        noise_scale: factor of log(sigma) / 4, likewise.
    """

    path: Path
    unet: UNet2DConfig
    sigma_data: float
    noise_scale: float

    @property
    def config(self) -> Path:
        """``unet/config.json``."""
        return self.path / UNET_CONFIG

    @property
    def weights(self) -> Path:
        """``unet/diffusion_pytorch_model.safetensors``."""
        return self.path / WEIGHTS

    @property
    def kind(self) -> str:
        """``UNet2DModel``."""
        return UNET

    @property
    def num_classes(self) -> int:
        """As ``num_class_embeds`` has it."""
        return self.unet.num_class_embeds or 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """As ``sample_size`` has it."""
        return (3, self.unet.size, self.unet.size)

    @property
    def one_step_sigma(self) -> float | None:
        """As ``one_step_sigma`` of unet/config.json has it."""
        return self.unet.one_step_sigma

    @property
    def settings(self) -> dict[str, Any]:
        """The network's arguments, defaults included, and its preconditioning; who wrote the files is not in it."""
        return {"unet": self.unet.arguments(), "sigma_data": self.sigma_data, "noise_scale": self.noise_scale}

    def empty_network(self) -> "EdmNetwork":
        """The network that unet/config.json describes, and the preconditioning of the scheduler."""
        import torch

        from pipeline.teachers.edm.diffusers_unet import DiffusersUNet
        from pipeline.teachers.edm.preconditioning import EdmNetwork
        from pipeline.teachers.folder import as_its_files_say

        with as_its_files_say(self.config), torch.device("meta"):
            return EdmNetwork(DiffusersUNet(self.unet.arguments()), self.sigma_data, self.noise_scale)

    def stored(self, network: "EdmNetwork") -> "nn.Module":
        """The UNet2DModel: diffusers knows nothing of what is around it."""
        from pipeline.teachers.edm.diffusers_unet import DiffusersUNet

        assert isinstance(network.model, DiffusersUNet)
        return network.model.unet

    def write_student(self, path: Path, sigma: float) -> "DiffusersFolder":
        """Write both configs as the teacher has them, and the step into that of the network."""
        for name, more in ((UNET_CONFIG, {"one_step_sigma": sigma}), (SCHEDULER_CONFIG, {})):
            (path / name).parent.mkdir()
            content = json.dumps(read_config(self.path / name) | more, indent=2)
            (path / name).write_text(content + "\n", encoding="utf-8")
        return replace(self, path=path, unet=self.unet.model_copy(update={"one_step_sigma": sigma}))


def open_diffusers(path: Path) -> DiffusersFolder:
    """Look at a folder, which has a unet/config.json, without reading its weights.

    Raises:
        UserError: it is not complete, not in safetensors, or not of a network that EDM's preconditioning is around.
    """
    unet = read_unet_config(path / UNET_CONFIG)
    if not (path / SCHEDULER_CONFIG).is_file():
        raise UserError(f"{path / SCHEDULER_CONFIG}: missing, so it is not known {_PRECONDITIONED}")
    folder = DiffusersFolder(path, unet, *_preconditioning(path / SCHEDULER_CONFIG))
    if not folder.weights.is_file():
        raise UserError(_no_weights(folder.weights))
    return folder


def refuse_network_alone(path: Path) -> None:
    """Raise UserError where a folder has the config of a UNet2DModel in it, and no pipeline."""
    config = path / "config.json"
    if config.is_file() and read_config(config).get("_class_name") == UNET:
        raise UserError(
            f"{config}: a {UNET} alone, without {SCHEDULER_CONFIG}, so it is not known {_PRECONDITIONED}; the network "
            f"goes into {path.name}/unet"
        )


_PRECONDITIONED = (
    "how the network was preconditioned; if it was trained as EDM, save the scheduler that says so beside it: "
    f"{', '.join(NOISE_SCALES)}"
)


def _preconditioning(path: Path) -> tuple[float, float]:
    """(sigma_data, noise_scale) of a scheduler."""
    content = read_config(path)
    name = content.get("_class_name")
    if name not in list(NOISE_SCALES):
        raise UserError(f"{path}: _class_name: {name!r} is no scheduler of EDM and does not say {_PRECONDITIONED}")
    if (prediction := content.get("prediction_type", "epsilon")) != "epsilon":
        raise UserError(
            f"{path}: prediction_type: {prediction!r} is not EDM's, which diffusers calls epsilon; v_prediction is the "
            "same with the other sign: negate weight and bias of the network's conv_out, and write epsilon"
        )
    sigma_data = content.get("sigma_data", 0.5)
    if isinstance(sigma_data, bool) or not isinstance(sigma_data, int | float) or not 0 < sigma_data < 1e6:
        raise UserError(f"{path}: sigma_data: {sigma_data!r} is no standard deviation of images; EDM has 0.5")
    return float(sigma_data), NOISE_SCALES[name]


def _no_weights(wanted: Path) -> str:
    """Why there are no weights: pickled only, in other files, or none at all."""
    others = sorted(path.name for path in wanted.parent.iterdir())
    again = f"{UNET}.from_pretrained(OLD, subfolder='unet').save_pretrained(NEW + '/unet', max_shard_size='100GB')"
    if stored := [name for name in others if name.endswith(".safetensors")]:
        return f"{wanted}: missing; there is {stored[0]}: save one float32 file without a variant: {again}"
    if pickles := [name for name in others if name.endswith((".bin", ".ckpt", ".pt", ".pth"))]:
        return (
            f"{wanted}: missing; {pickles[0]} is a pickle, which is never loaded; convert it if you trust it: {again}"
        )
    return f"{wanted}: missing; copy or download the folder again"
