import pytest
from support.fashion import write_fashion


@pytest.fixture(scope="session")
def fashion(tmp_path_factory):
    return write_fashion(tmp_path_factory.mktemp("fashion"))
