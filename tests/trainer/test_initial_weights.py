"""A run that begins with another's networks: student, fake score and average are its own, all else begins anew."""

import shutil

import pytest
import torch
from support import tiny_sd
from support.training import tensors, train_config

from configs.errors import UserError
from trainer.build import build
from trainer.loop import train


@pytest.fixture(scope="module")
def first(trained_on, tmp_path_factory):
    """A run of four steps with checkpoints after two and after four."""
    output = tmp_path_factory.mktemp("first") / "run"
    train(train_config(trained_on, output, runtime={"steps": 4, "checkpoint_every": 2}))
    return output


def next_config(trained_on, output, first, **sections):
    return train_config(trained_on, output, init_from=str(first), loss={"t_max": 0.5}, **sections)


def begun(config):
    """Networks of a run that has not taken a step."""
    run = build(config)
    try:
        named = {name: network.state_dict() for name, network in run.networks().items()}
        moments = [state for optimizer, _ in run.optimizers().values() for state in optimizer.state.values()]
        return {f"{name}/{key}": value for name, of in named.items() for key, value in of.items()}, moments, run.state
    finally:
        run.resources.close()


@pytest.mark.parametrize("step", [2, 4])
def test_student_fake_score_and_average_are_those_of_the_checkpoint(trained_on, tmp_path, first, step):
    source = first if step == 4 else first / "checkpoints/step_0000002"
    found, moments, state = begun(next_config(trained_on, tmp_path / "run", source))
    expected = {name: value for name, value in tensors(first, step).items() if "optimizer" not in name.split("/")[0]}
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert {name.split("/")[0] for name in found} == {"student", "fake_score", "student_ema"}
    assert (moments, state.step) == ([], 0)


def test_what_the_other_run_does_not_have_begins_without_it(trained_on, tmp_path):
    regression = {"dm_weight": 0}
    config = train_config(trained_on, tmp_path / "first", loss=regression, student={"ema_decay": None})
    train(config.model_copy(update={"runtime": config.runtime.model_copy(update={"steps": 1})}))
    found, _, _ = begun(next_config(trained_on, tmp_path / "run", tmp_path / "first"))
    teacher, _, _ = begun(train_config(trained_on, tmp_path / "plain"))
    student = tensors(tmp_path / "first", 1)
    for name in (name.partition("/")[2] for name in student if name.startswith("student/")):
        assert torch.equal(found[f"student/{name}"], student[f"student/{name}"])
        assert torch.equal(found[f"student_ema/{name}"], student[f"student/{name}"])
        assert torch.equal(found[f"fake_score/{name}"], teacher[f"fake_score/{name}"])


def test_a_second_phase_resumes_as_itself(trained_on, tmp_path, first):
    train(next_config(trained_on, tmp_path / "second", first, runtime={"steps": 2}))
    found, _, state = begun(next_config(trained_on, tmp_path / "second", first))
    assert state.step == 2
    expected = tensors(tmp_path / "second", 2)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    start = tensors(first, 4)
    assert not torch.equal(found["student/conv_in.weight"], start["student/conv_in.weight"])
    with pytest.raises(UserError, match="init_digest"):  # it began elsewhere
        build(next_config(trained_on, tmp_path / "second", first / "checkpoints/step_0000002"))


def test_weights_that_cannot_be_begun_with_are_refused_before_anything_is_written(trained_on, tmp_path, first):
    damaged = shutil.copytree(first / "checkpoints/step_0000004", tmp_path / "damaged")
    with (damaged / "student.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(UserError, match=r"init_from: .* is damaged \(student\.safetensors is not what was written"):
        train(next_config(trained_on, tmp_path / "run", damaged))
    for name in ("trainer_state.json", "COMPLETE"):
        other = tmp_path / f"without-{name}"
        shutil.copytree(first / "checkpoints/step_0000004", other / "checkpoints/step_0000004")
        (other / "checkpoints/step_0000004" / name).unlink()
        with pytest.raises(UserError, match=rf"init_from: .* is damaged \({name} is missing\); name another"):
            train(next_config(trained_on, tmp_path / "run", other))
    with pytest.raises(UserError, match=r"init_from: .* has no checkpoints"):
        train(next_config(trained_on, tmp_path / "run", tmp_path / "nowhere"))
    other = {"kind": "stable_diffusion", "path": str(tiny_sd.build(tmp_path / "other", seed=1))}
    alone = {"pairs": None, "prompts": str(trained_on / "pairs/prompts.parquet"), "holdout": 0}
    config = train_config(
        trained_on, tmp_path / "run", teacher=other, loss={"regression_weight": 0}, data=alone, init_from=str(first)
    )
    with pytest.raises(UserError, match="of another teacher"):
        train(config)
    assert not (tmp_path / "run/run.json").exists()
