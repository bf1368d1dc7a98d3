"""Pairs that were made for another run are refused."""

import pytest

from configs.errors import UserError
from configs.schema import MixtureTeacherConfig, PairsSpec
from configs.train_schema import TrainConfig
from pipeline import teachers
from trainer.compatibility import check_dataset

TEACHER = MixtureTeacherConfig(image_size=8)


def config(**sections):
    base = {
        "output": "run",
        "teacher": {"kind": "mixture", "image_size": 8},
        "data": {"pairs": "/pairs"},
        "loss": {"regression": "l2", "guidance_scale": 3.0, "negative_prompt": "blurry"},
    }
    return TrainConfig.model_validate(
        {**base, **{name: {**base[name], **entries} for name, entries in sections.items()}}
    )


def spec(teacher=TEACHER, **changes):
    values = {
        "sampler": {"name": "edm_heun"},
        "guidance_scale": 3.0,
        "negative_prompt": "blurry",
        "num_samples": 8,
        "teacher": teachers.identify(teacher),
        "prompts_digest": "0" * 64,
    }
    return PairsSpec.model_validate({**values, **changes})


def check(run, pairs):
    check_dataset(run, teachers.identify(TEACHER), "/pairs", pairs)


def test_pairs_of_this_run_are_taken():
    check(config(), spec())


def test_every_difference_is_a_line_with_both_values():
    other = MixtureTeacherConfig(image_size=16)
    with pytest.raises(UserError) as refusal:
        check(config(), spec(other, guidance_scale=8.0))
    lines = str(refusal.value).splitlines()
    assert "/pairs" in lines[0]
    rows = {line.split()[0]: line for line in lines[2:]}
    assert set(rows) == {"teacher.weights_digest", "teacher.sample_shape", "teacher.image_shape", "guidance_scale"}
    assert rows["guidance_scale"].split()[1:] == ["8.0", "3.0"]
    assert teachers.identify(other).weights_digest in rows["teacher.weights_digest"]


def test_the_precision_of_the_teachers_networks_is_no_difference():
    identity = teachers.identify(TEACHER).model_copy(update={"dtype": "float16"})
    check(config(), spec().model_copy(update={"teacher": identity}))


def test_without_guidance_the_negative_prompt_says_nothing():
    check(config(loss={"guidance_scale": 1.0, "negative_prompt": ""}), spec(guidance_scale=1.0))
    with pytest.raises(UserError, match="negative_prompt"):
        check(config(loss={"negative_prompt": ""}), spec())


def test_a_difference_that_is_meant_is_allowed_by_name():
    meant = {"allow_differences": ["guidance_scale"]}
    check(config(data=meant), spec(guidance_scale=8.0))
    with pytest.raises(UserError, match="negative_prompt"):
        check(config(data=meant), spec(guidance_scale=8.0, negative_prompt="dull"))
