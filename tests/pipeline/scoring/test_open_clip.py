import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import tiny_clip
from support.pictures import pictures, save_pictures

from configs.errors import UserError
from configs.evaluate_schema import ClipScorerConfig, OpenClipFeaturesConfig
from pipeline.scoring import open_clip_scorer
from pipeline.scoring.build import build_scorer
from pipeline.scoring.resizing import middle_square

CPU = torch.device("cpu")
PROMPTS = ["a red coat", "a teal boot", "", "a bag of another colour altogether"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip.build(tmp_path_factory.mktemp("clip"))


def scorer_of(folder, kind=ClipScorerConfig, **settings):
    return build_scorer(kind(model=f"local-dir:{folder}", **settings), CPU)


def direct(folder, files, texts):
    """What open_clip's readme says to do."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        image_features = model.encode_image(torch.stack([preprocess(Image.open(file)) for file in files]))
        text_features = model.encode_text(tokenizer(texts))
    return image_features, text_features


def test_the_score_is_the_cosine_that_open_clip_gives(folder, tmp_path):
    images = pictures(4)
    files = sorted(save_pictures(tmp_path / "images", images).iterdir())
    f, g = direct(folder, files, [f"A photo depicts {prompt}" for prompt in PROMPTS])
    ours = scorer_of(folder, prefix="A photo depicts ")(images, PROMPTS)
    assert {name: (values.dtype, values.shape) for name, values in ours.items()} == {"clip": (np.float32, (4,))}
    assert ours["clip"] == pytest.approx(torch.cosine_similarity(f, g).numpy(), abs=1e-6)
    assert np.ptp(ours["clip"]) > 1e-3
    assert not np.allclose(ours["clip"], scorer_of(folder)(images, PROMPTS)["clip"])


def test_features_are_the_image_towers_own_and_texts_share_their_space(folder, tmp_path):
    images = pictures(4)
    f, g = direct(folder, sorted(save_pictures(tmp_path / "images", images).iterdir()), PROMPTS)
    scorer = scorer_of(folder, OpenClipFeaturesConfig)
    assert scorer.columns == {"features": 12}
    np.testing.assert_allclose(scorer(images, PROMPTS)["features"], f.numpy(), atol=1e-6)
    np.testing.assert_allclose(scorer.encode_texts(PROMPTS), g.numpy(), atol=1e-6)
    assert not np.allclose(np.linalg.norm(f.numpy(), axis=1), 1, atol=0.01)  # not normalized


def test_each_image_is_measured_by_itself(folder):
    images = pictures(4)
    scorer = scorer_of(folder)
    backwards = scorer(images[::-1], PROMPTS[::-1])["clip"][::-1]
    assert scorer(images, PROMPTS)["clip"] == pytest.approx(backwards, abs=1e-6)


def test_resize_comes_before_the_models_own_preprocessing(folder):
    images = pictures(4, 40, 64)
    ours = scorer_of(folder, resize=20)(images, PROMPTS)["clip"]
    assert np.array_equal(ours, scorer_of(folder)([middle_square(image, 20) for image in images], PROMPTS)["clip"])
    assert not np.array_equal(ours, scorer_of(folder)(images, PROMPTS)["clip"])


def test_loading_leaves_the_global_generator_alone(folder):
    state = torch.get_rng_state()
    scorer_of(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_identity_is_the_content_not_the_place(folder, tmp_path):
    identity = scorer_of(folder).identity
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert scorer_of(copy).identity == identity
    assert scorer_of(copy, prefix="a ").identity != identity
    assert scorer_of(copy, resize=8).identity != identity
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["interpolation"] = "bilinear"
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    assert scorer_of(copy).identity != identity


@pytest.mark.parametrize("file", ["weights", "tokenizer"])
def test_another_weight_or_another_token_is_another_identity(folder, tmp_path, file):
    copy = shutil.copytree(folder, tmp_path / "copy")
    if file == "weights":
        weights = load_file(copy / "open_clip_model.safetensors")
        weights["text_projection"][0, 0] += 1e-3
        save_file(weights, copy / "open_clip_model.safetensors")
    else:
        vocabulary = (copy / "vocab.json").read_text()
        (copy / "vocab.json").write_text(vocabulary.replace('"a"', '"\\u00e9"'))
    assert scorer_of(copy).identity != scorer_of(folder).identity


def test_builtin_is_the_judge_that_comes_along(folder, monkeypatch):
    monkeypatch.setattr(open_clip_scorer, "JUDGE", folder)
    builtin, local = build_scorer(ClipScorerConfig(), CPU), scorer_of(folder)
    assert builtin.identity == {**local.identity, "model": "builtin"}
    assert np.array_equal(builtin(pictures(4), PROMPTS)["clip"], local(pictures(4), PROMPTS)["clip"])


@pytest.fixture
def name(folder, tmp_path, monkeypatch):
    """The tiny network under a name of open_clip's registry, without weights."""
    config = {**tiny_clip.CONFIG, "text_cfg": {**tiny_clip.CONFIG["text_cfg"], "hf_tokenizer_name": str(folder)}}
    (tmp_path / "Tiny-4.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.add_model_config(tmp_path / "Tiny-4.json")
    return "Tiny-4"


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_a_name_takes_weights_from_a_file(folder, tmp_path, name, save):
    path = tmp_path / ("weights.safetensors" if save is save_file else "weights.pt")
    save(load_file(folder / "open_clip_model.safetensors"), path)
    named = build_scorer(OpenClipFeaturesConfig(model=name, weights=str(path)), CPU)
    local = scorer_of(folder, OpenClipFeaturesConfig)
    assert named.identity["model"] == name
    assert np.array_equal(named.encode_texts(PROMPTS), local.encode_texts(PROMPTS))
    # A name's preprocessing has CLIP's own mean and std, so the same weights see other pixels.
    assert not np.allclose(named(pictures(4), PROMPTS)["features"], local(pictures(4), PROMPTS)["features"])


class Marker:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("where", ["folder", "file"])
def test_weights_are_never_unpickled_as_code(folder, tmp_path, name, where):
    pickled = {"a": Marker(tmp_path / "executed")}
    if where == "folder":
        copy = shutil.copytree(folder, tmp_path / "copy")
        (copy / "open_clip_model.safetensors").unlink()
        torch.save(pickled, copy / "open_clip_pytorch_model.bin")
        config = ClipScorerConfig(model=f"local-dir:{copy}")
    else:
        torch.save(pickled, tmp_path / "weights.pt")
        config = ClipScorerConfig(model=name, weights=str(tmp_path / "weights.pt"))
    with pytest.raises(UserError, match="cannot be loaded") as refused:
        build_scorer(config, CPU)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "executed").exists()


def test_what_cannot_be_loaded_is_named_in_one_line(folder, tmp_path):
    def refusal(**settings):
        with pytest.raises(UserError) as refused:
            build_scorer(ClipScorerConfig(**settings), CPU)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert "has no open_clip_config.json" in refusal(model=f"local-dir:{tmp_path}")
    assert "no 'ViT-B32', did you mean 'ViT-B-32'?" in refusal(model="ViT-B32", weights="openai")
    assert "did you mean 'laion2b_s34b_b79k'?" in refusal(model="ViT-B-32", weights="laion2b_s34b_b79")
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "open_clip_model.safetensors").unlink()
    assert "cannot be loaded (Required pretrained weights" in refusal(model=f"local-dir:{copy}")


def test_the_config_wants_one_source_of_weights():
    with pytest.raises(ValueError, match="weights: missing; model ViT-B-32"):
        ClipScorerConfig(model="ViT-B-32")
    for model in ("builtin", "local-dir:/there", "hf-hub:a/b"):
        with pytest.raises(ValueError, match="brings its own"):
            ClipScorerConfig(model=model, weights="openai")
