"""Two proxies between the purge and its servers, on real sockets: to watch, to hold, to break.

`TcpProxy` stands before MariaDB and records what the client sent; it can cut the connection.
`S3Proxy` stands before moto and hands every request to the test's own functions.
"""

from __future__ import annotations

import http.client
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

LOCAL = "127.0.0.1"


class TcpProxy:
    """Forwards connections to a local port; `sent` is all that clients sent, in order.

    `on_received(bytes)` is called before the server's next data are passed on, with their total so
    far over all connections; it may wait, or cut.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server((LOCAL, 0))
        self.port: int = self._listener.getsockname()[1]
        self.sent, self.received = bytearray(), 0
        self.on_received: Callable[[int], None] = lambda total: None
        self._ends: list[socket.socket] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.append(self._listener)  # wakes the thread that accepts
        self.cut()
        self._listener.close()

    def cut(self) -> None:
        """Break every connection that is open now."""
        for end in self._ends:
            with suppress(OSError):  # it may be closed already
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((LOCAL, self._target))
                server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # holding is felt
                self._ends += client, server
                threading.Thread(target=self._pump, args=(client, server), daemon=True).start()

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        with client, server, suppress(OSError):
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(65536)
                    if not data:
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

    It came `at` this moment (Unix time); the audit log had `logged` bytes then.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float = field(default_factory=time.time)
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
    """An answer of S3, or a stand-in for one: DROP closes the connection, RESET resets it (RST).

    A Content-Length among the headers stands: one that is too long cuts the body short.
    """

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


DROP, RESET = Answer(0), Answer(-1)


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that was killed
            super().handle_error(request, client_address)


class S3Proxy:
    """An HTTP server before moto's.

    `before(request)` may answer in moto's place; `after(request, answer)` may change its answer.
    `requests` lists all that came.
    """

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url).netloc
        self.before: Callable[[Request], Answer | None] = lambda request: None
        self.after: Callable[[Request, Answer], Answer] = lambda request, answer: answer
        self.requests: list[Request] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                if len(body) < length:  # the client died
                    self.close_connection = True
                    return
                headers = dict(self.headers.items())
                self.reply(proxy.answer(Request(self.command, self.path, headers, body)))

            def reply(self, answer: Answer) -> None:
                if answer == RESET:
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    os.close(self.connection.detach())
                if answer in (DROP, RESET):
                    self.close_connection = True
                    return
                length = {"Content-Length": str(len(answer.body))} if answer.status != 204 else {}
                with suppress(OSError):  # the client may be gone
                    self.send_response_only(answer.status)
                    for name, value in (length | answer.headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(answer.body)

            do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_any  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self._server = QuietServer((LOCAL, 0), Handler)
        self.url = f"http://{LOCAL}:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: Request) -> Answer:
        self.requests.append(request)
        early = self.before(request)
        return early if early is not None else self.after(request, self._forward(request))

    def _forward(self, request: Request) -> Answer:
        with closing(http.client.HTTPConnection(self._target, timeout=30)) as connection:
            connection.request(request.method, request.path, request.body, request.headers)
            response = connection.getresponse()
            skipped = {"content-length", "transfer-encoding", "connection"}
            headers = {k: v for k, v in response.getheaders() if k.lower() not in skipped}
            return Answer(response.status, response.read(), headers)

    def count(self, operation: str) -> int:
        return sum(request.operation == operation for request in self.requests)
