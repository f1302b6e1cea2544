#!/usr/bin/env python3
"""Delete the S3 source data of expired TRIAL jobs, and nothing that a remaining job refers to.

A job table in MySQL names the objects: the key of a job's source data is `prefix + sourceData`.

    expired job     `type` is exactly TRIAL and `completedAt` lies before the cutoff
    remaining job   every other row: OFFICIAL, not completed, unknown type; when in doubt, keep
    expired key     referred to by at least one expired job and by no remaining job
    orphan          an object that no job refers to at all, older than the grace period

Deleted are expired keys and, if asked for, orphans. Everything else stays, for ever. Keys are
compared as bytes, the way S3 compares them, whatever the collation of the table says.

The run, in order; any error before step 6 ends it with nothing deleted:

    1. a real run takes a lock against other runs; a dry run cannot write anywhere
    2. the job table, grouped by key and sorted by its bytes, is read at once into a spool file
    3. the bucket's listing, which S3 sorts by the same bytes, is merged with it
    4. the merge writes the plan, a second spool file
    5. guards may refuse the plan; a dry run prints it and ends
    6. batch by batch: ask the table again whether a job refers to a key, write the others to the
       audit log, delete them, account for every single key
    7. if asked for, delete the rows of expired jobs whose object is seen to be gone

Order of this file: constants, errors, policy and merge (pure), spool files, MySQL, S3, execution,
report, command line.
"""

from __future__ import annotations

import gc
import hashlib
import io
import ipaddress
import json
import logging
import os
import pickle
import random
import re
import signal
import ssl
import sys
import tempfile
import threading
import time
import uuid
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from functools import partial
from itertools import chain, compress, islice, pairwise, repeat
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote, unquote_plus
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import boto3
import click
import pymysql
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from pymysql.cursors import SSCursor

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar
    from types_boto3_s3 import S3Client

    Connection = pymysql.Connection[pymysql.cursors.Cursor]

T = TypeVar("T")
Record = TypeVar("Record", bound=tuple[Any, ...])

log = logging.getLogger("retention_purge")

CA_BUNDLE_URL = "https://truststore.pki.rds.amazonaws.com/global/global-bundle.pem"
DEFAULT_CA_BUNDLE = Path(__file__).resolve().parent / "rds-ca-bundle.pem"
PASSWORD_VARIABLE = "RETENTION_PURGE_DB_PASSWORD"

# Keys in one ListObjectsV2 answer, and in one DeleteObjects request (S3 API reference).
PAGE = BATCH = 1000
# Bytes of UTF-8 in an object key (S3 user guide, "Creating object key names").
KEY_BYTES = 1024
# The smallest TIMESTAMP (MySQL manual, "The DATE, DATETIME, and TIMESTAMP Types"). The zero date
# `0000-00-00` sorts below it: such a job is not completed.
FIRST_TIMESTAMP = "1970-01-01 00:00:01"

# A page with fewer wanted keys is not worth its parsing: each key is sought by itself. A seek lists
# SEEK objects, to notice where wanted keys lie densely; a worker does SEEKS of them at a time.
SPARSE, SEEK, SEEKS = 25, 10, 2

# Clocks of this host, the database and S3 may differ by this much.
MAX_SKEW = timedelta(minutes=5)

# Seconds. The grouped query may sort for minutes before its first row; a re-check may not.
CONNECT_TIMEOUT, PLAN_TIMEOUT, RECHECK_TIMEOUT = 10, 3600, 40
# Seconds: a re-check is too old for a request after these.
MAX_RECHECK_AGE = 50
# Seconds a batch: a re-check that costs more than a quarter of the time that --max-rate gives the
# batch, within these bounds, serves several batches at once, up to MAX_CHUNK and to CHUNK_BYTES of
# SQL (the smallest default of max_allowed_packet is 4 MiB, in MySQL 5.7).
CHEAP_RECHECK, DEAR_RECHECK, MAX_CHUNK, CHUNK_BYTES = 0.01, 0.1, 32, 2_000_000
# Job rows deleted in one statement, which is one transaction.
ROWS_A_COMMIT = 200
# A key that S3 cannot delete just now is tried this often, each time after a new re-check.
ATTEMPTS = 5
# Seconds: the first pause after a retryable failure, doubled with each further one up to the last.
FIRST_PAUSE, LAST_PAUSE = 0.1, 10.0

# Character sets from whose text UTF-8 comes back unchanged, so that a key converted to them finds
# its row. Others (sjis, gbk, …) spell some characters in two ways: their keys are sought by scan.
ROUND_TRIP_CHARSETS = {"ascii", "latin1", "utf8", "utf8mb3", "utf8mb4"}

# The code, ours, of planned keys that a stopped run did not come to.
NOT_ATTEMPTED = "NotAttempted"

# XML 1.0 cannot carry these (W3C, production 2); a carriage return comes back as a line feed.
# A key with one of them goes by single DeleteObject, where it stands percent-encoded in the URL.
NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

# S3's codes that a later try may not meet (S3 API reference, "List of error codes"), and HTTP's.
RETRYABLE = {
    "SlowDown",
    "ServiceUnavailable",
    "InternalError",
    "RequestTimeout",
    "OperationAborted",
    "500",
    "502",
    "503",
    "504",
    "InvalidAnswer",  # ours: the body is not the answer to the request
    "NoAnswer",  # ours: a key that the answer does not mention, or no answer at all
}


# ---------------------------------------------------------------------------------------------
# Errors: one line that says what to do, and an exit code
# ---------------------------------------------------------------------------------------------


class PurgeError(click.ClickException):
    """An operation failed, and the run with it."""

    exit_code = 1


class UsageError(PurgeError):
    """The call itself is wrong."""

    exit_code = 2


class Refused(PurgeError):
    """A guard stopped the run before the first delete."""

    exit_code = 3


class Locked(PurgeError):
    """Another run works on the same bucket, prefix and table (75: EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75


class Interrupted(BaseException):
    """SIGINT or SIGTERM came. Not an Exception: libraries catch those, and try again."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


class Stopped(PurgeError):
    """The run was interrupted: exit code 128 + the signal's number, as shells have it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"Stopped by {signal.Signals(signum).name}; run again to finish the work.")
        self.exit_code = 128 + signum  # type: ignore[misc]


class DatabaseError(PurgeError):
    """MySQL could not be reached, refused, or broke off."""


class BucketError(PurgeError):
    """S3 could not be reached, refused, or gave no proper answer. `code` is S3's or ours."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


# ---------------------------------------------------------------------------------------------
# Policy and merge: pure, no clock, no network
# ---------------------------------------------------------------------------------------------
# Keys are `str`. Python orders str by code point, which is the order of the UTF-8 bytes, which is
# the order of an S3 listing; and two str are equal exactly if their bytes are.


class Reason(StrEnum):
    """Why an object may go."""

    EXPIRED = "expired"
    ORPHAN = "orphan"


class Reference(NamedTuple):
    """A key that the job table names; `expired` if every job that refers to it is expired."""

    key: str
    expired: bool


class S3Object(NamedTuple):
    """An object in the bucket; `size` in bytes, `last_modified` aware UTC."""

    key: str
    size: int
    last_modified: datetime


class Candidate(NamedTuple):
    """A planned delete; `size` in bytes, `last_modified` in ISO 8601, as it is printed."""

    key: str
    size: int
    last_modified: str
    reason: Reason
    version_id: str | None = None  # in an undo: of the delete marker to remove


@dataclass(frozen=True)
class Policy:
    """The rules, frozen for the run; all times aware UTC.

    A job completed before `cutoff` (not at it) is expired. An orphan last modified before
    `orphans_before` may go; None keeps all orphans.
    """

    cutoff: datetime
    orphans_before: datetime | None = None

    def reason(self, reference: Reference | None, found: S3Object | None) -> Reason | None:
        """Why this object may go, or None if it stays (or is not there)."""
        if found is None:
            return None
        if reference is not None:
            return Reason.EXPIRED if reference.expired else None
        if self.orphans_before is not None and found.last_modified < self.orphans_before:
            return Reason.ORPHAN
        return None


@dataclass
class Tally:
    """Objects counted by reason, and their bytes."""

    expired: int = 0
    orphan: int = 0
    bytes: int = 0

    def add(self, candidate: Candidate) -> None:
        if candidate.reason is Reason.EXPIRED:
            self.expired += 1
        else:
            self.orphan += 1
        self.bytes += candidate.size

    @property
    def objects(self) -> int:
        return self.expired + self.orphan


@dataclass
class Totals:
    """What the merge saw: the plan's size, and what the guards need to know."""

    planned: Tally = field(default_factory=Tally)
    expired: int = 0  # expired keys
    missing: int = 0  # of these, without an object
    remaining: int = 0  # distinct keys of remaining jobs
    listed: int = 0  # objects that the listing gave
    listed_remaining: int = 0  # of these, referred to by a remaining job


Keyed = TypeVar("Keyed", Reference, S3Object)

LISTING = "The bucket's listing"


def ascending(stream: Iterable[Keyed], source: str) -> Iterator[Keyed]:
    """The same stream; raises PurgeError where a key does not follow the one before it.

    The merge is right only for sorted streams. Out of order, it would take a referenced object for
    an orphan.
    """
    last: str | None = None
    for item in stream:
        if last is not None and item.key <= last:
            raise out_of_order(source, item.key, last)
        last = item.key
        yield item


def out_of_order(source: str, key: str, last: str) -> PurgeError:
    return PurgeError(
        f"{source} is out of order: {printable(key)} came after {printable(last)}. Nothing can be "
        "concluded from it, so nothing more is deleted."
    )


def outer_join(
    references: Iterable[Reference], objects: Iterable[S3Object]
) -> Iterator[tuple[Reference | None, S3Object | None]]:
    """Pair two ascending streams by key, in constant memory; None where a side lacks the key."""
    names = ascending(references, "The spooled key list")
    found = ascending(objects, LISTING)
    reference, item = next(names, None), next(found, None)
    while reference is not None or item is not None:
        if item is None or (reference is not None and reference.key < item.key):
            yield reference, None
            reference = next(names, None)
        elif reference is None or item.key < reference.key:
            yield None, item
            item = next(found, None)
        else:
            yield reference, item
            reference, item = next(names, None), next(found, None)


def plan(
    pairs: Iterable[tuple[Reference | None, S3Object | None]], policy: Policy, totals: Totals
) -> Iterator[Candidate]:
    """The objects that may go, in key order; `totals` grows as the plan is drawn."""
    for reference, item in pairs:
        totals.listed += item is not None
        if reference is not None:
            totals.missing += reference.expired and item is None
            totals.listed_remaining += not reference.expired and item is not None
        reason = policy.reason(reference, item)
        if reason is not None and item is not None:
            candidate = Candidate(item.key, item.size, item.last_modified.isoformat(), reason)
            totals.planned.add(candidate)
            yield candidate


@dataclass(frozen=True)
class Limits:
    """The guards' settings; `max_objects` None is no limit."""

    max_objects: int | None
    max_percent: float
    orphans: bool


def refusals(totals: Totals, limits: Limits) -> Iterator[str]:
    """Why this plan must not be carried out; nothing if it may."""
    planned = totals.planned.objects
    if limits.max_objects is not None and planned > limits.max_objects:
        yield f"{planned} objects would be deleted, more than --max-objects {limits.max_objects}"
    shares = [(planned + totals.remaining, "keys that are planned or belong to remaining jobs")]
    if limits.orphans:
        shares.append((totals.listed, "objects in the listing"))
    for whole, name in shares:
        if not planned <= whole * limits.max_percent / 100:  # so that NaN refuses
            yield (
                f"{planned} of {whole} {name} would be deleted ({100 * planned / whole:.1f} %), "
                f"more than --max-percent {limits.max_percent:g}"
            )
    if limits.orphans and totals.remaining and not totals.listed_remaining:
        yield (
            f"--orphans, but none of the {totals.remaining} keys of remaining jobs is among the "
            f"{totals.listed} objects listed: --bucket, --prefix or --db-table must be wrong"
        )


def clock_refusals(host: datetime, database: datetime, s3_lead: timedelta) -> Iterator[str]:
    """Why the clocks cannot be trusted, if they are more than MAX_SKEW apart.

    `host` and `database` were read at the same moment; `s3_lead` is S3's clock less the host's.
    """
    clocks = {"this host": timedelta(), "the database": database - host, "S3": s3_lead}
    low, high = min(clocks, key=clocks.__getitem__), max(clocks, key=clocks.__getitem__)
    apart = clocks[high] - clocks[low]
    if apart > MAX_SKEW:
        yield (
            f"the clock of {high} is {apart.total_seconds():.0f} seconds ahead of that of {low}, "
            f"more than {MAX_SKEW.total_seconds():.0f}: set the clocks"
        )


def just_before(key: str) -> str:
    """A string below `key` with next to no key between: `StartAfter` excludes what it names.

    Cut before the first character that XML cannot carry, as a listing's answer may repeat it.
    """
    odd = NOT_XML.search(key)
    if odd:
        return key[: odd.start()]
    head, last = key[:-1], ord(key[-1])
    below = chr(0xD7FF if last == 0xE000 else last - 1)
    seek = f"{head}{below}\U0010ffff"
    return head if NOT_XML.match(below) or len(seek.encode()) > KEY_BYTES else seek


def printable(key: str) -> str:
    """The key as it is, or as a JSON string where it would not stand on a line unmistakably."""
    plain = key.isprintable() and key == key.strip() and not key.startswith('"')
    return key if plain and key else json.dumps(key)


# ---------------------------------------------------------------------------------------------
# Spool files: streams on disk
# ---------------------------------------------------------------------------------------------


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` consecutive items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


class Spool(Generic[Record]):
    """Records on disk, in an unnamed file in TMPDIR: written once, read as often as needed.

    Memory holds one chunk per reader, and the file vanishes with the process, whatever ends it. A
    chunk is stored by columns, which pickle writes several times faster than records.

    Raises PurgeError when the disk is full.
    """

    def __init__(self, record: Callable[..., Record], records: Iterable[Record]) -> None:
        self._record = record
        self.count = 0
        try:
            self._file = tempfile.TemporaryFile(prefix="retention_purge-")  # noqa: SIM115
            for chunk in chunks(records, 1000):
                pickle.dump(list(zip(*chunk, strict=True)), self._file, pickle.HIGHEST_PROTOCOL)
                self._file.flush()
                self.count += len(chunk)
        except OSError as error:
            raise PurgeError(
                f"Cannot write a spool file: {error.strerror}. Free some space in TMPDIR, or point "
                "TMPDIR elsewhere."
            ) from error

    def __iter__(self) -> Iterator[Record]:
        position, left = 0, self.count
        while left:
            self._file.seek(position)  # each reader has a place of its own
            columns = pickle.load(self._file)
            position = self._file.tell()
            left -= len(columns[0])
            yield from map(self._record, *columns)

    def close(self) -> None:
        self._file.close()


# ---------------------------------------------------------------------------------------------
# MySQL
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """Where the job table is, and how to log in. `token` makes an IAM token; see `connect`."""

    host: str
    port: int
    user: str
    database: str
    ca_bundle: Path | None
    token: Callable[[], str]


def connect(server: Server, read_timeout: int) -> Connection:
    """Log in; a secret leaves the machine only over TLS with certificate and host name verified.

    The secret is an IAM token, made now (it lives 15 minutes), or RETENTION_PURGE_DB_PASSWORD for
    servers without IAM. Without a CA bundle only that password, and only to a loopback host, is
    sent. `read_timeout` is in seconds, for each read from the server.

    Raises UsageError without a usable CA bundle, DatabaseError if the login fails.
    """
    password = os.environ.get(PASSWORD_VARIABLE)
    tls = tls_settings(server, needed=password is None or not is_loopback(server.host))
    secret = server.token() if password is None else password
    with database_errors(f"Cannot log in to {server.host}:{server.port} as {server.user}"):
        connection = pymysql.connect(
            host=server.host,
            port=server.port,
            user=server.user,
            password=secret.encode(),
            database=server.database,
            charset="utf8mb4",
            # Every read sees the table as it is now, not as an open transaction first saw it.
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=read_timeout,
            write_timeout=RECHECK_TIMEOUT,
            **tls,
        )
    with database_errors("Cannot set up the database session"), connection.cursor() as cursor:
        for statement in SESSION:
            cursor.execute(statement)
    return connection


# What the server's own settings must not decide.
SESSION = (
    # TIMESTAMP columns are converted to the session's time zone. A row limit would cut the
    # references short without a word; some SQL modes change what a string is. The connection that
    # holds the lock is idle while the bucket is listed: allow it a day.
    "SET time_zone = '+00:00', sql_select_limit = 18446744073709551615, sql_mode = '', "
    "wait_timeout = 86400",
    # Rows deleted by a transaction that may yet be rolled back are still there.
    "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ",
)


def tls_settings(server: Server, needed: bool) -> dict[str, Any]:
    """PyMySQL's arguments for TLS: all verified, or (only if not `needed`) left to the server.

    `ssl_verify_identity` is what verifies: `ssl_ca` alone encrypts and trusts anyone.
    """
    advice = f"download {CA_BUNDLE_URL} to {DEFAULT_CA_BUNDLE.name} beside the script"
    if server.ca_bundle is None:
        if needed:
            raise UsageError(f"No CA bundle for the database: {advice}, or give --ca-bundle.")
        return {}
    try:
        ssl.create_default_context(cafile=server.ca_bundle)
    except ssl.SSLError:
        raise UsageError(f"{server.ca_bundle} holds no certificates: {advice}.") from None
    except OSError as error:
        raise UsageError(
            f"Cannot read the CA bundle {server.ca_bundle} ({error.strerror}): {advice}."
        ) from None
    return {"ssl_ca": str(server.ca_bundle), "ssl_verify_identity": True}


def is_loopback(host: str) -> bool:
    """Whether the host, as written, can only be this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def database_errors(doing: str) -> Iterator[None]:
    """Turn what PyMySQL raises into a DatabaseError of one line: what was done, why it failed."""
    try:
        yield
    except (pymysql.Error, OSError) as error:
        raise DatabaseError(f"{doing}: {database_advice(error)}") from error


LOGIN_ADVICE = (
    "access denied. With IAM, one of these: the user is not IDENTIFIED WITH "
    "AWSAuthenticationPlugin; IAM authentication is not enabled on the instance; the AWS identity "
    "lacks rds-db:connect for this user and instance; --db-host is an alias (the token is signed "
    "for the name given: use the real endpoint); --region is not the database's; this host's clock "
    "is off by minutes. "
    f"With {PASSWORD_VARIABLE}: it is wrong"
)


def database_advice(error: Exception) -> str:
    """The likely cause of a PyMySQL error, in one line."""
    code = error.args[0] if error.args and isinstance(error.args[0], int) else None
    cause = getattr(error, "original_exception", None) or error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"its certificate was not accepted ({cause.verify_message}), so no secret was sent. "
            f"Wrong or outdated CA bundle (the current one: {CA_BUNDLE_URL}), a host name that is "
            "not the real endpoint, or not the server you mean"
        )
    detail = " ".join(str(error.args[-1] if error.args else error).split())
    if code == 2026:
        return "the server offers no TLS, so no secret was sent. Enable TLS on the server"
    if code in (1045, 1698):
        return LOGIN_ADVICE
    if code == 1524:
        return f"{detail}. IAM authentication is not enabled on the instance"
    if code == 2003:
        return f"{detail}. Check --db-host, --db-port, DNS, and the security group"
    if code in (1044, 1142, 1143):
        return f"{detail}. Grant SELECT on the table (DELETE only for --delete-jobs)"
    if code in (1049, 1146):
        return f"{detail}. Check --db-name and --db-table"
    return detail or type(error).__name__


def text_bytes(column: str) -> str:
    """SQL for the UTF-8 bytes of a text column: equal only if identical, and ordered as in S3."""
    return f"CAST(CONVERT({column} USING utf8mb4) AS BINARY)"


NAME = text_bytes("`sourceData`")


def expired_sql(cutoff: datetime) -> str:
    """SQL for "this job is expired", 0 or 1: NULL makes the AND NULL, and IS TRUE makes that 0."""
    moment = cutoff.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")
    return (
        f"((`completedAt` >= '{FIRST_TIMESTAMP}' AND `completedAt` < '{moment}' "
        f"AND {text_bytes('`type`')} = 'TRIAL') IS TRUE)"
    )


def query(
    connection: Connection, doing: str, sql: str, arguments: Any = None
) -> tuple[tuple[Any, ...], ...]:
    """The rows of a statement, all at once. Raises DatabaseError."""
    with database_errors(doing), connection.cursor() as cursor:
        cursor.execute(sql, arguments)
        return cursor.fetchall()


def database_now(connection: Connection) -> datetime:
    """The database's clock, aware UTC."""
    ((now,),) = query(connection, "Cannot ask the database's clock", "SELECT UTC_TIMESTAMP(6)")
    assert isinstance(now, datetime)
    return now.replace(tzinfo=UTC)


def take_lock(connection: Connection, bucket: str, prefix: str, table: str) -> None:
    """Lock bucket, prefix and table against other runs, until the connection ends.

    Raises Locked if another run has the lock, Refused on a read replica: the lock would not be the
    primary's, and a re-check would see the table as it was some time ago.
    """
    doing = f"Cannot take the lock on {table}"
    if any(query(connection, doing, "SELECT @@global.read_only, @@innodb_read_only")[0]):
        raise Refused("The database is read-only, so it may be a replica: give the primary's host.")
    subject = json.dumps([bucket, prefix, table]).encode()
    name = f"retention_purge:{hashlib.sha256(subject).hexdigest()[:40]}"  # 64 characters at most
    ((got,),) = query(connection, doing, "SELECT GET_LOCK(%s, 0)", (name,))
    if got is None:
        raise DatabaseError(f"{doing}: GET_LOCK failed; see the server's error log.")
    if not got:
        raise Locked("Another run works on the same bucket, prefix and table; try again later.")


class JobRow(NamedTuple):
    """An expired row of the job table. `key` is `prefix + name`."""

    key: str
    name: str
    job_id: str


class JobTable:
    """The job table over one connection, with `cutoff` deciding which jobs are expired.

    Only `delete` writes. All methods raise DatabaseError.
    """

    def __init__(self, connection: Connection, place: tuple[str, str], cutoff: datetime) -> None:
        self._connection, self._place = connection, place
        self.name = ".".join(place)
        self._from = f"FROM {'.'.join(map(quoted, place))}"
        self._expired = expired_sql(cutoff)
        self._charset, self._collation = self._describe()
        # Whether a re-check can use an index.
        self.indexed = self._charset in ROUND_TRIP_CHARSETS and self._is_indexed()
        # A scan costs the same for one batch and for many, an index costs what is asked of it.
        self.max_chunk = 1 if self.indexed else MAX_CHUNK

    def _describe(self) -> tuple[str, str]:
        """Character set and collation of `sourceData`, after a look at all columns."""
        rows = query(
            self._connection,
            f"Cannot describe {self.name}",
            "SELECT COLUMN_NAME, DATA_TYPE, CHARACTER_SET_NAME, COLLATION_NAME "
            "FROM information_schema.COLUMNS WHERE TABLE_SCHEMA = %s AND TABLE_NAME = %s",
            self._place,
        )
        columns = {name.lower(): facts for name, *facts in rows}
        if not columns:
            raise DatabaseError(
                f"There is no table {self.name}, or this user may not read it: "
                "check --db-name and --db-table, and grant SELECT on it."
            )
        for name in ("jobId", "completedAt", "type", "sourceData"):
            if name.lower() not in columns:
                raise DatabaseError(f"{self.name} has no column {name}: is it the job table?")
        if columns["completedat"][0].lower() not in ("timestamp", "datetime"):
            raise DatabaseError(f"{self.name}.completedAt must be a TIMESTAMP or DATETIME column.")
        _, charset, collation = columns["sourcedata"]
        if charset is None or charset == "binary":
            raise DatabaseError(f"{self.name}.sourceData must be a text column to name S3 keys.")
        return charset, collation

    def _is_indexed(self) -> bool:
        """Whether an index leads with `sourceData`."""
        rows = query(
            self._connection,
            f"Cannot read the indexes of {self.name}",
            "SELECT 1 FROM information_schema.STATISTICS WHERE TABLE_SCHEMA = %s "
            "AND TABLE_NAME = %s AND COLUMN_NAME = 'sourceData' AND SEQ_IN_INDEX = 1 "
            "AND INDEX_TYPE = 'BTREE' LIMIT 1",
            self._place,
        )
        return bool(rows)

    def names(self) -> Iterator[tuple[bytes]]:
        """Each distinct `sourceData` in byte order: its UTF-8 bytes after a `+`, or after a `-` if
        one of its jobs remains. For jobs without a name, their number instead.

        SQL_BIG_RESULT makes the server sort instead of filling a temporary table keyed by the
        group, five times faster on millions of rows, under any collation and with or without an
        index; one column, as a second costs the client as much again. Read it at once: a client
        that stops reading is cut off after net_write_timeout (60 s), and an open read keeps a
        snapshot alive.
        """
        doing = f"Cannot read {self.name}"
        ((length,),) = query(self._connection, doing, "SELECT @@max_sort_length")
        if length < KEY_BYTES:
            raise DatabaseError(
                f"{doing}: the server would take names for one another whose first {length} bytes "
                f"are the same. Set its max_sort_length to {KEY_BYTES}, the default."
            )
        return self._stream(
            f"SELECT SQL_BIG_RESULT CAST(IFNULL(CONCAT(IF(MIN({self._expired}), '+', '-'), "
            f"NULLIF({NAME}, '')), COUNT(*)) AS BINARY) "
            f"{self._from} GROUP BY {NAME} ORDER BY {NAME}"
        )

    def expired_rows(self) -> Iterator[tuple[bytes, str]]:
        """(`sourceData` in UTF-8, `jobId`) of each expired job, in byte order of the former."""
        return self._stream(f"SELECT {NAME}, `jobId` {self._from} WHERE {self._expired} ORDER BY 1")

    def _stream(self, sql: str) -> Iterator[Any]:
        """The rows as the server sends them."""
        with database_errors(f"Cannot read {self.name}"):
            cursor: Any = self._connection.cursor(SSCursor)
            try:
                cursor.execute(sql)
                while rows := cursor.fetchmany(1000):
                    yield from rows
            finally:
                # PyMySQL would first read all that is left. The connection is closed instead.
                if cursor._result is not None:
                    cursor._result.unbuffered_active = False

    def referenced(self, names: list[str], by_any: bool = False) -> dict[str, bool]:
        """Those of `names` that a remaining job refers to at this moment: True. With `by_any` also
        those that only expired jobs refer to: False.

        The search finds a superset under any collation, through an index if there is one; the
        bytes are compared here. A name that the column's character set cannot spell becomes
        another in the conversion, which is right: no row can hold it.
        """
        escaped = self._connection.escape
        if self.indexed:
            column = "`sourceData`"
            form = f"CONVERT(%s USING {self._charset}) COLLATE {self._collation}"
            terms = ",".join(form % escaped(text) for text in names)
        else:  # a scan compares bytes faster
            column = NAME
            terms = ",".join(escaped(text.encode()) for text in names)
        low, high = (escaped(text.encode()) for text in (min(names), max(names)))
        rows = query(
            self._connection,
            f"Cannot re-check references in {self.name}",
            # The range spares a scan most of the comparisons; an index serves the list.
            f"SELECT {NAME}, MAX(NOT {self._expired}) {self._from} "
            f"WHERE {NAME} BETWEEN {low} AND {high} AND {column} IN ({terms}) "
            f"{'' if by_any else f'AND NOT {self._expired}'} GROUP BY 1",
        )
        asked = {text.encode(): text for text in names}
        return {asked[found]: bool(remains) for found, remains in rows if found in asked}

    def delete(self, rows: list[JobRow]) -> int:
        """Delete these jobs, if they are as they were read and still expired; how many were."""
        escaped = self._connection.escape
        ids = ",".join(escaped(row.job_id) for row in rows)
        pairs = ",".join(f"({escaped(row.job_id)},{escaped(row.name)})" for row in rows)
        with database_errors(f"Cannot delete from {self.name}"):
            return self._connection.cursor().execute(
                f"DELETE {self._from} WHERE `jobId` IN ({ids}) AND {self._expired} "
                f"AND ({text_bytes('`jobId`')}, {NAME}) IN ({pairs})"
            )


def quoted(identifier: str) -> str:
    return "`" + identifier.replace("`", "``") + "`"


def as_text(name: bytes | None) -> str:
    """The name as text; empty for NULL, and for bytes that are no UTF-8, which S3 cannot hold."""
    try:
        return (name or b"").decode()
    except UnicodeDecodeError:
        return ""


def references(
    rows: Iterable[tuple[bytes]], prefix: str, totals: Totals, all_keys: bool
) -> Iterator[Reference]:
    """What the rows of `JobTable.names` mean, counted: the expired keys, or all. Most of a table is
    of remaining jobs. Raises PurgeError where a name does not follow the one before it."""
    nameless, last = 0, b""
    for (row,) in rows:
        mark, name = row[:1], row[1:]
        if mark != b"+" and mark != b"-":
            nameless += int(row)
            continue
        if name <= last:
            raise out_of_order("The job table's name list", as_text(name), as_text(last))
        last = name
        expired = mark == b"+"
        if expired:
            totals.expired += 1
        else:
            totals.remaining += 1
        if expired or all_keys:
            try:
                yield Reference(prefix + name.decode(), expired)
            except UnicodeDecodeError:
                continue  # S3 cannot hold such a key
    if nameless:
        log.warning("%d jobs have no sourceData; they name no object", nameless)


# ---------------------------------------------------------------------------------------------
# S3
# ---------------------------------------------------------------------------------------------


@dataclass
class Requests:
    """Requests to S3 that cost money or wear it."""

    list: int = 0
    delete: int = 0


class Page(NamedTuple):
    """One ListObjectsV2 answer by columns, sizes and dates as S3 spells them; `token` continues the
    listing, None at its end."""

    keys: list[str]
    sizes: list[bytes]
    dates: list[bytes]
    token: str | None
    bucket: str

    def objects(self, wanted: Container[str] | None = None) -> list[S3Object]:
        """The objects of the page, or those with a wanted key: most of a page may not matter."""
        chosen = repeat(True) if wanted is None else [key in wanted for key in self.keys]
        sizes = map(int, compress(self.sizes, chosen))
        dates = map(datetime.fromisoformat, map(bytes.decode, compress(self.dates, chosen)))
        return list(map(S3Object, compress(self.keys, chosen), sizes, dates))


class Leap(NamedTuple):
    """What one seek of the leapfrog told."""

    found: list[S3Object]
    settled: int  # of the keys asked for: found, or known to be missing
    passed: int  # objects listed, up to the last key asked for
    last: str  # key listed


class Verdict(NamedTuple):
    """What S3 said of one key: deleted if `code` is None, or why not."""

    key: str
    code: str | None = None
    message: str = ""
    version_id: str | None = None  # that the request named
    marker: str | None = None  # version id of the delete marker, in a versioned bucket


