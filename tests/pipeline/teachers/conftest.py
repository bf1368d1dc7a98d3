"""Tiny Stable Diffusion folders, built once, and copies of them to damage."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_sd import build


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads, and far slower where other processes compete for the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SD 1.x kind: predicts eps, padding in sight. Read only."""
    return build(tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="session")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SD 2.x kind: predicts v, attention mask in the text encoder. Read only."""
    return build(tmp_path_factory.mktemp("sd2"), style="sd2", prediction_type="v_prediction", seed=1)


@pytest.fixture
def copy(sd1: Path, tmp_path: Path) -> Path:
    """A copy of the SD 1.x folder that a test may change."""
    return shutil.copytree(sd1, tmp_path / "copy")


@pytest.fixture
def edit() -> Callable[..., None]:
    """Change entries of a JSON file; the value REMOVE takes one out."""

    def change(path: Path, **entries: Any) -> None:
        config = json.loads(path.read_text()) | entries
        path.write_text(json.dumps({key: value for key, value in config.items() if value != "REMOVE"}))

    return change
