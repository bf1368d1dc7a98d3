"""A run directory belongs to one experiment, and to one process at a time."""

import multiprocessing

import pytest
from support.patience import PATIENCE_S

from configs.errors import UserError
from configs.schema import MixtureTeacherConfig
from configs.train_schema import TrainConfig, TrainSpec
from pipeline import teachers
from trainer.run_directory import begin, check, locked


def claim(run_dir, config, spec):
    check(run_dir, spec)
    begin(run_dir, config, spec)


CONFIG = TrainConfig.model_validate(
    {"output": "run", "teacher": {"kind": "mixture"}, "data": {"pairs": "/pairs"}, "loss": {"regression": "l2"}}
)


def spec(**changes):
    values = {
        "teacher": teachers.identify(MixtureTeacherConfig()),
        "data": [],
        "prompts_digest": None,
        **{name: getattr(CONFIG, name) for name in ("student", "loss", "optimizer", "batch", "seed", "precision")},
        "holdout": CONFIG.data.holdout,
        "shuffle_window": CONFIG.data.shuffle_window,
    }
    return TrainSpec.model_validate({**values, **changes})


def test_the_same_run_may_come_back(tmp_path):
    claim(tmp_path, CONFIG, spec())
    record = (tmp_path / "run.json").read_bytes()
    claim(tmp_path, CONFIG, spec())
    assert (tmp_path / "run.json").read_bytes() == record


def test_another_run_is_refused_with_what_differs(tmp_path):
    claim(tmp_path, CONFIG, spec())
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as refusal:
        claim(tmp_path, CONFIG, spec(seed=5))
    assert str(refusal.value).splitlines()[-1].split() == ["seed", "0", "5"]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        claim(tmp_path, CONFIG, spec())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("below", ["", "sub", "sub/run"])
def test_a_file_in_the_place_of_the_directory_or_of_one_above_it_is_refused(tmp_path, below):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.tex: is a file, not a folder"):
        claim(tmp_path / "thesis.tex" / below, CONFIG, spec())
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_what_a_killed_process_left_of_its_first_record_is_nothing(tmp_path):
    for name in (".lock", ".staging-122e73f46851fdd5"):
        (tmp_path / name).write_text("{")
    claim(tmp_path, CONFIG, spec())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.yaml", "run.json"]


@pytest.mark.parametrize("text", ["", "{}", '{"spec": {}}'])
def test_a_record_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json"):
        claim(tmp_path, CONFIG, spec())


def hold(path, ready, release):
    with locked(path):
        ready.set()
        release.wait(PATIENCE_S)


def test_two_processes_do_not_train_in_one_directory(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, release))
    other.start()
    try:
        assert ready.wait(PATIENCE_S)
        with pytest.raises(UserError, match="in use"), locked(tmp_path):
            pass
    finally:
        other.kill()
        other.join()
    with locked(tmp_path):  # a process that was killed holds nothing
        claim(tmp_path, CONFIG, spec())
