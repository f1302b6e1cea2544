#!/usr/bin/env python3
"""Delete the S3 source data of expired TRIAL jobs, and nothing that a remaining job refers to.

A job table in MySQL names the objects: the key of a job's source data is `prefix + sourceData`.

    expired job     `type` is exactly TRIAL and `completedAt` lies before the cutoff
    remaining job   every other row: OFFICIAL, not completed, unknown type; when in doubt, keep
    expired key     referred to by at least one expired job and by no remaining job
    orphan          an object that no job refers to at all, older than the grace period
    missing         an expired key without an object
    dangling        a key of a remaining job without an object: reported, never acted on

Deleted are the objects of expired keys and, if asked for, orphans and the rows of expired jobs.
Everything else stays. Keys are compared as bytes, the way S3 compares them, whatever the table's
collation says. Whatever cannot be read whole is an error, never "nothing there".

The run, in order; any error before step 5 ends it with nothing deleted:

    1. a real run takes a lock against other runs; a dry run cannot write anywhere
    2. the job table, grouped by key and sorted by its bytes, is read at once into a spool file
    3. the bucket's listing, which S3 sorts by the same bytes, is merged with it into the plan
    4. guards may refuse the plan; a dry run prints it and ends
    5. round by round: ask the table again whether the keys may still go, write them to the audit
       log, delete them, account for every single one, then delete the job rows if asked for

The way of a key, in file order: Reference -> outer_join -> Policy.reason -> Candidate -> refusals
-> Bucket._leave (how old is its re-check?) -> Ledger; in between Rounds: _recheck (may_go), _send
(intent, request), _settle. Of the cutoff: Policy -> every statement of JobTable. Of a Ctrl-C: Stop
-> Interrupted, at once while the run only reads, else before the next request -> Rounds._round
accounts for what is in flight -> main -> Ledger.end -> exit code 130.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import logging
import os
import pickle
import queue
import random
import re
import signal
import socket
import sqlite3
import ssl
import sys
import tempfile
import threading
import time
import uuid
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from email.utils import parsedate_to_datetime
from enum import StrEnum
from itertools import chain, groupby, islice, repeat
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar
from unicodedata import normalize
from urllib.parse import quote, unquote_plus
from xml.etree import ElementTree

import boto3
import click
import pymysql
from botocore import exceptions as aws
from botocore.config import Config
from botocore.parsers import ResponseParserError

T = TypeVar("T")
Record = TypeVar("Record", bound=tuple[Any, ...])

log = logging.getLogger("retention_purge")

VERSION = "2.0.0"
# Exit codes; 75 is EX_TEMPFAIL of sysexits.h.
FAILED, USAGE, REFUSED, SOME_FAILED, LOCKED = 1, 2, 3, 4, 75
CA_BUNDLE_URL = "https://truststore.pki.rds.amazonaws.com/global/global-bundle.pem"
DEFAULT_CA_BUNDLE = Path(__file__).resolve().parent / "rds-ca-bundle.pem"
VARIABLES, PASSWORD_VARIABLE = "RETENTION_PURGE_", "RETENTION_PURGE_DB_PASSWORD"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Keys in one ListObjectsV2 answer and in one DeleteObjects request (S3 API reference); bytes of
# UTF-8 in an object key (S3 user guide, "Creating object key names").
PAGE, BATCH, KEY_BYTES = 1000, 1000, 1024
END = "\U0010ffff" * KEY_BYTES  # above every key
# The smallest TIMESTAMP (MySQL manual, "The DATE, DATETIME, and TIMESTAMP Types"). The zero date
# `0000-00-00` sorts below it: such a job is not completed.
FIRST_TIMESTAMP = "1970-01-01 00:00:01"
# Without --orphans, a page with fewer wanted keys is not worth its parsing: each key is sought by
# itself. A seek lists SEEK objects, to notice where wanted keys lie densely.
SPARSE, SEEK = 25, 10
# References whose objects are listed ahead, all objects or theirs alone; of all, pages of a part.
LISTED_AHEAD, SOUGHT_AHEAD, PAGES_AHEAD = 40_000, 24_000, 6
BLOCK = 1000  # records in a block of a spool file
SAMPLE = 50  # keys of remaining jobs that are looked for where all expired keys are missing
WRONG_PLACE = "--bucket, --prefix or --db-table must be wrong"
MAX_SKEW = timedelta(minutes=5)  # between the clocks of this host, the database and S3
# Seconds. A login and a re-check may not take long, nor may a connection to S3, while the re-check
# grows old; the grouped query may sort for an hour before its first row. A lock on a row or on the
# table is awaited for less than an answer, or a DELETE given up here would take effect there. The
# longer a delete is awaited, the rarer one that S3 carries out later.
CONNECT_TIMEOUT, PLAN_TIMEOUT, RECHECK_TIMEOUT, LOCK_TIMEOUT = 10, 3600, 40, 5
S3_CONNECT_TIMEOUT, LIST_TIMEOUT, DELETE_TIMEOUT = 3, 30, 60
# Seconds: a request whose re-check is older does not leave the machine; a re-check that takes
# longer than DEAR is worth the advice to make an index.
MAX_RECHECK_AGE, DEAR_RECHECK = 30, 0.5
# Without an index a re-check scans the table, whatever is asked, so that one serves a long round:
# what --max-rate lets out in these seconds, up to so many keys and so many bytes of SQL (the
# smallest default of max_allowed_packet is 4 MiB, in MySQL 5.7).
ROUND_SECONDS, ROUND_KEYS, ROUND_BYTES = 10, 25 * BATCH, 2_000_000
# Job rows read at a time, and deleted in one statement, which is one transaction.
ROWS, ROWS_A_COMMIT = 5000, 200
# A key that S3 cannot delete just now is tried so often, each time after a new re-check, after a
# pause (in seconds) that doubles with each failure.
ATTEMPTS, FIRST_PAUSE, LAST_PAUSE = 5, 0.1, 10.0
# Character sets from whose text UTF-8 comes back unchanged, so that a key converted to them finds
# its row (others, such as sjis and gbk, spell some characters in two ways), and Python's for them.
CHARSETS = {"ascii": "ascii", "latin1": "cp1252"}
CHARSETS |= dict.fromkeys(("utf8", "utf8mb3", "utf8mb4"), "utf-8")
# XML 1.0 cannot carry these (W3C, production 2); a carriage return comes back as a line feed.
# A key with one of them goes by single DeleteObject, where it stands percent-encoded in the URL.
NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# S3's codes that a later try may not meet (S3 API reference, "List of error codes"), and HTTP's.
# The first say that nothing was done, after the others the delete may take effect yet. Ours are
# NotSent, InvalidAnswer (the body answers no such request), NoAnswer (to a key, or at all).
UNDONE = {"SlowDown", "ServiceUnavailable", "503", "NotSent"}
DOUBTFUL = {"InternalError", "RequestTimeout", "OperationAborted", "500", "502", "504"}
DOUBTFUL |= {"InvalidAnswer", "NoAnswer"}


# --- Errors and stop signals ----------------------------------------------------------------------


class PurgeError(click.ClickException):
    """The run failed: one line that says what to do, and its exit code. `code` is S3's, or ours."""

    def __init__(self, message: str, exit_code: int = FAILED, code: str = "") -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code, self.code = exit_code, code  # type: ignore[misc]


class Interrupted(BaseException):
    """A stop signal came. Not an Exception: libraries catch those, and try again."""


class Stop:
    """SIGHUP, SIGINT, SIGTERM. The first ends the run in order, a second one at once.

    While the run is `reading`, the signal raises Interrupted where it arrives. Otherwise it is only
    noted, and `check` raises where all that is in flight can be accounted for.
    """

    def __init__(self) -> None:
        self.received, self._raises = 0, False  # the signal's number

    def listen(self) -> None:
        """From now on, but for what is ignored (nohup); the caller catches Interrupted."""
        for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._receive)

    def _receive(self, signum: int, _frame: Any) -> None:
        if self.received:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.received = signum
        if self._raises:
            raise Interrupted

    def check(self) -> None:
        if self.received:
            raise Interrupted

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within, a signal raises at once; one noted before, too."""
        self._raises = True
        try:
            self.check()
            yield
        finally:
            self._raises = False


# --- Policy and merge: pure, no clock, no network -------------------------------------------------
# Keys are `str`. Python orders str by code point, which is the order of the UTF-8 bytes, which is
# the order of an S3 listing; and two str are equal exactly if their bytes are.


class Reason(StrEnum):
    """Why a key is in the plan. Of the last two only expired job rows may go, not the object."""

    EXPIRED = "expired"
    ORPHAN = "orphan"
    MISSING = "missing"  # an expired key without an object
    SHARED = "shared"  # a key of expired jobs that remaining jobs refer to as well


class Reference(NamedTuple):
    """A key that `jobs` rows of the job table refer to, `expired` of them being expired jobs."""

    key: str
    jobs: int
    expired: int


class S3Object(NamedTuple):
    """An object in the bucket; size (bytes) and moment (ISO 8601) as S3 spells them."""

    key: str
    size: str
    last_modified: str


class Candidate(NamedTuple):
    """A planned delete; `size` in bytes, `last_modified` in ISO 8601, as it is printed."""

    key: str
    reason: str  # the value of a Reason
    size: int = 0
    last_modified: str = ""
    version_id: str | None = None  # in an undo: of the delete marker to remove


OF_OBJECTS = {Reason.EXPIRED, Reason.ORPHAN}
Pairs = Iterable[tuple[Reference | None, S3Object | None]]
Plan = Iterator[Candidate]


@dataclass(frozen=True)
class Policy:
    """The rules, frozen for the run; all times aware UTC.

    A job completed before `cutoff` (not at it) is expired. An orphan last modified before
    `orphans_before` may go; None keeps all orphans. `rows`: expired job rows may go, too.
    """

    cutoff: datetime
    prefix: str = ""
    orphans_before: datetime | None = None
    rows: bool = False

    def reason(self, reference: Reference | None, found: S3Object | None) -> Reason | None:
        """Why this key belongs in the plan, or None if it does not."""
        if reference is None:
            if found is None or self.orphans_before is None or found.key == self.prefix:
                return None  # a console's "folder" is called like the prefix: it is nobody's data
            modified = datetime.fromisoformat(found.last_modified)
            return Reason.ORPHAN if modified < self.orphans_before else None
        if reference.expired == reference.jobs and found is not None:
            return Reason.EXPIRED
        if not reference.expired or not self.rows:
            return None
        return Reason.SHARED if reference.expired < reference.jobs else Reason.MISSING


def may_go(reason: str, found: Reference | None) -> bool:
    """Whether an object may still go, by what the re-check found of its key. An expired key whose
    rows have vanished since may not: they may come back (a reload)."""
    if reason == Reason.ORPHAN:
        return found is None
    return found is not None and found.expired == found.jobs > 0


class Tally(Counter[str]):
    """Objects counted by reason, and their `bytes`."""

    def __init__(self) -> None:
        super().__init__(expired=0, orphan=0, bytes=0)

    def add(self, item: Candidate) -> None:
        self[item.reason] += 1
        self["bytes"] += item.size

    @property
    def objects(self) -> int:
        return self["expired"] + self["orphan"]


@dataclass
class Totals:
    """What the references and the merge told: the plan's size, and what the guards must know."""

    planned: Tally = field(default_factory=Tally)
    jobs: int = 0  # rows of the table
    nameless: int = 0  # of these, without a sourceData that can be a key
    expired_jobs: int = 0  # of these, expired and naming an object
    expired: int = 0  # expired keys
    missing: int = 0  # of these, without an object
    remaining: int = 0  # distinct keys of remaining jobs
    dangling: int = 0  # of these, without an object, where all are looked for
    listed: int = 0  # objects that the listing gave
    known: int = 0  # of these, referred to by any job
    doubtful: int = 0  # orphans kept for their name


def ascending(items: Iterable[Record], source: str, last: str | None = None) -> Iterator[Record]:
    """The same items. Raises PurgeError where their keys do not ascend, above `last`."""
    for item in items:
        if last is not None and item[0] <= last:
            places = f"{printable(item[0])} came after {printable(last)}"
            raise PurgeError(f"The {source} is out of order: {places}. Nothing more is deleted.")
        last = item[0]
        yield item


def outer_join(references: Iterable[Reference], objects: Iterable[S3Object]) -> Pairs:
    """Pair two streams by key, in constant memory; None where a side lacks the key. Raises
    PurgeError where the listing does not ascend: a referenced object would pass for an orphan."""
    names, found = iter(references), ascending(objects, "bucket's listing")
    reference, item = next(names, None), next(found, None)
    while reference or item:
        if item is None or (reference and reference.key < item.key):
            yield reference, None
            reference = next(names, None)
        elif reference is None or item.key < reference.key:
            yield None, item
            item = next(found, None)
        else:
            yield reference, item
            reference, item = next(names, None), next(found, None)


def plan(pairs: Pairs, policy: Policy, totals: Totals, is_doubtful: Callable[[str], bool]) -> Plan:
    """What may go, in key order; `totals` grows as the plan is drawn. `is_doubtful` tells the keys
    of orphans that a job may mean, though it spells them otherwise."""
    for reference, item in pairs:
        reason = policy.reason(reference, item)
        totals.listed += item is not None
        totals.known += item is not None and reference is not None
        if reference and not item:
            totals.missing += reference.expired == reference.jobs
            totals.dangling += reference.expired < reference.jobs
        if item and reason is Reason.ORPHAN and is_doubtful(item.key):
            totals.doubtful += 1
        elif item and reason in OF_OBJECTS:
            modified = datetime.fromisoformat(item.last_modified).isoformat()
            candidate = Candidate(item.key, reason, int(item.size), modified)
            totals.planned.add(candidate)
            yield candidate
        elif reference and reason:
            yield Candidate(reference.key, reason)


def refusals(totals: Totals, policy: Policy, most: int | None, percent: float) -> Iterator[str]:
    """Why this plan must not be carried out; nothing if it may."""
    planned, orphans = totals.planned.objects, policy.orphans_before is not None
    if most is not None and planned > most:
        yield f"{planned} objects would be deleted, more than --max-objects {most}"
    whole = planned + totals.remaining
    shares = [(planned, whole, "keys that are planned or belong to remaining jobs")]
    shares += [(planned, totals.listed, "objects in the listing")] * orphans
    shares += [(totals.expired_jobs, totals.jobs, "job rows")] * policy.rows
    for part, whole, name in shares:
        if part > whole * percent / 100:
            share = f"{part} of {whole} {name} would be deleted ({100 * part / whole:.1f} %)"
            yield f"{share}, more than --max-percent {percent:g}"
    if orphans and not totals.known and (totals.listed or totals.jobs):
        seen = f"none of the {totals.listed} objects listed is referred to by any of the"
        yield f"--orphans, but {seen} {totals.jobs} jobs: {WRONG_PLACE}"


def clock_refusals(database: timedelta, s3: timedelta) -> Iterator[str]:
    """Why the clocks cannot be trusted; given is by how much these lead this host's."""
    clocks = [(timedelta(), "this host"), (database, "the database"), (s3, "S3")]
    (behind, slow), _, (ahead, fast) = sorted(clocks)
    if ahead - behind > MAX_SKEW:
        apart = f"{(ahead - behind).total_seconds():.0f} seconds ahead of that of {slow}"
        yield f"the clock of {fast} is {apart}, more than {MAX_SKEW}: set the clocks"


def just_before(key: str) -> str:
    """A string below `key` with next to no key between: `StartAfter` excludes what it names. Cut
    before the first character that XML cannot carry, as a listing's answer may repeat it."""
    below = key[:-1] + chr(max(ord(key[-1]) - 1, 0))
    head, seek, odd = key[:-1], f"{below}\U0010ffff", NOT_XML.search(below)
    if odd:
        head = below[: odd.start()]
        seek = head + "\ufffd\U0010ffff" * (odd[0] > "\ufffd")
    return seek if len(seek.encode()) <= KEY_BYTES else head


def printable(key: str) -> str:
    """The key as it is, or as a JSON string where it would not stand on a line unmistakably."""
    plain = key.isprintable() and key == key.strip() and not key.startswith('"')
    return key if plain and key else json.dumps(key)


