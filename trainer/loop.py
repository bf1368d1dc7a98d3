"""The training loop.

One step is a plan of turns. In each turn one network learns from every micro-batch of the step's batch and is updated
once:

    turn 0     student      x0 = G(z); distribution matching, and regression on pairs                     (Algorithm 1)
               fake score   on the same x0, as they were before the update                                (Algorithm 1)
    turn 1 ..  fake score   on fresh samples: the two-time-scale rule                               (Yin et al. 2024b)

Steps are steps of the student; those of the fake score are counted apart. A step that is done is a function of the step
before, the seed and the data: nothing else is carried from one to the next, so a run may end after any of them.

References:
    Yin et al. 2024, One-step Diffusion with Distribution Matching Distillation, arXiv 2311.18828.
    Yin et al. 2024b, Improved Distribution Matching Distillation, arXiv 2405.14867.
"""

import torch
from torch import Tensor

from configs.train_schema import TrainConfig
from pipeline.full_disk import full_disk_stops
from trainer.build import build
from trainer.losses import finite_samples
from trainer.preemption import StopSignal
from trainer.tracking.diagnostics import observe_samples, observe_scores
from trainer.training_run import TrainingRun

Samples = list[tuple[Tensor, Tensor]]
"""The student's x0 and their conditions, for each micro-batch of this process; without a graph."""


def train(config: TrainConfig) -> None:
    """Train until ``runtime.steps`` steps are done, a signal asks to stop, or an error ends it.

    Raises:
        UserError: something about config, data or run directory is wrong; nothing has been changed.
        RunStopped: the run cannot go on: what it has learnt is in the last checkpoint.
    """
    with full_disk_stops(config.output, "its checkpoints are untouched"), StopSignal() as stop, build(config) as run:
        if run.state.step >= config.runtime.steps and run.is_finished():
            run.metrics.say(f"{run.directory}: {run.state.step} steps are done, nothing left to do")
            return
        run.metrics.say(f"{run.directory}: {run.state.step} of {config.runtime.steps} steps are done")
        if run.state.step == 0:
            run.draw_grid()
        while run.state.step < config.runtime.steps:
            step(run)
            done = run.state.step == config.runtime.steps
            stopping = stop.should_stop(run.accelerator)
            saving = run.is_due(config.runtime.checkpoint_every) or done or stopping
            if run.is_due(config.runtime.log_every) or saving:  # what is counted is in the checkpoint too
                run.log()
            if not stopping:
                run.judge()  # before it is saved: a run that learns nothing pushes no checkpoint out
            if run.is_due(config.runtime.grid_every) or done:
                run.draw_grid()
            if saving:
                run.save()
            if stopping:
                run.judge()  # after it is saved: whoever asked for a stop may not wait for another
            if stopping and not done:
                run.report()
                why = stop.received or "a signal to another process"
                run.metrics.say(f"stopped by {why} after step {run.state.step}; the same command goes on from there")
                return
        run.finish()


def step(run: TrainingRun) -> None:
    """One step: the student's turn, then those of the fake score."""
    samples = student_turn(run)
    if run.fake_score is not None:
        for turn in range(run.config.loss.critic_steps_per_generator_step):
            critic_turn(run, turn, samples if turn == 0 else fresh_samples(run, turn))
    run.step_done()


def student_turn(run: TrainingRun) -> Samples:
    """Update the student once. Returns its samples of distribution matching, for the fake score to learn from."""
    loss_config, samples = run.config.loss, Samples()
    for number, batch in run.micro_batches():
        with run.student.accumulating(is_last=number == run.accumulation - 1):
            # One call for both streams: noise that is fresh, and noise whose picture is known.
            z, condition = run.student_inputs(batch, turn=0, number=number)
            x0 = run.generator(z, condition)
            loss = x0.new_zeros(())
            is_finite = finite_samples(x0)
            if run.matching is not None:
                count = len(x0) if loss_config.dm_on_pairs else len(batch.prompts)
                draws = run.draws("matching", 0, number, count)
                loss_dm, comparison = run.matching.generator_loss(x0[:count], condition[:count], draws)
                loss = loss + loss_config.dm_weight * loss_dm
                is_finite[:count] &= comparison.is_finite
                samples.append((x0[:count].detach(), condition[:count]))
                run.metrics.add("loss/dm", loss_dm)
                observe_scores(run.metrics, x0[:count], comparison, len(run.matching.times))
            if run.regression is not None and batch.pairs is not None:
                distance = run.regression(x0[len(batch.prompts) :], batch.pairs.target)
                loss = loss + loss_config.regression_weight * distance.mean()
                is_finite[len(batch.prompts) :] &= distance.detach().isfinite()
                run.metrics.add("loss/regression", distance)
            run.student.backward(loss / run.accumulation)
        run.metrics.add("loss/student", loss)
        observe_samples(run.metrics, x0)
        run.note_finite(is_finite)
    run.update(run.student, "student")
    return samples


def critic_turn(run: TrainingRun, turn: int, samples: Samples) -> None:
    """Update the fake score once, on samples of the student."""
    assert run.fake_score is not None
    assert run.matching is not None
    for number, (x0, condition) in enumerate(samples):
        with run.fake_score.accumulating(is_last=number == run.accumulation - 1):
            loss = run.matching.critic_loss(x0, condition, run.draws("critic", turn, number, len(x0)))
            run.fake_score.backward(loss / run.accumulation)
        run.metrics.add("loss/critic", loss)
    run.update(run.fake_score, "critic")


@torch.no_grad()
def fresh_samples(run: TrainingRun, turn: int) -> Samples:
    """What the student makes of fresh noise and prompts now."""
    samples = Samples()
    for number, batch in run.micro_batches():
        z, condition = run.student_inputs(batch, turn=turn, number=number)
        samples.append((run.generator(z, condition), condition))
    return samples
