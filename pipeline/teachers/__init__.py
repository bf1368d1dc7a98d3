"""Teachers: frozen text-to-image diffusion models, each behind :class:`~pipeline.teachers.base.Teacher`.

From the cheapest to the dearest, for whoever holds a ``TeacherConfig``:

* :func:`check`: can these settings be carried out with this teacher at all? Reads configs; of weights, at most names.
* :func:`sampler_evaluations`: what would a sample cost? Likewise.
* :func:`identify`: which teacher is it? Reads the weights once, builds nothing, needs neither GPU nor memory.
* :func:`load`: the teacher itself, on a device.

For teachers with a network, the two ends of training a student:

* :func:`load_network`: a copy of the teacher's network that can be trained.
* :func:`save_student`: its weights as a folder that can be run: :func:`student_usage`, :func:`as_system`.

Each kind of teacher is one module with these functions; it is imported when one of its kind is asked for.
"""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from configs.errors import UserError
from configs.schema import (
    EdmTeacherConfig,
    MixtureTeacherConfig,
    PairsSettings,
    SamplerConfig,
    TeacherConfig,
    TeacherIdentity,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pipeline.prompts import PromptTable
    from pipeline.teachers.base import StudentUsage, Teacher


def check(config: TeacherConfig, settings: PairsSettings) -> None:
    """Find every reason why these settings cannot be carried out, before anything large is read or allocated.

    A hub id is fetched for it.

    Raises:
        UserError: the teacher is not there or of no family we know, or sampler or fields do not fit it.
    """
    _module(config).check(config, settings)


def sampler_evaluations(config: TeacherConfig, sampler: SamplerConfig, guidance_scale: float) -> int:
    """Network evaluations of one sample, guidance included, for a sampler that :func:`check` accepts."""
    return _module(config).sampler_evaluations(config, sampler, guidance_scale)


def identify(config: TeacherConfig) -> TeacherIdentity:
    """Say which teacher lies there, by content.

    Raises:
        UserError: the teacher is not there, not complete or of no family we know.
    """
    return _module(config).identify(config)


def num_classes(config: TeacherConfig) -> int:
    """Classes of a teacher that is conditioned on classes; 0 for an unconditional one.

    Raises:
        UserError: the teacher takes texts, or is not there.
    """
    if not isinstance(config, EdmTeacherConfig):
        raise UserError(f"prompts.path: classes is for teachers of kind edm; a {config.kind} teacher takes texts")
    return _module(config).num_classes(config)


def check_prompts(config: TeacherConfig, prompts: "PromptTable") -> None:
    """Raise UserError when a prompt means nothing to the teacher: where it takes classes, that is any other text."""
    if isinstance(config, EdmTeacherConfig):
        _module(config).check_prompts(config, prompts.distinct())


def load(
    config: TeacherConfig, device: "torch.device", *, compile: bool = False, channels_last: bool = False
) -> "Teacher":
    """Put a teacher on a device.

    Args:
        config: which one, and its precision.
        device: where to.
        compile: torch.compile its network. The toy teacher has none and takes no notice.
        channels_last: use the channels_last memory format, likewise.

    Raises:
        UserError: as :func:`identify`, which it calls: the identity is that of the files on this very machine.
    """
    if isinstance(config, MixtureTeacherConfig):
        from pipeline.teachers.mixture import MixtureTeacher

        return MixtureTeacher(config, device)
    if isinstance(config, EdmTeacherConfig):
        from pipeline.teachers.edm.teacher import EdmTeacher

        return EdmTeacher(config, device, compile=compile, channels_last=channels_last)
    from pipeline.teachers.stable_diffusion import StableDiffusionTeacher

    return StableDiffusionTeacher(config, device, compile=compile, channels_last=channels_last)


def check_trainable(config: TeacherConfig) -> None:
    """Raise UserError when a teacher has no network that a student could start from. Reads nothing."""
    _student_module(config)


def load_network(config: TeacherConfig) -> "nn.Module":
    """A trainable copy of the teacher's network: what a student and its fake score start as.

    Returns:
        The network on the CPU, float32 with the weights of the files whatever the teacher's precision, in train mode,
        every parameter with a gradient, and without dropout. :meth:`Teacher.call` evaluates it.

    Raises:
        UserError: the teacher has no network, or as :func:`identify`.
    """
    return _student_module(config).load_network(config)


def save_student(config: TeacherConfig, state_dict: "Mapping[str, Tensor]", folder: Path, *, timestep: float) -> None:
    """Write a student as a folder of its teacher's kind: a diffusers pipeline with the other parts, or a network alone.

    ``DiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=1, guidance_scale=0)`` is then the one-step
    generator and the teacher's decoder; for EDM that is ``OneStepStudent(folder)(z, classes)``
    (pipeline/teachers/edm/student.py). Nothing is written aside: a folder of an interrupted call is not whole.

    Args:
        config: the teacher, whose other parts are read again.
        state_dict: of the network that :func:`load_network` gave, unwrapped.
        folder: where to; missing or empty.
        timestep: the time at which the student is evaluated.

    Raises:
        UserError: the teacher has no network, or as :func:`identify`.
        RuntimeError: ``state_dict`` is of another network.
    """
    _student_module(config).save_student(config, state_dict, folder, timestep=timestep)


def student_usage(config: TeacherConfig, folder: str) -> "StudentUsage":
    """How to run what :func:`save_student` wrote; ``folder`` is how the code there names it."""
    return _student_module(config).usage(folder)


def is_student(config: TeacherConfig, folder: Path) -> bool:
    """Whether a folder looks like one that :func:`save_student` wrote for this kind of teacher."""
    return any((folder / marker).is_file() for marker in _student_module(config).MARKERS)


def as_system(config: TeacherConfig, folder: Path) -> "tuple[TeacherConfig, SamplerConfig]":
    """A student's folder as a teacher to be sampled, and the sampler that takes its one step.

    Args:
        config: the student's teacher, whose kind and precision it has.
        folder: where the student lies.

    Raises:
        UserError: it is no student's.
    """
    return _student_module(config).as_system(folder, getattr(config, "dtype", "float32"))


def check_identity(found: TeacherIdentity, expected: TeacherIdentity, where: str) -> None:
    """Make sure that a teacher is the one a dataset was made with.

    Args:
        found: the teacher at hand.
        expected: the teacher of the dataset.
        where: the dataset, for the message.

    Raises:
        UserError: they differ; every field that does is named with both values.
    """
    pairs = ((name, getattr(found, name), getattr(expected, name)) for name in TeacherIdentity.model_fields)
    if differing := [f"{name} is {a}, not {b}" for name, a, b in pairs if a != b]:
        raise UserError(f"teacher: not the teacher of {where}: {'; '.join(differing)}; give the path of that one")


def _module(config: TeacherConfig) -> ModuleType:
    if isinstance(config, MixtureTeacherConfig):
        from pipeline.teachers import mixture as module
    elif isinstance(config, EdmTeacherConfig):
        from pipeline.teachers.edm import teacher as module
    else:
        from pipeline.teachers import stable_diffusion as module
    return module


def _student_module(config: TeacherConfig) -> ModuleType:
    if isinstance(config, MixtureTeacherConfig):
        raise UserError(
            "teacher.kind: mixture is a formula and has no network to start a student from; use stable_diffusion or edm"
        )
    if isinstance(config, EdmTeacherConfig):
        from pipeline.teachers.edm import student as module
    else:
        from pipeline.teachers import student as module
    return module
