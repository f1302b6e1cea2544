"""A job table and a bucket in this process, for thousands of runs a minute.

`Table` is SQLite that understands the script's SQL. It keeps what matters to the gate: collations
that ignore case, snapshots of open transactions, the state of a session, a lock. `Bucket` is an
HTTP server with versions and delete markers. It records every key that it was asked to delete.
"""

from __future__ import annotations

import re
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote_plus, urlsplit
from xml.etree import ElementTree

import pymysql

OLD, YOUNG = datetime(2019, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
# A session as a server may hand it out: nothing is as the gate wants it.
ODD_SESSION = {"autocommit": "0", "time_zone": "SYSTEM", "sql_mode": "ANSI", "sql_select_limit": 2}
MOST = 2**63 - 1  # SQLite has no larger integer
WORDS = [  # MySQL's SQL in SQLite's
    (r"SQL_BIG_RESULT ", ""),
    (r"TIMESTAMP'", "'"),
    (r"/\*M?!.*?\*/", ""),
    (r"`ndvr`\.`jobs`", "jobs"),
    (r"CONVERT\(([^()]*) USING \w+\)(?: COLLATE \w+)?", r"\1"),
    (r"_utf8mb4 (x'[0-9a-f]*')", r"CAST(\1 AS TEXT)"),
    (r"AS BINARY\) ([<>=!]+) ('\w*')", r"AS BLOB) \1 CAST(\2 AS BLOB)"),
    (r"AS BINARY\)", "AS BLOB)"),
    (r"AS CHAR\)", "AS TEXT)"),
    (r"@@(?:global\.|session\.)?(\w+)", r"session_value('\1')"),
    (r"<=>", "IS"),
    (r"1844674407370955161[45]", str(MOST - 1)),
]


class Job(NamedTuple):
    job_id: str
    completed: str | None
    kind: str | None
    name: str


class Table:
    """The table ndvr.jobs, and a session on it as `pymysql.connect` returns one.

    `before_ask` is called before each re-check. `writes` counts statements that delete.
    """

    def __init__(self, jobs: Iterable[Job] = (), indexed: bool = True, **session: Any) -> None:
        self.live = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self.live.execute(
            "CREATE TABLE jobs (jobId TEXT PRIMARY KEY, completedAt TEXT, type TEXT, "
            "sourceData TEXT COLLATE NOCASE)"
        )
        self.add(*jobs)
        self.session = {"read_only": "OFF", "innodb_read_only": 0, "sql_mode": ""}
        self.session |= {"lower_case_table_names": 0} | ODD_SESSION | session
        self.indexed, self.locked, self.writes = indexed, False, 0
        self.before_ask: Callable[[], Any] = lambda: None
        self._snapshot: sqlite3.Connection | None = None
        self._open = False
        self._sock, self._read_timeout = self, 0

    def add(self, *jobs: Job) -> None:
        """Moments get all their digits, because SQLite compares them as text."""
        rows = [job._replace(completed=job.completed and f"{job.completed}.000000") for job in jobs]
        self.live.executemany("INSERT INTO jobs VALUES (?, ?, ?, ?)", rows)

    def close(self, *_: Any) -> None:
        """As a connection; as its socket it has this: setsockopt."""

    setsockopt = close

    def cursor(self, kind: Any = None) -> Cursor:
        return Cursor(self, kind)

    def leave_open(self) -> None:
        """What `START TRANSACTION WITH CONSISTENT SNAPSHOT` leaves behind."""
        self._open, self._snapshot = True, sqlite3.connect(":memory:", check_same_thread=False)
        self.live.backup(self._snapshot)

    @property
    def job_ids(self) -> set[str]:
        return {row[0] for row in self.live.execute("SELECT jobId FROM jobs")}

    def run(self, sql: str) -> tuple[list[tuple[Any, ...]], int]:
        """The rows of a statement, and how many it changed."""
        if " UNION ALL " in sql:
            self.before_ask()
        head = sql.split()[0]
        if head in ("ROLLBACK", "COMMIT"):
            self._snapshot, self._open = None, False
            if self.live.in_transaction:
                self.live.execute(head)
            return [], 0
        if head == "START":
            self._open = True
            self.live.execute("BEGIN")
            return [], 0
        if head == "SET":
            plain = re.sub(r"/\*M?!.*?\*/", "", sql)
            for name, text, number in re.findall(r"(\w+) = (?:'([^']*)'|(\d+))", plain):
                self.session[name] = min(int(number), MOST) if number else text
            return [], 0
        if (known := self._canned(sql)) is not None:
            return known, 0
        return self._translated(sql)

    def _canned(self, sql: str) -> list[tuple[Any, ...]] | None:
        text, none = "varchar(64)", ("NO", "", None, "", "", "")
        columns = [
            (name, text, "utf8mb4_general_ci", *none) for name in ("jobId", "type", "sourceData")
        ]
        index = {"Key_name": "k", "Seq_in_index": 1, "Index_type": "BTREE", "Sub_part": None}
        rows = [{**index, "Column_name": "jobId", "Non_unique": 0}]
        rows += [{**index, "Column_name": "sourceData", "Non_unique": 1, "Key_name": "s"}]
        canned: dict[str, list[Any]] = {
            "SHOW FULL": [*columns, ("completedAt", "timestamp", None, *none)],
            "SHOW INDEX": rows[: 1 + self.indexed],
            "SELECT UTC_TIMESTAMP": [(datetime.now(UTC).replace(tzinfo=None),)],
            "EXPLAIN": [],
            "DO ": [],
        }
        if sql.startswith("SELECT GET_LOCK"):
            self.locked = True
            return [(1, 7)]
        return next((found for start, found in canned.items() if sql.startswith(start)), None)

    def _translated(self, sql: str) -> tuple[list[tuple[Any, ...]], int]:
        for old, new in WORDS:
            sql = re.sub(old, new, sql)
        if sql.startswith("DELETE"):
            database, self.writes = self.live, self.writes + 1
        else:
            in_snapshot = self._open or self.session["autocommit"] in ("0", 0)
            if in_snapshot and self._snapshot is None:
                self.leave_open()
            database = self._snapshot or self.live
        database.create_function("session_value", 1, self.session.get)
        database.create_function("IS_USED_LOCK", 1, lambda _: 7 if self.locked else None)
        database.create_function("CONNECTION_ID", 0, lambda: 7)
        database.create_function("TO_DAYS", 1, lambda at: None if (at or "0")[0] == "0" else 1)
        try:
            cursor = database.execute(sql)
            rows = cursor.fetchall()
        except sqlite3.Error as error:
            raise pymysql.err.ProgrammingError(1064, f"{error}: {sql}") from error
        limit = self.session["sql_select_limit"]
        return rows[: limit if isinstance(limit, int) else MOST], cursor.rowcount


class Cursor:
    def __init__(self, table: Table, kind: Any) -> None:
        self._table, self._result = table, None
        self._rows: list[Any] = []

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def execute(self, sql: str) -> int:
        self._rows, count = self._table.run(sql)
        return count

    def fetchall(self) -> list[Any]:
        rows, self._rows = self._rows, []
        return rows

    def fetchmany(self, size: int) -> list[Any]:
        rows, self._rows = self._rows[:size], self._rows[size:]
        return rows


class Version(NamedTuple):
    version_id: str
    modified: datetime
    is_marker: bool


def xml(root: str, content: str) -> bytes:
    space = "http://s3.amazonaws.com/doc/2006-03-01/"
    return f'<?xml version="1.0"?>\n<{root} xmlns="{space}">{content}</{root}>'.encode()


class Bucket:
    """A bucket on a port of its own. Each key has versions, the newest last.

    `before_answer` gets each request's method and query. `asked` lists what each DeleteObjects
    named; `removed` lists versions, which are no markers, that were destroyed by their id.
    """

    def __init__(self, name: str = "incoming-data", versioned: bool = False) -> None:
        self.name, self.versioned = name, versioned
        self.clear()
        self.before_answer: Callable[[str, dict[str, Any]], Any] = lambda method, query: None
        handler = type("Handler", (Handler,), {"bucket": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def clear(self) -> None:
        self.keys: dict[str, list[Version]] = {}
        self.asked: list[tuple[str, list[tuple[str, str]]]] = []  # bucket, pairs
        self.removed: list[tuple[str, str]] = []

    def put(self, key: str, modified: datetime = OLD, version_id: str = "") -> None:
        name = version_id or (uuid.uuid4().hex if self.versioned else "null")
        kept = self.keys.get(key, []) if self.versioned else []
        self.keys[key] = [*kept, Version(name, modified, False)]

    def hide(self, key: str, version_id: str = "") -> str:
        """Put a delete marker upon a key; its version id."""
        name = version_id or uuid.uuid4().hex
        now = datetime.now(UTC).replace(microsecond=0)
        self.keys.setdefault(key, []).append(Version(name, now, True))
        return name

    @property
    def live(self) -> set[str]:
        return {
            key for key, versions in self.keys.items() if versions and not versions[-1].is_marker
        }

    def listed(self, query: dict[str, str]) -> bytes:
        after, prefix = (
            query.get("continuation-token") or query.get("start-after", ""),
            query["prefix"],
        )
        most = int(query["max-keys"])
        found = sorted(key for key in self.live if key.startswith(prefix) and key > after)
        page, more = found[:most], len(found) > most
        parts = [f"<Name>{self.name}</Name><KeyCount>{len(page)}</KeyCount>"]
        parts.append("<EncodingType>url</EncodingType>")
        parts.append(f"<IsTruncated>{str(more).lower()}</IsTruncated>")
        if more:
            parts.append(f"<NextContinuationToken>{quote_plus(page[-1])}</NextContinuationToken>")
        for key in page:
            moment = f"{self.keys[key][-1].modified:%Y-%m-%dT%H:%M:%S.000Z}"
            parts.append(f"<Contents><Key>{quote_plus(key)}</Key><Size>1</Size>")
            parts.append(f"<LastModified>{moment}</LastModified></Contents>")
        return xml("ListBucketResult", "".join(parts))

    def versions(self, query: dict[str, str]) -> bytes:
        parts = ["<IsTruncated>false</IsTruncated><EncodingType>url</EncodingType>"]
        for key in sorted(key for key in self.keys if key.startswith(query["prefix"])):
            for place, version in enumerate(reversed(self.keys[key])):
                tag = "DeleteMarker" if version.is_marker else "Version"
                facts = f"<Key>{quote_plus(key)}</Key><VersionId>{version.version_id}</VersionId>"
                facts += f"<IsLatest>{str(not place).lower()}</IsLatest>"
                facts += f"<LastModified>{version.modified:%Y-%m-%dT%H:%M:%S.000Z}</LastModified>"
                parts.append(f"<{tag}>{facts}</{tag}>")
        return xml("ListVersionsResult", "".join(parts))

    def deleted(self, name: str, body: bytes) -> bytes:
        pairs = []
        for item in ElementTree.fromstring(body):
            facts = {child.tag.rpartition("}")[2]: child.text or "" for child in item}
            pairs.append((facts["Key"], facts.get("VersionId", "")))
        self.asked.append((name, pairs))
        parts = []
        for key, version_id in pairs:
            marker = self._delete(key, version_id) if name == self.name else ""
            told = f"<DeleteMarkerVersionId>{marker}</DeleteMarkerVersionId>" if marker else ""
            escaped = key.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            parts.append(f"<Deleted><Key>{escaped}</Key>{told}</Deleted>")
        return xml("DeleteResult", "".join(parts))

    def _delete(self, key: str, version_id: str) -> str:
        versions = self.keys.get(key, [])
        if version_id:
            gone = [each for each in versions if each.version_id == version_id]
            self.removed += [(key, version_id) for each in gone if not each.is_marker]
            self.keys[key] = [each for each in versions if each not in gone]
            return ""
        if self.versioned:
            return self.hide(key)
        self.keys.pop(key, None)
        return ""


class Handler(BaseHTTPRequestHandler):
    bucket: Bucket
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        self.bucket.before_answer(self.command, query)
        status, answer = 200, b""
        if self.command == "GET" and "versioning" in query:
            state = "<Status>Enabled</Status>" if self.bucket.versioned else ""
            answer = xml("VersioningConfiguration", state)
        elif self.command == "GET" and "list-type" in query:
            answer = self.bucket.listed(query)
        elif self.command == "GET" and "versions" in query:
            answer = self.bucket.versions(query)
        elif self.command == "POST" and "delete" in query and parts.path.count("/") == 1:
            answer = self.bucket.deleted(parts.path.strip("/"), body)
        elif self.command == "DELETE":
            name, _, key = parts.path.strip("/").partition("/")
            self.bucket.asked.append((name, [(key, query.get("versionId", ""))]))
            self.bucket._delete(key, query.get("versionId", ""))
            status = 204
        else:
            status = 501
        self.send_response_only(status)
        self.send_header("Date", format_datetime(datetime.now(UTC), usegmt=True))
        if status != 204:
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(answer)

    do_GET = do_POST = do_DELETE = do_PUT = handle_any  # noqa: N815
