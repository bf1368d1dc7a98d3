"""Real images from wherever they are give the same reference; labels are read as they are meant."""

import shutil

import numpy as np
import pytest
from PIL import Image
from support import evaluation, tiny_inception
from support.pictures import pictures, save_pictures
from support.real_images import encode_config

from configs.errors import UserError
from configs.evaluate_schema import EvaluateConfig
from pipeline.evaluation import tables
from pipeline.evaluation.labels import Labels
from pipeline.evaluation.reference import Reference, open_reference
from pipeline.evaluation.results import KID_GIVEN, Report
from pipeline.evaluation.scores import Scores
from pipeline.images.encode import encode_images
from pipeline.scoring.score_table import read_column
from pipeline.shards.dataset import Dataset
from pipeline.shards.storage import Storage


@pytest.fixture
def scores(world, tmp_path):
    return Scores(evaluation.config(world, tmp_path / "out"))


def opened(world, tmp_path, scores, source):
    return open_reference(evaluation.config(world, tmp_path / "out", reference=str(source)), scores)


def test_a_folder_and_the_statistics_of_its_features_are_the_same(world, tmp_path, scores):
    features = evaluation.real_features(world)
    np.savez(tmp_path / "real.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False), count=40)
    np.savez(tmp_path / "kid.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False), features=features)
    folder = opened(world, tmp_path, scores, world / "real")
    moments = opened(world, tmp_path, scores, tmp_path / "real.npz")
    whole = opened(world, tmp_path, scores, tmp_path / "kid.npz")
    np.testing.assert_allclose(folder.features, features, atol=1e-5)
    np.testing.assert_allclose(whole.features, features)
    np.testing.assert_allclose(folder.statistics.sigma, moments.statistics.sigma, atol=1e-6)
    assert (folder.statistics.count, moments.statistics.count) == (40, 40)
    assert (folder.kid, whole.kid) == (KID_GIVEN, KID_GIVEN)
    assert moments.kid == "not given: the reference is statistics without features"


def test_kid_is_not_given_of_features_too_long_for_its_kernel_and_the_report_says_why(world, tmp_path, scores):
    features = evaluation.real_features(world)
    unit = features / np.sqrt(np.square(features).mean())
    assert Reference.of(3 * unit, "").about["kid"] == KID_GIVEN
    long = Reference.of(14 * unit, "").about
    assert "these have 196" in long["kid"]
    given = Report(title="", protocol={"reference": long}, systems=(), grid={}, run={}, provenance={})
    assert ("KID", long["kid"]) in tables.meanings(given)


def test_features_of_a_folder_are_kept_until_an_image_changes(world, tmp_path, scores, monkeypatch):
    first = opened(world, tmp_path, scores, world / "real")
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.evaluation.reference._read_image", None)  # it is not asked again
        assert opened(world, tmp_path, scores, world / "real").about == first.about
    changed = tmp_path / "real"
    changed.mkdir()
    paths = sorted((world / "real").iterdir())
    for path, source in zip(paths, [paths[1], *paths[1:]], strict=True):
        (changed / path.name).write_bytes(source.read_bytes())
    assert opened(world, tmp_path, scores, changed).about != first.about


def test_a_folder_of_several_sizes_is_refused_where_only_the_network_resizes(world, tmp_path):
    weights = str(tiny_inception.build(tmp_path / "inception-2015-12-05.pt"))
    folder = save_pictures(tmp_path / "real", [*pictures(2, 16, 16), *pictures(1, 16, 20)])
    for resize in (None, 16):
        features = {"kind": "inception_features", "mode": "legacy_tensorflow", "weights": weights, "resize": resize}
        changes = {"features": features, "labels": None, "reference": str(folder)}
        config = evaluation.config(world, tmp_path / "out", **changes)
        if resize is None:
            with pytest.raises(UserError, match=rf"^reference: {folder}: images of several sizes, .*features\.resize$"):
                open_reference(config, Scores(config))
        else:
            assert open_reference(config, Scores(config)).statistics.count == 3


def test_an_image_too_large_to_be_read_is_named(world, tmp_path, scores, monkeypatch):
    folder = save_pictures(tmp_path / "real", [*pictures(1, 8, 8), *pictures(1, 16, 16)])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # PIL refuses twice as many
    with pytest.raises(UserError, match=rf"^reference: {folder}/00001\.png has too many pixels"):
        opened(world, tmp_path, scores, folder)


def test_a_pair_dataset_can_be_the_reference(world, finished, tmp_path, scores):
    root = finished / "images" / "teacher-3"
    found = opened(world, tmp_path, scores, root)
    expected = read_column(Dataset.open(Storage.open(str(root))), scores.features, "features")
    assert np.array_equal(found.features, expected)


def test_a_dataset_that_is_not_finished_is_no_reference(world, finished, tmp_path, scores):
    root = shutil.copytree(finished / "images" / "teacher-3", tmp_path / "part")
    dataset = Dataset.open(Storage.open(str(root)))
    dataset.withdraw(1, "a test")  # the tables of the other shards are there
    with pytest.raises(UserError, match=rf"^reference: {root} is not finished, .*; run the command [^\n]*$"):
        opened(world, tmp_path, scores, root)


def test_encoded_images_are_the_folder_that_they_were_made_of(world, tmp_path, scores):
    source = {"kind": "folder", "path": str(world / "real")}
    encode_images(encode_config(tmp_path / "real", source, spec={"resize": "none"}, layout={"samples_per_shard": 16}))
    folder, encoded = (opened(world, tmp_path, scores, root) for root in (world / "real", tmp_path / "real"))
    np.testing.assert_array_equal(encoded.features, folder.features)
    assert encoded.about == folder.about


def test_published_statistics_are_asked_for_by_all_parts_of_their_name(monkeypatch):
    asked = []

    def asked_for_features(*parts):
        asked.append(parts)

    def unreachable(*parts):
        raise UserError("no network")

    monkeypatch.setattr("pipeline.evaluation.reference.named_statistics", lambda *parts: asked.append(parts) or parts)
    monkeypatch.setattr("pipeline.evaluation.reference.named_features", asked_for_features)
    found = Reference.published("cifar10/32/train", "clean")
    assert asked == [("cifar10", "32", "train", "clean")] * 2
    assert found.features is None
    with pytest.raises(UserError, match="NAME/RESOLUTION/SPLIT"):
        Reference.published("cifar10", "clean")
    monkeypatch.setattr("pipeline.evaluation.reference.named_features", unreachable)
    with pytest.raises(UserError, match="no network"):  # which does not mean that there are no features
        Reference.published("cifar10/32/train", "clean")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("colour\nred\n", "needs a column caption"),
        ("caption,colour\n", "needs a column caption and a row"),
        ("caption,colour\na,red\na ,blue\n", "names a caption twice"),
        ("caption,colour\na\n", ":2: not 2 fields"),
    ],
)
def test_labels_that_cannot_be_meant(tmp_path, text, line):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=line):
        Labels.read(str(tmp_path / "labels.csv"))


