"""A run.json that this code would misread is refused."""

import json

import pytest
from support.toy import toy_config

from configs.errors import UserError
from configs.fingerprint import fingerprint
from pipeline.generate import generate_pairs
from pipeline.shards.dataset import Dataset
from pipeline.shards.records import DamagedRecord, Run
from pipeline.shards.storage import Storage


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    generate_pairs(toy_config(folder / "root", folder, spec={"num_samples": 8}))
    return folder / "root"


def with_spec(root, tmp_path, **changes):
    """A root whose run.json has another spec, and the fingerprint that goes with it."""
    run = Run.model_validate_json((root / "run.json").read_bytes())
    spec = run.spec.model_copy(update=changes)
    (tmp_path / "run.json").write_bytes(
        run.model_copy(update={"spec": spec, "fingerprint": fingerprint(spec)}).to_json()
    )
    return Storage.open(str(tmp_path))


def test_a_dataset_of_this_version_is_opened(root, tmp_path):
    assert Dataset.open(with_spec(root, tmp_path, seed=8)).run.spec.seed == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, r"run.json: format_version is 2, this code knows 1 only"),
        ({"noise_recipe": "philox-np-v2"}, r"noise_recipe is 'philox-np-v2', this code knows 'philox-np-v1' only"),
    ],
)
def test_another_version_of_the_format_or_the_noise_is_refused(root, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        Dataset.open(with_spec(root, tmp_path, **changes))


def test_another_version_is_named_even_when_its_keys_are_unknown(root, tmp_path):
    record = json.loads((root / "run.json").read_bytes())
    record["spec"] |= {"format_version": 2, "a_new_key": 1}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="format_version is 2"):
        Dataset.open(Storage.open(str(tmp_path)))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"spec": 1}'])
def test_a_record_without_versions_is_damaged(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(DamagedRecord, match=r"run.json: "):
        Dataset.open(Storage.open(str(tmp_path)))
