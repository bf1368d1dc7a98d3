"""An S3 server that says what a test wants, and roots of every kind."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.shards.storage import Storage

Reply = Callable[[str, str], tuple[int, bytes]]


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage: a local folder that does not exist yet, or a prefix of a bucket."""
    root = str(tmp_path / "a new folder") if request.param == "local" else request.getfixturevalue("s3_root")
    return Storage.open(root)


@pytest.fixture
def scripted_s3(s3_environment: Callable[[str], None]) -> Iterator[Callable[[Reply], list[str]]]:
    """Start a server that answers with ``reply(method, path) -> (status, body)``; returns the growing request log."""
    servers: list[ThreadingHTTPServer] = []

    def start(reply: Reply) -> list[str]:
        log: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                log.append(f"{self.command} {self.path}")
                status, body = reply(self.command, self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
                self.send_header("ETag", '"1"')
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

            def log_message(self, *_: object) -> None:  # type: ignore[override]
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        s3_environment(f"http://127.0.0.1:{server.server_port}")
        return log

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
