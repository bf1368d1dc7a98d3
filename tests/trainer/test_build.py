"""What a run goes on from, and when it is refused to begin again."""

import shutil

import pytest
from support.training import metrics, train_config

from configs.errors import UserError
from trainer.loop import train


def test_checkpoints_that_are_gone_are_missed(trained_on, tmp_path):
    config = train_config(trained_on, tmp_path / "run", runtime={"steps": 4, "checkpoint_every": 2})
    train(config)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=r"checkpoints: has no checkpoint, though metrics\.jsonl tells of 4 steps"):
        train(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_metrics_of_a_first_checkpoint_that_was_never_finished_are_made_again(trained_on, tmp_path):
    for name in ("killed", "straight"):
        train(train_config(trained_on, tmp_path / name, runtime={"steps": 2, "checkpoint_every": 2}))
    (made,) = (tmp_path / "killed" / "checkpoints").iterdir()
    made.rename(made.with_name(f"{made.name}.tmp"))  # as if it had been killed within the first save
    (made.with_name(f"{made.name}.tmp") / "COMPLETE").unlink()
    train(train_config(trained_on, tmp_path / "killed", runtime={"steps": 2, "checkpoint_every": 2}))
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()] == [made.name]
    assert [line["loss/student"] for line in metrics(tmp_path / "killed")] == [
        line["loss/student"] for line in metrics(tmp_path / "straight")
    ]
