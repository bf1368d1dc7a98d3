import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from support.tiny_sd import build
from torch import Tensor

from configs.schema import StableDiffusionTeacherConfig
from configs.train_schema import (
    BatchConfig,
    DataConfig,
    DataIdentity,
    LossConfig,
    OptimizerConfig,
    StudentConfig,
    TrainConfig,
    TrainSpec,
)
from pipeline import teachers
from pipeline.provenance import code_revision, library_versions
from trainer import export as module
from trainer.export import export

METRICS = {"distance to held-out pairs": 0.123456, "loss/dm": 1.5}
UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def config(folder: Path) -> TrainConfig:
    return TrainConfig(
        output="runs/one",
        teacher=StableDiffusionTeacherConfig(path=str(folder)),
        data=DataConfig(pairs="pairs"),
        student=StudentConfig(ema_decay=0.999),
        loss=LossConfig(guidance_scale=3),
    )


@pytest.fixture(scope="module")
def spec(config: TrainConfig) -> TrainSpec:
    datasets = (
        DataIdentity(fingerprint="f" * 64, content_sha256="c" * 64, selection_digest="5" * 64, weight=1),
        DataIdentity(fingerprint="e" * 64, content_sha256="d" * 64, selection_digest=None, weight=2),
    )
    return TrainSpec(
        teacher=teachers.identify(config.teacher),
        data=datasets,
        prompts_digest="9" * 64,
        holdout=16,
        shuffle_window=8,
        student=config.student,
        loss=config.loss,
        optimizer=OptimizerConfig(),
        batch=BatchConfig(),
        seed=7,
        precision="bfloat16",
    )


@pytest.fixture(scope="module")
def weights(config: TrainConfig) -> dict[str, Tensor]:
    """A student's weights, not the teacher's."""
    return {name: 1.1 * tensor for name, tensor in teachers.load_network(config.teacher).state_dict().items()}


def run(run_dir: Path, config: TrainConfig, spec: TrainSpec, networks: Any, **changes: Any) -> list[Path]:
    return export(run_dir, config, spec, networks, **({"timestep": 399, "step": 1200, "metrics": METRICS} | changes))


def equal(path: Path, weights: dict[str, Tensor]) -> bool:
    stored = load_file(path / UNET)
    return stored.keys() == weights.keys() and all(torch.equal(stored[name], weights[name]) for name in stored)


def test_student_and_average_leave_each_in_a_folder(
    tmp_path: Path, config: TrainConfig, spec: TrainSpec, weights: dict[str, Tensor]
) -> None:
    average = {name: tensor + 1 for name, tensor in weights.items()}
    folders = run(tmp_path, config, spec, {"student": weights, "student_ema": average})
    assert folders == [tmp_path / "export", tmp_path / "export_ema"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "export_ema"]
    assert equal(folders[0], weights)
    assert equal(folders[1], average)
    assert "moving average" not in (folders[0] / "README.md").read_text()
    assert "after step 1,200, moving average with decay 0.999" in (folders[1] / "README.md").read_text()


def test_a_checkpoints_file_is_exported_like_a_module(
    tmp_path: Path, config: TrainConfig, spec: TrainSpec, weights: dict[str, Tensor]
) -> None:
    network = teachers.load_network(config.teacher)
    network.load_state_dict(weights)
    save_file(network.state_dict(), tmp_path / "student.safetensors")
    (live,) = run(tmp_path / "live", config, spec, {"student": network.state_dict()})
    (stored,) = run(tmp_path / "stored", config, spec, {"student": load_file(tmp_path / "student.safetensors")})
    files = sorted(path.relative_to(live) for path in live.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(stored) for path in stored.rglob("*") if path.is_file())
    for path in files:
        assert (live / path).read_bytes() == (stored / path).read_bytes()
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_the_cards_code_runs_as_it_stands(
    tmp_path: Path, config: TrainConfig, spec: TrainSpec, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = run(tmp_path, config, spec, {"student": weights})
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["pipeline"].scheduler.timesteps.tolist() == [399]
    assert not names["pipeline"].do_classifier_free_guidance
    picture = Image.open(folder / "image.png")
    assert picture.size == (16, 16)
    assert any(darkest < brightest for darkest, brightest in picture.getextrema())


def test_the_card_says_what_the_student_is(
    tmp_path: Path, config: TrainConfig, spec: TrainSpec, weights: dict[str, Tensor]
) -> None:
    (folder,) = run(tmp_path, config, spec, {"student": weights})
    card = (folder / "README.md").read_text()
    assert config.teacher.kind == "stable_diffusion"
    for said in (
        f"stable_diffusion (path {config.teacher.path})",
        f"`{spec.teacher.weights_digest}`",
        "predicts eps, schedule `vp:scaled_linear:0.00085:0.012:1000`, timestep 399",
        "Distribution Matching Distillation",
        "| guidance_scale | 3, of the teacher",
        f"`{'f' * 64}`, content `{'c' * 64}`, selection `{'5' * 64}` |",
        f"`{'e' * 64}`, content `{'d' * 64}` |",
        f"| prompts | `{'9' * 64}` |",
        f"| made with | {code_revision()} |",
        f"diffusers {library_versions()['diffusers']}",
        "| distance to held-out pairs | 0.1235 |",
        "| loss/dm | 1.5 |",
    ):
        assert said in card, said
    (written,) = re.findall(r"```yaml\n(.*?)```", card, flags=re.DOTALL)
    assert TrainSpec.model_validate(yaml.safe_load(written)) == spec
    front_matter = yaml.safe_load(card.split("---\n")[1])
    assert front_matter == {"library_name": "diffusers", "pipeline_tag": "text-to-image"}


def test_regression_alone_is_called_what_it_is(config: TrainConfig, spec: TrainSpec) -> None:
    plain = spec.model_copy(update={"loss": LossConfig(dm_weight=0), "prompts_digest": None, "data": spec.data[1:]})
    card = module.model_card(config, plain, "student", timestep=999, step=1, metrics={})
    assert "regression on noise/image pairs" in card
    assert "Distribution Matching" not in card
    assert "| prompts |" not in card


def test_an_older_export_stays_until_the_new_one_is_whole(
    tmp_path: Path,
    config: TrainConfig,
    spec: TrainSpec,
    weights: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    newer = {name: tensor + 1 for name, tensor in weights.items()}
    run(tmp_path, config, spec, {"student": weights})

    def fail(*_: object, **__: object) -> str:
        assert equal(tmp_path / "export", weights)
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(module, "model_card", fail)  # the last thing written
        with pytest.raises(OSError, match="no space left"):
            run(tmp_path, config, spec, {"student": newer})
    assert equal(tmp_path / "export", weights)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]

    for left_by_a_killed_run in ("export.tmp", "export.old"):
        (tmp_path / left_by_a_killed_run / "unet").mkdir(parents=True)
    run(tmp_path, config, spec, {"student": newer})
    assert equal(tmp_path / "export", newer)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_killed_between_two_renames_neither_export_is_lost(
    tmp_path: Path,
    config: TrainConfig,
    spec: TrainSpec,
    weights: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    newer = {name: tensor + 1 for name, tensor in weights.items()}
    run(tmp_path, config, spec, {"student": weights})
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name == "export.tmp":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, config, spec, {"student": newer})
    assert equal(tmp_path / "export.old", weights)
    assert equal(tmp_path / "export.tmp", newer)
    run(tmp_path, config, spec, {"student": newer})
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
