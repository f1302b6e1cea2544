"""A fast stand-in for S3: it knows what the purge and s5cmd ask for, and 501 for the rest. One
bucket, of any name; objects have no bodies, no signatures are checked."""

from __future__ import annotations

import re
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable
from functools import partial
from html import escape, unescape
from http.server import BaseHTTPRequestHandler
from itertools import islice, takewhile
from typing import Any
from urllib.parse import parse_qsl, quote_plus, unquote

ODD = re.compile(r"\W+", re.ASCII)
PAGE = 1000  # keys in one answer or one DeleteObjects request (S3 API reference)
ENTRY = "<Contents><Key>{}</Key><LastModified>2019-01-02T03:04:05.000Z</LastModified>"
ENTRY += "<ETag>&quot;9e3779b97f4a7c159e3779b97f4a7c15&quot;</ETag><Size>{}</Size>"
ENTRY += "<StorageClass>STANDARD</StorageClass></Contents>"
Answer = tuple[int, bytes]


class Store:
    """The bucket: all keys in UTF-8 byte order, and which of them are `gone`."""

    def __init__(self, keys: Iterable[str] = (), latency: float = 0) -> None:
        self.keys, self.latency = sorted(keys), latency  # in seconds a request
        self.gone: set[str] = set()
        self.requests: Counter[str] = Counter()  # by kind

    def page(self, after: str, prefix: str, limit: int) -> tuple[list[str], bool]:
        """Up to `limit` live keys above `after` that start with `prefix`; any more?"""
        start = max(bisect_right(self.keys, after), bisect_left(self.keys, prefix))
        above = (self.keys[place] for place in range(start, len(self.keys)))
        there = takewhile(lambda key: key.startswith(prefix), above)
        found = list(islice((key for key in there if key not in self.gone), limit + 1))
        return found[:limit], len(found) > limit


def answered(root: str, content: str = "") -> Answer:
    head = f'<?xml version="1.0"?>\n<{root} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    return 200, f"{head}{content}</{root}>".encode()


def listing(store: Store, bucket: str, query: dict[str, str]) -> Answer:
    """ListObjectsV2. The continuation token is the last key of the page before."""
    is_url = query.get("encoding-type") == "url"
    spelled = partial(quote_plus, safe="/*") if is_url else escape
    encode = partial(ODD.sub, lambda odd: spelled(odd[0]))  # most keys have none
    prefix, limit = query.get("prefix", ""), min(int(query.get("max-keys") or PAGE), PAGE)
    after = query.get("continuation-token") or query.get("start-after", "")
    keys, more = store.page(after, prefix, limit)
    facts: dict[str, Any] = {"Name": bucket, "Prefix": encode(prefix), "KeyCount": len(keys)}
    facts |= {"MaxKeys": limit, "IsTruncated": str(more).lower()}
    for name, spell in ("continuation-token", escape), ("start-after", encode):
        if name in query:
            facts[name.title().replace("-", "")] = spell(query[name])
    facts |= {"EncodingType": "url"} if is_url else {}
    facts |= {"NextContinuationToken": escape((keys or [after])[-1])} if more else {}
    head = [f"<{tag}>{text}</{tag}>" for tag, text in facts.items()]
    entries = [ENTRY.format(encode(key), len(key)) for key in keys]
    return answered("ListBucketResult", "".join(head + entries))


def operation(
    store: Store, method: str, bucket: str, key: str, query: dict[str, str], body: bytes
) -> tuple[str, Answer]:
    """The kind of the request, for the counter, and its answer."""
    if method == "DELETE" and key:
        store.gone.add(key)
        return "delete", (204, b"")
    if method == "POST" and "delete" in query:
        keys = re.findall("<Key>([^<]*)</Key>", body.decode())
        assert 0 < len(keys) <= PAGE
        store.gone.update(map(unescape, keys))
        told = [f"<Deleted><Key>{key}</Key></Deleted>" for key in keys if b"<Quiet>" not in body]
        return "delete", answered("DeleteResult", "".join(told))
    if method == "GET" and not key and query.get("list-type") == "2":
        return "list", listing(store, bucket, query)
    if method == "GET" and not key and "versioning" in query:
        return "versioning", answered("VersioningConfiguration")
    return "other", (501, b"<Error><Code>NotImplemented</Code><Message>stub</Message></Error>")


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with keep-alive over `store`, which a benchmark replaces."""

    protocol_version, wbufsize, store = "HTTP/1.1", -1, Store()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        bucket, _, key = path[1:].partition("/")
        asked = dict(parse_qsl(query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind, answer = operation(self.store, self.command, bucket, unquote(key), asked, body)
        self.store.requests[kind] += 1
        time.sleep(self.store.latency)
        self.send_response(answer[0])
        if answer[0] != 204:  # it may not have a length (RFC 9110, 8.6)
            self.send_header("Content-Length", str(len(answer[1])))
        self.end_headers()
        self.wfile.write(answer[1])

    do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass
