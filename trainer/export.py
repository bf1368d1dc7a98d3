"""A trained student as a folder that can be run, with the card that says how, and what it is.

    RUN_DIR/export        the student
    RUN_DIR/export_ema    the moving average of its weights, if there is one

A folder is written aside and renamed: whoever finds ``export`` finds it whole, and an older one is there until then.
Weights come as names and tensors, so that a checkpoint's file is exported like a network in training.
"""

import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from configs.train_schema import TrainConfig, TrainSpec
from configs.yaml_file import to_yaml
from pipeline import teachers
from pipeline.markdown_table import markdown_row
from pipeline.provenance import code_revision, library_versions

if TYPE_CHECKING:
    from torch import Tensor

FOLDERS = {"student": "export", "student_ema": "export_ema"}
"""Network, as checkpoints name it -> folder in the run directory."""
CARD = "README.md"


def export(
    run_dir: Path,
    config: TrainConfig,
    spec: TrainSpec,
    networks: "Mapping[str, Mapping[str, Tensor]]",
    *,
    timestep: float,
    step: int,
    metrics: Mapping[str, float],
) -> list[Path]:
    """Write the pipeline folders of a student; for one process only.

    Args:
        run_dir: where the folders go.
        config: of the run; its teacher lends the parts that were not trained.
        spec: of the run, for the card.
        networks: state dicts, without wrappers' prefixes, of ``student`` and, if there is one, ``student_ema``.
        timestep: the time at which the student is evaluated.
        step: steps it was trained for.
        metrics: name -> last value, for the card.

    Returns:
        The folders.

    Raises:
        UserError: the teacher's folder is gone, or it has no network.
    """
    folders: list[Path] = []
    for name, state_dict in networks.items():
        folder = run_dir / FOLDERS[name]
        with _replacing(folder) as aside:
            teachers.save_student(config.teacher, state_dict, aside, timestep=timestep)
            card = model_card(config, spec, name, timestep=timestep, step=step, metrics=metrics)
            (aside / CARD).write_text(card, encoding="utf-8")
        folders.append(folder)
    return folders


def model_card(
    config: TrainConfig, spec: TrainSpec, name: str, *, timestep: float, step: int, metrics: Mapping[str, float]
) -> str:
    """The text of the card, in Markdown; arguments as :func:`export` has them, ``name`` of the network."""
    usage = teachers.student_usage(config.teacher, ".")
    method = "Distribution Matching Distillation" if spec.loss.dm_weight > 0 else "regression on noise/image pairs"
    average = f", moving average with decay {spec.student.ema_decay:g}" if name == "student_ema" else ""
    teacher = config.teacher.model_dump(exclude_none=True, exclude={"kind", "dtype"})
    network = f"predicts {spec.teacher.parametrization}, schedule `{spec.teacher.schedule}`"
    rows = {
        "teacher": f"{config.teacher.kind} ({', '.join(f'{key} {value}' for key, value in teacher.items())})",
        "teacher weights": f"`{spec.teacher.weights_digest}`",
        "network": f"{network}, timestep {timestep:g}",
        "weights": f"after step {step:,}{average}",
        "guidance_scale": f"{spec.loss.guidance_scale:g}, of the teacher; it is in the weights",
        "image": "x".join(map(str, spec.teacher.image_shape)),
    }
    for data in spec.data:
        selection = "" if data.selection_digest is None else f", selection `{data.selection_digest}`"
        rows[f"pairs `{data.fingerprint[:12]}`"] = f"`{data.fingerprint}`, content `{data.content_sha256}`{selection}"
    if spec.prompts_digest is not None:
        rows["prompts"] = f"`{spec.prompts_digest}`"
    rows["made with"] = code_revision()
    rows["versions"] = ", ".join(f"{library} {version}" for library, version in library_versions().items())
    return f"""---
{usage.metadata}
---

# One-step student

{usage.about} in one evaluation of the network: a student of the teacher below, trained by {method}.
{usage.parts} The license of the teacher's weights applies to these.

In this folder, {usage.where}:

```python
{usage.code}
```

One step without guidance is all that it was trained for. It is taken at timestep {timestep:g}.

{_table(rows)}

## Metrics

{_table({name: f"{value:.4g}" for name, value in metrics.items()})}

## Spec

```yaml
{to_yaml(spec.model_dump(mode="json")).strip()}
```
"""


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *map(markdown_row, rows.items())])


@contextmanager
def _replacing(folder: Path) -> Generator[Path]:
    """An empty folder that takes the place of ``folder`` once it is filled; after an exception nothing has changed."""
    aside, old = folder.with_name(f"{folder.name}.tmp"), folder.with_name(f"{folder.name}.old")
    if aside.exists():  # of a run that was killed
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside)
        raise
    if folder.exists():
        if old.exists():
            shutil.rmtree(old)
        folder.rename(old)
    aside.rename(folder)
    if old.exists():
        shutil.rmtree(old)
