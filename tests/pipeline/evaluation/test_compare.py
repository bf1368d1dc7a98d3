"""Evaluations side by side: what is the same is one row, and what does not compare is refused."""

import base64
import json
import shutil

import pytest
from support import evaluation, tiny_sd

from configs.errors import UserError
from configs.evaluate_schema import CompareConfig
from pipeline.evaluation.compare import compare
from pipeline.evaluation.evaluate import evaluate


def compared(output, *folders):
    compare(CompareConfig(evaluations=tuple(map(str, folders)), output=str(output)))
    return json.loads((output / "report.json").read_bytes())


def test_a_teacher_is_one_row_and_students_are_called_after_their_evaluations(world, finished, tmp_path):
    other = tmp_path / "other"
    tiny_sd.build(tmp_path / "pupil", seed=2)
    teacher = str(finished / "images" / "teacher-3")
    evaluate(evaluation.config(world, other, student=str(tmp_path / "pupil"), pairs=teacher, teacher_steps=[3, 2]))
    (other / "curves.png").write_bytes(b"curves")
    report = compared(tmp_path / "both", finished, other)
    rows = [(system["name"], system["title"]) for system in report["systems"]]
    assert rows == [
        ("teacher-3", "teacher, 3 steps"),
        ("teacher-1", "teacher, 1 step"),
        ("teacher-2", "teacher, 2 steps"),
        ("tiny-student", "tiny"),
        ("other-student", "other"),
    ]
    numbers = {system["name"]: system["numbers"] for system in report["systems"]}
    for folder, name in ((finished, "tiny-student"), (other, "other-student")):
        own = json.loads((folder / "report.json").read_bytes())["systems"][-1]
        assert numbers[name] == own["numbers"]
    page = (tmp_path / "both" / "report.html").read_text()
    assert page.count('<tr class="student">') == 2
    assert (tmp_path / "both" / "curves-other.png").read_bytes() == b"curves"
    assert base64.b64encode(b"curves").decode() in page


def test_numbers_that_do_not_compare_are_refused(finished, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    report = json.loads((finished / "report.json").read_bytes())
    report["protocol"]["seed"] = 9
    (other / "report.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"do not compare .*seed is 1 in tiny, 9 in other"):
        compared(tmp_path / "both", finished, other)
    assert not (tmp_path / "both").exists()


def test_each_folder_is_an_evaluation_and_has_a_name_of_its_own(finished, tmp_path):
    with pytest.raises(UserError, match=r"no report\.json"):
        compared(tmp_path / "both", finished, tmp_path)
    with pytest.raises(UserError, match="two evaluations are called tiny"):
        compared(tmp_path / "both", finished, shutil.copytree(finished, tmp_path / "tiny"))
    (tmp_path / "report.json").write_text('{"title": 1}')
    with pytest.raises(UserError, match="not what this version writes"):
        compared(tmp_path / "both", finished, tmp_path)
