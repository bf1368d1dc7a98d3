"""A Ray head for the tests of this folder: one for the session, on free ports, stopped at the end."""

import pytest
import torch

from pipeline.ray_head import ray_head


@pytest.fixture(scope="session")
def head():
    with ray_head(num_cpus=2, num_gpus=0) as running:
        yield running


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in a worker: networks this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
