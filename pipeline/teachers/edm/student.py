"""A student out of an EDM teacher, and back into a folder like the teacher's own.

    network   = the teacher's, preconditioning included, trainable, float32
    x0        = D(sigma* z, sigma*, c),  z ~ N(0, I),  sigma* = one_step_sigma of its config

So a student is sampled as a teacher is: by one step of Euler's method (``ddim``) from sigma*. No other library takes
such a step; :class:`OneStepStudent` takes it in a few lines.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import DdimSampler, Dtype, EdmTeacherConfig
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.generator import OneStepGenerator
from pipeline.diffusion.schedules import EDMSchedule
from pipeline.safetensors_errors import system_errors
from pipeline.teachers.base import StudentUsage
from pipeline.teachers.edm.folder import CONFIGS, open_folder
from pipeline.teachers.edm.teacher import one_hot
from pipeline.teachers.edm.weights import read_network

MARKERS = CONFIGS
"""The files by one of which a student's folder is known."""


def load_network(config: EdmTeacherConfig) -> nn.Module:
    """The teacher's network to be trained, on the CPU, float32 whatever ``config.dtype`` is. It has no dropout.

    Raises:
        UserError: the folder is missing, incomplete or of another kind.
    """
    return read_network(open_folder(config)).train().requires_grad_(True)


def save_student(config: EdmTeacherConfig, state_dict: Mapping[str, Tensor], folder: Path, *, timestep: float) -> None:
    """Write a folder like the teacher's; see :func:`pipeline.teachers.save_student`."""
    teacher = open_folder(config)
    network = teacher.empty_network()
    network.load_state_dict(state_dict, assign=True)  # every name and shape checked
    student = teacher.write_student(folder, float(timestep))
    stored = teacher.stored(network).state_dict()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()}
    with system_errors(student.weights):
        save_file(tensors, student.weights, metadata={"format": "pt"})


def as_system(folder: Path, dtype: Dtype) -> tuple[EdmTeacherConfig, DdimSampler]:
    """A student's folder as a teacher, and the sampler that takes its one step.

    Raises:
        UserError: it is no student's.
    """
    config = EdmTeacherConfig(path=str(folder), dtype=dtype)
    opened = open_folder(config)
    sigma = opened.one_step_sigma
    if sigma is None:
        raise UserError(f"student: {opened.config} has no one_step_sigma, so this is a teacher; name a run's export")
    return config, DdimSampler(steps=1, sigma_max=sigma, sigma_min=min(0.002, sigma / 2))


def usage(folder: str) -> StudentUsage:
    """How to run what :func:`save_student` wrote at ``folder``."""
    return StudentUsage(
        metadata="pipeline_tag: unconditional-image-generation",
        about="Images from noise, and a class if the teacher has classes",
        parts="It is a network of Karras et al. 2022 (EDM) with its preconditioning.",
        code=f'''import torch
from pipeline.teachers.edm.student import OneStepStudent

device = "cuda" if torch.cuda.is_available() else "cpu"
student = OneStepStudent("{folder}", device)
z = torch.randn(8, *student.shape, device=device)
images = student(z, [0] * 8 if student.num_classes else None)  # (8, 3, H, W) in [-1, 1], not clipped''',
        where="from a checkout of the code that wrote it",
    )


class OneStepStudent:
    """A trained student.

    Args:
        folder: that a training has exported.
        device: where to put it.

    Attributes:
        shape: of one image, (3, H, W).
        num_classes: 0 for an unconditional one.

    Raises:
        UserError: the folder is no student's.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        config, sampler = as_system(Path(folder), "float32")
        opened = open_folder(config)
        self.shape = opened.image_shape
        self.num_classes = opened.num_classes
        network = read_network(opened).requires_grad_(False).eval().to(device)
        schedule = EDMSchedule()
        self._generator = OneStepGenerator(Denoiser(network, schedule, "x0"), schedule, torch.tensor(sampler.sigma_max))

    @torch.no_grad()
    def __call__(self, z: Tensor, classes: list[int] | None = None) -> Tensor:
        """Generate.

        Args:
            z: unit Gaussian noise, (B, *shape), float32, on the device.
            classes: B numbers from 0; None for an unconditional student.

        Returns:
            Images, (B, *shape), float32, black -1 to white 1, not clipped.
        """
        condition = one_hot([None] * len(z) if classes is None else classes, self.num_classes)
        return self._generator(z, condition.to(z.device))
