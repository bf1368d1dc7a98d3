"""A store that has its ways: a proxy in front of an S3 server that fails, dawdles and forgets as a test wants."""

import http.client
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

_PIECE = 1 << 16


@dataclass(frozen=True)
class Fault:
    """What happens to one request. Without any entry: nothing.

    Attributes:
        status: answered instead of asking the store.
        body: of that answer.
        cut_at: the reply's connection is closed after so many bytes of its body.
        reply_is_lost: the store does what it is asked, and the connection is closed without an answer.
        pause_s: before each piece of the reply's body.
        edit: what the body of the store's reply becomes.
    """

    status: int | None = None
    body: bytes = b""
    cut_at: int | None = None
    reply_is_lost: bool = False
    pause_s: float = 0.0
    edit: Callable[[bytes], bytes] | None = None


Script = Callable[[str, str], Fault | None]
"""(method, path with query) -> what happens."""


class Proxy:
    """The proxy while it runs.

    Attributes:
        endpoint: its address.
        script: decides about each request; may be replaced at any time.
        log: ``METHOD path`` of every request, in order of arrival.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.script: Script = lambda method, path: None
        self.log: list[str] = []
        self.lock = Lock()

    def count(self, start: str) -> int:
        """Requests whose ``METHOD path`` starts so."""
        return sum(line.startswith(start) for line in self.log)


@contextmanager
def injecting_proxy(store: str) -> Iterator[Proxy]:
    """Run a proxy on a free port of loopback.

    Args:
        store: address of the S3 server behind it.
    """
    backend = store.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            sent = self.rfile.read(length)
            if len(sent) < length:  # who asks has gone half way; the store would wait for the rest
                self.close_connection = True
                return
            with proxy.lock:
                proxy.log.append(f"{self.command} {self.path}")
                fault = proxy.script(self.command, self.path) or Fault()
            if fault.status is not None:
                self.reply(fault.status, {}, fault.body, Fault())
                return
            connection = http.client.HTTPConnection(backend)
            connection.request(self.command, self.path, sent, dict(self.headers))
            reply = connection.getresponse()
            body = reply.read()
            connection.close()
            if fault.reply_is_lost:
                self.close_connection = True
                return
            self.reply(reply.status, dict(reply.getheaders()), body, fault)

        def reply(self, status: int, headers: dict[str, str], body: bytes, fault: Fault) -> None:
            body = fault.edit(body) if fault.edit is not None else body
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command == "HEAD":
                return
            shown = body if fault.cut_at is None else body[: fault.cut_at]
            for start in range(0, len(shown), _PIECE):
                time.sleep(fault.pause_s)
                self.wfile.write(shown[start : start + _PIECE])
            self.close_connection = fault.cut_at is not None

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

        def log_message(self, *_: object) -> None:  # type: ignore[override]
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # a client that gave up waiting

    server = Server(("127.0.0.1", 0), Handler)
    proxy = Proxy(f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
