import warnings

import numpy as np
import pytest
import torch
from cleanfid import fid, inception_pytorch
from cleanfid.features import build_feature_extractor
from cleanfid.inception_torchscript import InceptionV3W
from support import tiny_inception
from support.pictures import pictures, save_pictures

from configs.errors import UserError
from configs.evaluate_schema import InceptionFeaturesConfig
from pipeline.scoring.build import build_scorer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of both kinds under clean-fid's names."""
    path = tmp_path_factory.mktemp("weights")
    tiny_inception.build(path / "inception-2015-12-05.pt")
    return path


@pytest.fixture(scope="module")
def pytorch_weights(folder):
    from torchvision.models import inception_v3

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = inception_v3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    gained = {name: value * 6**0.5 if name.endswith("conv.weight") else value for name, value in weights.items()}
    torch.save(gained, folder / "pt_inception.pth")  # torch's own first weights would let the signal die out
    return folder / "pt_inception.pth"


def scorer_of(path, mode="clean", **settings):
    return build_scorer(InceptionFeaturesConfig(mode=mode, weights=str(path), **settings), CPU)


@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow"])
def test_features_are_those_that_clean_fid_takes_from_files(folder, tmp_path, mode):
    images = pictures(6, 40, 32)
    network = InceptionV3W(str(folder), download=False, resize_inside=mode == "legacy_tensorflow").eval()
    saved = str(save_pictures(tmp_path / "images", images))
    direct = fid.get_folder_features(saved, network, num_workers=0, device=CPU, mode=mode, verbose=False)
    ours = scorer_of(folder / "inception-2015-12-05.pt", mode)(images, [""] * 6)["features"]
    assert (ours.dtype, ours.shape) == (np.float32, (6, 2048))
    np.testing.assert_allclose(ours, direct, rtol=1e-5, atol=1e-5)


def test_legacy_pytorch_is_pytorch_fids_network_from_a_file(folder, pytorch_weights, tmp_path, monkeypatch):
    images = pictures(2, 40, 32)
    state, filters = torch.get_rng_state(), list(warnings.filters)
    scorer = scorer_of(pytorch_weights, "legacy_pytorch")
    assert torch.equal(torch.get_rng_state(), state)
    assert warnings.filters == filters  # clean-fid would silence the whole process
    ours = scorer(images, [""] * 2)["features"]
    weights = torch.load(pytorch_weights, weights_only=True)
    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: weights)
    network = build_feature_extractor("legacy_pytorch", CPU, use_dataparallel=False)
    saved = str(save_pictures(tmp_path / "images", images))
    with warnings.catch_warnings():
        direct = fid.get_folder_features(saved, network, 0, device=CPU, mode="legacy_pytorch", verbose=False)
    np.testing.assert_allclose(ours, direct, rtol=1e-4, atol=1e-5)
    assert ours.std() > 0.01


def test_images_of_several_sizes_are_refused_where_only_the_network_resizes_them(folder):
    images = [*pictures(1, 40, 32), *pictures(1, 20, 24)]
    path = folder / "inception-2015-12-05.pt"
    with pytest.raises(UserError, match=r"such as 24 x 20 and 32 x 40 pixels, .*; set features\.resize$"):
        scorer_of(path, "legacy_tensorflow")(images, ["", ""])
    for mode, resize in (("legacy_tensorflow", 16), ("clean", None)):
        scorer = scorer_of(path, mode, resize=resize)
        alone = [scorer([image], [""])["features"] for image in images]
        np.testing.assert_allclose(scorer(images, ["", ""])["features"], np.concatenate(alone), rtol=1e-5, atol=1e-5)


def test_the_mode_decides_what_the_network_sees(folder):
    images = pictures(2, 40, 32)
    path = folder / "inception-2015-12-05.pt"
    clean, legacy = (scorer_of(path, mode) for mode in ("clean", "legacy_tensorflow"))
    assert clean.identity != legacy.identity
    assert not np.allclose(clean(images, ["", ""])["features"], legacy(images, ["", ""])["features"])


def test_the_identity_is_the_content_not_the_name(folder, tmp_path):
    copy = tmp_path / "under another name"
    copy.write_bytes((folder / "inception-2015-12-05.pt").read_bytes())
    assert scorer_of(copy).identity == scorer_of(folder / "inception-2015-12-05.pt").identity


def test_weights_that_are_missing_or_of_something_else_are_refused(tmp_path):
    path = tmp_path / "weights.pt"
    for mode in ("clean", "legacy_pytorch"):
        with pytest.raises(UserError, match="weights: there is no file"):
            scorer_of(path, mode)
    torch.jit.script(torch.nn.Identity()).save(path)
    with pytest.raises(UserError, match="not clean-fid's Inception network"):
        scorer_of(path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not pytorch-fid's Inception network"):
        scorer_of(path, "legacy_pytorch")


class Marker:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_weights_are_never_unpickled_as_code(tmp_path):
    torch.save({"a": Marker(tmp_path / "executed")}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="tensors alone"):
        scorer_of(tmp_path / "weights.pt", "legacy_pytorch")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("mode", ["clean", "legacy_pytorch"])
def test_without_weights_and_network_the_line_says_what_to_get(mode, tmp_path, monkeypatch):
    def unreachable(url, path):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("pipeline.scoring.inception.CLEANFID_CACHE", tmp_path)
    with pytest.raises(UserError, match=r"cannot be downloaded \(no network\); get https://.*inception.* as weights"):
        build_scorer(InceptionFeaturesConfig(mode=mode), CPU)
