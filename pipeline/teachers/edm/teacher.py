"""Networks of EDM (Karras et al. 2022) as teachers: images in pixels, a class in the place of a prompt.

    condition = one-hot class, (B, K); without classes (B, 0)
    x0        = Heun's method, or Euler's, on the Karras grid, (B, 3, H, W)
    image     = x0

Guidance is none of theirs: the published networks were trained with their class always in sight.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import EdmTeacherConfig, PairsSettings, SamplerConfig, TeacherIdentity
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.schedules import EDMSchedule
from pipeline.teachers import karras_sampling
from pipeline.teachers.base import Teacher
from pipeline.teachers.digest import weights_digest
from pipeline.teachers.edm.folder import EdmFolder, open_folder
from pipeline.teachers.edm.weights import read_network


def identify(config: EdmTeacherConfig) -> TeacherIdentity:
    """Look at the files, read them once, and say which teacher they are. No network is built.

    Raises:
        UserError: the folder is missing, incomplete or of another kind.
    """
    return _identity(open_folder(config), config)


def check(config: EdmTeacherConfig, settings: PairsSettings) -> None:
    """Raise UserError when these settings cannot be carried out with this teacher, or its weights are of another."""
    folder = open_folder(config)
    if settings.sampler.name == "diffusers":
        raise UserError("spec.sampler.name: diffusers is for Stable Diffusion teachers; give edm_heun or ddim")
    if settings.guidance_scale != 1:
        raise UserError("spec.guidance_scale: EDM networks know no empty condition to be guided from; set 1")
    if settings.negative_prompt:
        raise UserError("spec.negative_prompt: EDM networks are not guided; leave it out")
    if settings.fields.x0 == "latent":
        raise UserError("spec.fields.x0: this teacher works on pixels and has no latent; set x0: pixels")
    if settings.fields.text_embedding:
        raise UserError("spec.fields.text_embedding: this teacher has no text encoder; set text_embedding: false")
    if settings.fields.prompt and not folder.num_classes:
        raise UserError("spec.fields.prompt: this teacher has no classes to be stored; set prompt: false")
    read_network(folder)  # names and shapes; the file is mapped, and of its tensors nothing is read


def sampler_evaluations(config: EdmTeacherConfig, sampler: SamplerConfig, guidance_scale: float) -> int:
    """Network evaluations of one sample, for a sampler that :func:`check` has passed."""
    assert sampler.name != "diffusers"
    return karras_sampling.num_predictions(sampler)


def num_classes(config: EdmTeacherConfig) -> int:
    """Classes of the network; 0 if it is unconditional."""
    return open_folder(config).num_classes


def check_prompts(config: EdmTeacherConfig, prompts: Iterable[str]) -> None:
    """Raise UserError unless every prompt is a class of this teacher."""
    count = num_classes(config)
    for prompt in prompts:
        class_number(prompt, count)


def class_number(prompt: str, num_classes: int) -> int | None:
    """The class that a prompt names: decimal digits without leading zeros; None for the empty prompt.

    Raises:
        UserError: there is no such class, or no class where there are some.
    """
    if not num_classes:
        if prompt:
            raise UserError(
                f"prompts: {prompt[:40]!r} given, and this teacher has no classes; give prompts.path: classes"
            )
        return None
    if re.fullmatch("0|[1-9][0-9]{0,8}", prompt) and int(prompt) < num_classes:
        return int(prompt)
    raise UserError(
        f"prompts: {prompt[:40]!r} is no class of this teacher; give numbers from 0 to {num_classes - 1}, one a row, "
        "or prompts.path: classes to have them drawn"
    )


def one_hot(classes: Sequence[int | None], num_classes: int) -> Tensor:
    """Conditions of the network, (B, K), float32: all zeros where there is no class; (B, 0) where there never is."""
    condition = torch.zeros(len(classes), num_classes)
    for row, number in enumerate(classes):
        if number is not None:
            condition[row, number] = 1
    return condition


class EdmTeacher(Teacher):
    """A frozen EDM network.

    Args:
        config: where it lies, and the precision of its layers.
        device: where to put it.
        compile: torch.compile the network.
        channels_last: use the channels_last memory format.

    Raises:
        UserError: the folder is missing, incomplete or of another kind.
    """

    def __init__(self, config: EdmTeacherConfig, device: torch.device, *, compile: bool, channels_last: bool) -> None:
        folder = open_folder(config)
        self.identity = _identity(folder, config)
        self.device = device
        self._num_classes = folder.num_classes
        network = read_network(folder).requires_grad_(False).eval()
        self._network = network.cast_layers(getattr(torch, config.dtype)).to(device)
        if channels_last:
            self._network.to(memory_format=torch.channels_last)
        self._forward = torch.compile(self._network) if compile else self._network

    @property
    def denoiser(self) -> Denoiser:
        """The network with its preconditioning; the condition is a one-hot class, (B, K)."""
        return Denoiser(self._forward, EDMSchedule(), "x0")

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """One-hot classes, (B, K), float32; the empty prompt, which no such network was trained with, is all zeros.

        Raises:
            UserError: a prompt names no class of this teacher.
        """
        classes = [class_number(prompt, self._num_classes) if prompt else None for prompt in prompts]
        return one_hot(classes, self._num_classes).to(self.device)

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """A class is never too long."""
        return [False] * len(prompts)

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        condition: Tensor,
        unconditional: Tensor,
        sampler: SamplerConfig,
        guidance_scale: float,
        *,
        seed: int,
        sample_ids: Sequence[int],
    ) -> Tensor:
        """Run ``edm_heun`` or ``ddim`` on the Karras grid, without guidance."""
        assert sampler.name != "diffusers"
        assert guidance_scale == 1
        return karras_sampling.sample(self.denoiser, noise, condition, sampler, seed=seed, sample_ids=sample_ids)

    def decode(self, x0: Tensor) -> Tensor:
        """x0 is the image."""
        return x0

    def enable_gradient_checkpointing(self) -> None:
        """There is no decoder, and nothing to save."""

    @contextmanager
    def float32(self) -> Iterator[None]:
        """All layers in float32, not compiled; half precision widens and narrows without loss."""
        dtype, forward = self._network.layer_dtype, self._forward
        try:
            self._forward = self._network
            self._cast(torch.float32)
            yield
        finally:
            self._cast(dtype)
            self._forward = forward

    def _cast(self, dtype: torch.dtype) -> None:
        # Within a caller's inference mode the new weights would be inference tensors, unfit for training ever after.
        with torch.inference_mode(False), torch.no_grad():
            self._network.cast_layers(dtype)


def _identity(folder: EdmFolder, config: EdmTeacherConfig) -> TeacherIdentity:
    return TeacherIdentity(
        kind=config.kind,
        weights_digest=weights_digest({"model": [folder.weights]}, folder.settings),
        dtype=config.dtype,
        parametrization="x0",
        schedule=EDMSchedule.description,
        latent_scale=None,
        sample_shape=folder.image_shape,
        image_shape=folder.image_shape,
    )
