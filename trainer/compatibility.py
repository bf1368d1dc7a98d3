"""Do a dataset and a training run speak of the same teacher, sampled in the same way?

A pair says: this noise, under this prompt, becomes that picture. It says so of one teacher, one noise schedule, one
guidance. Trained on for another, it teaches something else, without an error and without a warning. So what a dataset
was made with is compared with what the run says, before anything is loaded, and shown in two columns.

Not compared: the precision of the teacher's networks (the pairs' fp16 is the same teacher), sampler and steps (any good
one ends at nearly the same picture). The noise recipe is checked where a dataset is opened.
"""

from collections.abc import Iterable
from typing import Any, get_args

from configs.errors import UserError
from configs.schema import PairsSpec, TeacherIdentity
from configs.train_schema import Difference, TrainConfig

_TEACHER = ("kind", "weights_digest", "schedule", "parametrization", "latent_scale", "sample_shape", "image_shape")


def check_dataset(config: TrainConfig, teacher: TeacherIdentity, root: str, spec: PairsSpec) -> None:
    """Make sure that pairs fit a run.

    Args:
        config: the run; differences named in ``data.allow_differences`` are let pass.
        teacher: its teacher.
        root: where the pairs lie, for the message.
        spec: what they are.

    Raises:
        UserError: they differ; a table with a line for every setting that does.
    """
    ours, theirs = _settings(config, teacher), _settings_of(spec)
    differing = [name for name in ours if ours[name] != theirs[name] and name not in config.data.allow_differences]
    if not differing:
        return
    allowed = [name for name in differing if name in get_args(Difference)]
    fix = "give the dataset or the setting that was meant"
    if allowed == differing:
        fix += f"; if the difference is meant, set data.allow_differences: [{', '.join(allowed)}]"
    rows = [(name, str(theirs[name]), str(ours[name])) for name in differing]
    raise UserError(f"data.pairs: {root} was made for another run; {fix}\n{two_columns('dataset', 'this run', rows)}")


def two_columns(left: str, right: str, rows: Iterable[tuple[str, Any, Any]]) -> str:
    """A table of what differs, one line each: name, value on the left, value on the right."""
    lines = [("", left, right), *((name, str(a), str(b)) for name, a, b in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(2)]
    return "\n".join(f"  {name:<{widths[0]}}  {a:<{widths[1]}}  {b}" for name, a, b in lines)


def _settings(config: TrainConfig, teacher: TeacherIdentity) -> dict[str, Any]:
    settings = {f"teacher.{name}": getattr(teacher, name) for name in _TEACHER}
    return settings | _guidance(config.loss.guidance_scale, config.loss.negative_prompt)


def _settings_of(spec: PairsSpec) -> dict[str, Any]:
    settings = {f"teacher.{name}": getattr(spec.teacher, name) for name in _TEACHER}
    return settings | _guidance(spec.guidance_scale, spec.negative_prompt)


def _guidance(scale: float, negative_prompt: str) -> dict[str, Any]:
    """Without guidance there is no unconditional branch, and its prompt says nothing."""
    return {"guidance_scale": scale, "negative_prompt": "" if scale == 1 else negative_prompt}
