"""A fast stand-in for S3, for benchmarks: it answers at once, or after a set latency.

    python tests/world/s3_stub.py

prints its URL on one line and serves one bucket, of any name, on 127.0.0.1 until its standard
input ends. Keys are kept in a sorted list, made from a pattern; there are no bodies, no signatures
are checked. It knows what the purge, s5cmd and rclone ask for, and answers 501 to the rest:
ListObjectsV2, DeleteObjects, DeleteObject, HEAD of bucket and object, GetBucketVersioning,
GetBucketLocation.

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
from email.utils import formatdate
from html import escape, unescape
from itertools import compress
from urllib.parse import parse_qsl, quote_plus, unquote

PAGE = 1000  # keys in one answer or one DeleteObjects request (S3 API reference)
BODY = 8 << 20  # bytes of a request's body at most; 1,000 keys of 1,024 escaped bytes fit
KEYS = 5_000_000
TAILS = 65_537  # objects that differ in time, size and ETag, before they repeat

XML = '<?xml version="1.0" encoding="UTF-8"?>\n'
NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
PLAIN = re.compile(r"[A-Za-z0-9_./*-]*")  # needs neither percent-encoding nor escaping
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
KEY = re.compile(rb"<Key>([^<]*)</Key>")
QUIET = re.compile(rb"<Quiet>\s*true\s*</Quiet>")

Answer = tuple[int, bytes]


def tail(number: int) -> str:
    """What follows the key in a listing's entry."""
    day, second = number % 28 + 1, number * 7919 % 86400
    return (
        f"</Key><LastModified>2019-0{number % 9 + 1}-{day:02}T{second // 3600:02}:"
        f"{second // 60 % 60:02}:{second % 60:02}.000Z</LastModified>"
        f"<ETag>&quot;{number * 0x9E3779B97F4A7C15 % (1 << 128):032x}&quot;</ETag>"
        f"<Size>{number * 31 % 999_983}</Size><StorageClass>STANDARD</StorageClass></Contents>"
    )


def url_encoded(key: str) -> str:
    """As in an answer to EncodingType=url: percent-encoded UTF-8, a plus for a space."""
    return key if PLAIN.fullmatch(key) else quote_plus(key, safe="/*")


