"""Teachers: frozen text-to-image diffusion models, each behind :class:`~pipeline.teachers.base.Teacher`.

From the cheapest to the dearest, for whoever holds a ``TeacherConfig``:

* :func:`check`: can these settings be carried out with this teacher at all? Reads configs, no weights.
* :func:`sampler_evaluations`: what would a sample cost? Likewise.
* :func:`identify`: which teacher is it? Reads the weights once, builds nothing, needs neither GPU nor memory.
* :func:`load`: the teacher itself, on a device.

Each kind of teacher is one module with these functions; it is imported when one of its kind is asked for.
"""

from types import ModuleType
from typing import TYPE_CHECKING

from configs.errors import UserError
from configs.schema import MixtureTeacherConfig, PairsSettings, SamplerConfig, TeacherConfig, TeacherIdentity

if TYPE_CHECKING:
    import torch

    from pipeline.teachers.base import Teacher


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
    from pipeline.teachers.stable_diffusion import StableDiffusionTeacher

    return StableDiffusionTeacher(config, device, compile=compile, channels_last=channels_last)


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
    else:
        from pipeline.teachers import stable_diffusion as module
    return module
