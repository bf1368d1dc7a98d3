"""The page about a run: ``RUN_DIR/README.md``, with ``curves.png``, for a person who opens the directory.

Made from what lies there: ``config.yaml`` and ``run.json``, and as far as the run has got, ``metrics.jsonl``, the last
checkpoint's ``trainer_state.json``, the sample grids and the exports. Loads no network and reads no dataset.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from configs.train_schema import LossConfig, TrainConfig, TrainSpec
from configs.yaml_file import read_layers
from pipeline import teachers
from pipeline.markdown_table import markdown_row
from pipeline.shards.storage import Storage
from trainer.checkpoints.checkpoints import TrainerState, newest_state
from trainer.curves import CURVES, draw_curves
from trainer.run_directory import CONFIG, RUN
from trainer.tracking.metrics_file import read_metrics

PAGE = "README.md"
_MEANINGS = {
    "loss/student": "what the student minimizes",
    "loss/dm": "distribution matching: its gradient counts, not its value",
    "loss/regression": "distance between student and teacher on training pairs",
    "loss/critic": "denoising loss of the fake score on the student's samples",
    "holdout/distance": "distance between student and teacher on pairs that were kept out",
    "holdout/distance_ema": "the same of the average",
    "grad_norm/student": "before clipping",
    "grad_norm/critic": "before clipping",
    "clip_fraction/student": "share of updates that were clipped",
    "clip_fraction/critic": "share of updates that were clipped",
    "dm/rms_gradient": "size of the distribution matching gradient",
    "dm/mean_abs_x0_minus_real": "what it is divided by: the student's sample against the teacher's view of it",
    "dm/mean_abs_fake_minus_real": "how far apart the two scores are",
    "dm/cosine/bucket0": "between the two scores' x0, least noise",
    "dm/cosine/bucket1": "",
    "dm/cosine/bucket2": "",
    "dm/cosine/bucket3": "most noise",
    "skipped_updates/student": "share of updates left out, since the gradient was not finite",
    "skipped_updates/critic": "share of updates left out, since the gradient was not finite",
    "nonfinite_samples": "samples since the line before that gave no finite gradient",
    "student/mean": "of the student's samples",
    "student/std": "of the student's samples",
    "images_per_second": "samples the student learnt from, all processes",
    "data_wait_share": "share of the time spent waiting for data",
    "peak_memory_gb": "on one GPU",
}


def write_report(run_dir: Path) -> None:
    """Write ``curves.png`` and ``README.md`` of a run, finished or not.

    Args:
        run_dir: a run directory with ``config.yaml`` and ``run.json``.

    Raises:
        UserError: one of its files is not what the program writes.
    """
    (tree,) = read_layers(run_dir / CONFIG).values()
    config = TrainConfig.model_validate(tree)
    run = json.loads((run_dir / RUN).read_bytes())
    lines = read_metrics(run_dir)
    storage = Storage.open(str(run_dir.absolute()))
    if lines:
        storage.write(CURVES, draw_curves(lines))
    page = _page(run_dir, config, run, TrainSpec.model_validate(run["spec"]), newest_state(run_dir), lines)
    storage.write(PAGE, page.encode())


def _page(
    run_dir: Path,
    config: TrainConfig,
    run: Mapping[str, Any],
    spec: TrainSpec,
    state: TrainerState | None,
    lines: Sequence[dict[str, Any]],
) -> str:
    parts = [
        f"# {run_dir.absolute().name}: a one-step student",
        _summary(spec, state, config.runtime.steps),
        _grid(run_dir),
        "| | |\n|---|---|\n" + "\n".join(map(markdown_row, _about(config, run, spec, state))),
        "## Data\n\n" + _data(config, spec, state),
        "## Metrics\n\n" + _metrics(lines),
        _exports(run_dir, config),
        "## Going on\n\n" + _going_on(config, state),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _summary(spec: TrainSpec, state: TrainerState | None, total_steps: int) -> str:
    ways = []
    if spec.loss.dm_weight > 0:
        ways.append("distribution matching")
    if spec.loss.regression_weight > 0:
        ways.append("regression on pairs")
    how = f"A {spec.teacher.kind} teacher distilled into one network call, by {' and '.join(ways)}."
    if state is None:
        return f"{how} No checkpoint has been written yet; {total_steps:,} steps are planned."
    if state.step < total_steps:
        return f"{how} Not finished: the last checkpoint is of step {state.step:,} of {total_steps:,}."
    return f"{how} Finished after {state.step:,} steps."


def _grid(run_dir: Path) -> str:
    grids = sorted((run_dir / "grids").glob("step_*.png"), key=lambda path: int(path.stem.removeprefix("step_")))
    if not grids:
        return ""
    step = int(grids[-1].stem.removeprefix("step_"))
    caption = f"*Samples after step {step:,}: the same noises and prompts in every grid.*"
    return f"![samples after step {step}](grids/{grids[-1].name})\n\n{caption}"


def _about(
    config: TrainConfig, run: Mapping[str, Any], spec: TrainSpec, state: TrainerState | None
) -> list[tuple[str, str]]:
    teacher = spec.teacher
    source = ", ".join(
        f"{name} {value}" for name, value in config.teacher.model_dump(exclude_none=True).items() if name != "kind"
    )
    timestep = "last of the schedule" if spec.student.timestep is None else f"{spec.student.timestep:g}"
    average = "none" if spec.student.ema_decay is None else f"decay {spec.student.ema_decay:g} per step"
    rows = [
        ("teacher", f"{teacher.kind} ({source})"),
        ("teacher weights", f"`{teacher.weights_digest}`"),
        ("network", f"predicts {teacher.parametrization}, schedule `{teacher.schedule}`"),
        ("begun as", _origin(config, spec)),
        ("student", f"timestep: {timestep}; average of weights: {average}"),
        ("loss", _loss(spec.loss)),
        ("optimizer", _optimizer(spec)),
        ("batch", _batch(spec)),
        ("precision", f"{spec.precision} network calls, float32 weights"),
        ("seed", str(spec.seed)),
    ]
    if state is not None:
        rows += [
            ("learnt from", f"{state.num_images:,} samples in {state.step:,} steps"),
            ("not finite", f"{state.nonfinite_samples:,} samples"),
            ("time", f"{tqdm.format_interval(state.seconds)} on {state.world} process{'es' * (state.world > 1)}"),
            ("made with", f"{state.code_revision}, torch {state.versions.get('torch', '?')}, begun {run['created']}"),
        ]
    return [*rows, ("fingerprint", f"`{run['fingerprint']}`")]


def _origin(config: TrainConfig, spec: TrainSpec) -> str:
    return "the teacher" if spec.init_digest is None else f"the student of {config.init_from}, `{spec.init_digest}`"


def _optimizer(spec: TrainSpec) -> str:
    optimizer = spec.optimizer
    parts = [f"AdamW, lr {optimizer.lr:g}"]
    if optimizer.decay_steps is not None:
        parts.append(f"falling to 0 at step {optimizer.decay_steps:,}")
    if spec.loss.dm_weight > 0:
        parts.append(f"critic {optimizer.critic_lr or optimizer.lr:g}")
    return ", ".join([*parts, f"{optimizer.warmup_steps:,} steps of warm-up"])


def _batch(spec: TrainSpec) -> str:
    matching = [f"{spec.batch.dm} for distribution matching"] if spec.loss.dm_weight else []
    pairs = [f"{spec.batch.pairs} pairs"] if spec.loss.regression_weight else []
    return ", ".join(matching + pairs)


def _loss(loss: LossConfig) -> str:
    parts = []
    if loss.dm_weight > 0:
        guidance = f", guidance_scale {loss.guidance_scale:g}"
        turns = f", critic steps for each of the student: {loss.critic_steps_per_generator_step}"
        parts.append(f"distribution matching x {loss.dm_weight:g} ({loss.dm_gradient}{guidance}{turns})")
    if loss.regression_weight > 0:
        parts.append(f"{loss.regression} in {loss.regression_space} x {loss.regression_weight:g}")
    return " + ".join(parts)


def _data(config: TrainConfig, spec: TrainSpec, state: TrainerState | None) -> str:
    rows = [
        markdown_row(
            [
                source.pairs,
                f"{identity.weight:g}",
                f"`{identity.fingerprint[:16]}`",
                f"`{identity.content_sha256[:16]}`",
            ]
        )
        for source, identity in zip(config.data.sources, spec.data, strict=False)
    ]
    table = "| pairs | weight | fingerprint | content |\n|---|---|---|---|\n" + "\n".join(rows)
    prompts = f"Prompts of distribution matching: {config.data.prompts or 'those of the pairs'}"
    if spec.prompts_digest is not None:
        prompts += f", digest `{spec.prompts_digest[:16]}`"
    told = [table] if rows else ["No pairs."]
    if rows and state is not None:
        told.append(f"{state.num_pairs:,} pairs are trained on, {spec.holdout} of each dataset are kept out.")
    if spec.loss.dm_weight > 0:
        told.append(prompts + ".")
    return "\n\n".join(told)


def _metrics(lines: Sequence[dict[str, Any]]) -> str:
    if not lines:
        return "No line of metrics has been written yet."
    first, last = lines[0], lines[-1]
    rows = [
        markdown_row([name, _number(first.get(name)), _number(last.get(name)), meaning])
        for name, meaning in _MEANINGS.items()
        if name in first or name in last
    ]
    return (
        f"![curves]({CURVES})\n\n"
        f"| metric | to step {first['step']:,} | to step {last['step']:,} | |\n|---|---:|---:|---|\n" + "\n".join(rows)
    )


def _number(value: float | None) -> str:
    return "" if value is None else re.sub(r"e([+-])0+", r"e\1", f"{value:.4g}")


def _exports(run_dir: Path, config: TrainConfig) -> str:
    folders = {"export": "the student", "export_ema": "the average of its weights"}
    there = {folder: what for folder, what in folders.items() if (run_dir / folder).is_dir()}
    if not there:
        return ""
    listed = "\n".join(f"- [`{folder}/`]({folder}/README.md): {what}" for folder, what in there.items())
    usage = teachers.student_usage(config.teacher, list(there)[-1])
    return f"""## The student

{listed}

Each has a card. In this directory, {usage.where}:

```python
{usage.code}
```"""


def _going_on(config: TrainConfig, state: TrainerState | None) -> str:
    if state is not None and state.step >= config.runtime.steps:
        return "There is nothing left to do. To train longer, run the same command with a larger `--runtime.steps`."
    where = "begins anew" if state is None else f"goes on after step {state.step:,}"
    return f"Run the same command again: it {where}. `{CONFIG}` holds every setting of it (`--config {CONFIG}`)."
