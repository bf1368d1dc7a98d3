"""What the schedules share: a cluster, a teacher with its pairs, and the sum of what they cost."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.chaos.cluster import Cluster
from faults.chaos.ledger import Ledger
from support.training import make_pairs

_LEDGER = pytest.StashKey[Ledger]()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of several nodes. What kills its head has it renewed."""
    with Cluster() as running:
        yield running


@pytest.fixture(scope="session")
def trained_on(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny teacher and its pairs. Not to be changed."""
    folder = tmp_path_factory.mktemp("trained-on")
    make_pairs(folder)
    return folder


@pytest.fixture(scope="session")
def ledger(request: pytest.FixtureRequest) -> Ledger:
    """What the faults of this session cost; written to the folder that FAULTS_REPORT names."""
    folder = os.environ.get("FAULTS_REPORT")
    return request.config.stash.setdefault(_LEDGER, Ledger(Path(folder) if folder else None))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what the faults cost."""
    if (ledger := config.stash.get(_LEDGER, None)) is not None:
        terminalreporter.section("faults")
        terminalreporter.write_line(ledger.close())