class Bucket:
    """One bucket below one prefix. Counts its requests; safe to use from several threads.

    Every answer must be what was asked for, whole: an empty or foreign body would otherwise parse
    to an empty listing. All methods raise BucketError.
    """

    def __init__(
        self, session: boto3.Session, name: str, prefix: str, workers: int, requests: Requests
    ) -> None:
        self.name, self.prefix, self._requests = name, prefix, requests
        self._workers, self._seekers = workers, 4 * workers
        self._counting = threading.Lock()
        self._read = self._client(session, workers, attempts=5)
        # A delete is not repeated by botocore: each try needs a new re-check of its own.
        self._write = self._client(session, workers, attempts=1)

    def _client(self, session: boto3.Session, workers: int, attempts: int) -> S3Client:
        with bucket_errors(f"Cannot use S3 for bucket {self.name}"):
            client = session.client(
                "s3",
                config=Config(
                    retries={"mode": "standard", "total_max_attempts": attempts},
                    max_pool_connections=4 * workers,
                    connect_timeout=CONNECT_TIMEOUT,
                    read_timeout=30,
                ),
            )
        for operation, reader in ANSWERS.items():
            # The wildcard puts it before botocore's own parse of the body for errors.
            client.meta.events.register_first(f"before-parse.*.{operation}", reader)
        client.meta.events.register("provide-client-params.s3.DeleteObjects", take_objects)
        client.meta.events.register("before-call.s3.DeleteObjects", put_objects)
        return client

    def versioning(self) -> tuple[str, timedelta]:
        """`off`, `enabled` or `suspended`; and by how much S3's clock leads this host's."""
        with bucket_errors(f"Cannot read the versioning of bucket {self.name}"):
            answer = self._read.get_bucket_versioning(Bucket=self.name)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        if date is None:
            raise BucketError("S3's answer has no Date header: is this S3?", "InvalidAnswer")
        lead = parsedate_to_datetime(date) - datetime.now(UTC)
        return answer.get("Status", "off").lower(), lead

    def page(self, after: str = "", limit: int = PAGE, token: str | None = None) -> Page:
        """Up to `limit` objects after the key `after`, or where a page's `token` continues it."""
        where: Any = {"ContinuationToken": token} if token else {"StartAfter": after}
        with bucket_errors(f"Cannot list bucket {self.name}"):
            answer: Any = self._read.list_objects_v2(
                Bucket=self.name, Prefix=self.prefix, MaxKeys=limit, **where
            )
        with self._counting:
            self._requests.list += 1
        page: Page = answer["Page"]
        for last, key in pairwise(chain([after] if after else [], page.keys)):
            if key <= last:
                raise out_of_order(LISTING, key, last)
        for key in page.keys[:1] + page.keys[-1:]:  # in order, so all between as well
            if not key.startswith(self.prefix):
                raise foreign_listing(self.name, f"the key {printable(key)}")
        # An access point's ARN or alias is answered with another name.
        if page.bucket != self.name and re.fullmatch(r"(?!.*-s3alias$)[a-z0-9.-]+", self.name):
            raise foreign_listing(self.name, f"the bucket's name {printable(page.bucket)}")
        return page

    def all(self) -> Iterator[S3Object]:
        """Every object below the prefix, in key order; a page is read while the next is fetched."""
        page = self.page()
        with ThreadPoolExecutor(1) as ahead:
            while page.token is not None:
                next_page = ahead.submit(self.page, token=page.token)
                yield from page.objects()
                page = next_page.result()
        yield from page.objects()

    def find(self, keys: Iterable[str]) -> Iterator[S3Object]:
        """Those of the ascending `keys` that exist, leapfrogging over what lies between.

        No more requests than keys, however large the bucket is, and where wanted keys lie densely
        about as many as it has pages. Slices of the keys are sought at the same time, in workers.
        """
        wanted, density = iter(keys), PAGE  # wanted keys in a page, as last measured
        sought: deque[Future[tuple[list[S3Object], int]]] = deque()
        pool = ThreadPoolExecutor(self._seekers)
        try:
            first = list(islice(wanted, PAGE))
            if first:
                leap = self._leap(first, "", PAGE)
                yield from leap.found
                wanted = chain(first[leap.settled :], wanted)
                density = dense(leap.settled, leap.passed)
            while True:
                size = max(density - density // 20, SEEKS)
                # A page keeps the CPU busy and the memory full, a seek mostly waits.
                most = self._workers * 3 // 2 if density >= SPARSE else self._seekers
                while len(sought) <= most and (slice_ := list(islice(wanted, size))):
                    sought.append(pool.submit(self._find_slice, slice_, density))
                if not sought:
                    return
                found, density = sought.popleft().result()
                yield from found
        finally:
            pool.shutdown(cancel_futures=True)

    def _find_slice(self, keys: list[str], density: int) -> tuple[list[S3Object], int]:
        """Those of a slice's keys that exist, and the density last measured on the way."""
        found: list[S3Object] = []
        after, settled, passed, requests = "", 0, 0, 0
        while keys:
            span = len(keys) * PAGE // max(density, 1)  # objects that the keys left may lie among
            limit = SEEK if density < SPARSE else min(PAGE, span + SEEK)
            leap = self._leap(keys, after, limit)
            found += leap.found
            keys = keys[leap.settled :]
            # Nothing settled: more objects than `limit` lie between just_before(key) and the key.
            after = "" if leap.settled else leap.last
            settled, passed, requests = settled + leap.settled, passed + leap.passed, requests + 1
            # A request settles the key that it seeks anyway; what came with it tells the density.
            density = dense(settled - requests, passed - requests)
        return found, density

    def _leap(self, keys: list[str], after: str, limit: int) -> Leap:
        """One request from the first of `keys`, or from `after` if that is further."""
        page = self.page(max(after, just_before(keys[0])), limit)
        last = page.keys[-1] if page.token is not None else keys[-1]
        settled = bisect_right(keys, last)
        passed = bisect_right(page.keys, keys[-1])
        return Leap(page.objects(set(keys[:settled])), settled, passed, last)

    def markers(self, key: str) -> dict[str, bool]:
        """The delete markers on a key: version id → whether it is the latest version."""
        with self._counting:
            self._requests.list += 1
        with bucket_errors(f"Cannot list the versions in bucket {self.name}"):
            answer = self._read.list_object_versions(Bucket=self.name, Prefix=key)
        # The key's own versions come first, before those of keys that it is a prefix of.
        found = [item for item in answer.get("DeleteMarkers", []) if item["Key"] == key]
        return {item["VersionId"]: item["IsLatest"] for item in found}

    def delete(self, candidates: list[Candidate]) -> list[Verdict]:
        """Ask S3 to delete the keys in one request; exactly one verdict for each, in their order.

        A key that S3 does not have is answered as deleted. Raises BucketError if the request failed
        as a whole, in which case any of the keys may be gone.
        """
        with self._counting:
            self._requests.delete += 1
        with bucket_errors(f"Cannot delete in bucket {self.name}"):
            if len(candidates) == 1 and NOT_XML.search(candidates[0].key):
                return [self._delete_single(candidates[0])]
            answer: Any = self._write.delete_objects(
                Bucket=self.name, Delete={"Objects": [named(item) for item in candidates]}
            )
        undo = candidates[0].version_id is not None
        verdicts: dict[tuple[str, str | None], Verdict] = {}
        for verdict in sorted(answer["Verdicts"], key=lambda verdict: verdict.code is not None):
            verdicts[verdict.key, verdict.version_id if undo else None] = verdict
        silent = "S3's answer does not mention the key"
        return [
            verdicts.get((item.key, item.version_id)) or Verdict(item.key, "NoAnswer", silent)
            for item in candidates
        ]

    def _delete_single(self, item: Candidate) -> Verdict:
        try:
            answer = self._write.delete_object(Bucket=self.name, **named(item))
        except ClientError as error:  # a verdict on this key, not on the request as a whole
            return Verdict(item.key, *code_and_message(error))
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        if status != 204:  # what DeleteObject answers (S3 API reference)
            return Verdict(item.key, "InvalidAnswer", f"HTTP status {status} instead of 204")
        return Verdict(item.key, marker=answer.get("VersionId"))


def foreign_listing(bucket: str, what: str) -> BucketError:
    message = f"The listing of {bucket} gave {what}, which was not asked for. Nothing was deleted."
    return BucketError(message, "InvalidAnswer")


def dense(wanted: int, objects: int) -> int:
    """Wanted keys in 1,000 objects."""
    return min(PAGE, max(wanted, 0) * PAGE // max(objects, 1))


def named(item: Candidate) -> Any:
    """The object in the words of DeleteObject and DeleteObjects."""
    return {"Key": item.key} | ({"VersionId": item.version_id} if item.version_id else {})


# botocore builds the XML of a DeleteObjects request node by node. These two put the same text into
# the request, three times faster, before it is given its checksum and signature.


def take_objects(params: dict[str, Any], context: dict[str, Any], **_: Any) -> Any:
    """Event `provide-client-params`: set the objects aside, before botocore validates them."""
    context["objects"] = params["Delete"]["Objects"]
    return {**params, "Delete": {"Objects": []}}


def put_objects(params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
    """Event `before-call`: write the request's body."""
    objects = "".join(
        f"<Object><Key>{escape(item['Key'], LINE_FEED)}</Key>"
        + (f"<VersionId>{item['VersionId']}</VersionId>" if "VersionId" in item else "")
        + "</Object>"
        for item in context["objects"]
    )
    params["body"] = f'<Delete xmlns="{S3_NAMESPACE}">{objects}</Delete>'.encode()


S3_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
LINE_FEED = {"\n": "&#xA;"}


def batches(candidates: Iterable[Candidate]) -> Iterator[list[Candidate]]:
    """Cut the plan into requests: up to 1,000 keys, or a single key that XML cannot carry."""
    batch: list[Candidate] = []
    for candidate in candidates:
        if NOT_XML.search(candidate.key):
            yield [candidate]
            continue
        batch.append(candidate)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


# Answers are parsed here, not by botocore: it spends most of a listing's time on timestamps, and
# accepts any well-formed body. botocore calls these with the raw answer before it parses
# (event `before-parse`), and adds what they put into `customized_response_dict` to its own result.


class InvalidAnswer(Exception):
    """The body is not the answer that S3 documents for the request."""


ROOT = re.compile(rb"\s*(?:<\?xml[^>]*\?>\s*)?<([^\s>]+)")


def answer_reader(
    root_tag: str, result: str | None, parse: Callable[[bytes], Any]
) -> Callable[..., None]:
    """A `before-parse` handler: checks a body, parses it, and spares botocore the work.

    A body that is not what S3 documents becomes a 500 with code InvalidAnswer, which is retried.
    """

    def read(
        response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any
    ) -> None:
        if response_dict["status_code"] >= 300:
            return
        body = response_dict["body"]
        try:
            found = ROOT.match(body)
            tag = found[1].decode() if found else ""
            if tag == "Error":
                return  # botocore knows these: S3 answers 200 before it knows that it fails
            if root_tag not in tag:
                raise InvalidAnswer(f"a <{tag}> instead of a <{root_tag}>")
            parsed = parse(body)
        except (ElementTree.ParseError, InvalidAnswer, ValueError) as error:
            response_dict["status_code"] = 500
            response_dict["body"] = (
                "<Error><Code>InvalidAnswer</Code><Message>not an answer of S3's: "
                f"{type(error).__name__}</Message></Error>"
            ).encode()
            log.debug("invalid answer from S3: %s", error)
            return
        if result is not None:
            customized_response_dict[result] = parsed
            response_dict["body"] = b""

    return read


def element(tag: str, content: str = "[^<]*") -> re.Pattern[bytes]:
    return re.compile(f"<{tag}>({content})</{tag}>".encode())


MOMENT = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]+)?Z"
OBJECTS = re.compile(b"<Contents>.*</Contents>", re.DOTALL)
COLUMNS = element("Key"), element("Size", "[0-9]+"), element("LastModified", MOMENT)


def parse_listing(body: bytes) -> Page:
    """ListBucketResult → Page. botocore asks for EncodingType=url, so keys are percent-encoded.

    By pattern, in a third of the time of an XML parser; that the body is whole is seen from its
    end, from KeyCount, and from every object having each column once.
    """
    frame = OBJECTS.sub(b"", body)
    if not frame.rstrip().endswith(b"</ListBucketResult>"):
        raise InvalidAnswer("the end is missing")
    raw, sizes, dates = columns = [column.findall(body) for column in COLUMNS]
    count = int(only("KeyCount", frame))
    if any(len(column) != count for column in columns) or body.count(b"<Contents>") != count:
        raise InvalidAnswer("an object without key, size or date, or not as many as KeyCount says")
    keys = list(map(plain, map(bytes.decode, raw)))
    if b"<EncodingType>url</EncodingType>" in frame:
        decode = partial(unquote_plus, errors="strict")
        keys = [decode(key) if "%" in key or "+" in key else key for key in keys]
    bucket = only("Name", frame)
    if only("IsTruncated", frame) == "false":
        return Page(keys, sizes, dates, None, bucket)
    if not keys:
        raise InvalidAnswer("truncated before the first key")
    return Page(keys, sizes, dates, only("NextContinuationToken", frame), bucket)


def only(tag: str, text: bytes) -> str:
    """The text of the only element that is called so."""
    found = element(tag).findall(text)
    if len(found) != 1:
        raise InvalidAnswer(f"{len(found)} <{tag}>")
    return plain(found[0].decode())


def plain(text: str) -> str:
    """Character data without its XML escapes."""
    return (ElementTree.fromstring(f"<x>{text}</x>").text or "") if "&" in text else text


def check_versions(body: bytes) -> None:
    """Whether a ListVersionsResult is one; botocore reads it."""
    root = tree(body)
    if root.find("Name") is None or root.find("IsTruncated") is None:
        raise InvalidAnswer("without name or end")


def parse_deletes(body: bytes) -> list[Verdict]:
    """DeleteResult → the verdicts in it."""
    verdicts = []
    for item in tree(body):
        if item.tag not in ("Deleted", "Error"):
            continue
        facts = {child.tag: child.text or "" for child in item}
        code = facts.get("Code", "") if item.tag == "Error" else None
        if "Key" not in facts or code == "":
            raise InvalidAnswer(f"<{item.tag}> without key or code")
        version, marker = facts.get("VersionId") or None, facts.get("DeleteMarkerVersionId")
        verdicts.append(Verdict(facts["Key"], code, facts.get("Message", ""), version, marker))
    return verdicts


def tree(body: bytes) -> ElementTree.Element:
    """The answer as a tree, its tags without S3's namespace."""
    root = ElementTree.fromstring(body)
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
    return root


ANSWERS = {
    "ListObjectsV2": answer_reader("ListBucketResult", "Page", parse_listing),
    "DeleteObjects": answer_reader("DeleteResult", "Verdicts", parse_deletes),
    "ListObjectVersions": answer_reader("ListVersionsResult", None, check_versions),
    "GetBucketVersioning": answer_reader("Versioning", None, ElementTree.fromstring),
}


@contextmanager
def bucket_errors(doing: str) -> Iterator[None]:
    """Turn what botocore raises into a BucketError of one line: what was done, why it failed."""
    try:
        yield
    except ClientError as error:
        code, message = code_and_message(error)
        advice = BUCKET_ADVICE.get(code, "")
        raise BucketError(one_line(f"{doing}: {code}: {message} {advice}"), code) from error
    except HTTPClientError as error:
        raise BucketError(one_line(f"{doing}: {error}"), "NoAnswer") from error
    except BotoCoreError as error:
        advice = "Check AWS credentials, --profile and --region."
        raise BucketError(one_line(f"{doing}: {error} {advice}"), type(error).__name__) from error


BUCKET_ADVICE = {
    "NoSuchBucket": "Check --bucket.",
    "AccessDenied": (
        "The AWS identity needs s3:ListBucket and s3:GetBucketVersioning on the bucket and "
        "s3:DeleteObject on its objects; in a versioned bucket also s3:ListBucketVersions, and "
        "for --undo s3:DeleteObjectVersion."
    ),
    "ExpiredToken": "The AWS credentials ended; run again with fresh ones.",
    "PermanentRedirect": "Check --region: the bucket is in another one.",
    "RequestTimeTooSkewed": "Set this host's clock.",
}


def code_and_message(error: ClientError) -> tuple[str, str]:
    answer = error.response.get("Error", {})
    return answer.get("Code") or "unknown", answer.get("Message") or ""


def one_line(text: str) -> str:
    return " ".join(text.split())


# ---------------------------------------------------------------------------------------------
# Report: what is counted, printed and returned
# ---------------------------------------------------------------------------------------------


@dataclass
class Report:
    """The run in numbers. Every planned key of a purge ends in deleted, retained or failed."""

    mode: str
    bucket: str
    prefix: str
    table: str
    run_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    cutoff: datetime | None = None
    versioning: str = "off"
    totals: Totals = field(default_factory=Totals)
    deleted: Tally = field(default_factory=Tally)
    retained: int = 0
    failed: int = 0
    requests: Requests = field(default_factory=Requests)
    max_recheck_age: float = 0.0  # seconds
    started: float = field(default_factory=time.monotonic)
    jobs_deleted: int = 0
    plan_complete: bool = False
    error: PurgeError | None = None

    @property
    def exit_code(self) -> int:
        """0 done or nothing to do; the error's own code; 4 finished, but some keys failed."""
        if self.error is not None:
            return self.error.exit_code
        return 4 if self.failed else 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "mode": self.mode,
            "bucket": self.bucket,
            "prefix": self.prefix,
            "table": self.table,
            "cutoff": self.cutoff and self.cutoff.isoformat(),
            "versioning": self.versioning,
            "planned": asdict(self.totals.planned),
            "deleted": asdict(self.deleted),
            "retained": self.retained,
            "failed": self.failed,
            "missing": self.totals.missing,
            "jobs_deleted": self.jobs_deleted,
            "recoverable": self.versioning == "enabled"
            and self.mode == "purge"
            and self.deleted.objects > 0,
            "requests": asdict(self.requests),
            "max_recheck_age_seconds": round(self.max_recheck_age, 3),
            "seconds": round(time.monotonic() - self.started, 3),
            "exit_code": self.exit_code,
            "error": self.error and self.error.message,
        }

    def as_text(self) -> str:
        """The same for an operator, a line for each fact."""
        facts = self.as_dict()
        lines = [
            ("run", f"{self.run_id} ({self.mode})"),
            ("bucket", f"s3://{self.bucket}/{self.prefix} (versioning {self.versioning})"),
            ("table", self.table),
            ("cutoff", f"{facts['cutoff']}: TRIAL jobs completed before it are expired"),
            ("planned", in_words(self.totals.planned)),
            ("deleted", in_words(self.deleted)),
            ("retained", f"{self.retained} planned, but a job refers to them by now"),
            ("failed", f"{self.failed}"),
            ("missing", f"{self.totals.missing} {MISSING[self.mode]}"),
            ("jobs", f"{self.jobs_deleted} expired job rows deleted"),
            ("requests", f"{self.requests.list} LIST, {self.requests.delete} DELETE"),
            ("re-check", f"at most {self.max_recheck_age:.3f} s before its request"),
            ("seconds", f"{facts['seconds']}"),
            ("exit code", f"{self.exit_code}"),
        ]
        text = "\n".join(
            f"{name:<10}{fact}" for name, fact in lines if name not in HIDDEN[self.mode]
        )
        return text if self.mode == "undo" else text + VERSIONING_ADVICE[self.versioning]


