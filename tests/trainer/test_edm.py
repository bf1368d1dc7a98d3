"""The whole way with an EDM teacher: pairs, training, the exported student, its evaluation beside the teacher."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from configs.errors import UserError
from configs.evaluate_schema import EvaluateConfig
from configs.train_schema import TrainConfig
from pipeline.class_labels import draw_labels
from pipeline.evaluation.evaluate import evaluate
from pipeline.generate import generate_pairs
from pipeline.noise import noise
from pipeline.shards.members import decode_image, to_uint8
from pipeline.teachers.edm.student import OneStepStudent
from tests.pipeline.test_pairs_edm import pairs
from tests.support import tiny_clip, tiny_edm, tiny_unet
from tests.support.toy import samples
from tests.support.training import metrics, tensors, train_settings
from trainer.loop import train


def settings(folder: Path, **sections: Any) -> dict[str, Any]:
    """A run on ``folder/pairs``: DMD and regression in pixels, the paper's critic weighting for EDM."""
    tree = train_settings(
        folder,
        folder / "run",
        loss={"guidance_scale": 1.0, "regression_space": "pixels"},
        batch={"dm": 4, "regression": 2},
        runtime={"steps": 2, "micro_batch": 2, "log_every": 1},
    )
    tree["teacher"] = {"kind": "edm", "path": str(folder / "teacher")}
    for name, entries in sections.items():
        tree[name] = {**tree[name], **entries} if isinstance(entries, dict) else entries
    return tree


PUBLISHED = ("config.json", "model.safetensors", "student/")
"""Of a folder: the network's config, its weights, and what stands before their names in a checkpoint."""
DIFFUSERS = ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "student/model.unet.")


def build_unet(folder: Path, label_dim: int = 10) -> Path:
    """Of OpenAI's kind, trained with dropout."""
    kind = {**tiny_unet.OPENAI, "sample_size": 16, "num_class_embeds": label_dim, "dropout": 0.3}
    return tiny_unet.build(folder, "CMStochasticIterativeScheduler", kind=kind)


@pytest.mark.parametrize(
    ("build", "label_dim", "files", "saves_memory"),
    [
        pytest.param(tiny_edm.build, 10, PUBLISHED, False, id="classes"),
        pytest.param(tiny_edm.build, 0, PUBLISHED, True, id="unconditional"),
        pytest.param(build_unet, 10, DIFFUSERS, True, id="diffusers"),
    ],
)
def test_a_student_of_an_edm_teacher_is_trained_exported_and_measured(
    tmp_path: Path, build: Callable[..., Path], label_dim: int, files: tuple[str, str, str], saves_memory: bool
) -> None:
    described, weights, prefix = files
    teacher = build(tmp_path / "teacher", label_dim=label_dim)
    fields = {"x0": "pixels", "prompt": label_dim > 0}
    generate_pairs(pairs(tmp_path / "pairs", teacher, spec={"num_samples": 16, "fields": fields}))
    tree = settings(tmp_path)
    if saves_memory:
        tree |= {"precision": "bfloat16", "teacher": {**tree["teacher"], "dtype": "bfloat16"}}
        tree["runtime"]["gradient_checkpointing"] = True
    train(TrainConfig.model_validate(tree))

    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite([line["loss/dm"], line["loss/critic"], line["loss/student"]]).all() for line in lines)
    export = tmp_path / "run" / "export"
    assert json.loads((export / described).read_bytes())["one_step_sigma"] == 80.0
    exported, checkpoint = load_file(export / weights), tensors(tmp_path / "run", 2)
    assert {f"{prefix}{name}" for name in exported} <= checkpoint.keys()
    assert all(torch.equal(checkpoint[f"{prefix}{name}"], tensor) for name, tensor in exported.items())
    learnt = [not torch.equal(tensor, load_file(teacher / weights)[name]) for name, tensor in exported.items()]
    assert all(learnt)
    card = (export / "README.md").read_text()
    assert 'OneStepStudent(".", device)' in card
    assert "taken at timestep 80." in card

    tiny_clip.build(tmp_path / "judge")
    (tmp_path / "real").mkdir()
    for i, picture in enumerate(np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)):
        Image.fromarray(picture).save(tmp_path / "real" / f"{i}.png")
    evaluate(
        EvaluateConfig.model_validate(
            {
                "output": str(tmp_path / "evaluation"),
                "student": str(export),
                "teacher": {"kind": "edm", "path": str(teacher)},
                "teacher_steps": [2, 1],
                "sampler": {"name": "edm_heun"},
                "prompts": {"path": "classes"},
                "num_images": 6,
                "features": {"kind": "open_clip_features", "model": f"local-dir:{tmp_path / 'judge'}"},
                "reference": str(tmp_path / "real"),
                "allow_few_images": True,
                "latency": None,
                "runtime": {"executor": "in-process", "batch_size": 4, "lease_period_s": 0.2},
            }
        )
    )
    report = json.loads((tmp_path / "evaluation/report.json").read_bytes())
    rows = [(system["name"], system["evaluations"]) for system in report["systems"]]
    assert rows == [("teacher-2", 3), ("teacher-1", 1), ("student", 1)]
    student, labels = OneStepStudent(export), list(draw_labels(label_dim, 1, 6))
    z = torch.from_numpy(np.stack([noise(1, i, (3, 16, 16)) for i in range(6)])).float()
    images = student(z, [int(label) for label in labels] if label_dim else None)
    drawn = [decode_image(members["png"]) for members, _ in samples(tmp_path / "evaluation/images/student").values()]
    for image, picture in zip(images, drawn, strict=True):
        assert np.abs(to_uint8(image.numpy()).astype(int) - picture.astype(int)).max() <= 1


