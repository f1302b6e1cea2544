"""Two proxies between the purge and its servers, on real sockets: to watch, to hold, to break.

`TcpProxy` stands before MariaDB and records what the client sent; it can cut the connection.
`S3Proxy` stands before moto and hands every request to the test's own functions.
"""

from __future__ import annotations

import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

LOCAL = "127.0.0.1"


class LocalServer(ThreadingTCPServer):
    """Serves at a port of its own, until the end of `with`."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, handler: type[BaseRequestHandler]) -> None:
        super().__init__((LOCAL, 0), handler)
        self.port: int = self.server_address[1]
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that was killed
            super().handle_error(request, client_address)


class TcpProxy(LocalServer):
    """Forwards connections to a local port; `sent` is all that clients sent, in order.

    `on_received(bytes)` is called before the server's next data are passed on, with their total so
    far over all connections; it may wait, or cut.
    """

    def __init__(self, port: int) -> None:
        super().__init__(BaseRequestHandler)
        self._target = port
        self.sent, self.received = bytearray(), 0
        self.on_received: Callable[[int], None] = lambda total: None
        self._ends: list[socket.socket] = []

    def cut(self) -> None:
        """Break every connection that is open now."""
        for end in self._ends:
            with suppress(OSError):  # it may be closed already
                end.shutdown(socket.SHUT_RDWR)

    def finish_request(self, client: Any, client_address: Any) -> None:
        """Pass on what either end sends, until one of them closes."""
        with socket.create_connection((LOCAL, self._target)) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # holding is felt
            self._ends += client, server
            while True:
                for source in select.select([client, server], [], [])[0]:
                    if not (data := source.recv(65536)):
                        return
                    if source is client:
                        self.sent += data
                        server.sendall(data)
                    else:
                        self.received += len(data)
                        self.on_received(self.received)
                        client.sendall(data)


@dataclass
class Request:
    """One request to S3. `operation` is list, delete, delete-one, versioning or other.

    It came `at` this moment (Unix time), as the `number`th of its operation; `faults.py` notes how
    many lines the audit log had then.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float = field(default_factory=time.time)
    number: int = 0
    logged: int = 0

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query, keep_blank_values=True)

    @property
    def operation(self) -> str:
        names = {"list-type": "list", "delete": "delete", "versioning": "versioning"}
        found = [name for mark, name in names.items() if mark in self.query]
        return found[0] if found else "delete-one" if self.method == "DELETE" else "other"


@dataclass
class Answer:
    """An answer of S3, or a stand-in for one: DROP closes the connection.

    A Content-Length among the headers stands: one that is too long cuts the body short.
    """

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


DROP = Answer(0)


class Handler(BaseHTTPRequestHandler):
    """Asks its `S3Proxy` for each answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the acknowledgement of its head

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body, headers = self.rfile.read(length), dict(self.headers.items())
        if len(body) < length:
            raise ConnectionError("the client died")
        answer = self.server.answer(Request(self.command, self.path, headers, body))
        if answer == DROP:
            raise ConnectionError("broken on purpose")
        told = {"Content-Length": str(len(answer.body))} if answer.status != 204 else {}
        self.send_response_only(answer.status)
        for name, value in (told | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_POST = do_DELETE = handle_any  # noqa: N815


class S3Proxy(LocalServer):
    """An HTTP server before moto's.

    `before(request)` may answer in moto's place; `after(request, answer)` may change its answer.
    `requests` lists all that came.
    """

    def __init__(self, url: str) -> None:
        super().__init__(Handler)
        self.url = f"http://{LOCAL}:{self.port}"
        self._target = urlsplit(url).netloc
        self.before: Callable[[Request], Answer | None] = lambda request: None
        self.after: Callable[[Request, Answer], Answer] = lambda request, answer: answer
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._met, self._open = set[Any](), 0  # clients' addresses; connections

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open += 1
            self._met.add(client_address)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._open -= 1

    def answer(self, request: Request) -> Answer:
        with self._lock:
            self.requests.append(request)
            request.number = self.count(request.operation)
        return self.before(request) or self.forward(request)

    def settle(self) -> None:
        """Wait until all that clients, which have ended, asked for is done: one that was killed
        leaves requests behind. A new connection is met after all those that wait to be met."""
        with socket.create_connection((LOCAL, self.port)) as last:
            while last.getsockname() not in self._met:
                time.sleep(0.01)
        while self._open:
            time.sleep(0.01)

    def forward(self, request: Request) -> Answer:
        """moto's answer, with what `after` makes of it."""
        with closing(HTTPConnection(self._target, timeout=30)) as connection:
            connection.request(request.method, request.path, request.body, request.headers)
            response = connection.getresponse()
            skipped = {"content-length", "transfer-encoding", "connection"}
            headers = {k: v for k, v in response.getheaders() if k.lower() not in skipped}
            return self.after(request, Answer(response.status, response.read(), headers))

    def count(self, operation: str) -> int:
        return sum(request.operation == operation for request in self.requests)