# What the text summary says of missing keys, and leaves out, in each mode.
MISSING = dict.fromkeys(("purge", "dry-run"), "expired keys have no object")
MISSING["undo"] = "delete markers are gone already"
HIDDEN = {
    "purge": (),
    "dry-run": ("deleted", "retained", "failed", "jobs", "re-check"),
    "undo": ("table", "cutoff", "retained", "jobs", "re-check"),
}
VERSIONING_ADVICE = {
    "off": "",
    "enabled": "\nThe bucket is versioned: deleted objects are hidden behind delete markers, and no"
    "\nspace is freed until a lifecycle rule expires old versions. Till then --undo AUDIT_LOG"
    "\nbrings them back.",
    "suspended": "\nVersioning is suspended: deleted objects are gone, a run cannot be undone.",
}


def in_words(tally: Tally) -> str:
    """`17 objects, 357 bytes (17 expired, 0 orphans)`"""
    reasons = f"{tally.expired} expired, {tally.orphan} orphans"
    return f"{tally.objects} objects, {tally.bytes} bytes ({reasons})"


def watched(items: Iterable[T], phase: str, total: int | None = None) -> Iterator[T]:
    """The same items. Says on standard error how far they are, and how fast: with a progress bar on
    a terminal, otherwise (a cron log) with a line a minute."""
    started = told = time.monotonic()
    with ExitStack() as stack:
        bar = None
        if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
            bar = stack.enter_context(progress_bar(phase, total))
        count = shown = 0
        for count, item in enumerate(items, 1):
            yield item
            if count % 100 and total != count:
                continue
            now = time.monotonic()
            rate = count / max(now - started, 0.001)
            if bar is not None:
                bar.update(count - shown, f"{rate:,.0f}/s")
                shown = count
            elif now - told >= 60:
                left = f" of {total:,}, {(total - count) / rate:,.0f} s left" if total else ""
                log.info("%s: %s%s, %s/s", phase, f"{count:,}", left, f"{rate:,.0f}")
                told = now


def progress_bar(phase: str, total: int | None) -> ProgressBar[Any]:
    """click's bar, with position, remaining time, and the rate that `update` is given."""
    return click.progressbar(
        repeat(None),
        length=total,
        label=phase,
        show_pos=True,
        item_show_func=lambda rate: rate,
        file=sys.stderr,
        update_min_steps=1,
    )