# --- Streams, ahead of their reader and on disk ---------------------------------------------------


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` consecutive items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def ahead(streams: Iterable[Iterable[T]], width: int, depth: int = 0) -> Iterator[T]:
    """The items of all streams, one stream after the other; up to `width` of them are drawn at the
    same time, each in a thread of its own, `depth` items ahead (0: all). Raises what they raise."""

    def draw(stream: Iterable[T], results: queue.Queue[Any]) -> None:
        try:
            for item in stream:
                results.put((item, None))
            results.put((None, StopIteration()))
        except BaseException as error:
            results.put((None, error))

    waiting, running = iter(streams), deque[queue.Queue[Any]]()
    while True:
        for stream in islice(waiting, width - len(running)):
            running.append(queue.Queue(depth))
            threading.Thread(target=draw, args=(stream, running[-1]), daemon=True).start()
        if not running:
            return
        item, error = running[0].get()
        if error is None:
            yield item
        elif isinstance(error, StopIteration):
            running.popleft()
        else:
            raise error


def no_space(error: Exception) -> PurgeError:
    advice = "Free some space in TMPDIR, or point TMPDIR elsewhere."
    return PurgeError(f"Cannot write a spool file: {error}. {advice}")


class Spool(Generic[Record]):
    """Named tuples in an unnamed file in TMPDIR, which vanishes with the process: written once,
    then read in order as often as needed; safe to read from several threads. Raises PurgeError."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._ends, self._count = [0], 0
        for block in chunks(records, BLOCK):
            self._make: Callable[[Any], Record] = type(block[0])._make  # type: ignore[attr-defined]
            try:
                self._file.write(pickle.dumps([*map(tuple, block)]))
                self._file.flush()
            except OSError as error:
                with suppress(OSError):
                    self._file.close()
                raise no_space(error) from error
            self._count += len(block)
            self._ends.append(self._file.tell())

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Record]:
        return self.slice(0, self._count)

    def slice(self, start: int, end: int) -> Iterator[Record]:
        """The records from one place up to before another."""
        for number in range(start // BLOCK, -(-end // BLOCK)):
            begin, after = self._ends[number : number + 2]
            block = pickle.loads(os.pread(self._file.fileno(), after - begin, begin))
            first = number * BLOCK
            yield from map(self._make, block[max(start - first, 0) : end - first])

    def __getitem__(self, place: int) -> Record:
        return next(self.slice(place, place + 1))

    def has(self, key: str) -> bool:
        """Whether a record has this key, if they ascend by it."""
        place = bisect_left(self, key, key=lambda record: record.key)  # type: ignore[attr-defined]
        return place < len(self) and self[place].key == key  # type: ignore[attr-defined]


# --- MySQL ----------------------------------------------------------------------------------------

# What the server's own settings must not decide. TIMESTAMP columns are converted to the session's
# time zone; a row limit would cut the references short without a word, a short sort length take
# names for one another; some SQL modes change what a string is; the connection that holds the lock
# is idle while the bucket is listed; rows deleted by a transaction that may yet be rolled back are
# still there.
SESSION = (
    "SET time_zone = '+00:00', sql_select_limit = 18446744073709551615, sql_mode = '', "
    "max_sort_length = 8192, wait_timeout = 86400, sql_safe_updates = 0, sql_big_selects = 1, "
    f"innodb_lock_wait_timeout = {LOCK_TIMEOUT}, lock_wait_timeout = {LOCK_TIMEOUT}",
    "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ",
)
# SQL for the UTF-8 bytes of a text column: equal only if identical, and ordered as in S3.
TEXT_BYTES = "CAST(CONVERT({} USING utf8mb4) AS BINARY)"
NAME, ID, TYPE = map(TEXT_BYTES.format, ("`sourceData`", "`jobId`", "`type`"))
# MySQL's error codes (MySQL manual, "Error Message Reference") and what to do.
DATABASE_ADVICE = {
    1044: "Check --db-name, and grant SELECT on the table",
    1045: "With IAM, one of these: the user is not IDENTIFIED WITH AWSAuthenticationPlugin; IAM "
    "authentication is not enabled on the instance; the AWS identity lacks rds-db:connect for this "
    "user and instance; --db-host is an alias (the token is signed for the name given: use the "
    "real endpoint); --region is not the database's; this host's clock is off by minutes. "
    f"With {PASSWORD_VARIABLE}: it is wrong",
    1049: "Check --db-name",
    1142: "Grant SELECT on the table (DELETE only for --delete-jobs)",
    1146: "Check --db-name and --db-table",
    1205: f"Another transaction held the rows for {LOCK_TIMEOUT} seconds; run again to finish",
    1524: "IAM authentication is not enabled on the instance",
    2003: "Check --db-host, --db-port, DNS, and the security group",
    2026: "No secret was sent: the server offers no TLS, or --ca-bundle is outdated (the current "
    f"one: {CA_BUNDLE_URL}), or --db-host is not the real endpoint, or not the server you mean",
}


@contextmanager
def database_errors(doing: str) -> Iterator[None]:
    """Turn what PyMySQL raises into a PurgeError of one line: what was done, why it failed."""
    try:
        yield
    except (pymysql.Error, OSError) as error:
        code = error.args[0] if error.args and isinstance(error.args[0], int) else 0
        detail = str(error.args[-1] if error.args else error) or type(error).__name__
        cause = getattr(error, "original_exception", None)
        if isinstance(cause, ssl.SSLCertVerificationError):
            detail, code = f"its certificate was not accepted ({cause.verify_message})", 2026
        advice = f" {DATABASE_ADVICE[code]}." if code in DATABASE_ADVICE else ""
        raise PurgeError(f"{doing}: {detail.rstrip('.')}.{advice}", code=str(code)) from error


def query(connection: Any, doing: str, sql: str, arguments: Any = None) -> list[tuple[Any, ...]]:
    """The rows of a statement, all at once. Raises PurgeError."""
    with database_errors(doing), connection.cursor() as cursor:
        cursor.execute(sql, arguments)
        return list(cursor.fetchall())


def connect(settings: dict[str, Any]) -> Any:
    """Log in, and let nothing of the server's own settings decide. Raises PurgeError."""
    settings |= {f"{kind}_timeout": CONNECT_TIMEOUT for kind in ("connect", "read", "write")}
    settings |= {"charset": "utf8mb4", "autocommit": True}  # every read sees the table as it is
    with database_errors("Cannot log in to {host}:{port} as {user}".format(**settings)):
        connection: Any = pymysql.connect(**settings)
    # A minute's silence sends a probe: NAT gateways forget idle connections after 350 seconds.
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            connection._sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    for statement in SESSION:
        query(connection, "Cannot set up the database session", statement)
    return connection


def tls_settings(bundle: Path | None, local: bool) -> dict[str, Any]:
    """PyMySQL's arguments for TLS with certificate and host name verified. Only `local`, for a
    password that goes to this machine, and without a CA bundle is TLS left to the server.

    `ssl_verify_identity` is what verifies: `ssl_ca` alone encrypts and trusts anyone. Raises
    PurgeError without a usable CA bundle.
    """
    if bundle is None and local:
        return {}
    bundle = bundle or DEFAULT_CA_BUNDLE
    try:
        ssl.create_default_context(cafile=bundle)
    except OSError as error:  # SSLError too
        fault = "no certificates in it" if isinstance(error, ssl.SSLError) else error.strerror
        advice = f"Download {CA_BUNDLE_URL} to {DEFAULT_CA_BUNDLE.name} beside the script"
        message = (
            f"No CA bundle for the database: {bundle} ({fault}). {advice}, or give --ca-bundle."
        )
        raise PurgeError(message, USAGE) from None
    return {"ssl_ca": str(bundle), "ssl_verify_identity": True}


def take_lock(connection: Any, bucket: str, prefix: str, table: str) -> None:
    """Lock bucket, prefix and table against other runs, until the connection ends.

    Raises PurgeError if another run has the lock, or on a read replica: the lock would not be the
    primary's, and a re-check would see the table as it was some time ago.
    """
    doing = f"Cannot take the lock on {table}"
    if any(query(connection, doing, "SELECT @@global.read_only, @@innodb_read_only")[0]):
        message = "The database is read-only, so it may be a replica: give the primary's host."
        raise PurgeError(message, REFUSED)
    subject = json.dumps([bucket, prefix, table]).encode()
    name = f"retention_purge:{hashlib.sha256(subject).hexdigest()[:40]}"  # 64 characters at most
    sql = "SELECT GET_LOCK(%s, 0), IS_USED_LOCK(%s)"
    ((got, holder),) = query(connection, doing, sql, (name, name))
    if not got:  # 0, or NULL if it failed
        sql = "SELECT HOST, COMMAND, TIME FROM information_schema.PROCESSLIST WHERE ID = %s"
        rows = []
        with suppress(PurgeError):  # MySQL cannot spell everything that others run: error 3854
            rows = query(connection, doing, sql, (holder,))
        facts = [f" of {host} ({command} for {seconds} s)" for host, command, seconds in rows]
        message = "Another run works on the same bucket, prefix and table: database connection "
        message += f"{holder}{''.join(facts)} holds the lock. Try again later."
        raise PurgeError(message, LOCKED)


class JobTable:
    """The job table over one connection, with `cutoff` deciding which jobs are expired. Only
    `delete` writes. All methods raise PurgeError."""

    def __init__(self, connection: Any, name: str, cutoff: datetime) -> None:
        self._connection, self.name = connection, name
        schema, _, table = name.replace("`", "``").rpartition(".")  # a schema may have dots
        self._from = f"FROM `{schema}`.`{table}`"
        moment = cutoff.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")
        in_time = f"`completedAt` >= '{FIRST_TIMESTAMP}' AND `completedAt` < '{moment}'"
        # "This job is expired", 0 or 1: NULL makes the AND NULL, and IS TRUE makes that 0.
        self._expired = f"(({in_time} AND {TYPE} = 'TRIAL') IS TRUE)"
        # Of each name its bytes, jobs and expired jobs.
        counts = f"COUNT(*), COUNT(NULLIF({self._expired}, 0))"
        self._references = f"SQL_BIG_RESULT IFNULL({NAME}, ''), {counts}"
        self._describe()
        # Whether an index leads with `sourceData`, so that a re-check need not scan the table.
        leads = "Column_name = 'sourceData' AND Seq_in_index = 1 AND Index_type = 'BTREE'"
        self.indexed = bool(self._query("SHOW INDEX", f"WHERE {leads}"))

    def _query(self, what: str, rest: str = "", doing: str = "read") -> list[tuple[Any, ...]]:
        sql = f"{what} {self._from} {rest}"
        return query(self._connection, f"Cannot {doing} {self.name}", sql)

    def _describe(self) -> None:
        """Learn how `sourceData` holds text, after a look at all columns."""
        rows = self._query("SHOW FULL COLUMNS")
        columns = {name.lower(): (kind.lower(), collation) for name, kind, collation, *_ in rows}
        for name in ("jobId", "completedAt", "type", "sourceData"):
            if name.lower() not in columns:
                raise PurgeError(f"{self.name} has no column {name}: is it the job table?")
        moment, (kind, self._collation) = columns["completedat"][0], columns["sourcedata"]
        if moment.startswith("datetime"):
            log.warning("completedAt is a DATETIME: its values are taken as UTC")
        elif not moment.startswith("timestamp"):
            raise PurgeError(f"{self.name}.completedAt must be a TIMESTAMP column, not {moment}.")
        self._charset = (self._collation or "").split("_")[0]
        if self._charset not in CHARSETS:
            known = f"a text column in one of {', '.join(CHARSETS)}: it is {kind} {self._charset}"
            raise PurgeError(f"{self.name}.sourceData must be {known}.")
        length = re.search(r"char\((\d+)\)", kind)
        self._length = int(length[1]) if length else KEY_BYTES
        self._strips = kind.startswith("char")  # a CHAR gives no trailing blanks back

    def can_hold(self, name: str) -> bool:
        """Whether `sourceData` can spell the name: if not, a job of it stands there mangled."""
        codec = CHARSETS[self._charset]
        spelt = name.encode(codec, "ignore").decode(codec) == name
        narrow = self._charset in ("utf8", "utf8mb3") and max(name) > "\uffff"
        stripped = self._strips and name.endswith(" ")
        return spelt and len(name) <= self._length and not narrow and not stripped

    def references(self) -> Iterator[Reference]:
        """Each distinct `sourceData`, in byte order, its jobs and expired jobs.

        SQL_BIG_RESULT makes the server sort instead of filling a temporary table keyed by the
        group, five times faster on millions of rows, under any collation and with or without an
        index. Read it at once: a client that stops reading is cut off after net_write_timeout (60
        s), and an open read keeps a snapshot alive.
        """
        self._connection._read_timeout = PLAN_TIMEOUT  # PyMySQL applies it at its next read
        sql = f"SELECT {self._references} {self._from} GROUP BY 1 ORDER BY 1"
        with database_errors(f"Cannot read {self.name}"):
            cursor = self._connection.cursor(pymysql.cursors.SSCursor)
            try:
                cursor.execute(sql)
                while rows := cursor.fetchmany(BLOCK):  # half as dear as one by one
                    for name, jobs, expired in rows:
                        yield Reference(name.decode(), jobs, expired)
            finally:
                # PyMySQL would first read all that is left. The connection is closed instead.
                if cursor._result is not None:
                    cursor._result.unbuffered_active = False
        self._connection._read_timeout = RECHECK_TIMEOUT

    def ping(self) -> None:
        """Keep the connection, and the lock on it, from being cut as idle."""
        query(self._connection, "The database connection is lost", "DO 0")

    def sample(self) -> list[str]:
        """Names of some remaining jobs, from all over the table."""
        some = f"WHERE NOT {self._expired} AND {NAME} <> '' ORDER BY RAND() LIMIT {SAMPLE}"
        return [name.decode() for (name,) in self._query(f"SELECT {NAME}", some)]

    def referenced(self, names: Collection[str]) -> dict[str, Reference]:
        """Those of `names` that jobs refer to at this moment, and by how many."""
        which, doing = f"WHERE {self._among(names)} GROUP BY 1", "re-check references in"
        rows = self._query(f"SELECT {self._references}", which, doing)
        found = (Reference(name.decode(), jobs, expired) for name, jobs, expired in rows)
        return {item.key: item for item in found if item.key in names}

    def _among(self, names: Iterable[str]) -> str:
        """SQL that finds a superset of the jobs of these names under any collation, through an
        index if there is one. A name that the column's character set cannot spell becomes another,
        which is right: no row can hold it. Whoever asks compares the bytes of the answer."""
        form = f"CONVERT(%s USING {self._charset}) COLLATE {self._collation}"
        form = "%s" if self._charset == "utf8mb4" else form  # that of the connection
        escaped = map(self._connection.escape, names)
        return f"`sourceData` IN ({','.join(form % name for name in escaped)})"

    def expired_rows(self, names: Collection[str]) -> list[tuple[str, str, str]]:
        """Of up to ROWS expired jobs of these names jobId, completedAt and sourceData."""
        exact = ",".join(map(self._connection.escape, names))
        which = f"WHERE {self._among(names)} AND {NAME} IN ({exact}) AND {self._expired}"
        what = f"SELECT `jobId`, CAST(`completedAt` AS CHAR), {NAME}"
        rows = self._query(what, f"{which} LIMIT {ROWS}", "read the expired jobs in")
        return [(job_id, moment, name.decode()) for job_id, moment, name in rows]

    def delete(self, rows: list[tuple[str, str, str]]) -> int:
        """Delete these jobs, if they are as they were read and still expired; how many were."""
        escaped = self._connection.escape
        ids = ",".join(escaped(job_id) for job_id, _, _ in rows)
        pairs = ",".join(f"({escaped(job_id)},{escaped(name)})" for job_id, _, name in rows)
        which = f"WHERE `jobId` IN ({ids}) AND {self._expired} AND ({ID}, {NAME}) IN ({pairs})"
        with database_errors(f"Cannot delete from {self.name}"):
            return int(self._connection.cursor().execute(f"DELETE {self._from} {which}"))

    def row_refusals(self) -> Iterator[str]:
        """Why job rows cannot be deleted, if so. EXPLAIN asks for the rights of the statement that
        it explains, and does nothing; on a read-only server (a dry run's) it tells nothing.

        Warns of tables that a DELETE opens besides, for ON DELETE CASCADE or a trigger. No view
        shows them to a user without rights on them, but the second EXPLAIN counts them.
        """
        opened, status = [], "SHOW SESSION STATUS LIKE 'Table_open_cache%s'"
        try:
            for _ in range(2):
                self._query("EXPLAIN DELETE", "WHERE FALSE", "check the right to delete from")
                rows = query(self._connection, "Cannot count open tables", status % "%")
                opened.append(sum(int(n) for name, n in rows if not name.endswith("overflows")))
        except PurgeError as error:
            if error.code == "1142":
                yield f"--delete-jobs, but the user has no DELETE on {self.name}: grant it"
            elif error.code != "1290":
                raise
            return
        if opened[1] - opened[0] > 1:
            others = "a foreign key with ON DELETE CASCADE, or a trigger, may change them"
            log.warning("a DELETE in %s opens other tables: %s", self.name, others)


def read_references(jobs: JobTable, policy: Policy, totals: Totals) -> Iterator[Reference]:
    """What the table says of each key, counted; given are the keys that the run must know: those of
    expired jobs, with --orphans all. Most of a table is of remaining jobs."""

    every = policy.orphans_before is not None
    for name, count, expired in ascending(jobs.references(), "list of the table's keys"):
        key = policy.prefix + name
        totals.jobs += count
        if not name or len(key.encode()) > KEY_BYTES:
            totals.nameless += count
            continue
        totals.expired_jobs += expired
        totals.expired += expired == count
        totals.remaining += expired < count
        if every or (expired if policy.rows else expired == count):
            yield Reference(key, count, expired)
    if totals.nameless:
        log.warning("%d jobs have no sourceData that can be a key", totals.nameless)


# --- S3 -------------------------------------------------------------------------------------------

# Of each operation the root of its answer; DeleteObject is answered by a status alone.
ROOTS: dict[str, str | int] = {
    "ListObjectsV2": "ListBucketResult",
    "DeleteObjects": "DeleteResult",
    "DeleteObject": 204,
    "ListObjectVersions": "ListVersionsResult",
    "GetBucketVersioning": "Versioning",
}
# Of an object in a listing.
MOMENT = r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(?:\.\d+)?Z"
PATTERNS = {"Key": "[^<]*", "Size": "[0-9]+", "LastModified": MOMENT}
COLUMNS = [re.compile(f"<{tag}>({content})</{tag}>", re.ASCII) for tag, content in PATTERNS.items()]
OBJECTS = re.compile("<Contents>.*</Contents>", re.DOTALL)
# S3's codes (S3 API reference, "List of error codes") and what to do.
BUCKET_ADVICE = {
    "NoSuchBucket": "Check --bucket.",
    "ExpiredToken": "The AWS credentials ended; run again with fresh ones.",
    "InvalidAccessKeyId": "The AWS access key does not exist: check --profile, the credentials.",
    "SignatureDoesNotMatch": "The AWS secret key is not that of the access key.",
    "PermanentRedirect": "Check --region: the bucket is in another one.",
    "RequestTimeTooSkewed": "Set this host's clock.",
}


