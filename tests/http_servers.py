"""Small HTTP servers for tests: a folder with byte ranges, and a proxy that injects faults on the way."""

import hashlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Handler(BaseHTTPRequestHandler):
    """Keeps connections open and silent."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_file(self, data: bytes, **headers: str) -> None:
        """The whole file, or the range that was asked for."""
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        if not asked:
            self.answer(200, data, Accept_Ranges="bytes", **headers)
            return
        first, _, last = asked.partition("-")
        start, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
        if start > end:
            self.answer(416, Content_Range=f"bytes */{len(data)}", **headers)
            return
        where = f"bytes {start}-{end}/{len(data)}"
        self.answer(206, data[start : end + 1], Content_Range=where, Accept_Ranges="bytes", **headers)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, handler: type[Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)


@contextmanager
def serving(handler: type[Handler], **state: Any) -> Iterator[str]:
    """Runs a server with `state` as attributes of its handlers; gives its URL."""
    server = _Server(type(handler.__name__, (handler,), state))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        for connection in server.connections:  # clients keep them open
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join()


class FolderHandler(Handler):
    """The files of `root`."""

    root: Path

    def do_GET(self) -> None:
        file = self.root / unquote(urlsplit(self.path).path).lstrip("/")
        if file.is_file():
            self.answer_file(file.read_bytes())
        else:
            self.answer(404)

    do_HEAD = do_GET


class Faults:
    """Which requests fail, and how: decided by a seed, the request and how often it came, so that it fails at
    most `times` times, whatever the order of arrival.

    Args:
        kinds: `500`, `stall` (no answer for `stall_s` seconds), `cut` (half of the body, then the end).
        share: of the requests.
    """

    def __init__(
        self, seed: int, kinds: tuple[str, ...], *, share: float = 0.4, times: int = 2, stall_s: float = 2.0
    ) -> None:
        self.seed, self.kinds, self.share, self.times, self.stall_s = seed, kinds, share, times, stall_s
        self.seen: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        """By method and path."""
        self.lock = threading.Lock()

    def next(self, request: str, path: str) -> str | None:
        with self.lock:
            self.requests[path] += 1
            self.seen[request] += 1
            nth = self.seen[request]
            draw = hashlib.sha256(f"{self.seed}|{request}|{nth}".encode()).digest()
            if nth > self.times or draw[0] >= 256 * self.share:
                return None
            kind = self.kinds[draw[1] % len(self.kinds)]
            self.injected[kind] += 1
            return kind


class FaultProxy(Handler):
    """Hands requests on to `upstream`; those of the `failing` methods may meet a fault."""

    upstream: str
    faults: Faults
    failing: tuple[str, ...] = ("GET",)

    def forward(self) -> None:
        kind = None
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command in self.failing:
            kind = self.faults.next(f"{self.path} {self.headers.get('Range')}", urlsplit(self.path).path)
        if kind == "500":
            self.answer(500)
            return
        if kind == "stall":
            time.sleep(self.faults.stall_s)
            self.close_connection = True
            return
        connection = HTTPConnection(urlsplit(self.upstream).netloc)
        connection.request(self.command, self.path, body, dict(self.headers))
        response = connection.getresponse()
        data = response.read()
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                self.send_header(name, value)
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if kind == "cut" else data)
        self.close_connection = kind == "cut"
        connection.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward
