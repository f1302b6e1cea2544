"""A `Bucket` whose requests are answered in this process, just below botocore."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import boto3
from botocore.awsrequest import AWSResponse
from s3_stub import PAGE, Answer, Store, operation
from urllib3 import HTTPResponse

import retention_purge as rp


class LocalBucket(rp.Bucket):
    """Answers are those of `s3_stub` over `keys`, changed by `after` (of the request's number,
    beginning with 1, and the answer). Nothing is asked twice."""

    def __init__(self) -> None:
        session = boto3.Session("key", "secret", region_name="eu-west-1")
        super().__init__(session, rp.Report(), 2, rp.Stop())
        self.fill()

    def fill(self, keys: Iterable[str] = (), prefix: str = "", workers: int = 2) -> LocalBucket:
        """Begin anew: making one costs more than most tests."""
        self.name, self.prefix, self.workers = "bucket", prefix, workers
        self.store = Store(keys)
        self.after: Callable[[int, Answer], Answer] = lambda number, answer: answer
        self.asked: list[dict[str, str]] = []  # the query of each request
        return self

    def _client(self, session: boto3.Session, timeout: int, attempts: int) -> Any:
        client = super()._client(session, timeout, attempts=1)
        client.meta.events.register("before-send.s3", self._answer)
        return client

    def _answer(self, request: Any, **_: Any) -> AWSResponse:
        url = urlsplit(request.url)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        query["max-keys"] = str(min(int(query.get("max-keys", PAGE)), rp.PAGE))  # as patched
        self.asked.append(query)
        number, key, body = len(self.asked), unquote(url.path[1:]), request.body or b""
        answer = operation(self.store, request.method, "bucket", key, query, body)[1]
        status, content = self.after(number, answer)
        raw = HTTPResponse(io.BytesIO(content), preload_content=False)
        return AWSResponse(request.url, status, {}, raw)
