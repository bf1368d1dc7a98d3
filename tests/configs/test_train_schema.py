"""What a training run refuses to be told."""

import pytest

from configs.errors import UserError
from configs.load import parse
from configs.train_schema import TrainConfig


def test_a_mistake_inside_a_list_of_sections_names_the_entry(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text(
        "output: run\nteacher: {kind: mixture}\n"
        "data: {mix: [{pairs: /a}, {pairs: /b, wieght: 1}, {pairs: /c, weight: -1}, {weight: 1}]}\n"
    )
    with pytest.raises(UserError) as mistake:
        parse(TrainConfig, argv=["--config", str(file)])
    assert str(mistake.value).splitlines() == [
        f"{file}: data.mix.1.wieght: unknown key, did you mean 'weight'?",
        f"{file}: data.mix.2.weight: must be greater than 0, not -1",
        f"{file}: data.mix.3.pairs: missing, set it here",
    ]


@pytest.mark.parametrize("output", ["s3://bucket/run", "gs://bucket/run", ""])
def test_a_run_directory_is_local(tmp_path, output):
    file = tmp_path / "train.yaml"
    file.write_text("teacher: {kind: mixture}\ndata: {pairs: /a}\n")
    with pytest.raises(UserError, match=r"--output: .*is no local path"):
        parse(TrainConfig, argv=["--config", str(file), "--output", output])


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({}, r"data\.pairs: missing"),
        ({"loss": {"regression_weight": 0}}, r"data\.prompts: missing"),
        ({"loss": {"dm_weight": 0, "regression_weight": 0}}, "nothing is left to learn from"),
        ({"data": {"prompts": "/p.parquet"}, "loss": {"regression_weight": 0, "dm_on_pairs": True}}, "needs pairs"),
        ({"data": {"pairs": "/a"}, "loss": {"regression_space": "latent"}}, "regression lpips compares images"),
        ({"data": {"pairs": "/a", "mix": [{"pairs": "/b"}]}}, "exclude each other"),
    ],
)
def test_what_a_loss_needs_must_be_there(settings, missing):
    with pytest.raises(ValueError, match=missing):
        TrainConfig.model_validate({"output": "run", "teacher": {"kind": "mixture"}, **settings})