class Ledger:
    """Accounts for every key: in the report, in the audit log, failures also on standard error.

    The audit log is JSON Lines, appended: `start`, then `delete` (the intent, on disk before its
    request leaves), `deleted`, `failed` or `retained` for each key, and `end` with the summary.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        self._file: io.FileIO | None = None
        self._started = False
        self._broken: OSError | None = None

    def open(self, path: Path | None) -> None:
        """Raises UsageError if the file cannot be appended to."""
        if path is None:
            return
        try:
            self._file = io.FileIO(path, "a+")
            if self._file.seek(0, os.SEEK_END):
                self._file.seek(-1, os.SEEK_END)
                if self._file.read() != b"\n":  # a run that was killed left its last line cut
                    self._file.write(b"\n")
        except OSError as error:
            raise UsageError(f"Cannot write the audit log {path}: {error.strerror}.") from error

    def start(self, options: Options) -> None:
        report = self.report
        where = {"bucket": report.bucket, "prefix": report.prefix, "table": report.table}
        cutoff = report.cutoff and report.cutoff.isoformat()
        self._started = True
        self._write([self._event("start", **where, cutoff=cutoff, options=asdict(options))])
        self._check()

    def intend(self, candidates: list[Candidate]) -> None:
        """Put the keys on disk, before their request. Raises PurgeError if that fails."""
        self._write((self._key_event("delete", item) for item in candidates), sync=True)
        self._check()

    def deleted(self, item: Candidate, marker: str | None) -> None:
        self.report.deleted.add(item)
        self._note("deleted", item, {"version_id": marker} if marker else {})

    def retained(self, item: Candidate) -> None:
        self.report.retained += 1
        log.info("retained %s: a job refers to it by now", printable(item.key))
        self._note("retained", item, {})

    def failed(self, item: Candidate, verdict: Verdict) -> None:
        self.report.failed += 1
        if verdict.code != NOT_ATTEMPTED:
            reason = one_line(f"{verdict.code}: {verdict.message}")
            log.error("failed %s: %s", printable(item.key), reason)
        self._note("failed", item, {"code": verdict.code, "message": verdict.message})

    def end(self) -> None:
        """Close the log with the summary. Raises PurgeError if the log has a gap."""
        if self._started:
            self._write([self._event("end", **self.report.as_dict())], sync=True)
            self._check()

    def _note(self, event: str, item: Candidate, more: dict[str, Any]) -> None:
        if self._file is not None:
            self._write([self._key_event(event, item, **more)])

    def _key_event(self, event: str, item: Candidate, **more: Any) -> dict[str, Any]:
        known = {"key": item.key, "reason": item.reason, "size": item.size}
        return self._event(event, **known, last_modified=item.last_modified, **more)

    def _event(self, event: str, **more: Any) -> dict[str, Any]:
        now = datetime.now(UTC).isoformat()
        return {"event": event, "run_id": self.report.run_id, "time": now} | more

    def _write(self, events: Iterable[dict[str, Any]], sync: bool = False) -> None:
        """Append whole lines. After a failed write nothing more is: the log ends where it broke."""
        if self._file is None or self._broken is not None:
            return
        lines = "".join(json.dumps(event, default=str) + "\n" for event in events).encode()
        try:
            while lines:
                lines = lines[self._file.write(lines) :]
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._broken = error

    def _check(self) -> None:
        if self._broken is not None:
            reason = self._broken.strerror
            raise PurgeError(f"Cannot write the audit log: {reason}. Mend that and run again.")


# ---------------------------------------------------------------------------------------------
# Execution
# ---------------------------------------------------------------------------------------------


class StopSignals:
    """SIGINT and SIGTERM. The first ends the run in order, a second one at once.

    While the run only reads, the signal raises Interrupted where it arrives. After `defer` it is
    only noted, and `check` raises: between two batches, so that all in flight is accounted for.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._deferred = False
        self.event = threading.Event()
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._receive)

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        self._received = signum
        self.event.set()
        if not self._deferred:
            raise Interrupted(signum)

    def defer(self) -> None:
        self._deferred = True

    def check(self) -> None:
        if self._received is not None:
            raise Interrupted(self._received)

    def between(self, items: Iterable[T]) -> Iterator[T]:
        """The same items, with a check before each."""
        for item in items:
            self.check()
            yield item


class Pace:
    """When the next request may leave. All leave through one thread, so all workers ease off alike.

    `rate` is in objects per second, 0 for no limit: a token bucket that holds one batch. `clock` is
    monotonic, in seconds.
    """

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._filled = 0.0  # when the bucket is full again
        self._pause = self._until = 0.0

    @property
    def delay(self) -> float:
        """Seconds until the next request may leave."""
        return max(0.0, self._filled - self._clock(), self._until - self._clock())

    def sent(self, objects: int) -> None:
        if self._rate:
            self._filled = max(self._filled, self._clock()) + objects / self._rate

    def ease_off(self) -> None:
        """After a retryable failure: pause before the next request, longer each time.

        Answers to requests that left before the pause do not make it longer.
        """
        if self._clock() >= self._until:
            self._pause = min(max(self._pause * 2, FIRST_PAUSE), LAST_PAUSE)
            self._until = self._clock() + self._pause * random.uniform(0.5, 1)

    def recover(self) -> None:
        """After a success."""
        self._pause /= 2


@dataclass
class Batch:
    """Keys that go in one request."""

    candidates: list[Candidate]
    tries: int = 0  # requests sent so far
    verdicts: dict[Candidate, Verdict] = field(default_factory=dict)  # of the last try
    checked: float = 0.0  # when its re-check began (monotonic seconds)
    age: float = 0.0  # seconds from then to its request


def start_threads(pool: ThreadPoolExecutor, count: int) -> None:
    """Start all threads of a pool now: a thread that cannot start must not fail a later `submit`,
    which would have queued its task all the same."""
    together = threading.Barrier(count + 1)
    try:
        for _ in range(count):
            pool.submit(together.wait)
    except RuntimeError as error:
        together.abort()
        raise PurgeError(f"Cannot start {count} threads ({error}): lower --workers.") from error
    together.wait()