class Store:
    """The bucket: all keys in UTF-8 byte order, and which of them are still there."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.alive = bytearray()
        self.latency = 0.0
        self.requests: Counter[str] = Counter()
        self.tails = [tail(number) for number in range(TAILS)]

    def fill(self, count: str, pattern: str, latency: str) -> None:
        if not 0 <= int(count) <= KEYS or not 0 <= float(latency) <= 10:
            raise ValueError("too much")
        self.keys = sorted([pattern % number for number in range(int(count))])
        self.alive = bytearray(b"\1") * len(self.keys)
        self.latency = float(latency)
        self.requests.clear()
        gc.freeze()  # a million keys are not to be walked again and again

    def counters(self) -> dict[str, int]:
        return {"left": self.alive.count(1), **self.requests}

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
        while len(found) <= limit and start < end:
            start = self.alive.find(1, start, end)
            if start < 0:
                break
            stop = min(start + limit + 1, end)
            found += compress(range(start, stop), self.alive[start:stop])
            start = stop
        return found[:limit], len(found) > limit


def listing(store: Store, bucket: str, query: dict[str, str]) -> Answer:
    """ListObjectsV2. The continuation token is the last key of the page before."""
    prefix, encoded = query.get("prefix", ""), query.get("encoding-type") == "url"
    encode = url_encoded if encoded else escape
    limit = min(int(query.get("max-keys") or PAGE), PAGE)
    after = query.get("continuation-token") or query.get("start-after", "")
    places, more = store.page(after, prefix, limit)
    if query.get("delimiter") and any("/" in store.keys[place][len(prefix) :] for place in places):
        return error(501, "NotImplemented")  # common prefixes
    entries = [
        f"<Contents><Key>{encode(store.keys[place])}{store.tails[place % TAILS]}"
        for place in places
    ]
    head = [f"<Name>{bucket}</Name><Prefix>{encode(prefix)}</Prefix>"]
    for tag, name, spell in (
        ("ContinuationToken", "continuation-token", escape),
        ("StartAfter", "start-after", encode),
        ("Delimiter", "delimiter", encode),
        ("EncodingType", "encoding-type", escape),
    ):
        if name in query:
            head.append(f"<{tag}>{spell(query[name])}</{tag}>")
    if more:
        token = escape(store.keys[places[-1]])
        head.append(f"<NextContinuationToken>{token}</NextContinuationToken>")
    head.append(f"<KeyCount>{len(places)}</KeyCount><MaxKeys>{limit}</MaxKeys>")
    head.append(f"<IsTruncated>{str(more).lower()}</IsTruncated>")
    result = "".join([XML, "<ListBucketResult ", NAMESPACE, ">", *head, *entries])
    return 200, f"{result}</ListBucketResult>".encode()


def delete_objects(store: Store, body: bytes) -> Answer:
    """DeleteObjects, with the full answer or, if asked so, the quiet one: no errors, nothing."""
    keys = KEY.findall(body)
    if not 0 < len(keys) <= PAGE:
        return error(400, "MalformedXML")
    for key in keys:
        text = key.decode()
        store.delete(unescape(text) if "&" in text else text)
    deleted = b"" if QUIET.search(body) else b"</Key></Deleted><Deleted><Key>".join(keys)
    if deleted:
        deleted = b"<Deleted><Key>" + deleted + b"</Key></Deleted>"
    return 200, f"{XML}<DeleteResult {NAMESPACE}>".encode() + deleted + b"</DeleteResult>"


def error(status: int, code: str) -> Answer:
    return status, f"{XML}<Error><Code>{code}</Code><Message>stub</Message></Error>".encode()


def answer(store: Store, method: str, target: str, body: bytes) -> Answer:
    path, _, query_text = target.partition("?")
    bucket, _, key = path[1:].partition("/")
    query = dict(parse_qsl(query_text, keep_blank_values=True))
    if bucket == "-":
        return control(store, key, query)
    kind, result = operation(store, method, bucket, unquote(key), query, body)
    store.requests[kind] += 1
    return result


def operation(
    store: Store, method: str, bucket: str, key: str, query: dict[str, str], body: bytes
) -> tuple[str, Answer]:
    """The kind of the request, for the counters, and its answer."""
    if method == "GET" and not key and query.get("list-type") == "2":
        return "list", listing(store, bucket, query)
    if method == "POST" and not key and "delete" in query:
        return "delete_many", delete_objects(store, body)
    if method == "DELETE" and key:
        store.delete(key)
        return "delete_one", (204, b"")
    if method == "HEAD":
        found = not key or store.find(key) is not None
        return "head", (200 if found else 404, b"")
    if method == "GET" and not key and "versioning" in query:
        return "versioning", (200, f"{XML}<VersioningConfiguration {NAMESPACE}/>".encode())
    if method == "GET" and not key and "location" in query:
        region = f"<LocationConstraint {NAMESPACE}>eu-west-1</LocationConstraint>"
        return "location", (200, f"{XML}{region}".encode())
    return "other", error(501, "NotImplemented")


def control(store: Store, name: str, query: dict[str, str]) -> Answer:
    if name == "fill":
        store.fill(query["count"], query["pattern"], query["latency"])
    elif name != "counters":
        return error(404, "NoSuchKey")
    return 200, json.dumps(store.counters()).encode()


REASONS = {200: "OK", 204: "No Content", 400: "Bad Request", 404: "Not Found"}


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive; one request at a time, as clients of S3 send them."""

    def __init__(self, store: Store) -> None:
        self._store, self._received = store, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if not blank:
            if len(head) > BODY:
                self._transport.close()
            return
        found = LENGTH.search(head)
        length = int(found[1]) if found else 0
        if length > BODY:
            self._transport.close()
        elif len(body) >= length:
            self._received = body[length:]
            self._serve(head, body[:length])
        elif not body and b"100-continue" in head:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _serve(self, head: bytes, body: bytes) -> None:
        method, target, _ = head.partition(b"\r\n")[0].decode().split(" ")
        try:
            status, content = answer(self._store, method, target, body)
        except (ValueError, KeyError, TypeError):
            status, content = error(400, "InvalidRequest")
        response = (
            f"HTTP/1.1 {status} {REASONS.get(status, 'Not Implemented')}\r\n"
            f"Date: {formatdate(usegmt=True)}\r\n"
            "x-amz-request-id: STUB\r\nx-amz-id-2: STUB\r\nServer: AmazonS3\r\n"
            "x-amz-bucket-region: eu-west-1\r\nContent-Type: application/xml\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        ).encode()
        if status == 204:  # may not have a length (RFC 9110, 8.6)
            response = response.replace(b"Content-Length: 0\r\n", b"")
        response += b"" if method == "HEAD" else content
        wait = 0.0 if target.startswith("/-/") else self._store.latency
        asyncio.get_running_loop().call_later(wait, self._transport.write, response)


async def main() -> None:
    loop = asyncio.get_running_loop()
    store = Store()
    server = await loop.create_server(lambda: Connection(store), "127.0.0.1", 0, backlog=512)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)  # ends with the process that started this


if __name__ == "__main__":
    asyncio.run(main())
