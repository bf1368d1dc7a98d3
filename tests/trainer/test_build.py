"""What a run goes on from, and when it is refused to begin again."""

import shutil

import pytest
from support.training import metrics, train_config

from configs.errors import UserError
from trainer.build import build
from trainer.loop import step, train


@pytest.mark.parametrize("checkpoint_every", [2, 100])
def test_checkpoints_that_are_gone_are_missed(trained_on, tmp_path, checkpoint_every):
    runtime = {"steps": 2, "checkpoint_every": 2, "log_every": 1}
    train(train_config(trained_on, tmp_path / "run", runtime=runtime))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    runtime |= {"steps": 4, "checkpoint_every": checkpoint_every}  # which may change, and tells nothing about before
    with pytest.raises(UserError, match=r"checkpoints: has no checkpoint, though last_checkpoint\.json tells of one"):
        train(train_config(trained_on, tmp_path / "run", runtime=runtime))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_run_that_was_killed_before_its_first_checkpoint_may_have_it_earlier(trained_on, tmp_path):
    runtime = {"steps": 3, "checkpoint_every": 100, "log_every": 1}
    with build(train_config(trained_on, tmp_path / "run", runtime=runtime)) as run:
        for _ in range(2):
            step(run)
            run.log()
    runtime["checkpoint_every"] = 1
    train(train_config(trained_on, tmp_path / "run", runtime=runtime))
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]


def test_metrics_of_a_first_checkpoint_that_was_never_finished_are_made_again(trained_on, tmp_path):
    for name in ("killed", "straight"):
        train(train_config(trained_on, tmp_path / name, runtime={"steps": 2, "checkpoint_every": 2}))
    (made,) = (tmp_path / "killed" / "checkpoints").iterdir()
    made.rename(made.with_name(f"{made.name}.tmp"))  # as if it had been killed within the first save
    (tmp_path / "killed" / "last_checkpoint.json").unlink()
    (made.with_name(f"{made.name}.tmp") / "COMPLETE").unlink()
    train(train_config(trained_on, tmp_path / "killed", runtime={"steps": 2, "checkpoint_every": 2}))
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()] == [made.name]
    assert [line["loss/student"] for line in metrics(tmp_path / "killed")] == [
        line["loss/student"] for line in metrics(tmp_path / "straight")
    ]
