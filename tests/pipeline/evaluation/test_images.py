"""Images are paired by their ids, whatever either dataset lacks."""

import shutil

import numpy as np
import pytest
from support.rejected import REJECTED, make_with_rejected
from support.toy import samples, toy_config

from pipeline.evaluation.grid import keep_tiles, read_tiles
from pipeline.evaluation.images import all_stored_ids, paired_distances, stored_images
from pipeline.generate import generate_pairs
from pipeline.metrics.paired import pixel_distance
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import key
from pipeline.shards.members import decode_image
from pipeline.shards.storage import Storage
from pipeline.shards.writer import DamagedShard


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Forty images of which nine are rejected, and all forty of another sampler in shards of another size."""
    folder = tmp_path_factory.mktemp("images")
    make_with_rejected(folder / "some", folder)
    spec, layout = {"sampler": {"name": "edm_heun", "steps": 2}}, {"samples_per_shard": 16}
    generate_pairs(toy_config(folder / "all", folder, spec=spec, layout=layout))
    return folder / "some", folder / "all"


def opened(root):
    return Dataset.open(Storage.open(str(root)))


def decoded(root):
    return {int(name): decode_image(members["png"]) for name, (members, _) in samples(root).items()}


def test_every_stored_image_comes_once_in_order(roots):
    some, everything = roots
    for root, ids in ((some, sorted(set(range(40)) - REJECTED)), (everything, list(range(40)))):
        found = list(stored_images(opened(root)))
        assert [sample_id for sample_id, _ in found] == ids == all_stored_ids(opened(root)).tolist()
        assert all(np.array_equal(image, decoded(root)[sample_id]) for sample_id, image in found)


def test_pairs_are_of_one_id_whichever_side_lacks_some(roots):
    one, other = (decoded(root) for root in roots)
    expected = [pixel_distance(one[i][None], other[i][None])[0] for i in sorted(one)]
    assert min(expected) != max(expected)
    for left, right in (roots, reversed(roots)):
        np.testing.assert_allclose(paired_distances(opened(left), opened(right)), expected, rtol=1e-6)


def test_a_missing_shard_is_named(roots, tmp_path):
    root = shutil.copytree(roots[0], tmp_path / "root")
    tar = sorted((root / "shards").iterdir())[1]
    tar.unlink()
    with pytest.raises(DamagedShard, match=f"{tar.name} is missing"):
        list(stored_images(opened(root)))


def test_the_picture_of_an_earlier_system_is_not_shown_for_a_rejected_sample(roots, tmp_path):
    some, everything = map(opened, roots)
    storage, ids = Storage.open(str(tmp_path / "out")), [0, 3, 5]
    keep_tiles(storage, "student", everything, ids)
    keep_tiles(storage, "student", some, ids)
    previews = [(roots[0] / "previews" / f"{key(i)}.png").read_bytes() for i in (0, 5)]
    assert 3 in REJECTED
    assert read_tiles(storage, "student", list(map(key, ids))) == [previews[0], None, previews[1]]
