"""A toy dataset with rejected samples, made once, and a copy of it for each test."""

import shutil

import pytest
from support.rejected import make_with_rejected

from pipeline.shards.dataset import Dataset
from pipeline.shards.storage import Storage


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    make_with_rejected(folder / "root", folder)
    return folder / "root"


@pytest.fixture
def root(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "root")


@pytest.fixture
def dataset(root):
    return Dataset.open(Storage.open(str(root)))


@pytest.fixture
def remote(s3_root, tmp_path):
    """The same dataset in a bucket."""
    make_with_rejected(s3_root, tmp_path)
    return Dataset.open(Storage.open(s3_root))
