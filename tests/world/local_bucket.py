"""A `Bucket` and its `Wire` whose requests are answered in this process, in place of a socket."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import boto3
from botocore.awsrequest import AWSHTTPConnection, AWSHTTPConnectionPool
from botocore.config import Config
from s3_stub import PAGE, Answer, Store, operation
from urllib3 import HTTPResponse

import retention_purge as rp


class LocalBucket(rp.Bucket):
    """Answers are those of `s3_stub` over `keys`, changed by `after` (of the request's number,
    beginning with 1, and the answer). Nothing is asked twice. `connect` runs where a connection
    would be made. `sent` holds what left by POST."""

    def __init__(self) -> None:
        self.wire = rp.Wire(SimpleNamespace(client=self._client), "bucket", 2, self._count_ages)
        super().__init__(self.wire, "", 2, rp.Stop(), lambda: None)
        self.fill()

    def fill(self, keys: Iterable[str] = (), prefix: str = "", workers: int = 2) -> LocalBucket:
        """Begin anew: making one costs more than most tests."""
        self.name, self.prefix, self.workers = "bucket", prefix, workers
        self.store = Store(keys)
        self.after: Callable[[int, Answer], Answer] = lambda number, answer: answer
        self.connect: Callable[[], Any] = lambda: None
        self.asked: list[dict[str, str]] = []  # the query of each request
        self.sent, self.ages = list[bytes](), list[float]()
        return self

    def delete(self, keys: Sequence[str], age: float = 0) -> list[rp.Verdict]:
        """As the gate does with a permit for these keys, by a re-check of this age (seconds)."""
        return self.wire._post([(key, "") for key in keys], rp.boot_seconds() - age)

    def _count_ages(self, ages: list[float]) -> None:
        self.ages += ages

    def _client(self, name: str, config: Any) -> Any:
        session: Any = boto3.Session("key", "secret", region_name="eu-west-1")
        config = config.merge(Config(retries={"mode": "standard", "total_max_attempts": 1}))
        client = session.client(name, endpoint_url="http://s3", config=config)
        pools, bucket = client._endpoint.http_session._pool_classes_by_scheme, self

        class Connection(AWSHTTPConnection):
            def _new_conn(self) -> Any:
                bucket.connect()
                return io.BytesIO()

            def request(self, method: str, url: str, body: Any = None, *_: Any, **__: Any) -> None:
                self.answer = bucket._answer(method, url, body or b"")
                self.number = len(bucket.asked)

            def getresponse(self) -> Any:
                status, content = bucket.after(self.number, self.answer)
                return HTTPResponse(io.BytesIO(content), status=status, preload_content=False)

        pools["http"] = type("Pool", (AWSHTTPConnectionPool,), {"ConnectionCls": Connection})
        return client

    def _answer(self, method: str, address: str, body: bytes) -> Answer:
        url = urlsplit(address)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        query["max-keys"] = str(min(int(query.get("max-keys", PAGE)), rp.PAGE))  # as patched
        self.asked.append(query)
        self.sent += [body] if method == "POST" else []
        return operation(self.store, method, "bucket", "", query, body)[1]
