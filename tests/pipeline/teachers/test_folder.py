import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_sd import build

from configs.errors import UserError
from configs.schema import StableDiffusionTeacherConfig, TeacherIdentity
from pipeline.teachers import identify
from pipeline.teachers.folder import open_folder, sample_shape

UNET = "unet/diffusion_pytorch_model.safetensors"


def config(path: Path | str, **entries: Any) -> StableDiffusionTeacherConfig:
    return StableDiffusionTeacherConfig(path=str(path), **entries)


def test_identity_says_what_the_files_say(sd1: Path, sd2: Path) -> None:
    identity = identify(config(sd1))
    assert identity == TeacherIdentity(
        kind="stable_diffusion",
        weights_digest=identity.weights_digest,
        dtype="float32",
        parametrization="eps",
        schedule="vp:scaled_linear:0.00085:0.012:1000",
        latent_scale=0.18215,
        sample_shape=(4, 8, 8),
        image_shape=(3, 16, 16),
    )
    assert identify(config(sd2, dtype="bfloat16")).parametrization == "v"
    assert identify(config(sd1, dtype="float16")) == identity.model_copy(update={"dtype": "float16"})


def test_digest_is_of_the_content_wherever_it_lies_and_however_it_is_split(
    sd1: Path, copy: Path, tmp_path: Path
) -> None:
    split = build(tmp_path / "split", max_shard_size="100KB")
    assert len(list((split / "unet").glob("*.safetensors"))) > 1
    variant = build(tmp_path / "variant", variant="fp16")
    digest = identify(config(sd1)).weights_digest
    assert identify(config(copy)).weights_digest == digest
    assert identify(config(split)).weights_digest == digest
    assert identify(config(variant, variant="fp16")).weights_digest == digest


def test_digest_changes_with_one_weight(sd1: Path, copy: Path) -> None:
    weights = load_file(copy / UNET)
    weights["conv_in.bias"][3] = torch.nextafter(weights["conv_in.bias"][3], torch.tensor(9.0))
    save_file(weights, copy / UNET)
    assert identify(config(copy)).weights_digest != identify(config(sd1)).weights_digest


@pytest.mark.parametrize(
    ("file", "entry", "same"),
    [
        ("unet/config.json", {"norm_eps": 1e-6}, False),
        ("vae/config.json", {"scaling_factor": 0.13025}, False),
        ("text_encoder/config.json", {"hidden_act": "gelu"}, False),
        ("scheduler/scheduler_config.json", {"beta_end": 0.0121}, False),
        ("scheduler/scheduler_config.json", {"steps_offset": 0}, False),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 20}, False),
        ("unet/config.json", {"_name_or_path": "/elsewhere", "_diffusers_version": "0.30.0"}, True),
        ("text_encoder/config.json", {"transformers_version": "4.57.0", "dtype": "float16"}, True),
        ("model_index.json", {"_class_name": "SomebodysPipeline"}, True),
    ],
)
def test_digest_is_over_the_settings_that_shape_the_output(
    sd1: Path, copy: Path, edit: Callable[..., None], file: str, entry: dict[str, Any], same: bool
) -> None:
    edit(copy / file, **entry)
    assert (identify(config(copy)).weights_digest == identify(config(sd1)).weights_digest) is same


def test_digest_is_over_the_vocabulary(sd1: Path, copy: Path, edit: Callable[..., None]) -> None:
    edit(copy / "tokenizer" / "vocab.json", a=65, b=64)
    assert identify(config(copy)).weights_digest != identify(config(sd1)).weights_digest


def test_configs_of_old_have_the_size_that_was_meant(copy: Path, edit: Callable[..., None]) -> None:
    edit(copy / "unet" / "config.json", _diffusers_version="0.2.2", sample_size=32)
    assert sample_shape(open_folder(config(copy))) == (4, 64, 64)
    edit(copy / "unet" / "config.json", _diffusers_version="0.11.0", sample_size=[8, 16])
    assert identify(config(copy)).image_shape == (3, 16, 32)