def test_a_label_belongs_to_its_caption(tmp_path):
    (tmp_path / "labels.csv").write_text('caption,colour\n"a bag, red",red\n"a  coat",blue\n')
    labels = Labels.read(str(tmp_path / "labels.csv"))
    assert labels.captions == ["a bag, red", "a coat"]  # white space as in a prompt table
    assert labels.properties == {"colour": ["red", "blue"]}
    assert labels.truth(["a coat", "a bag, red", "a coat"]).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"student": None, "teacher_steps": []}, "nothing to measure"),
        ({"teacher_steps": [], "pairs": "/p"}, "teacher_steps is empty"),
        ({"teacher_steps": [2, 2]}, "names a number twice"),
        ({"sampler": {"name": "diffusers", "steps": 7}}, "teacher_steps says how many"),
        ({"features": {"kind": "inception_features"}}, "labels need features.kind open_clip_features"),
    ],
)
def test_settings_that_contradict_each_other(world, tmp_path, changes, line):
    with pytest.raises(ValueError, match=line):
        evaluation.config(world, tmp_path / "out", **changes)


def test_a_printed_configuration_is_a_configuration(world, tmp_path):
    config = evaluation.config(world, tmp_path / "out")
    assert EvaluateConfig.model_validate(config.model_dump(mode="json")) == config
