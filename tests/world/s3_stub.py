"""A fast stand-in for S3: it knows what the purge, s5cmd and rclone ask for, and 501 for the rest.

`python tests/world/s3_stub.py` prints its URL and serves one bucket, of any name, on 127.0.0.1
until its standard input ends. There are no bodies, no signatures are checked.

    GET /-/fill?count=N&pattern=P&latency=S   N keys, P % 0 to P % (N - 1); S seconds a request
    GET /-/counters                           requests since the last fill, by kind; keys left
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable
from email.utils import formatdate
from html import escape, unescape
from itertools import compress
from urllib.parse import parse_qsl, quote_plus, unquote

PAGE = 1000  # keys in one answer or one DeleteObjects request (S3 API reference)
TAILS = 1009  # objects that differ in time, size and ETag, before they repeat

XML = '<?xml version="1.0" encoding="UTF-8"?>\n'
NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
PLAIN = re.compile(r"[A-Za-z0-9_./*-]*")  # needs neither percent-encoding nor escaping
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)

Answer = tuple[int, bytes]


def tail(number: int) -> str:
    """What follows the key in a listing's entry."""
    moment = (
        f"2019-0{number % 9 + 1}-{number % 28 + 1:02}T{number % 24:02}:{number % 60:02}:00.000Z"
    )
    etag = f"{number * 0x9E3779B97F4A7C15 % (1 << 128):032x}"
    return (
        f"</Key><LastModified>{moment}</LastModified><ETag>&quot;{etag}&quot;</ETag>"
        f"<Size>{number * 991}</Size><StorageClass>STANDARD</StorageClass></Contents>"
    )


def url_encoded(key: str) -> str:
    """As in an answer to EncodingType=url: percent-encoded UTF-8, a plus for a space."""
    return key if PLAIN.fullmatch(key) else quote_plus(key, safe="/*")


class Store:
    """The bucket: all keys in UTF-8 byte order, and which of them are still there."""

    def __init__(self, keys: Iterable[str] = (), latency: float = 0) -> None:
        self.keys, self.latency = sorted(keys), latency
        self.alive = bytearray(b"\1") * len(self.keys)
        self.tails = [tail(number) for number in range(TAILS)]
        self.requests: Counter[str] = Counter()

    def delete(self, key: str) -> None:
        place = self.find(key)
        if place is not None:
            self.alive[place] = 0

    def find(self, key: str) -> int | None:
        place = bisect_left(self.keys, key)
        there = place < len(self.keys) and self.keys[place] == key and self.alive[place]
        return place if there else None

    def page(self, after: str, prefix: str, limit: int) -> tuple[list[int], bool]:
        """Places of up to `limit` live keys above `after` that start with `prefix`; any more?"""
        start = max(bisect_right(self.keys, after), bisect_left(self.keys, prefix))
        end = bisect_left(self.keys, prefix + "\U0010ffff") if prefix else len(self.keys)
        found: list[int] = []
        while len(found) <= limit and 0 <= (start := self.alive.find(1, start, end)) < end:
            stop = min(start + limit + 1, end)
            found += compress(range(start, stop), self.alive[start:stop])
            start = stop
        return found[:limit], len(found) > limit


def listing(store: Store, bucket: str, query: dict[str, str]) -> Answer:
    """ListObjectsV2. The continuation token is the last key of the page before."""
    prefix, encode = query.get("prefix", ""), escape
    if query.get("encoding-type") == "url":
        encode = url_encoded
    limit = min(int(query.get("max-keys") or PAGE), PAGE)
    after = query.get("continuation-token") or query.get("start-after", "")
    places, more = store.page(after, prefix, limit)
    facts = {"Name": bucket, "Prefix": encode(prefix)}
    for tag, name, spell in (
        ("ContinuationToken", "continuation-token", escape),
        ("StartAfter", "start-after", encode),
        ("Delimiter", "delimiter", encode),
        ("EncodingType", "encoding-type", escape),
    ):
        if name in query:
            facts[tag] = spell(query[name])
    if more:
        facts["NextContinuationToken"] = escape(store.keys[places[-1]])
    facts |= {"KeyCount": str(len(places)), "MaxKeys": str(limit), "IsTruncated": str(more).lower()}
    entries = [
        f"<Contents><Key>{encode(store.keys[place])}{store.tails[place % TAILS]}"
        for place in places
    ]
    head = [f"<{tag}>{text}</{tag}>" for tag, text in facts.items()]
    result = "".join([XML, "<ListBucketResult ", NAMESPACE, ">", *head, *entries])
    return 200, f"{result}</ListBucketResult>".encode()