@pytest.mark.parametrize(
    ("file", "entry", "reason"),
    [
        ("model_index.json", {"unet": "REMOVE"}, "names no unet"),
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "further parts text_encoder_2"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae is a AutoencoderTiny"),
        ("unet/config.json", {"in_channels": 9}, "maps 9 to 4 channels where latents have 4"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim: 256"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        ("unet/config.json", {"sample_size": None}, "no sample_size"),
        ("vae/config.json", {"out_channels": 4}, "decodes 4 channels"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "flow_prediction"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "REMOVE"}, "beta_schedule"),
    ],
)
def test_other_families_are_refused_with_the_reason(
    copy: Path, edit: Callable[..., None], file: str, entry: dict[str, Any], reason: str
) -> None:
    edit(copy / file, **entry)
    with pytest.raises(UserError, match=reason) as error:
        identify(config(copy))
    assert str(copy) in str(error.value)
    assert "\n" not in str(error.value)


def test_pickled_weights_are_refused_with_the_conversion(copy: Path) -> None:
    (copy / UNET).rename(copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pickled weights.*safe_serialization=True"):
        open_folder(config(copy))


def test_a_missing_variant_names_those_there(sd1: Path) -> None:
    with pytest.raises(UserError, match=r"fp16.safetensors: missing.*teacher.variant"):
        open_folder(config(sd1, variant="fp16"))


def test_a_missing_split_file_is_named(tmp_path: Path) -> None:
    split = build(tmp_path / "split", max_shard_size="100KB")
    lost = sorted((split / "unet").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name}: missing"):
        open_folder(config(split))


def test_single_and_split_weights_together_are_refused(copy: Path) -> None:
    (copy / (UNET + ".index.json")).write_text("{}")
    with pytest.raises(UserError, match="remove the one not meant"):
        open_folder(config(copy))


def test_paths_that_are_no_folder(sd1: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    for path, reason in [(file, "is a file"), (tmp_path / "nowhere", "no folder"), (tmp_path, "from_single_file")]:
        with pytest.raises(UserError, match=reason):
            open_folder(config(path))
    with pytest.raises(UserError, match=r"teacher.revision: only a hub id"):
        open_folder(config(sd1, revision="main"))


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_hub_id_that_cannot_be_had_is_one_clear_line(offline_hub: Path) -> None:
    for name in ("someone/something", "some one/some:thing"):
        with pytest.raises(UserError, match=f"teacher.path: {name} is no folder here") as error:
            open_folder(config(name))
        assert "\n" not in str(error.value)


def test_a_hub_snapshot_is_the_same_teacher_as_the_folder(offline_hub: Path, sd1: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(sd1, offline_hub / "models--someone--tiny" / "snapshots" / commit)
    for revision in (commit, "main"):
        if revision == "main":
            refs = offline_hub / "models--someone--tiny" / "refs"
            refs.mkdir()
            (refs / "main").write_text(commit)
        assert identify(config("someone/tiny", revision=revision)) == identify(config(sd1))


def test_only_the_parts_we_use_are_fetched(monkeypatch: pytest.MonkeyPatch, sd1: Path) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(sd1)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    open_folder(config("someone/tiny", revision="abc"))
    listing = [
        *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder")),
        UNET,
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "model_index.json",
    ]
    unwanted = [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "safety_checker/model.safetensors",
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
    ]
    wanted = list(huggingface_hub.utils.filter_repo_objects(listing + unwanted, allow_patterns=asked["patterns"]))
    assert (asked["repo"], asked["revision"]) == ("someone/tiny", "abc")
    assert wanted == listing


def test_json_that_is_none_is_named(copy: Path) -> None:
    (copy / "vae" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"vae/config.json: not valid JSON"):
        open_folder(config(copy))
