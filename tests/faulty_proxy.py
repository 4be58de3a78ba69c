"""An HTTP proxy on loopback that fails on purpose, the way networks and busy object stores do."""

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("error before", "error after", "reset before", "reset after", "cut body", "slow body")
_HOP = {"connection", "transfer-encoding", "keep-alive"}


class FaultyProxy(ThreadingHTTPServer):
    """Forwards to one server; a share of the answers is spoiled.

    Attributes:
        rate: share of the requests that meet a fault, drawn with `seed`.
        injected: how often each fault was met.
        largest: bytes of the largest body that was sent.
        requests: how often each method was called on each path (without its query).
        delay: seconds that each request waits.
        most_at_once: most requests that were under way at once.
    """

    daemon_threads = True

    def __init__(self, target: tuple[str, int], rate: float, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.rate = target, rate
        self.injected: Counter[str] = Counter()
        self.requests: Counter[tuple[str, str]] = Counter()
        self.delay = 0.0
        self.n_requests = self.largest = self.most_at_once = 0
        self._under_way = 0
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @contextmanager
    def counted(self, method: str, path: str) -> Iterator[None]:
        """Count a request while it is under way."""
        with self._lock:
            self.requests[method, path.partition("?")[0]] += 1
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            time.sleep(self.delay)
            yield
        finally:
            with self._lock:
                self._under_way -= 1

    def draw(self) -> str:
        """The fault the next request meets, or ''."""
        with self._lock:
            self.n_requests += 1
            if self._random.random() >= self.rate:
                return ""
            fault = FAULTS[self.injected.total() % len(FAULTS)]  # in turn, so that each of them is met
            self.injected[fault] += 1
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are no news here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _handle(self) -> None:
        with self.server.counted(self.command, self.path):
            self._forward()

    def _forward(self) -> None:
        fault = self.server.draw()
        body = self._body()
        if fault == "reset before":
            return self._reset()
        if fault == "error before":
            return self._error()
        connection = HTTPConnection(*self.server.target, timeout=30)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if fault == "reset after":
            return self._reset()
        if fault == "error after":
            return self._error()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP | {"content-length"}:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self._send(b"" if self.command == "HEAD" else data, fault)
        return None

    def _send(self, data: bytes, fault: str) -> None:
        self.server.largest = max(self.server.largest, len(data))
        if fault == "cut body" and data:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            return self._reset()
        if fault == "slow body":
            for start in range(0, len(data), len(data) // 4 + 1):
                self.wfile.write(data[start : start + len(data) // 4 + 1])
                self.wfile.flush()
                time.sleep(0.05)
            return None
        self.wfile.write(data)
        return None

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _error(self) -> None:
        body = b"<Error><Code>InternalError</Code><Message>injected</Message></Error>"
        self.send_response(500)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextmanager
def faulty_proxy(target: tuple[str, int], rate: float, seed: int = 0) -> Iterator[FaultyProxy]:
    """A proxy in front of `target`, serving from a thread."""
    proxy = FaultyProxy(target, rate, seed)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
