"""From a configuration to a run, in an order in which mistakes cost nothing.

First comes everything that can be refused: processes, batch arithmetic, trackers, the metric's weights, teacher, data,
run directory, the checkpoint to go on from. Then the networks:

    teacher                  placed by hand, frozen, not prepared: what is prepared is wrapped and kept in step
    student, fake score      copies of the teacher's network, or of another run's (init_from), prepared
    student's average        a copy of the student, taken before it is prepared, or another run's

The wrappers that make denoisers of networks stay outside of the prepared networks: what runs in low precision is the
network call alone. The teacher's calls have the same autocast as those of student and fake score, or the difference of
the scores would be one of rounding.
"""

import os
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from configs.errors import RunStopped, UserError
from configs.fingerprint import fingerprint
from configs.schema import TeacherIdentity
from configs.train_schema import LossConfig, StudentConfig, TrainConfig, TrainSpec
from pipeline import teachers
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.generator import OneStepGenerator
from pipeline.diffusion.guidance import GuidedDenoiser
from pipeline.provenance import code_revision, library_versions
from pipeline.teachers.base import Teacher
from trainer.checkpoints.checkpoints import Checkpoints, TrainerState
from trainer.compatibility import check_dataset
from trainer.conditions import Conditions
from trainer.data.batch_shape import batch_shape
from trainer.data.training_data import TrainingData
from trainer.dmd import DistributionMatching
from trainer.ema import StudentEma
from trainer.initial_weights import InitialWeights
from trainer.regression import Distance, build_regression, check_regression
from trainer.run_directory import begin, check, locked
from trainer.tracking.trackers import check_trackers
from trainer.trainable import Trainable
from trainer.training_run import TrainingRun

if TYPE_CHECKING:
    from accelerate import Accelerator


def build(config: TrainConfig) -> TrainingRun:
    """Put a run together, to be entered as a context.

    Raises:
        UserError: something about it is wrong. Nothing has been written, but for a lock in an empty run directory.
    """
    directory = Path(config.output).absolute()
    check_trackers(config)
    accelerator = make_accelerator(config, directory)
    with ExitStack() as resources:
        shape = batch_shape(config, accelerator.num_processes)
        teachers.check_trainable(config.teacher)
        with accelerator.local_main_process_first():  # the first of a machine may download, the others find it there
            check_regression(config.loss)
            identity = teachers.identify(config.teacher)
        data = TrainingData(config)
        for root, dataset in data.datasets:
            check_dataset(config, identity, root, dataset.spec)
        initial = InitialWeights(Path(config.init_from).expanduser(), identity) if config.init_from else None
        spec = _spec(config, identity, data, initial)
        if accelerator.is_main_process:
            check(directory, spec)
            resources.enter_context(locked(directory))
            check(directory, spec)  # again: another process may have begun meanwhile
        checkpoints = Checkpoints(directory, config.runtime.keep_checkpoints, config.runtime.milestone_every)
        checkpoint = _agreed(accelerator, checkpoints.latest() if accelerator.is_main_process else None, spec)

        teacher = teachers.load(config.teacher, accelerator.device, compile=config.runtime.compile)
        if config.runtime.gradient_checkpointing:
            teacher.enable_gradient_checkpointing()
        schedule, parametrization = teacher.denoiser.schedule, teacher.denoiser.parametrization
        t = conditioning_time(teacher.denoiser, config.student)
        if initial is not None and checkpoint is None:
            initial.check()
        network = _network(config, accelerator.device, initial, "student")
        ema = StudentEma(network, config.student.ema_decay) if config.student.ema_decay is not None else None
        if ema is not None and initial is not None:
            initial.load("student_ema", ema.module)
        student = Trainable(accelerator, network, config.optimizer, config.optimizer.lr, config.optimizer.decay_steps)
        student_denoiser = Denoiser(partial(teacher.call, student.prepared), schedule, parametrization)
        fake_score = matching = None
        if config.loss.dm_weight > 0:
            network = _network(config, accelerator.device, initial, "fake_score")
            critic_lr = config.optimizer.critic_lr or config.optimizer.lr
            fake_score = Trainable(accelerator, network, config.optimizer, critic_lr)
            fake_denoiser = Denoiser(partial(teacher.call, fake_score.prepared), schedule, parametrization)
            real_score = guided_teacher(accelerator, teacher, config)
            matching = DistributionMatching(real_score, fake_denoiser, schedule, config.loss)
        run = TrainingRun(
            config=config,
            accelerator=accelerator,
            directory=directory,
            state=TrainerState(
                spec=spec,
                num_pairs=data.num_pairs,
                world=accelerator.num_processes,
                code_revision=code_revision(),
                versions=library_versions(),
            ),
            teacher=teacher,
            conditions=Conditions(teacher, config.runtime.text_cache),
            student=student,
            fake_score=fake_score,
            ema=ema,
            generator=OneStepGenerator(student_denoiser, schedule, t),
            matching=matching,
            regression=_distance(accelerator, teacher, config.loss, data) if config.loss.regression_weight else None,
            held_out_distance=_distance(accelerator, teacher, _held_out_loss(data), data) if data.target else None,
            data=data,
            shape=shape,
            checkpoints=checkpoints,
            resources=resources,
        )
        if checkpoint is not None:
            run.resume(checkpoint)
        if accelerator.is_main_process:
            begin(directory, config, spec)
            checkpoints.tidy()
        accelerator.wait_for_everyone()  # whoever enters the run finds its record
        run.resources = resources.pop_all()
    return run


def make_accelerator(config: TrainConfig, directory: Path) -> "Accelerator":
    """This process among the others, as the launcher started it; precision is the run's, whatever the launcher says.

    Raises:
        UserError: the launcher was asked for a way of distributing that this trainer does not have.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.utils import DistributedType, ProjectConfiguration

    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # not told, accelerate overlooks the other processes on a CPU
        mixed_precision="bf16" if config.precision == "bfloat16" else "no",
        log_with=list(config.runtime.trackers) or None,
        project_config=ProjectConfiguration(str(directory), logging_dir=str(directory / "tensorboard")),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # gradients are held once
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),  # others wait while the main one writes a checkpoint
        ],
    )
    refused = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in refused:
        raise UserError(
            f"accelerate: {accelerator.distributed_type.value} is not supported; launch with --multi_gpu, or change "
            "the launcher's config (accelerate config)"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UserError(
            f"accelerate: {launched} processes were launched, and this one sees {accelerator.num_processes}; launch "
            "with torchrun --nproc_per_node, or mend the launcher's config (accelerate config)"
        )
    return accelerator


def guided_teacher(accelerator: "Accelerator", teacher: Teacher, config: TrainConfig) -> GuidedDenoiser:
    """The real score: the frozen teacher, guided, in the precision that student and fake score are called in."""
    unconditional = teacher.encode_prompts([config.loss.negative_prompt])
    inner = teacher.denoiser

    def network(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        with accelerator.autocast():
            return inner.network(x_t, t, condition)

    return GuidedDenoiser(replace(inner, network=network), unconditional, config.loss.guidance_scale)


def conditioning_time(teacher: Denoiser, student: StudentConfig) -> Tensor:
    """The student's fixed time, shape (), as the teacher's schedule takes it.

    Raises:
        UserError: the teacher was not trained at such a time, or says nothing about x0 there.
    """
    times = teacher.schedule.training_times()
    t = times[-1] if student.timestep is None else torch.tensor(student.timestep).to(times.dtype)
    if student.timestep is not None and (t != student.timestep or not times[0] <= t <= times[-1]):
        kind = "a number" if times.is_floating_point() else "a whole number"
        raise UserError(
            f"student.timestep: {student.timestep:g} is no time of the teacher's; give {kind} from {times[0]:g} to "
            f"{times[-1]:g}"
        )
    if teacher.parametrization in ("eps", "score") and teacher.schedule(t)[0] == 0:
        raise UserError(f"student.timestep: at {t:g} there is no signal, so the teacher's eps tells no x0; give less")
    return t


def _agreed(accelerator: "Accelerator", checkpoint: Path | None, spec: TrainSpec) -> Path | None:
    """The checkpoint that the main process has found whole, and that all processes go on from.

    Raises:
        RunStopped: a process sees other data than the main one: a dataset grew between the two looks.
    """
    from accelerate.utils import broadcast_object_list

    agreed = [checkpoint, fingerprint(spec)]
    broadcast_object_list(agreed)
    if agreed[1] != fingerprint(spec):
        raise RunStopped(
            "processes see different data: wait until whatever writes it has ended, and run the same command again"
        )
    return agreed[0]


def _network(config: TrainConfig, device: torch.device, initial: InitialWeights | None, name: str) -> nn.Module:
    """A copy of the teacher's network on the device, with other weights if a run begins with them; to be prepared."""
    network: Any = teachers.load_network(config.teacher)
    if initial is not None:
        initial.load(name, network)
    network.to(device)
    if config.runtime.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if config.runtime.compile:
        network.compile()  # in place: the names of its parameters stay
    return network


def _spec(
    config: TrainConfig, identity: TeacherIdentity, data: TrainingData, initial: InitialWeights | None
) -> TrainSpec:
    return TrainSpec(
        teacher=identity,
        data=data.identities,
        prompts_digest=data.prompts_digest,
        holdout=config.data.holdout,
        shuffle_window=config.data.shuffle_window,
        student=config.student,
        init_digest=initial.digest if initial is not None else None,
        loss=config.loss,
        optimizer=config.optimizer,
        batch=config.batch,
        seed=config.seed,
        precision=config.precision,
    )


def _held_out_loss(data: TrainingData) -> LossConfig:
    """Mean squared error, whatever the loss is: in x0 if that is stored. Runs with other losses can be compared."""
    return LossConfig(regression="l2", regression_space="latent" if data.target == "x0" else "pixels")


def _distance(accelerator: "Accelerator", teacher: Teacher, loss: LossConfig, data: TrainingData) -> Distance:
    """The distance between the student's x0 and what the pairs hold."""
    assert data.target is not None

    def decode(x0: Tensor) -> Tensor:
        with accelerator.autocast():
            return teacher.decode(x0)

    works_on_latents = teacher.identity.latent_scale is not None
    return build_regression(loss, decode if works_on_latents else None, accelerator.device, data.target)
