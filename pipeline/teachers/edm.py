"""Networks of EDM (Karras et al. 2022) as teachers: images in pixels, a class in the place of a prompt.

    condition = one-hot class, (B, K); without classes (B, 0)
    x0        = Heun's method, or Euler's, on the Karras grid, (B, 3, H, W)
    image     = x0

Guidance is none of theirs: the published networks were trained with their class always in sight.
"""

import re
from collections.abc import Iterable

from configs.errors import UserError
from configs.schema import EdmTeacherConfig, PairsSettings, SamplerConfig, TeacherIdentity
from pipeline.diffusion.schedules import EDMSchedule
from pipeline.teachers.digest import weights_digest
from pipeline.teachers.edm_folder import EdmFolder, open_folder


def identify(config: EdmTeacherConfig) -> TeacherIdentity:
    """Look at the files, read them once, and say which teacher they are. No network is built.

    Raises:
        UserError: the folder is missing, incomplete or of another kind.
    """
    return identity(open_folder(config), config)


def identity(folder: EdmFolder, config: EdmTeacherConfig) -> TeacherIdentity:
    """The same for a folder that is open."""
    architecture = folder.architecture
    shape = (architecture.img_channels, architecture.img_resolution, architecture.img_resolution)
    settings = architecture.model_dump(mode="json", exclude={"one_step_sigma"})
    return TeacherIdentity(
        kind=config.kind,
        weights_digest=weights_digest({"model": [folder.weights]}, settings),
        dtype=config.dtype,
        parametrization="x0",
        schedule=EDMSchedule.description,
        latent_scale=None,
        sample_shape=shape,
        image_shape=shape,
    )


def check(config: EdmTeacherConfig, settings: PairsSettings) -> None:
    """Raise UserError when these settings cannot be carried out with this teacher."""
    architecture = open_folder(config).architecture
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
    if settings.fields.prompt and not architecture.label_dim:
        raise UserError("spec.fields.prompt: this teacher has no classes to be stored; set prompt: false")


def sampler_evaluations(config: EdmTeacherConfig, sampler: SamplerConfig, guidance_scale: float) -> int:
    """Network evaluations of one sample, for a sampler that :func:`check` has passed."""
    return 2 * sampler.steps - 1 if sampler.name == "edm_heun" else sampler.steps


def num_classes(config: EdmTeacherConfig) -> int:
    """Classes of the network; 0 if it is unconditional."""
    return open_folder(config).architecture.label_dim


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