def test_training_with_a_diffusers_network_goes_on_where_it_was(tmp_path: Path) -> None:
    build_unet(tmp_path / "teacher")
    generate_pairs(pairs(tmp_path / "pairs", tmp_path / "teacher", spec={"num_samples": 16}))

    def run(name: str, steps: int, **sections: Any) -> dict[str, torch.Tensor]:
        tree = settings(tmp_path, **sections) | {"output": str(tmp_path / name)}
        tree["runtime"]["steps"] = steps
        train(TrainConfig.model_validate(tree))
        return tensors(tmp_path / name, steps)

    straight = run("run", 2)
    first = run("halves", 1)
    resumed = run("halves", 2)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert not torch.equal(first["student/model.unet.conv_in.weight"], resumed["student/model.unet.conv_in.weight"])

    begun = run("begun", 1, init_from=str(tmp_path / "run"), optimizer={"lr": 1e-12})
    for name in ("student", "fake_score"):
        networks = {key for key in straight if key.startswith(f"{name}/model.unet.")}
        assert networks
        for key in networks:
            torch.testing.assert_close(begun[key], straight[key], atol=1e-9, rtol=1e-6)


def test_guidance_and_a_rounded_teacher_are_refused(tmp_path: Path) -> None:
    for sections, message in (
        ({"loss": {"guidance_scale": 2.0}}, "EDM networks know no empty condition to be guided from"),
        ({"loss": {"negative_prompt": "blurry"}}, r"loss\.negative_prompt: EDM networks are not guided"),
        ({"loss": {"negative_prompt": "0"}}, r"loss\.negative_prompt: EDM networks are not guided"),
        ({"teacher": {"dtype": "float16"}}, r"teacher.dtype: float16 under precision float32"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig.model_validate(settings(tmp_path, **sections))


def test_a_prompt_that_is_no_class_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    from configs.schema import PromptsConfig
    from pipeline.prompts import prepare_prompts

    tiny_edm.build(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("1\na cat\n")
    prepare_prompts(PromptsConfig(path=str(tmp_path / "prompts.txt")), tmp_path / "prompts.parquet")
    tree = settings(tmp_path, loss={"regression_weight": 0.0})
    tree["data"] = {"prompts": str(tmp_path / "prompts.parquet")}
    with pytest.raises(UserError, match="'a cat' is no class of this teacher"):
        train(TrainConfig.model_validate(tree))
    assert not (tmp_path / "run" / "run.json").exists()
