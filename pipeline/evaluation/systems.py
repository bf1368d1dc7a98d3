"""Which systems are measured, and how the images of each are drawn.

A system's images are a pair dataset that keeps the pictures only. All have one prompt table, one seed and one number of
images per prompt, so that image i of every system starts from the same noise and the same prompt.

    teacher-N   the teacher's sampler with N steps
    student     its export, sampled with one step, without guidance, since that is in its weights
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.evaluate_schema import EvaluateConfig
from configs.fingerprint import differences
from configs.json_text import parse_json
from configs.schema import (
    DiffusersSampler,
    FieldsConfig,
    GeneratePairsConfig,
    PairsLayout,
    PairsSettings,
    PromptsConfig,
    SamplerConfig,
    TeacherConfig,
)
from pipeline import teachers
from pipeline.prompts import PromptTable
from pipeline.shards.dataset import Dataset
from pipeline.shards.storage import Storage

STUDENT = "student"
EXPORTS = ("export_ema", "export")
"""Folders of a run directory with its student, the better one first."""


@dataclass(frozen=True)
class System:
    """Something that turns noise and prompts into images.

    Attributes:
        name: its folder in images/ and grid/.
        title: for people.
        is_student: or a teacher.
        pairs: how its images are drawn; of a dataset that exists, how they were.
        is_drawn: False for a dataset that exists.
    """

    name: str
    title: str
    is_student: bool
    pairs: GeneratePairsConfig
    is_drawn: bool = True

    @property
    def dataset(self) -> Dataset:
        """Its images, which have been drawn."""
        return Dataset.open(Storage.open(self.pairs.output))

    @property
    def steps(self) -> int:
        """Of its sampler."""
        return self.pairs.spec.sampler.steps

    @property
    def evaluations(self) -> int:
        """Network evaluations of one image, guidance included."""
        return teachers.sampler_evaluations(self.pairs.teacher, self.pairs.spec.sampler, self.pairs.spec.guidance_scale)

    @property
    def sampling(self) -> str:
        """Sampler and guidance in words."""
        spec = self.pairs.spec
        name = spec.sampler.scheduler if isinstance(spec.sampler, DiffusersSampler) else spec.sampler.name
        steps = f"{self.steps} step{'s' * (self.steps > 1)}"
        return f"{name}, {steps}, guidance_scale {spec.guidance_scale:g}"


def count_images(config: EvaluateConfig, prompts: PromptTable) -> int:
    """Images of each system."""
    return config.num_images or prompts.num_prompts * config.images_per_prompt


def build_systems(config: EvaluateConfig, prompts: str) -> list[System]:
    """The teacher from most steps to fewest, then the student.

    Args:
        config: of the evaluation.
        prompts: the prompt table that all are drawn from.

    Raises:
        UserError: a system cannot be drawn so, or there is no student where one is named.
    """
    systems = [_teacher(config, prompts, steps) for steps in sorted(config.teacher_steps, reverse=True)]
    if config.student is not None:
        student, one_step = teachers.as_system(config.teacher, student_folder(config.student, config.teacher))
        pairs = _pairs(config, prompts, STUDENT, student, one_step, guidance_scale=1.0, negative_prompt="")
        systems.append(System(STUDENT, "student, 1 step", True, pairs))
    for system in systems:
        teachers.check(system.pairs.teacher, system.pairs.spec)
    return systems


def student_folder(student: str, teacher: TeacherConfig) -> Path:
    """The folder of an exported student.

    Args:
        student: that folder itself, or the run directory of its training.
        teacher: whose student it is.

    Raises:
        UserError: there is none.
    """
    path = Path(student).expanduser().resolve()
    for folder in (path, *(path / name for name in EXPORTS)):
        if teachers.is_student(teacher, folder):
            return folder
    if not path.is_dir():
        raise UserError(f"student: there is no folder {student}; name a run directory, or its export")
    raise UserError(f"student: {student} has neither {' nor '.join(EXPORTS)}; let the training end, or name an export")


def run_directory(student: str) -> Path | None:
    """The run directory that a student comes from, if the folder is one, or lies in one."""
    path = Path(student).expanduser().resolve()
    return next((folder for folder in (path, path.parent) if _is_training_run(folder)), None)


def training_run(run_dir: Path) -> dict[str, Any]:
    """What ``run.json`` of a training run says."""
    return parse_json((run_dir / "run.json").read_bytes())


def check_student(config: EvaluateConfig) -> None:
    """Raise UserError when the run that a student comes from had another teacher, or learnt the pairs to be used."""
    run_dir = run_directory(config.student) if config.student is not None else None
    if run_dir is None:
        return
    spec = training_run(run_dir)["spec"]
    theirs, ours = spec["teacher"]["weights_digest"], teachers.identify(config.teacher).weights_digest
    if theirs != ours:
        raise UserError(
            f"teacher: its weights are {ours[:12]}, and {run_dir} learnt from {theirs[:12]}; name the student's teacher"
        )
    if config.pairs is not None:
        learnt = [data["fingerprint"] for data in spec["data"]]
        if Dataset.open(Storage.open(config.pairs)).run.fingerprint in learnt:
            raise UserError(
                f"pairs: {run_dir} was trained on {config.pairs}, so nothing is held out of it; name pairs of another "
                "seed, or leave pairs out to have them drawn"
            )


def existing_pairs(config: EvaluateConfig, system: System, prompts: PromptTable) -> GeneratePairsConfig:
    """How the images at ``config.pairs`` were drawn.

    Args:
        config: of the evaluation.
        system: that they are to stand for.
        prompts: of the evaluation.

    Raises:
        UserError: there is no finished dataset with lossless images, or it was drawn in another way.
    """
    assert config.pairs is not None
    dataset = Dataset.open(Storage.open(config.pairs))
    spec, wanted = dataset.run.spec, system.pairs.spec
    if dataset.sealed is None or spec.fields.image == "none":
        raise UserError(f"pairs: {config.pairs} is not finished, or has no images; name a finished one with images")
    if spec.fields.image == "jpg":  # the images of other systems are drawn as png
        raise UserError(
            f"pairs: {config.pairs} has jpg images, whose error would count as the teacher's; name pairs of png or "
            "webp, or leave it out to have them drawn"
        )
    identity = {"prompts_digest": prompts.digest, "weights_digest": teachers.identify(config.teacher).weights_digest}
    here = {
        **wanted.model_dump(mode="json", exclude={"fields"}),
        "num_samples": count_images(config, prompts),
        **identity,
    }
    there = spec.model_dump(mode="json") | {"weights_digest": spec.teacher.weights_digest}
    if differing := differences({key: there[key] for key in here}, here):
        listed = "; ".join(f"{name} is {old!r} there, {new!r} here" for name, old, new in differing)
        raise UserError(f"pairs: {config.pairs} is not {system.title} of this evaluation ({listed}); leave it out")
    return system.pairs.model_copy(update={"output": dataset.storage.uri})


def _is_training_run(folder: Path) -> bool:
    try:
        return "loss" in training_run(folder)["spec"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _teacher(config: EvaluateConfig, prompts: str, steps: int) -> System:
    name, title = f"teacher-{steps}", f"teacher, {steps} step{'s' * (steps > 1)}"
    sampler = config.sampler.model_copy(update={"steps": steps})
    pairs = _pairs(
        config,
        prompts,
        name,
        config.teacher,
        sampler,
        guidance_scale=config.guidance_scale,
        negative_prompt=config.negative_prompt,
    )
    return System(name, title, False, pairs)


def _pairs(
    config: EvaluateConfig,
    prompts: str,
    name: str,
    teacher: TeacherConfig,
    sampler: SamplerConfig,
    *,
    guidance_scale: float,
    negative_prompt: str,
) -> GeneratePairsConfig:
    return GeneratePairsConfig(
        output=f"{config.output.rstrip('/')}/images/{name}",
        teacher=teacher,
        prompts=PromptsConfig(path=prompts),
        spec=PairsSettings(
            sampler=sampler,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            seed=config.seed,
            pairs_per_prompt=config.images_per_prompt,
            num_samples=config.num_images,
            fields=FieldsConfig(noise=False, x0="none", image="png", prompt=False),
        ),
        layout=PairsLayout(samples_per_shard=config.samples_per_shard),
        runtime=config.runtime,
    )
