"""What the tests of whole runs share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from support.training import make_pairs


@pytest.fixture(scope="session")
def trained_on(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny teacher and its pairs. Not to be changed."""
    folder = tmp_path_factory.mktemp("trained-on")
    make_pairs(folder)
    return folder


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves are more than half the time of a run this short; runs that are processes of their own draw them."""
    monkeypatch.setattr("trainer.report.draw_curves", lambda lines: b"not drawn")


@pytest.fixture(autouse=True)
def no_accelerate_state() -> Iterator[None]:
    """accelerate keeps the first precision it is told for the whole process; each test begins anew."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