class Page(NamedTuple):
    """One ListObjectsV2 answer; `token` continues the listing, None at its end."""

    objects: list[S3Object]
    token: str | None
    bucket: str
    begins: list[str]  # where, as it was asked for: after a key, or with a token

    @property
    def last(self) -> str:
        return self.objects[-1].key if self.objects else ""


class Version(NamedTuple):
    """A version of a key, or a delete marker on it; `modified` aware UTC."""

    version_id: str
    modified: datetime
    is_latest: bool
    is_marker: bool

    def hides(self, since: datetime, until: datetime) -> bool:
        """Whether it is a delete marker that hides its key, set between these moments of S3's
        clock. S3 keeps whole seconds, and its clock is known to a second."""
        in_time = since - timedelta(seconds=2) <= self.modified <= until
        return self.is_marker and self.is_latest and in_time


class Verdict(NamedTuple):
    """What S3 said of one key: deleted if there is no `code`, or why not; `marker` is the version
    id of the delete marker, in a versioned bucket."""

    code: str = ""
    message: str = ""
    marker: str | None = None


class Bucket:
    """One bucket below one prefix; safe to use from several threads. Every answer must be what was
    asked for, whole: an empty or foreign body would parse to an empty listing. All methods raise
    PurgeError."""

    def __init__(self, session: boto3.Session, report: Report, workers: int, stop: Stop) -> None:
        self.name, self.prefix = report.bucket, report.prefix
        self.workers, self._report, self.stop = workers, report, stop
        self._counting, self._thread = threading.Lock(), threading.local()
        self._read = self._client(session, LIST_TIMEOUT, attempts=5)
        # A delete is not repeated by botocore: each try needs a new re-check of its own.
        self._write = self._client(session, DELETE_TIMEOUT, attempts=1)

    def _client(self, session: boto3.Session, timeout: int, attempts: int) -> Any:
        config = Config(
            retries={"mode": "standard", "total_max_attempts": attempts},
            max_pool_connections=4 * self.workers,
            connect_timeout=S3_CONNECT_TIMEOUT,
            read_timeout=timeout,
            parameter_validation=False,  # half of the CPU of a DeleteObjects
        )
        with bucket_errors(f"Cannot use S3 for bucket {self.name}"):
            client = session.client("s3", config=config)
        # The wildcard puts it before botocore's own parse of the body for errors.
        client.meta.events.register_first("before-parse.*", read_answer)
        client.meta.events.register("before-send.s3", self._leave)
        return client

    def _leave(self, event_name: str, **_: Any) -> None:
        """Event `before-send`: the request is signed, which may have refreshed credentials for a
        minute, and would leave now. Raises if it must not."""
        operation, report = event_name.rpartition(".")[2], self._report
        deletes = operation.startswith("Delete")
        age = time.monotonic() - self._thread.checked if deletes else 0.0
        if age > MAX_RECHECK_AGE:
            message = f"its re-check was {age:.0f} s old when it would have left"
            raise PurgeError(message, code="NotSent")
        if not deletes:
            self.stop.check()
        with self._counting:
            report.requests["list"] += operation.startswith("List")
            report.requests["delete"] += deletes
            if deletes and not report.undoes:
                oldest = report.max_recheck_age_seconds or 0.0
                report.max_recheck_age_seconds = max(oldest, round(age, 3))

    def look(self) -> None:
        """Learn the bucket's versioning, and by how much S3's clock leads this host's."""
        doing = f"Cannot read the versioning of bucket {self.name}"
        with bucket_errors(doing, "s3:GetBucketVersioning"):
            answer = self._read.get_bucket_versioning(Bucket=self.name)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        if date is None:
            raise PurgeError("S3's answer has no Date header: is this S3?")
        self._report.versioning = answer.get("Status", "off").lower()
        self.s3_lead = parsedate_to_datetime(date) - datetime.now(UTC)

    def page(
        self, after: str = "", limit: int = PAGE, token: str | None = None, prefix: str = ""
    ) -> Page:
        """Up to `limit` objects after the key `after`, where `token` may continue the listing. At
        least one, but at its end: a page without keys that has a token is followed."""
        while True:
            where: Any = {"ContinuationToken": token} if token else {"StartAfter": after}
            where |= {"Prefix": prefix or self.prefix, "MaxKeys": limit}
            with bucket_errors(f"Cannot list bucket {self.name}", "s3:ListBucket"):
                answer = self._read.list_objects_v2(Bucket=self.name, **where)
            page: Page = answer["Page"]
            self._check(page, after, token or after)
            if page.objects or page.token is None:
                if not prefix:  # nothing lies between these, which spares other parts a request
                    end = page.last or after, END
                    self._gap = (after, page.objects[0].key) if page.token else end
                return page
            token = page.token

    def _check(self, page: Page, after: str, asked: str) -> None:
        """Raises PurgeError if the page is not the one asked for, above `after`, in order."""
        keys = [item.key for item in ascending(page.objects, "bucket's listing", after)]
        foreign = [key for key in keys[:1] + keys[-1:] if not key.startswith(self.prefix)]
        # An access point's ARN or alias is answered with another name.
        if page.bucket != self.name and re.fullmatch(r"(?!.*-s3alias$)[a-z0-9.-]+", self.name):
            foreign.append(f"of {page.bucket}")
        if page.begins and asked not in page.begins:
            foreign.append(f"after {page.begins[0]}")
        if foreign:
            strange = printable(foreign[0])
            raise PurgeError(f"The listing of {self.name} gave {strange}, which was not asked for.")

    def exists(self, key: str) -> bool:
        """The key itself sorts first among those that it is a prefix of."""
        return [item.key for item in self.page(limit=1, prefix=key).objects] == [key]

    def objects(self, references: Spool[Reference], whole: bool) -> Iterator[S3Object]:
        """All objects if `whole`, else at least those that the references name, in order. These cut
        the listing into parts, of which some are listed at the same time: about as many requests
        as there are references, however large the bucket is, or as it has pages where they lie
        densely."""
        count = len(references)
        first = self.page("" if whole or not count else just_before(references[0].key))
        if first.token is None or not (whole or count):
            yield from first.objects
            return
        near = [reference.key for reference in references.slice(0, min(count, PAGE))]
        dense = whole or is_dense(bisect_right(near, first.last), first)
        # A page keeps the CPU busy and the memory full, a seek mostly waits.
        width = self.workers if dense else 4 * self.workers
        size = max(min(count, LISTED_AHEAD if whole else SOUGHT_AHEAD) // width, 1)

        def part(start: int) -> Iterator[list[S3Object]] | None:
            keys = [item.key for item in references.slice(start, min(start + size, count))]
            low = references[start - 1].key if start else ""
            if whole:
                keys = [END[1:] if start + size >= count else keys[-1]]
            begin, end = self._gap  # both at once: other threads replace it
            if begin <= low and keys[-1] < end:
                return None
            return self._part(low, keys, whole, PAGE if dense else SEEK)

        parts = filter(None, map(part, range(0, max(count, 1), size)))
        yield from chain.from_iterable(ahead(parts, width, PAGES_AHEAD if whole else 0))

    def _part(self, low: str, keys: list[str], whole: bool, limit: int) -> Iterator[list[S3Object]]:
        """The objects above `low`, up to the last of the sorted `keys`; if not `whole` those with
        one of the keys: each request leaps to the next one. The first lists `limit` objects."""
        wanted, place, token = {*keys}, 0, None
        after = just_before(low) if NOT_XML.search(low) else low
        while place < len(keys):
            if not whole and (token is None or just_before(keys[place]) > after):
                after, token = just_before(keys[place]), None
            page = self.page(after, limit, token)
            known = [item for item in page.objects if low < item.key <= keys[-1]]
            yield known if whole else [item for item in known if item.key in wanted]
            if page.token is None:
                return
            after, token, sought = page.last, page.token, place
            place = bisect_right(keys, after, place)
            limit = PAGE if whole or is_dense(place - sought, page) else SEEK

    def each(self, ask: Callable[[str], T], keys: Iterable[str]) -> Iterator[T]:
        """The answers for some keys, in their order, asked for at the same time."""
        return ahead((map(ask, [key]) for key in keys), 4 * self.workers)

    def versions(self, key: str) -> list[Version]:
        """The newest versions and delete markers of a key, the latest first."""
        doing = f"Cannot list the versions in bucket {self.name}"
        with bucket_errors(doing, "s3:ListBucketVersions"):
            answer: Any = self._read.list_object_versions(Bucket=self.name, Prefix=key, MaxKeys=50)
        if answer.get("EncodingType") != "url" and NOT_XML.search(key):
            raise PurgeError(f"{doing}: the server cannot spell {printable(key)}.")
        # The key's own versions come first, before those of keys that it is a prefix of. Of two of
        # the same second a marker counts as the later one: nothing is restored on a guess.
        found = [
            Version(item["VersionId"], item["LastModified"], item["IsLatest"], kind != "Versions")
            for kind in ("Versions", "DeleteMarkers")
            for item in answer.get(kind, [])
            if item["Key"] == key
        ]
        return sorted(found, key=lambda it: (it.is_latest, it.modified, it.is_marker), reverse=True)

    def delete(self, items: list[Candidate], checked: float) -> list[Verdict]:
        """Ask S3 to delete the keys in one request, by a re-check begun at `checked` (monotonic
        seconds); exactly one verdict for each, in their order.

        A key that S3 does not have is answered as deleted. Raises NotSent if the re-check was too
        old, PurgeError if the request failed as a whole: then any of the keys may be gone.
        """
        self._thread.checked = checked
        right = "s3:DeleteObjectVersion" if items[0].version_id else "s3:DeleteObject"
        names: Any = [{"Key": item.key, "VersionId": item.version_id} for item in items]
        with bucket_errors(f"Cannot delete in bucket {self.name}", right):
            if NOT_XML.search(items[0].key):
                return [self._delete_single(names[0])]
            answer = self._write.delete_objects(Bucket=self.name, Delete={"Objects": names})
        done = answer.get("Deleted", [])
        verdicts = {it.get("Key"): Verdict(marker=it.get("DeleteMarkerVersionId")) for it in done}
        for it in answer.get("Errors", []):  # of two answers to a key the error counts
            verdicts[it.get("Key")] = Verdict(it.get("Code") or "unknown", it.get("Message", ""))
        silence = Verdict("NoAnswer", "S3's answer does not mention the key")
        return [verdicts.get(item.key, silence) for item in items]

    def _delete_single(self, name: Any) -> Verdict:
        try:
            answer = self._write.delete_object(Bucket=self.name, **name)
        except aws.ClientError as error:  # a verdict on this key, not on the request as a whole
            facts = error.response.get("Error", {})
            return Verdict(facts.get("Code") or "unknown", facts.get("Message", ""))
        return Verdict(marker=answer.get("VersionId"))


def is_dense(references: int, page: Page) -> bool:
    """Whether so many references on a page are worth its parsing; the first of them was sought."""
    return (references - 1) * PAGE >= SPARSE * (len(page.objects) - 1)


def batches(items: Iterable[Candidate]) -> Iterator[list[Candidate]]:
    """Cut keys into requests: up to 1,000, or a single one that XML cannot carry."""
    for odd, group in groupby(items, key=lambda item: NOT_XML.search(item.key) is not None):
        yield from chunks(group, 1 if odd else BATCH)


def read_answer(operation_model: Any, response_dict: Any, **more: Any) -> None:
    """Event `before-parse`: check that the body is an answer to the operation, and parse a listing,
    as botocore accepts whatever is well-formed, and spends most of its time on timestamps. One that
    is not what S3 documents becomes a 500 with the code InvalidAnswer, which is tried again."""
    wanted, status = ROOTS.get(operation_model.name), response_dict["status_code"]
    if wanted is None or status >= 300 or status == wanted:
        return
    try:
        body = response_dict["body"].decode()
        root = re.match(r"\s*(?:<\?xml[^>]*\?>\s*)?<([\w:]+)[^>]*?(/?)>", body)
        if root and root[1] == "Error":
            return  # botocore knows these: S3 answers 200 before it knows that it fails
        if not root or str(wanted) not in root[1]:
            raise ValueError(f"no <{wanted}>")
        if not root[2] and not body.rstrip().endswith(f"</{root[1]}>"):
            raise ValueError("the end is missing")
        if wanted == "ListVersionsResult":
            only("IsTruncated", body)
        if wanted == "ListBucketResult":
            more["customized_response_dict"]["Page"] = parse_listing(body)  # added to its result
            response_dict["body"] = b""
    except (ElementTree.ParseError, ValueError) as error:
        log.debug("invalid answer from S3: %s", error)
        fault = f"<Code>InvalidAnswer</Code><Message>{type(error).__name__}</Message>"
        response_dict.update(status_code=500, body=f"<Error>{fault}</Error>".encode())


def parse_listing(body: str) -> Page:
    """ListBucketResult -> Page. botocore asks for EncodingType=url, so keys are percent-encoded. By
    pattern, in a third of the time of an XML parser; that the body is whole is seen from its end,
    from KeyCount, and from every object having each column once."""
    frame = OBJECTS.sub("", body)
    raw, sizes, moments = columns = [column.findall(body) for column in COLUMNS]
    count = int(only("KeyCount", frame))
    if any(len(column) != count for column in columns) or body.count("<Contents>") != count:
        raise ValueError("an object without key, size or date, or not as many as KeyCount says")
    keys = list(map(plain, raw))
    if "<EncodingType>url</EncodingType>" in frame:
        keys = [unquote_plus(k, errors="strict") if "%" in k or "+" in k else k for k in keys]
    token = None if only("IsTruncated", frame) == "false" else only("NextContinuationToken", frame)
    begins = re.findall("<(?:StartAfter|ContinuationToken)>([^<]*)<", frame)
    asked = [spelled for where in map(plain, begins) for spelled in (where, unquote_plus(where))]
    return Page(list(map(S3Object, keys, sizes, moments)), token, only("Name", frame), asked)


def only(tag: str, text: str) -> str:
    """The text of the only element that is called so."""
    found = re.findall(f"<{tag}>([^<]*)</{tag}>", text)
    if len(found) != 1:
        raise ValueError(f"{len(found)} <{tag}>")
    return plain(found[0])


def plain(text: str) -> str:
    """Character data without its XML escapes."""
    return (ElementTree.fromstring(f"<x>{text}</x>").text or "") if "&" in text else text


@contextmanager
def bucket_errors(doing: str, right: str = "") -> Iterator[None]:
    """Turn what botocore raises into a PurgeError of one line: what was done, why it failed.
    `right` is the IAM permission that it takes."""
    try:
        yield
    except aws.ClientError as error:
        facts = error.response.get("Error", {})
        code, message = facts.get("Code") or "unknown", facts.get("Message") or ""
        advice = f"The AWS identity needs {right}." if code == "AccessDenied" else ""
        advice = advice or BUCKET_ADVICE.get(code, "")
        raise PurgeError(f"{doing}: {code}: {message.rstrip('.')}. {advice}", code=code) from error
    except (aws.HTTPClientError, aws.ConnectionError, ResponseParserError) as error:
        raise PurgeError(f"{doing} (check network, --region): {error}", code="NoAnswer") from error


# --- Report: what is counted, printed, logged and returned ----------------------------------------

# What the numbers of the summary mean, and what may come next.
MEANINGS = {
    "cutoff": ": TRIAL jobs completed before it are expired",
    "retained": " planned, but a job refers to them by now, or their jobs have vanished",
    "retained in an undo": " cannot be brought back; the log says why",
    "not_attempted": " planned, but the run stopped",
    "missing": " expired keys have no object",
    "missing in an undo": " have an object already",
    "dangling": " keys of remaining jobs have no object: it may be lost data",
}
ADVICE = {
    "enabled": "The bucket is versioned: a delete hides an object; its space is freed when a\n"
    "lifecycle rule expires old versions. Only a run with --audit-log can be undone.",
    "suspended": "Versioning is suspended: objects written since are gone once deleted, older\n"
    "ones are hidden behind a delete marker.",
    "restored": "The next purge deletes these keys again, unless its schedule is stopped or an\n"
    "OFFICIAL job refers to them.",
}


@dataclass
class Report:
    """The run in numbers: the summary of the Contract, field by field. Every planned key ends as
    one of deleted, failed, retained, and in a run that was stopped as not attempted. What is not
    known (yet) is None."""

    run_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    version: str = VERSION
    mode: str = "purge"  # or dry-run, undo, undo-dry-run
    bucket: str = ""
    prefix: str = ""
    table: str | None = None
    cutoff: str | None = None
    versioning: str | None = None
    planned: dict[str, int] | None = None
    deleted: Tally = field(default_factory=Tally)  # in an undo "restored"
    retained: int = 0
    failed: int = 0
    not_attempted: int | None = None
    missing: int | None = None
    dangling: int | None = None
    jobs_deleted: int = 0
    recoverable: bool | None = None
    requests: dict[str, int] = field(default_factory=lambda: {"list": 0, "delete": 0})
    max_recheck_age_seconds: float | None = None
    seconds: float = field(default_factory=time.monotonic)  # first the moment of the start
    exit_code: int = 0
    error: str | None = None

    @property
    def undoes(self) -> bool:
        return self.mode.startswith("undo")

    def plan(self, totals: Totals, whole: bool = False, rows: bool = False) -> None:
        """The plan is complete; `whole` if all objects were listed, `rows` if job rows may go."""
        self.planned = {**totals.planned, "jobs": totals.expired_jobs if rows else 0}
        self.missing, self.dangling = totals.missing, totals.dangling if whole else None

    def end(self, error: PurgeError | None) -> None:
        """Exit code: of the first error; else 4 if some keys failed, 0 done or nothing to do."""
        if self.error is None:
            self.error = None if error is None else error.message
            self.exit_code = error.exit_code if error else SOME_FAILED if self.failed else 0

    def as_dict(self) -> dict[str, Any]:
        facts = vars(self) | {"seconds": round(time.monotonic() - self.seconds, 3)}
        if self.planned is not None:
            ended = self.deleted.objects + self.failed + (0 if self.undoes else self.retained)
            planned = self.planned["expired"] + self.planned["orphan"]
            facts["not_attempted"] = 0 if self.mode.endswith("dry-run") else planned - ended
        name = {"deleted": "restored"} if self.undoes else {}
        return {name.get(key, key): value for key, value in facts.items()}

    def as_text(self) -> str:
        """The same for an operator: a line for each fact that is known and was asked for."""
        facts, lines = self.as_dict() | {"bucket": f"s3://{self.bucket}/{self.prefix}"}, []
        hidden = {"prefix", "version", "recoverable", "error"}
        if self.mode.endswith("dry-run"):
            hidden |= {"deleted", "restored", "retained", "failed", "not_attempted", "jobs_deleted"}
        if not (self.planned and self.planned["jobs"]):
            hidden |= {"jobs", "jobs_deleted"}
        if self.dangling is None and not self.undoes:
            hidden.add("orphan")
        for name in [name for name in facts if name not in hidden and facts[name] is not None]:
            text = facts[name]
            if isinstance(text, dict):
                counts = [(n, what) for what, n in text.items() if what not in hidden]
                text = ", ".join(f"{n} {what}{in_units(n, what)}" for n, what in counts)
            meaning = MEANINGS.get(f"{name} in an undo" if self.undoes else name, "")
            lines.append(f"{name.replace('_', ' '):<24}{text}{meaning}")
        advice = ("restored" if self.deleted.objects else "") if self.undoes else self.versioning
        return "\n".join(lines + [ADVICE[key] for key in (advice or "",) if key in ADVICE])


def in_units(count: int, what: str) -> str:
    """Many bytes in larger units, as a remark."""
    unit = min((max(count, 1).bit_length() - 1) // 10, 4) if what == "bytes" else 0
    return f" ({count / 1024**unit:.1f} {'KMGT'[unit - 1]}iB)" if unit else ""


def watched(items: Iterable[T], phase: str, total: int = 0, minutely: Any = list) -> Iterator[T]:
    """The same items, `total` if known. Says on standard error how far they are, and how fast: by a
    progress bar on a terminal, else (a cron log) by a line a minute. Calls `minutely` as often."""
    started = told = time.monotonic()
    shows = sys.stderr.isatty() and log.isEnabledFor(logging.INFO)
    settings: Any = {"show_pos": True, "item_show_func": lambda rate: rate, "file": sys.stderr}
    with click.progressbar(repeat(""), total or None, phase, hidden=not shows, **settings) as bar:
        for count, item in enumerate(items, 1):
            if count % 100 == 0 or count == total:
                now = time.monotonic()
                rate = count / max(now - started, 0.001)
                bar.update(count - bar.pos, f"{rate:,.0f}/s")
                if now - told >= 60:
                    told = now
                    minutely()
                    left = f" of {total:,}, {(total - count) / rate:,.0f} s left" if total else ""
                    if not shows:
                        log.info("%s: %s%s, %s/s", phase, f"{count:,}", left, f"{rate:,.0f}")
            yield item


class Ledger:
    """Accounts for every key: in the report, in the audit log, causes of failure also on standard
    error, the same on many keys in one line.

    The audit log is JSON Lines, appended: `start`; `plan`; for each key `delete` (the intent, on
    disk before its request leaves) and `deleted`, `failed` or `retained`; for each job row
    `delete-job` (the intent); `end` with the summary. An undo writes `restore` and `restored`.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        self._file: io.FileIO | None = None
        self._broken: OSError | None = None
        self._causes: dict[str, list[str]] = {}  # what happened -> the keys, the first three
        self._counts: Counter[str] = Counter()

    def start(self, path: Path, settings: dict[str, Any]) -> None:
        """Raises PurgeError if the file cannot be appended to."""
        try:
            self._file = io.FileIO(path, "a+", opener=lambda name, how: os.open(name, how, 0o600))
            if self._file.seek(0, os.SEEK_END):
                self._file.seek(-1, os.SEEK_END)
                if self._file.read() != b"\n":  # a run that was killed left its last line cut
                    self._file.write(b"\n")
        except OSError as error:
            message = f"Cannot write the audit log {path}: {error.strerror}."
            raise PurgeError(message, USAGE) from error
        names = ("version", "mode", "bucket", "prefix", "table")
        facts = {name: getattr(self.report, name) for name in names}
        self.write("start", [{**facts, "options": settings}], sync=True)

    def write(self, event: str, items: Iterable[dict[str, Any]], sync: bool = False) -> None:
        """Append a line for each item. After a failed write nothing more is: the log ends where it
        broke. Raises PurgeError then, and ever after."""
        if self._file is None:
            return
        head = {"event": event, "run_id": self.report.run_id, "time": datetime.now(UTC).isoformat()}
        try:
            if self._broken is not None:
                raise self._broken
            lines = "".join(json.dumps(head | item, default=str) + "\n" for item in items).encode()
            while lines:
                lines = lines[self._file.write(lines) :]
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._broken = error
            reason = f"Cannot write the audit log: {error.strerror}. Mend that and run again."
            raise PurgeError(reason) from error

    def intend(self, items: list[Candidate]) -> None:
        """Put the keys on disk, before their request. Raises PurgeError if that fails."""
        event = "restore" if self.report.undoes else "delete"
        self.write(event, map(facts_of, items), sync=True)

    def deleted(self, item: Candidate, marker: str | None) -> None:
        self.report.deleted.add(item)
        done = "restored" if self.report.undoes else "deleted"
        self._note(done, item, {"version_id": marker} if marker else {})

    def retained(self, item: Candidate, why: str) -> None:
        self.report.retained += 1
        self._note("retained", item, {"message": why})

    def failed(self, item: Candidate, verdict: Verdict) -> None:
        self.report.failed += 1
        self._note("failed", item, {"code": verdict.code, "message": verdict.message})

    def _note(self, event: str, item: Candidate, more: dict[str, Any]) -> None:
        if self._file is not None:
            with suppress(PurgeError):  # the next intent, or the end, will say so
                self.write(event, [facts_of(item) | more])
        if "message" in more:
            cause = " ".join(f"{event}: {': '.join(more.values())}".split())
            if len(self._causes) >= 20 and cause not in self._causes:
                cause = f"{event}: other causes"
            self._counts[cause] += 1
            keys = self._causes.setdefault(cause, [])
            keys += [printable(item.key)] * (len(keys) < 3)

    def end(self) -> None:
        """Close the log with the summary. Raises PurgeError if the log has a gap."""
        self.write("end", [self.report.as_dict()], sync=True)

    def tell_causes(self) -> None:
        for cause, keys in self._causes.items():
            more = ", ..." if self._counts[cause] > len(keys) else ""
            level = logging.ERROR if cause.startswith("failed") else logging.WARNING
            log.log(level, "%d keys %s (%s%s)", self._counts[cause], cause, ", ".join(keys), more)


def facts_of(item: Candidate) -> dict[str, Any]:
    return {name: fact for name, fact in item._asdict().items() if fact is not None}


# --- Rounds: the plan is carried out --------------------------------------------------------------

NOT_SENT = Verdict("NotSent", "the run stopped before its request left")


class Pace:
    """When the next request may leave. All leave through one thread, so all workers ease off alike.

    `rate` is in objects per second, 0 for no limit: a token bucket that holds one batch. `clock` is
    monotonic, in seconds.
    """

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self._clock = rate, clock
        self._filled = 0.0  # when the bucket is full again
        self._pause = self._until = 0.0

    @property
    def delay(self) -> float:
        """Seconds until the next request may leave."""
        return max(0.0, self._filled - self._clock(), self._until - self._clock())

    def sent(self, objects: int) -> None:
        if self.rate:
            self._filled = max(self._filled, self._clock()) + objects / self.rate

    def answered(self, again: bool) -> None:
        """After a retryable failure (`again`): pause before the next request, longer each time.
        Answers to requests that left before the pause do not make it longer."""
        if not again:
            self._pause /= 2
        elif self._clock() >= self._until:
            self._pause = min(max(self._pause * 2, FIRST_PAUSE), LAST_PAUSE)
            self._until = self._clock() + self._pause * random.uniform(0.5, 1)  # jitter


@dataclass(slots=True)
class Tried:
    """What became of a key's requests so far; `since` is the moment of its first intent."""

    since: datetime | None = None
    tries: int = 0
    lost: bool = False  # one of them may yet take effect
    verdict: Verdict = NOT_SENT


class Rounds:
    """Carries out a plan, one round after the other: re-check, intent, request, wait, account; the
    same again with what may be tried again; then the job rows. This thread decides, others send.

    With an index each batch is re-checked just before its own request, without one query serves the
    round. In an undo there are no `jobs`, and nothing to re-check.
    """

    def __init__(self, bucket: Bucket, ledger: Ledger, pace: Pace, jobs: JobTable | None) -> None:
        self._bucket, self._ledger, self._stop, self._pace = bucket, ledger, bucket.stop, pace
        self._jobs, self._advised, self._start = jobs, False, len(bucket.prefix)
        self._scans = jobs is not None and not jobs.indexed
        self._in_flight = 0
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()  # of _request, for _settle

    def run(self, plan: Spool[Candidate], rows: bool = False) -> None:
        """Each candidate ends as deleted, failed or retained in the ledger; `rows`: with job rows.

        Raises PurgeError, or Interrupted, if the run had to stop: what was in flight is finished
        and accounted for, the rest of the plan not attempted.
        """

        def ended() -> Iterator[Candidate]:
            for items in self._cut(plan):
                self._round(items)
                if self._jobs is not None and rows:
                    self._delete_rows(items, self._jobs)
                yield from items

        deque(watched(ended(), "deleting" if self._jobs else "restoring", len(plan)), maxlen=0)

    def _cut(self, plan: Iterable[Candidate]) -> Iterator[list[Candidate]]:
        """Cut the plan where the SQL, the memory or a re-check's age would grow too large."""
        most = ROUND_KEYS if self._scans else self._bucket.workers * BATCH
        if self._scans and self._pace.rate:
            most = min(most, self._pace.rate * ROUND_SECONDS)
        items, size = list[Candidate](), 0
        for item in plan:
            items.append(item)
            size += 2 * len(item.key.encode()) + 16
            if len(items) >= most or size > ROUND_BYTES:
                yield items
                items, size = [], 0
        yield items

    def _round(self, items: list[Candidate]) -> None:
        # Keys of the round without an end yet; names whose object was deleted in it.
        self._pending = {item: Tried() for item in items if item.reason in OF_OBJECTS}
        self._gone = set[str]()
        try:
            while self._pending:
                self._attempt()
                self._look_up_lost()
                self._give_up(ATTEMPTS)
        finally:
            while self._in_flight:
                with suppress(Exception, Interrupted):  # the run stops already, for the first one
                    self._settle()
            self._give_up(1)

    def _attempt(self) -> None:
        """One request for each key of the round that has no end yet, or none if it must stay, or if
        the re-check has grown too old to serve it."""
        checked = 0.0
        for batch in batches([*self._pending]):
            while self._in_flight >= self._bucket.workers:
                self._settle()
            with self._stop.reading():
                time.sleep(self._pace.delay)
                if checked and self._scans and self._jobs is not None:
                    self._jobs.ping()  # the lock may be lost
            if not checked or not self._scans:
                checked = self._recheck([*self._pending] if self._scans else batch)
            elif time.monotonic() - checked > MAX_RECHECK_AGE:
                break
            self._send([item for item in batch if item in self._pending], checked)
        while self._in_flight:
            self._settle()

    def _recheck(self, items: list[Candidate]) -> float:
        """Ask the table again; keys that must stay get their end. When it was asked."""
        asked = time.monotonic()
        if self._jobs is None:
            return asked
        with self._stop.reading():
            found = self._jobs.referenced({item.key[self._start :] for item in items})
        seconds, advice = time.monotonic() - asked, "make an index on sourceData"
        if seconds > MAX_RECHECK_AGE:
            limit = f"{MAX_RECHECK_AGE} seconds, too long to delete by it"
            raise PurgeError(f"A re-check took more than {limit}: {advice}.")
        if seconds > DEAR_RECHECK and self._scans and not self._advised:
            self._advised = True
            log.warning("a re-check took %.1f s: %s", seconds, advice)
        for item in items:
            reference = found.get(item.key[self._start :])
            if may_go(item.reason, reference):
                continue
            why = "a job refers to it by now" if reference else "its jobs have vanished"
            if self._pending[item].lost:
                self._failed(item, Verdict("", why))
            else:
                del self._pending[item]
                self._ledger.retained(item, why)
        return asked

    def _send(self, items: list[Candidate], checked: float) -> None:
        """Write the intents, and let the request go."""
        if not items:
            return
        now = datetime.now(UTC)
        self._ledger.intend(items)
        for item in items:
            tried = self._pending[item]
            tried.since, tried.tries, tried.verdict = tried.since or now, tried.tries + 1, NOT_SENT
        try:
            threading.Thread(target=self._request, args=(items, checked)).start()
        except RuntimeError as error:
            raise PurgeError(f"Cannot start a thread ({error}): lower --workers.") from error
        self._in_flight += 1
        self._pace.sent(len(items))

    def _request(self, items: list[Candidate], checked: float) -> None:
        """In a thread of its own; whatever comes of it, no key may go uncounted."""
        try:
            self._answers.put((items, self._bucket.delete(items, checked), None))
        except BaseException as error:
            code = str(getattr(error, "code", "") or type(error).__name__)
            self._answers.put((items, [Verdict(code, str(error))] * len(items), error))

    def _settle(self) -> None:
        """Wait for an answer, and account for every key of it. Raises the error of a request that
        S3 refused as a whole: it would refuse the next one too."""
        items, verdicts, error = self._answers.get()
        self._in_flight -= 1
        again = False
        for item, verdict in zip(items, verdicts, strict=True):
            if not verdict.code:
                self._deleted(item, verdict.marker)
            elif verdict.code in UNDONE | DOUBTFUL:
                self._pending[item].verdict, again = verdict, True
                self._pending[item].lost |= verdict.code in DOUBTFUL
            else:
                self._failed(item, verdict)
        self._pace.answered(again)
        if error is not None and not again:
            raise error

    def _deleted(self, item: Candidate, marker: str | None) -> None:
        del self._pending[item]
        self._gone.add(item.key[self._start :])
        self._ledger.deleted(item, marker)

    def _look_up_lost(self) -> None:
        """In a versioned bucket, find out which keys a request without an answer has deleted.
        Deleting them again would put a second marker on top, of which no log would know."""
        if self._jobs is None or self._ledger.report.versioning != "enabled":
            return
        lost = [(item, tried.since) for item, tried in self._pending.items() if tried.lost]
        found = self._bucket.each(self._bucket.versions, [item.key for item, _ in lost])
        for (item, since), versions in zip(lost, found, strict=True):
            self._stop.check()
            now = datetime.now(UTC) + MAX_SKEW
            if since and versions and versions[0].hides(since + self._bucket.s3_lead, now):
                self._deleted(item, versions[0].version_id)

    def _give_up(self, tries: int) -> None:
        """Keys that were tried so often have failed."""
        for item, tried in [*self._pending.items()]:
            if tried.tries >= tries:
                self._failed(item, tried.verdict)

    def _failed(self, item: Candidate, verdict: Verdict) -> None:
        """The end of a key; whatever came last, an earlier request may yet take effect."""
        if self._pending.pop(item).lost and verdict.code not in DOUBTFUL:
            why = f"{verdict.message}, and an earlier request had no answer: it may yet be deleted"
            verdict = Verdict("NoAnswer", why)
        self._ledger.failed(item, verdict)

    def _delete_rows(self, items: list[Candidate], jobs: JobTable) -> None:
        """Delete the rows of expired jobs whose object is gone in this round, was listed as absent,
        or is kept by a remaining job. Raises Interrupted between two statements."""
        shared = {item.key[self._start :] for item in items if item.reason == Reason.SHARED}
        names = {item.key[self._start :] for item in items if item.reason == Reason.MISSING}
        with self._stop.reading():
            found = jobs.referenced(shared) if shared else {}
        names |= self._gone
        names |= {name for name, item in found.items() if item.expired < item.jobs}
        more, prefix = bool(names), self._bucket.prefix
        while more:
            with self._stop.reading():
                rows = jobs.expired_rows(names)
            before = self._ledger.report.jobs_deleted
            for chunk in chunks(rows, ROWS_A_COMMIT):
                self._stop.check()
                facts = [
                    {"job_id": job, "completed_at": at, "name": name, "key": prefix + name}
                    for job, at, name in chunk
                ]
                self._ledger.write("delete-job", facts, sync=True)
                self._ledger.report.jobs_deleted += jobs.delete(chunk)
            more = len(rows) == ROWS and self._ledger.report.jobs_deleted > before


# --- Undo -----------------------------------------------------------------------------------------

# A key that a run meant to delete, between which moments of S3's clock it may have done so, and the
# delete marker that the answer named, or the end without one, if it is on record.
Intent = tuple[Candidate, tuple[datetime, datetime], str | None]


def read_audit_log(path: Path) -> sqlite3.Connection:
    """The events of an audit log, in an unnamed file in TMPDIR. A cut line, which a killed run
    leaves, is skipped with a warning. Raises PurgeError if the file cannot be read, or is no audit
    log."""
    fields = ["event", "run_id", "time", "bucket", "key", "reason", "size", "last_modified"]
    fields += ["version_id", "s3_lead_seconds", "code"]
    events, number = sqlite3.connect(""), 0
    events.execute(f"CREATE TABLE events ({','.join(fields)})")
    sql = f"INSERT INTO events VALUES ({', '.join('?' for _ in fields)})"
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    event = json.loads(line) if number > 1 or line[:1] == b"{" else {}
                except ValueError:
                    log.warning("%s: line %d is cut; skipped", path, number)
                    continue
                datetime.fromisoformat(event["time"])
                events.execute(sql, [event.get(name) for name in fields])
    except OSError as error:
        raise PurgeError(f"Cannot read the audit log {path}: {error.strerror}.", USAGE) from error
    except sqlite3.OperationalError as error:
        raise no_space(error) from error
    except Exception as error:
        message = f"{path}, line {number}: not of an audit log of this tool; is it compressed?"
        raise PurgeError(message, REFUSED) from error
    return events


def choose_run(events: sqlite3.Connection, run_id: str | None, bucket: str) -> tuple[str, int]:
    """The run to undo, and of how many objects. Raises PurgeError if the log does not tell, or if
    it is one of another bucket."""
    sql = "SELECT run_id, COUNT(DISTINCT key), MAX(bucket), MIN(time) FROM events "
    sql += "WHERE event IN ('start', 'delete') GROUP BY 1 ORDER BY 4"
    runs = {run: (count, place, since) for run, count, place, since in events.execute(sql)}
    found = {run: facts for run, facts in runs.items() if facts[0]}
    known = "; ".join(f"{since} {run} {count}" for run, (count, _, since) in found.items())
    if not run_id and not found:
        message = "The audit log holds no run that deleted: there is nothing to undo."
        raise PurgeError(message, REFUSED)
    if not run_id and len(found) > 1:
        message = f"The audit log holds {len(found)} runs that deleted: name one with --run-id. "
        raise PurgeError(f"{message}Time, run id and objects of each: {known}.", REFUSED)
    chosen = run_id or next(iter(found))
    count, place, _ = runs.get(chosen, (0, None, None))
    if place != bucket:
        of = f"of bucket {place}, not {bucket}" if place else f"not in it. It holds: {known}"
        message = f"The audit log is not of that run and bucket: run {chosen} is {of}."
        raise PurgeError(message, REFUSED)
    return chosen, count


def intents_of(events: sqlite3.Connection, run_id: str) -> Iterator[Intent]:
    """Each key that the run meant to delete, once; moments are corrected to S3's clock. What has no
    answer on record was done within minutes after the run's last line, or not at all."""
    sql = "SELECT MAX(time), COALESCE(MAX(s3_lead_seconds), 0) FROM events WHERE run_id = ?"
    ((last, seconds),) = events.execute(sql, (run_id,))
    lead, doubtful = timedelta(seconds=seconds), ", ".join(f"'{code}'" for code in DOUBTFUL)
    until = datetime.fromisoformat(last) + MAX_SKEW + lead
    answer = f"CASE WHEN event = 'retained' OR code NOT IN ({doubtful}) THEN event ELSE version_id"
    sql = f"SELECT key, reason, size, last_modified, MIN(time), MAX({answer} END) FROM events "
    sql += "WHERE run_id = ? AND event IN ('delete', 'deleted', 'failed', 'retained') "
    sql += "GROUP BY key HAVING MIN(event) = 'delete'"
    for *known, since, marker in events.execute(sql, (run_id,)):
        yield Candidate(*known), (datetime.fromisoformat(since) + lead, until), marker


def plan_undo(intents: Iterable[Intent], bucket: Bucket, totals: Totals, ledger: Ledger) -> Plan:
    """The delete markers to remove: each hides its key, is the run's, and has a version below.
    Anything else is left alone, and counted."""
    for chunk in chunks(intents, PAGE):
        found = bucket.each(bucket.versions, [item.key for item, *_ in chunk])
        for (item, during, marker), versions in zip(chunk, found, strict=True):
            latest, below = (*versions, None, None)[:2]
            if latest is not None and not latest.is_marker:
                totals.missing += 1
            elif latest is None or below is None or below.is_marker:
                ledger.retained(item, "no version lies right below a delete marker")
            elif latest.version_id == "null":
                ledger.retained(item, "versioning was suspended: an object may take its place")
            elif latest.version_id != marker and (marker or not latest.hides(*during)):
                ledger.retained(item, "somebody else's delete marker hides it")
            else:
                totals.planned.add(item)
                yield item._replace(version_id=latest.version_id)


# --- Command line ---------------------------------------------------------------------------------


def moment(text: str) -> datetime:
    """Type of an option: ISO 8601, taken as UTC if it has no offset."""
    with suppress(ValueError, OverflowError):
        found = datetime.fromisoformat(text)
        found = (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
        if found.year >= 1970:
            return found
    raise click.BadParameter(f"{text!r} is not ISO 8601 since 1970, such as 2019-06-03T00:00:00Z.")


PERCENT, FILE = click.FloatRange(0, 100), click.Path(readable=False, path_type=Path)
COUNT, DAYS = click.IntRange(0), click.IntRange(0, 36500)
PORT, SOME_DAYS, THREADS = click.IntRange(1, 65535), click.IntRange(1, 36500), click.IntRange(1, 64)
FLAG, BARE = {"is_flag": True}, {"allow_from_autoenv": False}  # BARE: no variable is read

# Name, type or further settings, default, help.
OPTIONS: list[tuple[str, Any, Any, str]] = [
    ("--db-host", str, None, "RDS endpoint, the real one.  [required]"),
    ("--db-port", PORT, 3306, "Port of the database."),
    ("--db-user", str, None, "Database user.  [required]"),
    ("--db-name", str, None, "Schema of the job table.  [required]"),
    ("--db-table", str, "ndvr_job_status", "TABLE or SCHEMA.TABLE."),
    ("--ca-bundle", FILE, None, "CA certificates.  [default: rds-ca-bundle.pem beside the script]"),
    ("--bucket", str, None, "Bucket with the source data.  [required]"),
    ("--prefix", str, "", "Put before sourceData; nothing outside it is touched."),
    ("--profile", str, None, "AWS profile.  [default: the AWS chain]"),
    ("--region", str, None, "AWS region of the database.  [default: the AWS chain]"),
    ("--retention-days", SOME_DAYS, 90, "Days after completedAt at which a TRIAL job expires."),
    ("--as-of", moment, None, "Expire as of this moment, ISO 8601.  [default: database clock]"),
    ("--orphans", FLAG, False, "Also delete objects that no job refers to."),
    ("--orphan-grace-days", DAYS, 7, "Keep orphans younger than this by the real clock."),
    ("--delete-jobs", FLAG, False, "Also delete expired job rows."),
    ("-n --dry-run", FLAG, False, "Plan and report, change nothing."),
    ("--max-objects", COUNT, None, "Refuse the run if more objects would be deleted."),
    ("--max-percent", PERCENT, 50, "Refuse the run if more of the keys would be deleted, of the "
     "objects listed with --orphans, of the rows with --delete-jobs."),
    ("--max-rate", COUNT, 3000, "Objects deleted per second at most, 0 = no limit."),
    ("--workers", THREADS, 8, "Concurrent requests; up to four times as many to list."),
    ("--audit-log", FILE, None, "Append what is deleted to this file, as JSON Lines."),
    ("--manifest", FILE, None, "Write the plan as an S3 Batch Operations manifest."),
    ("--json", FLAG, False, "Print the summary as one JSON object."),
    ("-v --verbose", FLAG, False, "Log more, and show tracebacks."),
    ("-q --quiet", FLAG, False, "Print nothing but problems."),
    ("--undo", BARE | {"type": FILE, "metavar": "AUDIT_LOG"}, None, "Bring back what one run hid."),
    ("--run-id", BARE | {"metavar": "ID"}, None, "The run to undo, if the log holds several."),
]  # fmt: skip
# What must match as a whole, and what to say if it does not. A bucket may be an access point's ARN.
HOST, PLACE = r"[^\s:/]+|[^\s/]*:[^\s/]*:[^\s/]*", r"arn:.+|[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
SPELLINGS = {
    "db_host": (HOST, "is no host; a port goes into --db-port"),
    "db_table": (r"[^.]+(\.[^.]+)?", "is neither TABLE nor SCHEMA.TABLE"),
    "bucket": (PLACE, "is not a bucket name; a path goes into --prefix"),
}
NEEDED = ("db_host", "db_user", "db_name", "bucket")  # by a purge; by an undo only the last

CONTEXT = {"auto_envvar_prefix": VARIABLES[:-1], "help_option_names": ["-h", "--help"]}
EPILOG = f"""\b
Each option can also be set as {VARIABLES}<NAME>, such as
{VARIABLES}DB_HOST, but for --undo and --run-id; a flag as 1 or 0.
A variable of that kind that is no option, or is empty, is an error.
  {PASSWORD_VARIABLE}  instead of an IAM token, for servers
                               without IAM; without --ca-bundle only
                               for a loopback host
  AWS_ENDPOINT_URL_S3          another S3 server

\b
Exit codes:
  0  done, or nothing to do
  1  an operation failed (database, S3)
  2  wrong usage
  3  refused by a guard, nothing deleted
  4  finished, but some keys failed
  75  another run holds the lock
  129, 130, 143  stopped by SIGHUP, SIGINT, SIGTERM; run again to finish
"""


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    for names, kind, default, text in reversed(OPTIONS):
        settings = kind if isinstance(kind, dict) else {"type": kind}
        settings = {"default": default, "help": text, "show_default": True, **settings}
        command = click.option(*names.split(), **settings)(command)
    return command


@click.command(context_settings=CONTEXT, epilog=EPILOG)
@with_options
@click.version_option(VERSION, message="%(prog)s %(version)s", allow_from_autoenv=False)
def main(**given: Any) -> None:
    """Delete the S3 source data of TRIAL jobs completed more than 90 days ago.

    A key goes only if no remaining job refers to it; OFFICIAL jobs and their data stay for ever.
    Start with --dry-run.
    """
    gc.freeze()  # a tenth of all CPU went into walks over what the imports made
    gc.set_threshold(20_000)
    check_usage(given)
    set_up_output(given["verbose"], given["quiet"])
    stop, undoes, dry_run = Stop(), given["undo"] is not None, given["dry_run"]
    report = Report(bucket=given["bucket"], prefix=given["prefix"])
    report.mode = ("undo-" * undoes + "dry-run") if dry_run else "undo" if undoes else "purge"
    schema = "" if "." in given["db_table"] else f"{given['db_name']}."
    report.table = None if undoes else schema + given["db_table"]
    ledger = Ledger(report)
    try:
        stop.listen()
        report.end(outcome(lambda: carry_out(given, ledger, stop)))
    except Interrupted:  # here, so that no moment of the run is without a catcher
        name = signal.Signals(stop.received).name
        report.error = f"Stopped by {name}; run again to finish the work."
        report.exit_code = 128 + stop.received  # as shells have it
    if given["manifest"] and report.exit_code == REFUSED and not undoes:
        with suppress(OSError):
            given["manifest"].unlink()  # an earlier run's
    finish(ledger, given)
    sys.exit(report.exit_code)


def check_usage(given: dict[str, Any]) -> None:
    """What click cannot check for a single option: variables, required options, files."""

    def check(fine: Any, message: str) -> None:
        if not fine:
            raise PurgeError(message, USAGE)

    names = {*given} - {"undo", "run_id"}
    known = {VARIABLES + name.upper() for name in names} | {PASSWORD_VARIABLE}
    for name in sorted(name for name in os.environ if name.startswith(VARIABLES)):
        nearest = get_close_matches(name, known, 1, 0)[0]
        check(name in known, f"{name} is no option's variable: do you mean {nearest}?")
        check(bool(os.environ[name].strip()), f"{name} is empty: give it a value, or unset it.")
    for name in NEEDED[3 if given["undo"] else 0 :]:
        check(given[name], f"Missing option '--{name.replace('_', '-')}'.")
    for name, (pattern, advice) in SPELLINGS.items():
        fine = not given[name] or re.fullmatch(pattern, given[name])
        check(fine, f"--{name.replace('_', '-')}: {given[name]!r} {advice}.")
    check(not given["run_id"] or given["undo"] is not None, "--run-id goes with --undo.")
    if target := given["manifest"]:
        try:
            check(not target.exists() or target.is_file(), "--manifest must be a file.")
            logs = {path.resolve() for path in (given["audit_log"], given["undo"]) if path}
            own = {target.resolve(), target.with_name(f"{target.name}.part").resolve()}
        except (OSError, RuntimeError) as error:
            raise PurgeError(f"Cannot use --manifest or --audit-log: {error}.", USAGE) from None
        check(not logs & own, "--manifest and --audit-log must be two files.")
    check(given["max_percent"] == given["max_percent"], "--max-percent must be a number.")


def set_up_output(verbose: bool, quiet: bool) -> None:
    """Log to standard error, in UTC; print any key on a terminal of any encoding."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller has closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")
    logging.Formatter.converter = time.gmtime
    style = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(format=style, datefmt="%Y-%m-%dT%H:%M:%SZ")
    log.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)


def outcome(action: Callable[[], None]) -> PurgeError | None:
    """Do it; the error that ended it, in one line, whatever it was."""
    try:
        action()
    except PurgeError as error:
        log.debug("stopped", exc_info=True)
        return error
    except aws.BotoCoreError as error:
        usage = type(error).__name__ in ("ProfileNotFound", "NoCredentialsError", "NoRegionError")
        advice = f"{str(error).rstrip('.')}. Check AWS credentials, --profile, --region."
        return PurgeError(advice, USAGE if usage else FAILED)
    except Exception as error:
        log.debug("stopped", exc_info=True)
        return PurgeError(f"Unexpected {type(error).__name__}: {error}. -v shows where.")
    return None


def carry_out(given: dict[str, Any], ledger: Ledger, stop: Stop) -> None:
    """Make of the command line what the parts of the run need, and run. Raises PurgeError."""
    report, dry_run = ledger.report, given["dry_run"]
    with ExitStack() as stack:
        with stop.reading():
            if given["audit_log"] and not dry_run:
                options = {name: value for name, value in given.items() if value is not None}
                ledger.start(given["audit_log"], options)
            session = boto3.Session(profile_name=given["profile"], region_name=given["region"])
            bucket = Bucket(session, report, given["workers"], stop)
            bucket.look()
            enabled, jobs = report.versioning == "enabled", None
            report.recoverable = enabled and bool(given["audit_log"]) and not given["undo"]
            if given["undo"]:
                candidates = prepare_undo(bucket, ledger, given)
            else:
                connection = stack.enter_context(closing(log_in(session, given)))
                jobs, candidates = prepare_purge(bucket, ledger, connection, given)
        if not dry_run:
            rounds = Rounds(bucket, ledger, Pace(given["max_rate"]), jobs)
            rounds.run(candidates, given["delete_jobs"])


def log_in(session: boto3.Session, given: dict[str, Any]) -> Any:
    """Connect to the database, with the password or an IAM token, made now as it lives 15 minutes.
    Raises PurgeError."""
    password = os.environ.get(PASSWORD_VARIABLE)
    host, port, user = given["db_host"], given["db_port"], given["db_user"]
    settings = tls_settings(given["ca_bundle"], password is not None and host in LOOPBACK)
    settings |= {"host": host, "port": port, "user": user, "database": given["db_name"]}
    log.info("connecting to %s:%d", host, port)
    if password is None and not session.region_name:
        raise PurgeError("No AWS region: give --region, that of the database.", USAGE)
    if password is None:
        password = session.client("rds").generate_db_auth_token(host, port, user)
    return connect(settings | {"password": password.encode()})


def policy_of(given: dict[str, Any], now: datetime) -> Policy:
    """The rules at the moment `now` of the database's clock (aware UTC). Raises PurgeError for
    `--as-of` in the future, where jobs would expire before their time."""
    as_of = given["as_of"] or now.replace(microsecond=0)
    if as_of > now:
        raise PurgeError(f"--as-of {as_of} is later than the database clock, {now}.", REFUSED)
    cutoff = as_of - timedelta(days=given["retention_days"])
    before = now - timedelta(days=given["orphan_grace_days"]) if given["orphans"] else None
    return Policy(cutoff, given["prefix"], before, given["delete_jobs"])


def prepare_purge(
    bucket: Bucket, ledger: Ledger, connection: Any, given: dict[str, Any]
) -> tuple[JobTable, Spool[Candidate]]:
    """All of a run that only reads: lock, plan, guards. Raises PurgeError if it may not go on."""
    report, table, totals = ledger.report, str(ledger.report.table), Totals()
    if not given["dry_run"]:
        take_lock(connection, bucket.name, bucket.prefix, table)
    ((now,),) = query(connection, "Cannot ask the database's clock", "SELECT UTC_TIMESTAMP(6)")
    now = now.replace(tzinfo=UTC)
    clocks = clock_refusals(now - datetime.now(UTC), bucket.s3_lead)
    policy = policy_of(given, now)
    report.cutoff = policy.cutoff.isoformat()
    jobs = JobTable(connection, table, policy.cutoff)
    candidates = make_plan(bucket, jobs, policy, totals)
    report.plan(totals, given["orphans"], policy.rows)
    # How far S3's clock is ahead tells an undo which markers are younger than an intent.
    lead = {"s3_lead_seconds": bucket.s3_lead.total_seconds()}
    ledger.write("plan", [vars(totals) | report.as_dict() | lead])
    reasons = [*clocks, *refusals(totals, policy, given["max_objects"], given["max_percent"])]
    reasons += wrong_place(totals, jobs, bucket)
    reasons += jobs.row_refusals() if policy.rows else []
    show_plan(candidates, given)
    if reasons:
        raise PurgeError(f"Refused, nothing was deleted: {'; '.join(reasons)}.", REFUSED)
    if given["manifest"]:
        write_manifest(candidates, bucket.name, given["manifest"])
    return jobs, candidates


def make_plan(bucket: Bucket, jobs: JobTable, policy: Policy, totals: Totals) -> Spool[Candidate]:
    """Read the table, list what the policy needs of the bucket, merge, and keep the plan."""
    whole = policy.orphans_before is not None
    log.info("reading %s; cutoff %s", jobs.name, policy.cutoff.isoformat())
    references = Spool(watched(read_references(jobs, policy, totals), "reading references"))
    log.info("%d keys are expired, %d stay; listing the bucket", totals.expired, totals.remaining)

    def is_doubtful(key: str) -> bool:
        """Whether a job may mean this orphan: its column cannot hold the name, or it holds another
        Unicode normalisation of it."""
        name = key.removeprefix(policy.prefix)
        keys = {policy.prefix + normalize(form, name) for form in ("NFC", "NFD")} - {key}
        return not jobs.can_hold(name) or any(map(references.has, keys))

    pairs = outer_join(references, bucket.objects(references, whole))
    pairs = watched(pairs, "listing", 0 if whole else len(references), minutely=jobs.ping)
    candidates = Spool(plan(pairs, policy, totals, is_doubtful))
    log.info("planned: %d objects, %d bytes", totals.planned.objects, totals.planned["bytes"])
    if whole and totals.dangling:
        log.warning("%d keys of remaining jobs have no object: lost data?", totals.dangling)
    if totals.doubtful:
        why = "the table cannot hold the name, or holds it in another Unicode normalisation"
        log.warning("%d orphans are kept: %s", totals.doubtful, why)
    return candidates


def wrong_place(totals: Totals, jobs: JobTable, bucket: Bucket) -> Iterator[str]:
    """A reason to refuse, if all expired keys are missing, and some of remaining jobs as well: the
    absence of objects is believed only where keys of this table were seen."""
    if totals.expired and totals.missing == totals.expired and not totals.known:
        sample = [bucket.prefix + name for name in jobs.sample()]
        sample = [key for key in sample if len(key.encode()) <= KEY_BYTES]
        if sample and not any(bucket.each(bucket.exists, sample)):
            keys = f"the {totals.expired} expired keys and of {len(sample)} keys of remaining jobs"
            yield f"none of {keys} has an object: {WRONG_PLACE}"


def prepare_undo(bucket: Bucket, ledger: Ledger, given: dict[str, Any]) -> Spool[Candidate]:
    """The delete markers of one run, to be removed, so that objects are live again. Raises
    PurgeError."""
    report, totals = ledger.report, Totals()
    if report.versioning == "off":
        message = f"Bucket {bucket.name} is not versioned: there is nothing to undo."
        raise PurgeError(message, REFUSED)
    events = read_audit_log(given["undo"])
    chosen, count = choose_run(events, given["run_id"], bucket.name)
    intents = watched(intents_of(events, chosen), "looking for delete markers", count)
    candidates = Spool(plan_undo(intents, bucket, totals, ledger))
    report.plan(totals)
    show_plan(candidates, given)
    return candidates


def show_plan(candidates: Iterable[Candidate], given: dict[str, Any]) -> None:
    """In a dry run, print what a real one would do: reason, bytes, last modified, key."""
    if not given["dry_run"] or given["json"] or given["quiet"]:
        return
    objects = (item for item in candidates if item.reason in OF_OBJECTS)
    lines = (f"{why}\t{size}\t{at}\t{printable(key)}" for key, why, size, at, _ in objects)
    for chunk in chunks(lines, 1000):
        show("\n".join(chunk))


def write_manifest(candidates: Iterable[Candidate], bucket: str, path: Path) -> None:
    """Write the plan as S3 Batch Operations reads it, `bucket,url-encoded-key` on each line; beside
    first, then renamed. Raises PurgeError."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", encoding="ascii", newline="") as file:
            objects = (item for item in candidates if item.reason in OF_OBJECTS)
            file.writelines(f"{bucket},{quote(item.key)}\n" for item in objects)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise PurgeError(f"Cannot write the manifest {path}: {error.strerror}.") from error


def finish(ledger: Ledger, given: dict[str, Any]) -> None:
    """Tell how it went: audit log, standard output and error, all with the same exit code."""
    report = ledger.report
    ledger.tell_causes()
    report.end(outcome(ledger.end))
    error = outcome(lambda: show_summary(report, given))
    if error is not None and report.error is None:
        report.end(error)
        outcome(ledger.end)  # the last `end` counts
    if report.error is not None:
        line = f"Error: {report.error}"
        if not sys.stderr.isatty():
            line = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {line} (run {report.run_id})"
        with suppress(OSError):
            click.echo(line, err=True)


def show_summary(report: Report, given: dict[str, Any]) -> None:
    if given["json"]:
        show(json.dumps(report.as_dict()))
    elif report.planned is not None and not (given["quiet"] and report.exit_code == 0):
        show(report.as_text())
        if given["dry_run"] and sys.stderr.isatty() and not sys.stdout.isatty():
            click.echo(report.as_text(), err=True)  # the plan went into a file


def show(text: str) -> None:
    """Print a result. Raises PurgeError if standard output is closed or full."""
    try:
        click.echo(text)
    except OSError as error:
        # Nothing more can be printed, neither here nor when Python flushes at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise PurgeError(f"Cannot print the result: {error.strerror}.") from error


if __name__ == "__main__":
    main()
