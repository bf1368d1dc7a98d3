"""A run in progress: what the loop acts on, and the small acts themselves.

The loop (trainer/loop.py) says what happens in a step; here is how a batch becomes the student's input, when a thing is
due, and what is written when it is. :func:`trainer.build.build` puts the parts together.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from configs.errors import RunStopped
from configs.train_schema import TrainConfig
from configs.yaml_file import to_yaml
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.generator import OneStepGenerator
from pipeline.teachers.base import Teacher
from trainer.checkpoints.checkpoints import Checkpoints, TrainerState
from trainer.checkpoints.sealed_folder import COMPLETE
from trainer.conditions import Conditions
from trainer.data.batch_shape import BatchShape
from trainer.data.loader import MicroBatchLoader
from trainer.data.positions import Positions
from trainer.data.training_data import MicroBatch, TrainingData
from trainer.dmd import DistributionMatching
from trainer.ema import StudentEma
from trainer.export import CARD, FOLDERS, export
from trainer.randomness import DerivedDraws
from trainer.regression import Distance
from trainer.report import PAGE, write_report
from trainer.sample_grid import GridInputs, SampleGrid
from trainer.tracking.metrics import Metrics
from trainer.tracking.metrics_file import METRICS, last_metrics
from trainer.tracking.nonfinite import NonfiniteShares
from trainer.tracking.trackers import start_trackers
from trainer.trainable import Trainable

if TYPE_CHECKING:
    from accelerate import Accelerator

HELD_OUT_BATCH = 16
"""Most held-out pairs in a call of the network."""


@dataclass
class TrainingRun:
    """All parts of a run on one process.

    Attributes:
        config: what the user asked for.
        accelerator: this process among the others.
        directory: the run directory.
        state: what it is and how far it is; goes into every checkpoint.
        teacher: frozen; its denoiser is the real score.
        conditions: prompts -> condition.
        student: the network of the generator.
        fake_score: the critic; None without distribution matching.
        ema: the student's average; None if none is kept.
        generator: the student as (z, condition) -> x0, with gradients.
        matching: the losses of distribution matching; None without it.
        regression: the loss of pairs; None without it.
        held_out_distance: mean squared distance to pairs that are not trained on; None without pairs.
        data: pairs and prompts.
        shape: samples of a micro-batch, and micro-batches of a turn.
        checkpoints: where weights go.
        resources: what is let go at the end.
        metrics: where numbers go.
        batches: this process's micro-batches, from the first that has not been used.
    """

    config: TrainConfig
    accelerator: "Accelerator"
    directory: Path
    state: TrainerState
    teacher: Teacher
    conditions: Conditions
    student: Trainable
    fake_score: Trainable | None
    ema: StudentEma | None
    generator: OneStepGenerator
    matching: DistributionMatching | None
    regression: Distance | None
    held_out_distance: Distance | None
    data: TrainingData
    shape: BatchShape
    checkpoints: Checkpoints
    resources: ExitStack
    metrics: Metrics = field(init=False)
    batches: Iterator[MicroBatch] = field(init=False)
    _loaded: Path | None = field(init=False, default=None)

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint. Before the run is entered."""
        self._loaded = checkpoint
        there, _ = self.checkpoints.load(checkpoint, self.networks(), self.optimizers())
        self.state.step, self.state.num_images = there.step, there.num_images
        self.state.nonfinite_samples, self.state.seconds = there.nonfinite_samples, there.seconds

    def __enter__(self) -> "TrainingRun":
        """Open what is written to and read from while the run lasts."""
        accelerator, state = self.accelerator, self.state
        start_trackers(accelerator, self.config, state.step)
        self.resources.callback(accelerator.end_training)
        self.metrics = Metrics(
            accelerator,
            self.directory,
            step=state.step,
            num_images=state.num_images,
            total_steps=self.config.runtime.steps,
        )
        self.resources.callback(self.metrics.close)
        loader = MicroBatchLoader(
            self.data, rank=accelerator.process_index, world=accelerator.num_processes, first_step=state.step
        )
        self.resources.callback(loader.close)
        self.batches = loader
        self._started, self._logged = time.monotonic(), (state.step, state.num_images)
        self._nonfinite = NonfiniteShares(self.config.runtime.max_nonfinite_fraction)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resources.close()

    # ------------------------------------------------------------------------------------------ within a step

    @property
    def accumulation(self) -> int:
        """Micro-batches of a turn on this process."""
        return self.shape.accumulation

    def micro_batches(self) -> Iterator[tuple[int, MicroBatch]]:
        """The micro-batches of the next turn that needs any, numbered from 0."""
        for number in range(self.accumulation):
            with self.metrics.timed("data_wait"):
                batch = next(self.batches)
            yield number, batch

    def draws(self, purpose: str, turn: int, number: int, count: int) -> DerivedDraws:
        """The randomness of one purpose for the first ``count`` samples of micro-batch ``number`` of a turn.

        Samples of distribution matching are numbered from 0, pairs from batch.dm.
        """
        micro_batch = number * self.accelerator.num_processes + self.accelerator.process_index
        prompts = range(micro_batch * self.shape.prompts, (micro_batch + 1) * self.shape.prompts)
        pairs = range(micro_batch * self.shape.pairs, (micro_batch + 1) * self.shape.pairs)
        samples = [*prompts, *(self.config.batch.dm + pair for pair in pairs)]
        return DerivedDraws(
            self.teacher.device,
            seed=self.config.seed,
            purpose=purpose,
            step=self.state.step,
            turn=turn,
            samples=samples[:count],
        )

    def student_inputs(self, batch: MicroBatch, turn: int, number: int) -> tuple[Tensor, Tensor]:
        """Noise and conditions of a micro-batch: those of distribution matching first, then those of its pairs.

        Returns:
            z, (B, *sample_shape), float32, and condition, (B, ...), float32.
        """
        shape = (len(batch.prompts), *self.teacher.identity.sample_shape)
        z = self.draws("noise", turn, number, len(batch.prompts)).normal(torch.Size(shape))
        prompts = list(batch.prompts)
        if batch.pairs is not None:
            z = torch.cat([z, batch.pairs.noise.to(z)])
            prompts += batch.pairs.prompts
        return z, self.conditions(prompts)

    def note_finite(self, is_finite: Tensor) -> None:
        """Count the samples of a micro-batch, (B,), that gave no finite gradient."""
        self.metrics.add_total("nonfinite_samples", ~is_finite)

    def update(self, trainable: Trainable, name: str) -> None:
        """End a turn: one step of the optimizer."""
        norm, is_finite = trainable.update(self.state.step)
        self.metrics.add(f"grad_norm/{name}", norm)
        self.metrics.add(f"clip_fraction/{name}", norm > self.config.optimizer.max_grad_norm)
        self.metrics.add(f"skipped_updates/{name}", float(not is_finite))

    # ------------------------------------------------------------------------------------------ between steps

    def step_done(self) -> None:
        """Count a step, and let the average follow the student."""
        if self.ema is not None:
            self.ema.update(self.student.network)
        self.state.step += 1
        self.state.num_images += self.shape.num_images * self.accumulation * self.accelerator.num_processes
        self.metrics.tick(self.state.step)

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens after this one."""
        return self.state.step % every == 0

    def log(self) -> None:
        """Write the metrics since the last time."""
        with self.metrics.apart():
            self._measure_held_out("holdout/distance", self.student.network)
            if self.ema is not None:
                self._measure_held_out("holdout/distance_ema", self.ema.module)
        self.metrics.add("lr", self.student.learning_rate(self.state.step - 1))
        values = self.metrics.log(self.state.step, self.state.num_images, self.critic_steps)
        self.state.nonfinite_samples += int(values["nonfinite_samples"])
        self._count_nonfinite(values)

    def _count_nonfinite(self, values: Mapping[str, float]) -> None:
        """Add what a log line tells about the steps since the one before."""
        steps, num_images = self.state.step - self._logged[0], self.state.num_images - self._logged[1]
        self._logged = self.state.step, self.state.num_images
        updates = {"student": steps, "critic": steps * self.config.loss.critic_steps_per_generator_step}
        skipped = {name: values.get(f"skipped_updates/{name}", 0.0) for name in updates}  # a mean over the updates
        counts = {f"updates of the {name}": (round(skipped[name] * updates[name]), updates[name]) for name in updates}
        self._nonfinite.add(steps, {"samples": (int(values["nonfinite_samples"]), num_images), **counts})

    def judge(self) -> None:
        """See whether what was logged is about a run that learns.

        Raises:
            RunStopped: too many samples or updates gave no finite gradient.
        """
        if (lost := self._nonfinite.judge()) is not None:
            raise RunStopped(
                f"step {self.state.step}: {lost} had no finite gradient (runtime.max_nonfinite_fraction "
                f"{self.config.runtime.max_nonfinite_fraction:g}); see {self.directory / METRICS}; begin a new output "
                "with a lower optimizer.lr or precision float32"
            )

    @property
    def critic_steps(self) -> int:
        """Steps of the fake score that are done."""
        per_step = self.config.loss.critic_steps_per_generator_step
        return self.state.step * per_step if self.fake_score is not None else 0

    def save(self) -> None:
        """Write a checkpoint; the main process does, the others wait."""
        with self.metrics.apart():
            self._save()
            self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            state = replace(self.state, seconds=self.state.seconds + time.monotonic() - self._started)
            cursor = self.data.cursor(self.state.step)
            config_yaml = to_yaml(self.config.model_dump(mode="json"))
            self.checkpoints.save(state, self.networks(), self.optimizers(), cursor, config_yaml)

    def networks(self) -> dict[str, nn.Module]:
        """What learns, by the name of its file."""
        networks = {"student": self.student.network}
        if self.ema is not None:
            networks["student_ema"] = self.ema.module
        if self.fake_score is not None:
            networks["fake_score"] = self.fake_score.network
        return networks

    def optimizers(self) -> dict[str, tuple[torch.optim.Optimizer, nn.Module]]:
        """Optimizers with the networks they update, likewise."""
        trainables = {"student": self.student, "fake_score": self.fake_score}
        return {name: (one.optimizer, one.network) for name, one in trainables.items() if one is not None}

    def draw_grid(self) -> None:
        """Draw the sample grid; the main process does."""
        with self.metrics.apart():
            self._draw_grid()
            self.accelerator.wait_for_everyone()

    def _draw_grid(self) -> None:
        if self.accelerator.is_main_process:
            students = {"student": self.generator_of(self.student.network)}
            if self.ema is not None:
                students["student EMA"] = self.generator_of(self.ema.module)
            self._grid.write(self.directory / "grids" / f"step_{self.state.step:07d}.png", students)

    def generator_of(self, network: nn.Module) -> OneStepGenerator:
        """A network of the student's kind as a generator, in the run's precision, on this process alone."""
        teacher = self.teacher.denoiser

        def call(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            # Batches of other shapes than those of training: compiled for them, training would be slower.
            with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                return self.teacher.call(network, x_t, t, condition)

        denoiser = Denoiser(call, teacher.schedule, teacher.parametrization)
        return OneStepGenerator(denoiser, teacher.schedule, self.generator.t)

    def is_finished(self) -> bool:
        """Whether exports and page are those of the checkpoint that was loaded: a kill may have come before them.

        The main process looks, and tells the others: it may be writing them when they look.
        """
        from accelerate.utils import broadcast_object_list

        found = [self._loaded is not None and self._is_written_out(self._loaded)]
        broadcast_object_list(found)
        return found[0]

    def _is_written_out(self, checkpoint: Path) -> bool:
        """Whether all is there, and in the order in which :meth:`finish` writes it."""
        cards = [self.directory / FOLDERS[name] / CARD for name in self.networks() if name in FOLDERS]
        written = [checkpoint / COMPLETE, *cards, self.directory / PAGE]
        if not all(path.exists() for path in written):
            return False
        times = [path.stat().st_mtime_ns for path in written]
        return times == sorted(times)

    def finish(self) -> None:
        """Export the student and write the page about the run; the main process does."""
        if self.accelerator.is_main_process:
            states = {name: one.state_dict() for name, one in self.networks().items() if name in FOLDERS}
            export(
                self.directory,
                self.config,
                self.state.spec,
                states,
                timestep=self.generator.t.item(),
                step=self.state.step,
                metrics=last_metrics(self.directory),
            )
            self.metrics.say(f"done: {self.directory / PAGE}")
        self.report()

    def report(self) -> None:
        """Write the page about the run; the main process does."""
        if self.accelerator.is_main_process:
            write_report(self.directory)
        self.accelerator.wait_for_everyone()

    @cached_property
    def _grid(self) -> SampleGrid:
        """Noises and prompts of the held-out pairs, whose pictures are there; without pairs the teacher is sampled."""
        runtime, loss, held_out = self.config.runtime, self.config.loss, self.data.held_out
        if self.data.target is not None:
            count = runtime.grid_samples
            if held_out is None:  # then some that are trained on
                held_out = self.data.read(Positions(0, range(count), range(0))).pairs
                assert held_out is not None
            images = held_out.target[:count].float()
            if self.data.target == "x0":
                with torch.no_grad():
                    images = torch.cat([self.teacher.decode(x0[None].to(self.teacher.device)).cpu() for x0 in images])
            inputs = GridInputs(held_out.noise[:count], held_out.prompts[:count], images)
        else:
            prompts = self.data.read(Positions(0, range(0), range(runtime.grid_samples))).prompts
            inputs = GridInputs.from_teacher(
                self.teacher,
                prompts,
                seed=self.config.seed,
                guidance_scale=loss.guidance_scale,
                negative_prompt=loss.negative_prompt,
                steps=runtime.grid_teacher_steps,
            )
        return SampleGrid(self.teacher, inputs, self.generator.t)

    @torch.no_grad()
    def _measure_held_out(self, name: str, network: nn.Module) -> None:
        """Distance between student and teacher on pairs that are never trained on; each process takes its share."""
        held_out = self.data.held_out
        if self.held_out_distance is None or held_out is None:
            return
        generator = self.generator_of(network)
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        noise, prompts, target = held_out.noise[mine], held_out.prompts[mine], held_out.target[mine]
        size = min(HELD_OUT_BATCH, self.shape.num_images)  # what fits in training fits without gradients
        self.metrics.add(name, 0.0, 0)
        for start in range(0, len(prompts), size):
            some = slice(start, start + size)
            z = noise[some].to(self.teacher.device, torch.float32)
            x0 = generator(z, self.conditions(prompts[some]))
            self.metrics.add(name, self.held_out_distance(x0, target[some]))
