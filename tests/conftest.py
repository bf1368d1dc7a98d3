"""What every folder needs: one thread for arithmetic, settings of hypothesis, and an S3 server on loopback."""

import os
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads of small tests fight over the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of two, one that waits leaves its core to other tests
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would leave its workers what the tests beside them leave
# No test asserts time, nor leaves files behind. The same inputs each time: who changes nothing breaks nothing.
settings.register_profile("same", deadline=None, database=None, derandomize=True)
settings.register_profile("new", deadline=None, database=None)
settings.load_profile("same")


ON_RAY = frozenset(
    {"test_demo.py", "test_ray_actors.py", "test_ray_executor.py", "test_readers.py", "test_score_shards.py"}
)
"""Files whose tests start a Ray cluster. No two of them run at a time, in however many processes the tests run."""
LONG = frozenset({"test_resume.py", "test_run.py"})
"""Files of one to three minutes, which should not be the last to begin."""


class ByFile(LoadScopeScheduling):
    """Divides tests among processes: a file stays whole, for its fixtures' sake, and those on Ray stay together."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "on Ray" if Path(file).name in ON_RAY else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """Called by pytest-xdist where there is more than one process."""
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with those on Ray, which mostly wait and take longest, and with other long ones."""
    for item in items:
        if "head" in getattr(item, "fixturenames", ()) and item.path.name not in ON_RAY:
            raise pytest.UsageError(f"{item.path} starts a Ray cluster; name it in ON_RAY of tests/conftest.py")
    items.sort(key=lambda item: (item.path.name not in ON_RAY, item.path.name not in LONG))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a moto server, which serves one request at a time: S3's conditional writes are atomic, moto's not."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *_: object) -> None:
            pass

    application = DomainDispatcherApplication(create_backend_app)
    one_at_a_time = threading.Lock()

    def serialized(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        with one_at_a_time:
            return application(environ, start_response)

    server = make_server("127.0.0.1", 0, serialized, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


@pytest.fixture
def s3_environment(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Point this process and its children at an S3 endpoint, with credentials that are good for nothing."""

    def use(endpoint: str) -> None:
        settings = {
            "AWS_ACCESS_KEY_ID": "an-access-key",
            "AWS_SECRET_ACCESS_KEY": "a-secret-key",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ALLOW_HTTP": "true",
            "NO_PROXY": "127.0.0.1",
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)

    return use


@pytest.fixture
def s3_root(s3_server: str, s3_environment: Callable[[str], None]) -> str:
    """A root in a fresh, empty bucket, with a space in its prefix."""
    import obstore
    from obstore.store import HTTPStore

    s3_environment(s3_server)
    bucket = f"bucket-{secrets.token_hex(4)}"
    obstore.put(HTTPStore(s3_server, client_options={"allow_http": True}), bucket, b"")  # PUT /bucket makes it
    return f"s3://{bucket}/some prefix"
