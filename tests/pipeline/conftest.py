"""A Ray head for the tests of this folder: one for the session, on free ports, stopped at the end."""

import pytest

from pipeline.ray_head import ray_head


@pytest.fixture(scope="session")
def head():
    with ray_head(num_cpus=2, num_gpus=0) as running:
        yield running