def delete_objects(store: Store, body: bytes) -> Answer:
    """DeleteObjects, with the full answer or, if asked so, the quiet one: no errors, nothing."""
    keys = re.findall(rb"<Key>([^<]*)</Key>", body)
    if not 0 < len(keys) <= PAGE:
        return error(400, "MalformedXML")
    for key in keys:
        text = key.decode()
        store.delete(unescape(text) if "&" in text else text)
    told = b"".join([b"<Deleted><Key>%b</Key></Deleted>" % key for key in keys])
    if re.search(rb"<Quiet>\s*true\s*</Quiet>", body):
        told = b""
    return 200, f"{XML}<DeleteResult {NAMESPACE}>".encode() + told + b"</DeleteResult>"


def error(status: int, code: str) -> Answer:
    return status, f"{XML}<Error><Code>{code}</Code><Message>stub</Message></Error>".encode()


def operation(
    store: Store, method: str, bucket: str, key: str, query: dict[str, str], body: bytes
) -> tuple[str, Answer]:
    """The kind of the request, for the counters, and its answer."""
    if method == "HEAD":
        return "head", (404 if key and store.find(key) is None else 200, b"")
    if method == "DELETE" and key:
        store.delete(key)
        return "delete_one", (204, b"")
    if method == "POST" and "delete" in query:
        return "delete_many", delete_objects(store, body)
    if method == "GET" and not key:
        if query.get("list-type") == "2":
            return "list", listing(store, bucket, query)
        if "versioning" in query:
            return "versioning", (200, f"{XML}<VersioningConfiguration {NAMESPACE}/>".encode())
        if "location" in query:
            region = f"<LocationConstraint {NAMESPACE}>eu-west-1</LocationConstraint>"
            return "location", (200, f"{XML}{region}".encode())
    return "other", error(501, "NotImplemented")


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive; one request at a time, as clients of S3 send them."""

    store = Store()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._received = transport, b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        found = LENGTH.search(head)
        length = int(found[1]) if found else 0
        if blank and len(body) >= length:
            self._received = body[length:]
            self._serve(head, body[:length])

    def _serve(self, head: bytes, body: bytes) -> None:
        method, target, _ = head.partition(b"\r\n")[0].decode().split(" ")
        path, _, query_text = target.partition("?")
        bucket, _, key = path[1:].partition("/")
        query, wait = dict(parse_qsl(query_text, keep_blank_values=True)), 0.0
        if bucket == "-":
            status, content = self._control(**query)
        else:
            kind, answer = operation(self.store, method, bucket, unquote(key), query, body)
            (status, content), wait = answer, self.store.latency
            self.store.requests[kind] += 1
        # A 204 may not have a length (RFC 9110, 8.6).
        length = f"Content-Length: {len(content)}\r\n" if status != 204 else ""
        response = (
            f"HTTP/1.1 {status} Told\r\nDate: {formatdate(usegmt=True)}\r\n"
            "x-amz-request-id: STUB\r\nx-amz-id-2: STUB\r\nServer: AmazonS3\r\n"
            "x-amz-bucket-region: eu-west-1\r\nContent-Type: application/xml\r\n"
            f"{length}\r\n"
        ).encode() + content
        asyncio.get_running_loop().call_later(wait, self._transport.write, response)

    def _control(self, count: str = "", pattern: str = "", latency: str = "0") -> Answer:
        if pattern:
            keys = [pattern % number for number in range(int(count))]
            Connection.store = Store(keys, float(latency))
            gc.freeze()  # a million keys are not to be walked again and again
        left = {"left": self.store.alive.count(1), **self.store.requests}
        return 200, json.dumps(left).encode()


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=512)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)  # ends with the process that started this


if __name__ == "__main__":
    asyncio.run(main())