class Execution:
    """Carries out a plan: this thread re-checks and accounts, a pool of workers sends requests.

    A batch waits nowhere between its re-check and its request: first a free worker is awaited, then
    the table is asked, then the request leaves. A key that S3 cannot delete just now goes through
    all of that again. Where a re-check is dear, one serves several batches, up to `max_chunk`.

    `in_use` tells which keys of some candidates must stay, at this moment.
    """

    def __init__(
        self,
        bucket: Bucket,
        ledger: Ledger,
        stop: StopSignals,
        options: Options,
        in_use: Callable[[list[Candidate]], set[str]],
        max_chunk: int = 1,
    ) -> None:
        self._bucket, self._ledger, self._stop = bucket, ledger, stop
        self._workers, self._in_use = options.workers, in_use
        self._pace = Pace(options.max_rate)
        share = BATCH / options.max_rate / 4 if options.max_rate else 0
        self._dear = min(max(CHEAP_RECHECK, share), DEAR_RECHECK)
        self._in_flight: dict[Future[None], Batch] = {}
        self._retries: deque[Batch] = deque()
        self._checked: deque[Batch] = deque()  # free to be sent
        self._chunk, self._max_chunk = 1, max_chunk  # batches in the next re-check

    def run(self, candidates: Iterable[Candidate]) -> None:
        """Each candidate ends as exactly one of deleted, failed, retained in the ledger.

        Raises PurgeError if the run had to stop: what was in flight is finished and accounted for,
        what was not attempted counts as failed.
        """
        source = map(Batch, batches(candidates))
        with ThreadPoolExecutor(self._workers) as pool:
            start_threads(pool, self._workers)
            try:
                while self._next_is_ready(source):
                    self._ledger.intend(self._checked[0].candidates)
                    batch = self._checked.popleft()
                    self._in_flight[pool.submit(self._send, batch)] = batch
                    self._pace.sent(len(batch.candidates))
            finally:
                self._finish(source)

    def _next_is_ready(self, source: Iterator[Batch]) -> bool:
        """Wait until a worker is free and a batch re-checked for it; False when all is done."""
        while True:
            while len(self._in_flight) >= self._workers:
                self._settle(FIRST_COMPLETED)
            if (delay := self._pace.delay) > 0:
                self._stop.event.wait(delay)
            self._stop.check()
            self._drop_stale()
            if self._checked:
                return True
            if not self._recheck(source):
                if not self._in_flight:
                    return False
                self._settle(FIRST_COMPLETED)  # it may have to be retried

    def _drop_stale(self) -> None:
        """Re-checks that have grown too old are done again."""
        if self._checked and time.monotonic() - self._checked[0].checked > MAX_RECHECK_AGE:
            self._retries.extend(self._checked)
            self._checked.clear()

    def _recheck(self, source: Iterator[Batch]) -> bool:
        """Ask which keys of the next batches are in use by now; False if no batch is left."""
        chunk: list[Batch] = []
        try:
            for batch in self._take(source):
                chunk.append(batch)
                self._find_lost_answers(batch)
            started = time.monotonic()
            used = self._in_use([item for batch in chunk for item in batch.candidates])
            gone = self._gone(chunk, used)
        except BaseException:
            self._retries.extend(chunk)  # where `_finish` accounts for them
            raise
        cost = time.monotonic() - started
        for batch in chunk:
            for item in batch.candidates:
                if item.key in gone:
                    self._ledger.deleted(item, None)
                elif item.key in used:
                    self._ledger.retained(item)
            batch.candidates = [item for item in batch.candidates if item.key not in used]
            batch.checked = started
            if batch.candidates:
                self._checked.append(batch)
        # Were the cost a scan's, whatever is asked, then so many would make it cheap enough.
        self._chunk = max(1, min(int(cost / self._dear), self._max_chunk))
        return bool(chunk)

    def _take(self, source: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of the next re-check, retries first."""
        size = 0
        for _ in range(self._chunk):
            if size > CHUNK_BYTES:
                return
            batch = self._retries.popleft() if self._retries else next(source, None)
            if batch is None:
                return
            yield batch
            size += sum(2 * len(item.key.encode()) + 64 for item in batch.candidates)

    def _find_lost_answers(self, batch: Batch) -> None:
        """In a versioned bucket, find out which keys an earlier try has deleted after all.

        Deleting them again would put a second marker on top, of which no log would know.
        """
        if not batch.tries or self._ledger.report.versioning != "enabled":
            return
        gone: dict[Candidate, str] = {}
        for item in batch.candidates:
            markers = {} if item.version_id else self._bucket.markers(item.key)
            gone.update((item, marker) for marker, is_latest in markers.items() if is_latest)
        for item, marker in gone.items():
            self._ledger.deleted(item, marker)
        batch.candidates = [item for item in batch.candidates if item not in gone]

    def _gone(self, chunk: list[Batch], used: set[str]) -> set[str]:
        """Of the keys in use by now, those that an earlier try has deleted after all: its answer
        was lost, and the job came later. They are not retained."""
        tried = [item.key for batch in chunk if batch.tries for item in batch.candidates]
        doubtful = sorted(used.intersection(tried))
        return set(doubtful) - {item.key for item in self._bucket.find(doubtful)}

    def _send(self, batch: Batch) -> None:
        """In a worker: one request. Verdicts and age are left in the batch."""
        batch.tries += 1
        batch.age = time.monotonic() - batch.checked
        try:
            verdicts = self._bucket.delete(batch.candidates)
        except Exception as error:  # whatever it is, no key may go uncounted
            code = error.code if isinstance(error, BucketError) else type(error).__name__
            verdicts = [Verdict(item.key, code, str(error)) for item in batch.candidates]
            raise
        finally:
            batch.verdicts = dict(zip(batch.candidates, verdicts, strict=True))

    def _settle(self, until: str) -> None:
        """Wait for requests in flight and account for every key of those that ended.

        Raises the error of a request that S3 refused as a whole: it would refuse the next one too.
        """
        refused: BaseException | None = None
        for request in wait(self._in_flight, return_when=until).done:
            self._account(self._in_flight.pop(request))
            error = request.exception()
            if error and not (isinstance(error, BucketError) and error.code in RETRYABLE):
                refused = error
        if refused is not None:
            raise refused

    def _account(self, batch: Batch) -> None:
        report = self._ledger.report
        report.max_recheck_age = max(report.max_recheck_age, batch.age)
        again = Batch([], batch.tries, batch.verdicts)
        for item in batch.candidates:
            verdict = batch.verdicts[item]
            if verdict.code is None:
                self._ledger.deleted(item, verdict.marker)
            elif verdict.code in RETRYABLE and batch.tries < ATTEMPTS:
                again.candidates.append(item)
            else:
                self._ledger.failed(item, verdict)
        if again.candidates:
            self._retries.append(again)
            self._pace.ease_off()
        else:
            self._pace.recover()

    def _finish(self, source: Iterable[Batch]) -> None:
        """Account for all that is left. After a run without errors that is nothing."""
        with suppress(Exception):  # the run stops already, for the first error
            self._settle(ALL_COMPLETED)
        unsent = 0
        for batch in chain(self._retries, self._checked, source):
            for item in batch.candidates:
                default = Verdict(item.key, NOT_ATTEMPTED, "the run stopped")
                verdict = batch.verdicts.get(item, default)
                unsent += verdict is default
                self._ledger.failed(item, verdict)
        if unsent:
            log.error("%d planned keys were not attempted; they count as failed", unsent)


class InUse:
    """The re-check: which of some candidates must stay, because a job refers to them by now."""

    def __init__(self, jobs: JobTable, prefix: str) -> None:
        self._jobs, self._prefix = jobs, prefix
        self._advised = False

    def __call__(self, candidates: list[Candidate]) -> set[str]:
        """The keys that must stay: of expired keys those that a remaining job refers to, of orphans
        those that any job does."""
        if not candidates:
            return set()
        start, asked = len(self._prefix), time.monotonic()
        names = [item.key[start:] for item in candidates]
        orphans = any(item.reason is Reason.ORPHAN for item in candidates)
        found = self._jobs.referenced(names, by_any=orphans)
        self._advise(time.monotonic() - asked)
        # A job without a name does not refer to an object that is called like the prefix.
        return {
            item.key
            for item, name in zip(candidates, names, strict=True)
            if name and (name in found if item.reason is Reason.ORPHAN else found.get(name))
        }

    def _advise(self, seconds: float) -> None:
        """Once, if it is so: say which index would help."""
        if seconds > DEAR_RECHECK and not self._advised and not self._jobs.indexed:
            advice = "each scans the table; an index on sourceData would help"
            log.warning("a re-check of %s took %.1f s: %s", self._jobs.name, seconds, advice)
            self._advised = True


def delete_jobs(
    rows: Iterable[JobRow],
    names: Spool[Reference],
    bucket: Bucket,
    jobs: JobTable,
    report: Report,
    stop: StopSignals,
) -> None:
    """Delete the rows of expired jobs whose object is gone, or is kept by a remaining job.

    A new listing, made after the deletes, tells what is gone. The row of an object that is still
    there, as its delete failed or it was retained, stays: the next run decides anew. So does a row
    whose key the plan did not know. Raises PurgeError, and Interrupted between two statements.
    """
    still_there = bucket.find(stop.between(expired_keys(names)))
    for chunk in chunks(disposable(rows, outer_join(names, still_there)), ROWS_A_COMMIT):
        stop.check()
        shared = [row.name for row, gone in chunk if not gone]
        remaining = jobs.referenced(shared) if shared else {}
        free = [row for row, gone in chunk if gone or row.name in remaining]
        report.jobs_deleted += jobs.delete(free) if free else 0


def expired_keys(names: Iterable[Reference]) -> Iterator[str]:
    """The keys to look for in the bucket; S3 cannot hold one that is too long."""
    for reference in names:
        if reference.expired and len(reference.key.encode()) <= KEY_BYTES:
            yield reference.key


def expired_rows(rows: Iterable[tuple[bytes, str]], prefix: str) -> Iterator[JobRow]:
    """The rows that name an object."""
    for name, job_id in rows:
        if text := as_text(name):
            yield JobRow(prefix + text, text, job_id)


def disposable(
    rows: Iterable[JobRow], pairs: Iterable[tuple[Reference | None, S3Object | None]]
) -> Iterator[tuple[JobRow, bool]]:
    """Of the rows (ascending by key), those whose key the plan knew and whose object is gone (True)
    or was kept by a remaining job when the plan was made (False)."""
    known = iter(pairs)
    reference, found = next(known, (None, None))
    for row in rows:
        while reference is not None and reference.key < row.key:
            reference, found = next(known, (None, None))
        if reference is not None and reference.key == row.key:
            if not reference.expired:
                yield row, False
            elif found is None:
                yield row, True


def recorded_markers(path: Path, bucket: str) -> Iterator[Candidate]:
    """The delete markers that an audit log records, as candidates for their own removal.

    A cut line, which a killed run leaves, is skipped with a warning. Raises UsageError if the file
    cannot be read, Refused if it is no audit log or one of another bucket.
    """
    number = starts = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    event = json.loads(line)
                except ValueError:
                    log.warning("%s: line %d is cut; skipped", path, number)
                    continue
                if event["event"] == "start":
                    starts += 1
                    if event["bucket"] != bucket:
                        raise Refused(
                            f"{path} is the log of bucket {event['bucket']}, not {bucket}."
                        )
                elif event["event"] == "deleted" and event.get("version_id", "null") != "null":
                    modified = datetime.fromisoformat(event["last_modified"]).isoformat()
                    known = str(event["key"]), int(event["size"]), modified
                    yield Candidate(*known, Reason(event["reason"]), str(event["version_id"]))
    except OSError as error:
        raise UsageError(f"Cannot read the audit log {path}: {error.strerror}.") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Refused(f"{path}, line {number}: not of an audit log of this tool.") from error
    if not starts:
        raise Refused(f"{path} is not an audit log of this tool: it has no start event.")


def plan_undo(
    recorded: Iterable[Candidate], bucket: Bucket, totals: Totals, workers: int
) -> Iterator[Candidate]:
    """Those markers that are still there. Anything else under such a version id is left alone."""
    with ThreadPoolExecutor(workers) as pool:
        for chunk in map(list, map(dict.fromkeys, chunks(recorded, PAGE))):
            found = pool.map(bucket.markers, [item.key for item in chunk])
            for item, markers in zip(chunk, found, strict=True):
                if item.version_id in markers:
                    totals.planned.add(item)
                    yield item
                else:
                    totals.missing += 1


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """The command line, checked. Names and meanings are those of `--help`."""

    db_host: str
    db_port: int
    db_user: str
    db_name: str
    db_table: str
    ca_bundle: Path | None
    bucket: str
    prefix: str
    profile: str | None
    region: str | None
    retention_days: int
    as_of: datetime | None
    orphans: bool
    orphan_grace_days: int
    delete_jobs: bool
    dry_run: bool
    max_objects: int | None
    max_percent: float
    max_rate: int
    workers: int
    audit_log: Path | None
    manifest: Path | None
    json: bool
    verbose: bool
    quiet: bool
    undo: Path | None

    @property
    def table(self) -> tuple[str, str]:
        """Schema and name of the job table."""
        first, dot, second = self.db_table.partition(".")
        return (first, second) if dot else (self.db_name, first)

    def policy(self, now: datetime) -> Policy:
        """The rules at the moment `now` of the database's clock (aware UTC).

        Raises Refused for `--as-of` in the future, where jobs would expire before their time.
        """
        if self.as_of is not None and self.as_of > now:
            raise Refused(
                f"--as-of {self.as_of.isoformat()} is later than the database clock, "
                f"{now.isoformat()}: give a moment that has passed."
            )
        return Policy(
            cutoff=(self.as_of or now.replace(microsecond=0)) - timedelta(days=self.retention_days),
            orphans_before=now - timedelta(days=self.orphan_grace_days) if self.orphans else None,
        )


class Timestamp(click.ParamType[datetime]):
    """ISO 8601, taken as UTC if it has no offset."""

    name = "timestamp"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        try:
            moment = datetime.fromisoformat(value)
            moment = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not ISO 8601, such as 2019-06-03T00:00:00Z.", param, ctx)
        if moment.year < 1970:
            self.fail(f"{value!r} is before 1970.", param, ctx)
        return moment


class BucketName(click.ParamType[str]):
    """A bucket's name or access point ARN, not a URL."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if "/" in value and not value.startswith("arn:"):
            self.fail(f"{value!r} is not a bucket name; give the path as --prefix.", param, ctx)
        return str(value)


class TableName(click.ParamType[str]):
    """`table` or `schema.table`."""

    name = "table"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not 1 <= len(value.split(".")) <= 2 or not all(value.split(".")):
            self.fail(f"{value!r} is neither TABLE nor SCHEMA.TABLE.", param, ctx)
        return str(value)


EPILOG = f"""\b
Environment:
  {PASSWORD_VARIABLE}  instead of an IAM token, for servers without IAM;
                               without a CA bundle only for a loopback host
  AWS_ENDPOINT_URL_S3          another S3 server

\b
Exit codes:
  0  done, or nothing to do
  1  an operation failed (database, S3)
  2  wrong usage
  3  refused by a guard, nothing deleted
  4  finished, but some keys failed
  75  another run holds the lock
  130, 143  stopped by SIGINT, SIGTERM; run again to finish
"""


def option(*names: str, **settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(*names, show_envvar=True, show_default=True, **settings)


@click.command(
    context_settings={"auto_envvar_prefix": "RETENTION_PURGE", "max_content_width": 100},
    epilog=EPILOG,
)
@option("--db-host", help="RDS endpoint: the real one, the IAM token is signed for it.  [required]")
@option("--db-port", type=click.IntRange(1, 65535), default=3306, help="Port of the database.")
@option("--db-user", help="Database user.  [required]")
@option("--db-name", help="Schema of the job table.  [required]")
@option("--db-table", type=TableName(), default="ndvr_job_status", help="TABLE or SCHEMA.TABLE.")
@option(
    "--ca-bundle",
    type=click.Path(path_type=Path),
    help="CA certificates for the database.  "
    f"[default: {DEFAULT_CA_BUNDLE.name} beside the script]",
)
@option("--bucket", type=BucketName(), required=True, help="Bucket with the source data.")
@option(
    "--prefix", default="", help="Put before sourceData; nothing outside it is listed or deleted."
)
@option("--profile", help="AWS profile.  [default: the AWS chain]")
@option("--region", help="AWS region of the database.  [default: the AWS chain]")
@option(
    "--retention-days",
    type=click.IntRange(1, 36500),
    default=90,
    help="Days after completedAt at which a TRIAL job expires.",
)
@option(
    "--as-of",
    type=Timestamp(),
    help="Expire as if it were this moment: ISO 8601, UTC if no offset.  [default: database clock]",
)
@option("--orphans", is_flag=True, help="Also delete objects that no job refers to.")
@option(
    "--orphan-grace-days",
    type=click.IntRange(0, 36500),
    default=7,
    help="Keep orphans last modified within these days of the real clock.",
)
@option("--delete-jobs", is_flag=True, help="Also delete expired job rows.")
@option("-n", "--dry-run", is_flag=True, help="Plan and report, change nothing.")
@option(
    "--max-objects",
    type=click.IntRange(0),
    help="Refuse the run if more objects would be deleted.  [default: no limit]",
)
@option(
    "--max-percent",
    type=click.FloatRange(0, 100),
    default=50,
    help="Refuse the run if more than this share would be deleted: of the planned keys and those "
    "of remaining jobs; with --orphans also of the objects listed.",
)
@option(
    "--max-rate",
    type=click.IntRange(0),
    default=3000,
    help="Objects deleted per second at most, 0 = no limit.",
)
@option(
    "--workers",
    type=click.IntRange(1, 64),
    default=8,
    help="Concurrent DeleteObjects requests; LIST requests may be four times as many.",
)
@option(
    "--audit-log",
    type=click.Path(path_type=Path),
    help="Append what is deleted to this file, as JSON Lines; a dry run writes nothing.",
)
@option(
    "--manifest",
    type=click.Path(path_type=Path),
    help="Write the plan to this file, as an S3 Batch Operations CSV manifest.",
)
@option("--json", is_flag=True, help="Print the summary as one JSON object.")
@option("-v", "--verbose", is_flag=True, help="Log more, and show tracebacks.")
@option("-q", "--quiet", is_flag=True, help="Log warnings and errors only.")
@click.option(
    "--undo",
    type=click.Path(path_type=Path),
    metavar="AUDIT_LOG",
    allow_from_autoenv=False,
    help="Remove the delete markers that this log records, and stop (versioned bucket only).",
)
@click.pass_context
def main(ctx: click.Context, /, **values: Any) -> None:
    """Delete the S3 source data of TRIAL jobs completed more than 90 days ago.

    A key goes only if no remaining job refers to it; OFFICIAL jobs and their data stay for ever.
    Start with --dry-run.
    """
    # The imported modules are no garbage: do not look through them again and again.
    gc.freeze()
    gc.set_threshold(20_000)
    options = Options(**values)
    check_usage(ctx, options)
    set_up_output(options)
    stop = StopSignals()
    mode = "undo" if options.undo else "purge"
    report = Report(
        mode="dry-run" if options.dry_run else mode,
        bucket=options.bucket,
        prefix=options.prefix,
        table="" if options.undo else ".".join(options.table),
    )
    ledger = Ledger(report)
    try:
        report.error = outcome(lambda: (undo if options.undo else purge)(options, ledger, stop))
        stop.defer()
    except Interrupted as received:  # here, so that no moment of the run is without a catcher
        report.error = Stopped(received.signum)
    for last in (ledger.end, lambda: show_summary(report, options)):
        error = outcome(last)
        report.error = report.error or error
    if report.error is not None:
        with suppress(OSError):
            report.error.show()
    ctx.exit(report.exit_code)


def check_usage(ctx: click.Context, options: Options) -> None:
    """What click cannot check for a single option."""
    for param in ctx.command.params:
        if param.name in NEEDED and not options.undo and getattr(options, param.name) is None:
            raise click.MissingParameter(ctx=ctx, param=param)
        variable = f"RETENTION_PURGE_{str(param.name).upper()}"
        if getattr(param, "is_flag", False) and os.environ.get(variable) == "":
            raise click.UsageError(f"{variable} is empty: set it to 1 or 0, or unset it.", ctx)
    files = [path.resolve() for path in (options.manifest, options.audit_log) if path]
    if len(files) > len(set(files)):
        raise click.UsageError("--manifest and --audit-log must be two files.", ctx)


def show_summary(report: Report, options: Options) -> None:
    if options.json:
        show(json.dumps(report.as_dict()))
    elif report.plan_complete:
        show(report.as_text())


def show(text: str) -> None:
    """Print a result. Raises PurgeError if standard output is closed or full."""
    try:
        click.echo(text)
    except OSError as error:
        # Nothing more can be printed, neither here nor when Python flushes at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise PurgeError(f"Cannot print the result: {error.strerror}.") from error


# Options that a purge must be given, and --undo need not.
NEEDED = ("db_host", "db_user", "db_name")


def outcome(action: Callable[[], None]) -> PurgeError | None:
    """Do it; the error that ended it, in one line, whatever it was."""
    try:
        action()
    except PurgeError as error:
        log.debug("stopped", exc_info=True)
        return error
    except Exception as error:
        log.debug("stopped", exc_info=True)
        return PurgeError(one_line(f"Unexpected {type(error).__name__}: {error}. -v shows where."))
    return None


def set_up_output(options: Options) -> None:
    """Log to standard error, in UTC; print any key on a terminal of any encoding."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        elif stream is None:  # the caller has closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    handler = logging.StreamHandler()
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    log.handlers = [handler]
    log.propagate = False
    level = logging.WARNING if options.quiet else logging.INFO
    log.setLevel(logging.DEBUG if options.verbose else level)


def purge(options: Options, ledger: Ledger, stop: StopSignals) -> None:
    """The run; see the top of this file. Raises PurgeError.

    A dry run has no `live` connection: it takes no lock, and cannot delete.
    """
    report = ledger.report
    session = aws_session(options)
    bucket = Bucket(session, options.bucket, options.prefix, options.workers, report.requests)
    server = server_of(options, session)
    with ExitStack() as stack:
        live = None
        if not options.dry_run:
            ledger.open(options.audit_log)
            live = stack.enter_context(closing(connect(server, RECHECK_TIMEOUT)))
            take_lock(live, options.bucket, options.prefix, report.table)
        names, policy, reasons = read_table(options, server, bucket, report)
        stack.callback(names.close)
        if live is not None:
            ledger.start(options)
        candidates = make_plan(bucket, names, policy, report)
        stack.callback(candidates.close)
        limits = Limits(options.max_objects, options.max_percent, options.orphans)
        reasons += refusals(report.totals, limits)
        if live is None:
            show_plan(candidates, options)
        if reasons:
            raise Refused(f"Refused, nothing was deleted: {'; '.join(reasons)}.")
        if options.manifest is not None:
            write_manifest(candidates, options.bucket, options.manifest)
        if live is not None:
            stop.defer()
            jobs = JobTable(live, options.table, policy.cutoff)
            in_use = InUse(jobs, options.prefix)
            todo = watched(candidates, "deleting", candidates.count)
            Execution(bucket, ledger, stop, options, in_use, jobs.max_chunk).run(todo)
            if options.delete_jobs:
                rows = read_expired_rows(options, server, policy.cutoff, stop)
                stack.callback(rows.close)
                delete_jobs(rows, names, bucket, jobs, report, stop)


def read_table(
    options: Options, server: Server, bucket: Bucket, report: Report
) -> tuple[Spool[Reference], Policy, list[str]]:
    """The job table's keys, the rules at its clock, and what is wrong with the clocks."""
    report.versioning, s3_lead = bucket.versioning()
    with closing(connect(server, PLAN_TIMEOUT)) as connection:
        host, now = datetime.now(UTC), database_now(connection)
        policy = options.policy(now)
        report.cutoff = policy.cutoff
        jobs = JobTable(connection, options.table, policy.cutoff)
        log.info("reading %s; cutoff %s", jobs.name, policy.cutoff.isoformat())
        rows = watched(jobs.names(), "reading references")
        all_keys = options.orphans or options.delete_jobs
        keys = references(rows, options.prefix, report.totals, all_keys)
        names = Spool(Reference, keys)
    return names, policy, list(clock_refusals(host, now, s3_lead))


def read_expired_rows(
    options: Options, server: Server, cutoff: datetime, stop: StopSignals
) -> Spool[JobRow]:
    """The expired rows as they are now, on a connection that may sort for long."""
    log.info("looking which expired job rows may go")
    with closing(connect(server, PLAN_TIMEOUT)) as connection:
        rows = JobTable(connection, options.table, cutoff).expired_rows()
        return Spool(JobRow, stop.between(expired_rows(rows, options.prefix)))


def undo(options: Options, ledger: Ledger, stop: StopSignals) -> None:
    """Remove the delete markers that an audit log records, so that the objects are live again.

    Only markers: a version id that is not (or no more) a delete marker of its key is left alone.
    Raises PurgeError.
    """
    assert options.undo is not None
    report = ledger.report
    session = aws_session(options)
    bucket = Bucket(session, options.bucket, options.prefix, options.workers, report.requests)
    report.versioning, _ = bucket.versioning()
    if report.versioning == "off":
        raise Refused(f"Bucket {options.bucket} is not versioned: there is nothing to undo.")
    recorded = recorded_markers(options.undo, options.bucket)
    markers = plan_undo(recorded, bucket, report.totals, options.workers)
    with closing(Spool(Candidate, markers)) as candidates:
        report.plan_complete = True
        if options.dry_run:
            show_plan(candidates, options)
        else:
            stop.defer()
            Execution(bucket, ledger, stop, options, lambda _: set()).run(candidates)


def make_plan(
    bucket: Bucket, names: Spool[Reference], policy: Policy, report: Report
) -> Spool[Candidate]:
    """List what the policy needs of the bucket, merge it with the references, and keep the plan."""
    totals = report.totals
    log.info("%d keys are expired, %d stay; listing the bucket", totals.expired, totals.remaining)
    objects = bucket.find(expired_keys(names)) if policy.orphans_before is None else bucket.all()
    references = watched(names, "listing", names.count)
    candidates = Spool(Candidate, plan(outer_join(references, objects), policy, report.totals))
    report.plan_complete = True
    log.info("planned: %s", in_words(report.totals.planned))
    return candidates


def show_plan(candidates: Iterable[Candidate], options: Options) -> None:
    """Print what a real run would delete: reason, bytes, last modified, key."""
    if options.json:
        return
    for chunk in chunks(candidates, 1000):
        show(
            "\n".join(
                f"{item.reason}\t{item.size}\t{item.last_modified}\t{printable(item.key)}"
                for item in chunk
            )
        )


def write_manifest(candidates: Iterable[Candidate], bucket: str, path: Path) -> None:
    """Write the plan as S3 Batch Operations reads it: `bucket,url-encoded-key` on each line.

    Raises PurgeError.
    """
    try:
        with path.open("w", encoding="ascii", newline="") as file:
            file.writelines(f"{bucket},{quote(item.key)}\n" for item in candidates)
    except OSError as error:
        raise PurgeError(f"Cannot write the manifest {path}: {error.strerror}.") from error


def aws_session(options: Options) -> boto3.Session:
    try:
        return boto3.Session(profile_name=options.profile, region_name=options.region)
    except BotoCoreError as error:
        raise UsageError(f"{error}. Check --profile.") from error


def server_of(options: Options, session: boto3.Session) -> Server:
    """The database that the options name; the default CA bundle only if it is there."""
    return Server(
        host=options.db_host,
        port=options.db_port,
        user=options.db_user,
        database=options.db_name,
        ca_bundle=options.ca_bundle or (DEFAULT_CA_BUNDLE if DEFAULT_CA_BUNDLE.exists() else None),
        token=lambda: iam_token(session, options),
    )


def iam_token(session: boto3.Session, options: Options) -> str:
    """A login token for this host, port and user, good for 15 minutes."""
    try:
        return session.client("rds").generate_db_auth_token(
            options.db_host, options.db_port, options.db_user
        )
    except BotoCoreError as error:
        raise UsageError(
            one_line(f"Cannot make an IAM token: {error} Check AWS credentials, --region.")
        ) from error


if __name__ == "__main__":
    main()
