#!/usr/bin/env python3
"""Delete the S3 source data of expired TRIAL jobs, and nothing that a remaining job refers to.

A job table in MySQL names the objects: the key of a job's source data is `prefix + sourceData`.

    expired job     `type` is exactly TRIAL and `completedAt` lies before the cutoff
    remaining job   every other row: OFFICIAL, not completed, unknown type; when in doubt, keep
    expired key     referred to by at least one expired job and by no remaining job
    orphan          an object that no job refers to at all, older than the grace period

Deleted are expired keys and, if asked for, orphans. Everything else stays, for ever. Keys are
compared as bytes, the way S3 compares them, whatever the collation of the table says.

The run, in order; any error before step 5 ends it with nothing deleted:

    1. the job table, grouped by key and sorted by its bytes, is read at once into a spool file
    2. the bucket's listing, which S3 sorts by the same bytes, is merged with it
    3. the merge writes the plan, a second spool file
    4. a dry run prints the plan and ends
    5. batch by batch: look again in the table whether a job refers to a key, delete the others,
       account for every single key

Order of this file: constants, errors, policy and merge (pure), spool files, MySQL, S3, execution,
report, command line.
"""

from __future__ import annotations

import io
import ipaddress
import json
import logging
import os
import pickle
import random
import re
import ssl
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar
from urllib.parse import unquote_plus
from xml.etree import ElementTree

import boto3
import click
import pymysql
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from pymysql.cursors import SSCursor

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

    Connection = pymysql.Connection[pymysql.cursors.Cursor]

T = TypeVar("T")

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

# Seconds. The grouped query may sort for minutes before its first row; a re-check may not.
CONNECT_TIMEOUT, PLAN_TIMEOUT, RECHECK_TIMEOUT = 10, 3600, 50
# A key that S3 cannot delete just now is tried this often, each time after a new re-check.
ATTEMPTS = 5
# Seconds: the first pause after a retryable failure, doubled with each further one up to the last.
FIRST_PAUSE, LAST_PAUSE = 0.1, 10.0

# Character sets from whose text UTF-8 comes back unchanged, so that a key converted to them finds
# its row. Others (sjis, gbk, …) spell some characters in two ways: their keys are sought by scan.
ROUND_TRIP_CHARSETS = {"ascii", "latin1", "utf8", "utf8mb3", "utf8mb4"}

# XML 1.0 cannot carry these (W3C, production 2); a carriage return comes back as a line feed.
# A key with one of them goes by single DeleteObject, where it stands percent-encoded in the URL.
NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

THROTTLED = {"SlowDown", "ServiceUnavailable", "Throttling", "RequestLimitExceeded", "503"}
RETRYABLE = THROTTLED | {
    "InternalError",
    "RequestTimeout",
    "OperationAborted",
    "500",
    "502",
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
    """A planned delete."""

    key: str
    size: int
    last_modified: datetime
    reason: Reason


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
    missing: int = 0  # expired keys without an object
    remaining: int = 0  # distinct keys of remaining jobs
    listed: int = 0  # objects that the listing gave


Keyed = TypeVar("Keyed", Reference, S3Object)


def ascending(stream: Iterable[Keyed], source: str) -> Iterator[Keyed]:
    """The same stream; raises PurgeError where a key does not follow the one before it.

    The merge is right only for sorted streams. Out of order, it would take a referenced object for
    an orphan.
    """
    last: str | None = None
    for item in stream:
        if last is not None and item.key <= last:
            raise PurgeError(
                f"{source} is out of order: {printable(item.key)} came after {printable(last)}. "
                "Nothing can be concluded from it; nothing more is deleted."
            )
        last = item.key
        yield item


def outer_join(
    references: Iterable[Reference], objects: Iterable[S3Object]
) -> Iterator[tuple[Reference | None, S3Object | None]]:
    """Pair two ascending streams by key, in constant memory; None where a side lacks the key."""
    names = ascending(references, "The job table's sorted key list")
    found = ascending(objects, "The bucket's listing")
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
            totals.remaining += not reference.expired
            totals.missing += reference.expired and item is None
        reason = policy.reason(reference, item)
        if reason is not None and item is not None:
            candidate = Candidate(*item, reason)
            totals.planned.add(candidate)
            yield candidate


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


class Spool(Generic[T]):
    """A sequence on disk, in an unnamed file in TMPDIR: filled once, read as often as needed.

    Memory holds one chunk per reader. The file vanishes with the process, whatever ends it.
    Raises PurgeError when the disk is full.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._file = tempfile.TemporaryFile(prefix="retention_purge-")  # noqa: SIM115
        self.count = 0
        for chunk in chunks(items, 1000):
            try:
                pickle.dump(chunk, self._file, pickle.HIGHEST_PROTOCOL)
                self._file.flush()
            except OSError as error:
                raise PurgeError(
                    f"Cannot write a spool file in {tempfile.gettempdir()}: {error.strerror}. "
                    "Free some space there or point TMPDIR elsewhere. Nothing was deleted."
                ) from error
            self.count += len(chunk)

    def __iter__(self) -> Iterator[T]:
        position, left = 0, self.count
        while left:
            self._file.seek(position)  # each reader has a place of its own
            chunk: list[T] = pickle.load(self._file)
            position = self._file.tell()
            left -= len(chunk)
            yield from chunk

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
        return pymysql.connect(
            host=server.host,
            port=server.port,
            user=server.user,
            password=secret.encode(),
            database=server.database,
            charset="utf8mb4",
            # TIMESTAMP columns are converted to the session's time zone: make it UTC.
            init_command="SET time_zone = '+00:00'",
            # Every read sees the table as it is now, not as an open transaction first saw it.
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=read_timeout,
            write_timeout=RECHECK_TIMEOUT,
            **tls,
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


# NULL `type` or `completedAt` make the AND NULL, and IS TRUE makes that 0: not expired.
EXPIRED_SQL = (
    f"({text_bytes('`type`')} = 'TRIAL' AND `completedAt` >= '{FIRST_TIMESTAMP}' "
    "AND `completedAt` < %(cutoff)s) IS TRUE"
)


class JobTable:
    """The job table, read over one connection; nothing here writes.

    Raises DatabaseError if the table cannot be read or lacks a column.
    """

    def __init__(self, connection: Connection, schema: str, table: str) -> None:
        self._connection = connection
        self.name = f"{schema}.{table}"
        self._sql_name = f"{quoted(schema)}.{quoted(table)}"
        self._charset, self._collation = self._describe(schema, table)

    def _query(self, doing: str, sql: str, arguments: Any = None) -> tuple[tuple[Any, ...], ...]:
        with database_errors(f"{doing} {self.name}"), self._connection.cursor() as cursor:
            cursor.execute(sql, arguments)
            return cursor.fetchall()

    def _describe(self, schema: str, table: str) -> tuple[str, str]:
        """Character set and collation of `sourceData`, after a look that all columns are there."""
        rows = self._query(
            "Cannot describe",
            "SELECT COLUMN_NAME, CHARACTER_SET_NAME, COLLATION_NAME FROM information_schema.COLUMNS"
            " WHERE TABLE_SCHEMA = %s AND TABLE_NAME = %s",
            (schema, table),
        )
        columns = {name.lower(): (charset, collation) for name, charset, collation in rows}
        if not columns:
            raise DatabaseError(
                f"There is no table {self.name}, or this user may not read it: "
                "check --db-name and --db-table, and grant SELECT on it."
            )
        for name in ("jobId", "completedAt", "type", "sourceData"):
            if name.lower() not in columns:
                raise DatabaseError(f"{self.name} has no column {name}: is it the job table?")
        charset, collation = columns["sourcedata"]
        if charset is None or charset == "binary":
            raise DatabaseError(f"{self.name}.sourceData must be a text column to name S3 keys.")
        return charset, collation

    def now(self) -> datetime:
        """The database's clock, aware UTC."""
        ((now,),) = self._query("Cannot ask the clock of", "SELECT UTC_TIMESTAMP(6)")
        assert isinstance(now, datetime)
        return now.replace(tzinfo=UTC)

    def names(self, cutoff: datetime) -> Iterator[tuple[bytes | None, int, int]]:
        """Each distinct `sourceData` in byte order: (UTF-8 bytes, all its jobs expired?, jobs).

        SQL_BIG_RESULT makes the server sort instead of filling a temporary table keyed by the
        group, five times faster on millions of rows. Rows stream; the server cuts a client that
        stops reading for net_write_timeout (60 s), so read them at once.
        """
        name = text_bytes("`sourceData`")
        sql = (
            f"SELECT SQL_BIG_RESULT {name} AS name, MIN({EXPIRED_SQL}), COUNT(*) "
            f"FROM {self._sql_name} GROUP BY name ORDER BY name"
        )
        with database_errors(f"Cannot read {self.name}"):
            # Not closed on an error: that would read the rest. The connection is closed instead.
            cursor = self._connection.cursor(SSCursor)
            cursor.execute(sql, {"cutoff": sql_time(cutoff)})
            while rows := cursor.fetchmany(1000):
                yield from rows
            cursor.close()

    def referenced(self, names: list[str], cutoff: datetime) -> tuple[set[str], set[str]]:
        """Which of `names` a remaining job refers to at this moment, and which any job does.

        The search finds a superset under any collation, through an index if there is one; the
        bytes are compared here. A name that the column's character set cannot spell becomes
        another in the conversion, which is right: no row can hold it.
        """
        name = text_bytes("`sourceData`")
        if self._charset in ROUND_TRIP_CHARSETS:
            column = "`sourceData`"
            term = f"CONVERT(%s USING {self._charset}) COLLATE {self._collation}"
        else:
            column, term = name, "CAST(%s AS BINARY)"
        terms = ",".join(term % self._connection.escape(text) for text in names)
        rows = self._query(
            "Cannot re-check references in",
            f"SELECT DISTINCT {name}, {EXPIRED_SQL % {'cutoff': quoted_time(cutoff)}} "
            f"FROM {self._sql_name} WHERE {column} IN ({terms})",
        )
        asked = {text.encode(): text for text in names}
        by_any = {asked[found] for found, _ in rows if found in asked}
        remaining = {asked[found] for found, expired in rows if found in asked and not expired}
        return remaining, by_any


def quoted(identifier: str) -> str:
    return "`" + identifier.replace("`", "``") + "`"


def sql_time(moment: datetime) -> str:
    """A UTC moment as MySQL writes it, for a session in UTC."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


def quoted_time(moment: datetime) -> str:
    return f"'{sql_time(moment)}'"


def references(rows: Iterable[tuple[bytes | None, int, int]], prefix: str) -> Iterator[Reference]:
    """The keys that the rows of `JobTable.names` mean; rows that mean none are logged.

    NULL, the empty string, and bytes that are no UTF-8 (which S3 cannot hold) name no object.
    """
    nameless = 0
    for name, expired, jobs in rows:
        try:
            text = (name or b"").decode()
        except UnicodeDecodeError:
            text = ""
        if text:
            yield Reference(prefix + text, bool(expired))
        else:
            nameless += jobs
    if nameless:
        log.warning("%d jobs have no usable sourceData; they name no object", nameless)


# ---------------------------------------------------------------------------------------------
# S3
# ---------------------------------------------------------------------------------------------


@dataclass
class Requests:
    """Requests to S3 that cost money or wear it."""

    list: int = 0
    delete: int = 0


class Page(NamedTuple):
    """One ListObjectsV2 answer; `token` continues it, None at the end of the listing."""

    objects: list[S3Object]
    token: str | None


class Verdict(NamedTuple):
    """What S3 said of one key: deleted if `code` is None, or why not."""

    key: str
    code: str | None = None
    message: str = ""
    version_id: str | None = None  # of the delete marker, in a versioned bucket


class Bucket:
    """One bucket below one prefix. Counts its requests; safe to use from several threads.

    Every answer must be what was asked for, whole: an empty or foreign body would otherwise parse
    to an empty listing. All methods raise BucketError.
    """

    def __init__(
        self, session: boto3.Session, name: str, prefix: str, workers: int, requests: Requests
    ) -> None:
        self.name, self.prefix, self._requests = name, prefix, requests
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
                    max_pool_connections=workers,
                    connect_timeout=CONNECT_TIMEOUT,
                    read_timeout=30,
                ),
            )
        for operation, reader in ANSWERS.items():
            # First: before botocore's own look at the body.
            client.meta.events.register_first(f"before-parse.s3.{operation}", reader)
        return client

    def versioning(self) -> str:
        """`off`, `enabled` or `suspended`."""
        with bucket_errors(f"Cannot read the versioning of bucket {self.name}"):
            answer = self._read.get_bucket_versioning(Bucket=self.name)
        return answer.get("Status", "off").lower()

    def page(self, **where: Any) -> Page:
        """Up to 1,000 objects after `StartAfter` or a `ContinuationToken`."""
        with bucket_errors(f"Cannot list bucket {self.name}"):
            answer: Any = self._read.list_objects_v2(Bucket=self.name, Prefix=self.prefix, **where)
        with self._counting:
            self._requests.list += 1
        page: Page = answer["Page"]
        for item in page.objects:
            if not item.key.startswith(self.prefix):
                raise BucketError(
                    f"The listing of {self.name} gave {printable(item.key)}, which does not start "
                    f"with the prefix {printable(self.prefix)}. Nothing was deleted.",
                    "InvalidAnswer",
                )
        return page

    def all(self) -> Iterator[S3Object]:
        """Every object below the prefix, in key order."""
        page = self.page()
        yield from page.objects
        while page.token is not None:
            page = self.page(ContinuationToken=page.token)
            yield from page.objects

    def find(self, keys: Iterable[str]) -> Iterator[S3Object]:
        """Those of the ascending `keys` that exist, leapfrogging over what lies between."""
        wanted = iter(keys)
        key, last = next(wanted, None), ""
        while key is not None:
            page = self.page(StartAfter=max(last, just_before(key)))
            for item in page.objects:
                while key is not None and key < item.key:
                    key = next(wanted, None)
                if key == item.key:
                    yield item
                    key = next(wanted, None)
            if page.token is None:
                return
            last = page.objects[-1].key

    def delete(self, keys: list[str]) -> list[Verdict]:
        """Ask S3 to delete the keys in one request; exactly one verdict for each.

        A key that S3 does not have is answered as deleted. Raises BucketError if the request failed
        as a whole, in which case any of the keys may be gone.
        """
        with self._counting:
            self._requests.delete += 1
        with bucket_errors(f"Cannot delete in bucket {self.name}"):
            if len(keys) == 1 and NOT_XML.search(keys[0]):
                return [self._delete_single(keys[0])]
            answer: Any = self._write.delete_objects(
                Bucket=self.name, Delete={"Objects": [{"Key": key} for key in keys]}
            )
        verdicts: dict[str, Verdict] = {verdict.key: verdict for verdict in answer["Verdicts"]}
        unanswered = "S3's answer does not mention the key"
        return [verdicts.get(key) or Verdict(key, "NoAnswer", unanswered) for key in keys]

    def _delete_single(self, key: str) -> Verdict:
        try:
            answer = self._write.delete_object(Bucket=self.name, Key=key)
        except ClientError as error:  # a verdict on this key, not on the request as a whole
            return Verdict(key, *code_and_message(error))
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        if status != 204:  # what DeleteObject answers (S3 API reference)
            return Verdict(key, "InvalidAnswer", f"HTTP status {status} instead of 204")
        marker = answer.get("VersionId") if answer.get("DeleteMarker") else None
        return Verdict(key, version_id=marker)


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


def answer_reader(
    root_tag: str, result: str | None, parse: Callable[[ElementTree.Element, str], Any]
) -> Callable[..., None]:
    """A `before-parse` handler: checks the body of a 200, parses it, and spares botocore the work.

    A body that is not what S3 documents becomes a 500 with code InvalidAnswer, which is retried.
    """

    def read(
        response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any
    ) -> None:
        if response_dict["status_code"] != 200:
            return
        try:
            root = ElementTree.fromstring(response_dict["body"])
            namespace, brace, tag = root.tag.rpartition("}")
            if tag == "Error":
                return  # botocore knows these: S3 answers 200 before it knows that it fails
            if root_tag not in tag:
                raise InvalidAnswer(f"a <{tag}> instead of a <{root_tag}>")
            parsed = parse(root, namespace + brace)
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


def required(node: ElementTree.Element, path: str) -> str:
    """The text of a child that must be there."""
    text = node.findtext(path)
    if text is None:
        raise InvalidAnswer(f"no <{path}>")
    return text


def parse_listing(root: ElementTree.Element, ns: str) -> Page:
    """ListBucketResult → Page. botocore asks for EncodingType=url, so keys are percent-encoded."""
    decode = unquote_plus if root.findtext(f"{ns}EncodingType") == "url" else str
    key, size, modified = f"{ns}Key", f"{ns}Size", f"{ns}LastModified"
    objects = [
        S3Object(
            decode(required(item, key)),
            int(required(item, size)),
            datetime.fromisoformat(required(item, modified)),
        )
        for item in root.iterfind(f"{ns}Contents")
    ]
    if int(required(root, f"{ns}KeyCount")) != len(objects):
        raise InvalidAnswer("KeyCount differs from the number of keys")
    required(root, f"{ns}Name")
    if required(root, f"{ns}IsTruncated") == "false":
        return Page(objects, None)
    if not objects:
        raise InvalidAnswer("truncated before the first key")
    return Page(objects, required(root, f"{ns}NextContinuationToken"))


def parse_deletes(root: ElementTree.Element, ns: str) -> list[Verdict]:
    """DeleteResult → the verdicts in it."""
    verdicts = [
        Verdict(required(item, f"{ns}Key"), version_id=item.findtext(f"{ns}DeleteMarkerVersionId"))
        for item in root.iterfind(f"{ns}Deleted")
    ]
    for item in root.iterfind(f"{ns}Error"):
        key, code = required(item, f"{ns}Key"), required(item, f"{ns}Code")
        verdicts.append(Verdict(key, code, item.findtext(f"{ns}Message") or ""))
    return verdicts


ANSWERS = {
    "ListObjectsV2": answer_reader("ListBucketResult", "Page", parse_listing),
    "DeleteObjects": answer_reader("DeleteResult", "Verdicts", parse_deletes),
    "GetBucketVersioning": answer_reader("Versioning", None, lambda *_: None),
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
        "The AWS identity needs s3:ListBucket and s3:GetBucketVersioning on the bucket, and "
        "s3:DeleteObject on its objects."
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
    planned: bool = False  # the plan is complete
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
            "jobs_deleted": 0,
            "recoverable": self.versioning == "enabled" and self.deleted.objects > 0,
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
            ("missing", f"{self.totals.missing} expired keys have no object"),
            ("requests", f"{self.requests.list} LIST, {self.requests.delete} DELETE"),
            ("re-check", f"at most {self.max_recheck_age:.3f} s before its request"),
            ("seconds", f"{facts['seconds']}"),
            ("exit code", f"{self.exit_code}"),
        ]
        if self.mode == "dry-run":
            lines = [
                line
                for line in lines
                if line[0] not in ("deleted", "retained", "failed", "re-check")
            ]
        return "\n".join(f"{name:<10}{fact}" for name, fact in lines)


def in_words(tally: Tally) -> str:
    """`17 objects, 357 bytes (17 expired, 0 orphans)`"""
    reasons = f"{tally.expired} expired, {tally.orphan} orphans"
    return f"{tally.objects} objects, {tally.bytes} bytes ({reasons})"


# ---------------------------------------------------------------------------------------------
# Execution
# ---------------------------------------------------------------------------------------------


class Pace:
    """One pause for all: every request leaves through one thread, so it slows all workers alike."""

    def __init__(self) -> None:
        self._pause, self._until = 0.0, 0.0

    def ease_off(self) -> None:
        """After a retryable failure: pause before the next request, longer each time."""
        self._pause = min(max(self._pause * 2, FIRST_PAUSE), LAST_PAUSE)
        self._until = time.monotonic() + self._pause * random.uniform(0.5, 1)

    def recover(self) -> None:
        """After a success."""
        self._pause /= 2

    def wait(self) -> None:
        time.sleep(max(0.0, self._until - time.monotonic()))


@dataclass
class Batch:
    """Keys that go in one request."""

    candidates: list[Candidate]
    tries: int = 0  # requests sent so far
    verdicts: list[Verdict] = field(default_factory=list)  # of the last try, one a candidate
    checked: float = 0.0  # when its re-check began (monotonic seconds)
    age: float = 0.0  # seconds from then to its request


class Execution:
    """Carries out a plan: this thread re-checks and accounts, a pool of workers sends requests.

    A batch waits nowhere between its re-check and its request: first a free worker is awaited, then
    the table is asked, then the request leaves. A key that S3 cannot delete just now goes through
    all of that again.
    """

    def __init__(
        self, bucket: Bucket, jobs: JobTable, cutoff: datetime, report: Report, workers: int
    ) -> None:
        self._bucket, self._jobs, self._cutoff = bucket, jobs, cutoff
        self._report, self._workers = report, workers
        self._pace = Pace()
        self._in_flight: dict[Future[None], Batch] = {}
        self._retries: deque[Batch] = deque()

    def run(self, candidates: Iterable[Candidate]) -> None:
        """Each candidate ends as exactly one of deleted, failed, retained in the report.

        Raises PurgeError if the run had to stop: what was in flight is finished and accounted for,
        what was not attempted counts as failed.
        """
        source = map(Batch, batches(candidates))
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                while (batch := self._next(source)) is not None:
                    self._dispatch(batch, pool)
            finally:
                self._finish(source)

    def _next(self, source: Iterator[Batch]) -> Batch | None:
        """Wait until a worker is free; then the next batch to send, None when all is done."""
        while True:
            while len(self._in_flight) >= self._workers:
                self._settle(FIRST_COMPLETED)
            self._pace.wait()
            if self._retries:
                return self._retries.popleft()
            if (batch := next(source, None)) is not None:
                return batch
            if not self._in_flight:
                return None
            self._settle(FIRST_COMPLETED)  # it may have to be retried

    def _dispatch(self, batch: Batch, pool: ThreadPoolExecutor) -> None:
        """Re-check the batch and send what no job refers to."""
        try:
            self._recheck(batch)
        except PurgeError:
            self._retries.append(batch)  # where `_finish` accounts for it
            raise
        if batch.candidates:
            self._in_flight[pool.submit(self._send, batch)] = batch

    def _recheck(self, batch: Batch) -> None:
        """Drop the candidates that a job refers to by now: expired keys if a remaining job does,
        orphans if any does."""
        batch.checked = time.monotonic()
        start = len(self._bucket.prefix)
        names = {candidate.key: candidate.key[start:] for candidate in batch.candidates}
        remaining, by_any = self._jobs.referenced(list(names.values()), self._cutoff)
        free = []
        for candidate in batch.candidates:
            users = remaining if candidate.reason is Reason.EXPIRED else by_any
            if names[candidate.key] in users:
                self._report.retained += 1
                log.info("retained %s: a job refers to it by now", printable(candidate.key))
            else:
                free.append(candidate)
        batch.candidates = free

    def _send(self, batch: Batch) -> None:
        """In a worker: one request. Verdicts and age are left in the batch."""
        batch.tries += 1
        batch.age = time.monotonic() - batch.checked
        keys = [candidate.key for candidate in batch.candidates]
        try:
            batch.verdicts = self._bucket.delete(keys)
        except Exception as error:  # whatever it is, no key may go uncounted
            code = error.code if isinstance(error, BucketError) else type(error).__name__
            batch.verdicts = [Verdict(key, code, str(error)) for key in keys]
            raise

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
        self._report.max_recheck_age = max(self._report.max_recheck_age, batch.age)
        again = Batch([], batch.tries)
        for candidate, verdict in zip(batch.candidates, batch.verdicts, strict=True):
            if verdict.code is None:
                self._report.deleted.add(candidate)
            elif verdict.code in RETRYABLE and batch.tries < ATTEMPTS:
                again.candidates.append(candidate)
                again.verdicts.append(verdict)
            else:
                self._failed(candidate, verdict)
        if again.candidates:
            self._retries.append(again)
            self._pace.ease_off()
        else:
            self._pace.recover()

    def _failed(self, candidate: Candidate, verdict: Verdict) -> None:
        self._report.failed += 1
        log.error("failed %s: %s: %s", printable(candidate.key), verdict.code, verdict.message)

    def _finish(self, source: Iterable[Batch]) -> None:
        """Account for all that is left. After a run without errors that is nothing."""
        with suppress(BucketError):  # the run stops already, for the first such error
            self._settle(ALL_COMPLETED)
        left = 0
        for batch in chain(self._retries, source):
            for candidate, verdict in zip(batch.candidates, batch.verdicts, strict=False):
                self._failed(candidate, verdict)
            left += len(batch.candidates) - len(batch.verdicts)
        if left:
            self._report.failed += left
            log.error("%d planned keys were not attempted; they count as failed", left)


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
    dry_run: bool
    workers: int
    json: bool
    verbose: bool
    quiet: bool

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
        if isinstance(value, datetime):
            return value
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is not ISO 8601, such as 2019-06-03T00:00:00Z.", param, ctx)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)


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
"""


def option(*names: str, **settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(*names, show_envvar=True, show_default=True, **settings)


@click.command(
    context_settings={"auto_envvar_prefix": "RETENTION_PURGE", "max_content_width": 100},
    epilog=EPILOG,
)
@option(
    "--db-host", required=True, help="RDS endpoint: the real one, the IAM token is signed for it."
)
@option("--db-port", type=click.IntRange(1, 65535), default=3306, help="Port of the database.")
@option("--db-user", required=True, help="Database user.")
@option("--db-name", required=True, help="Schema of the job table.")
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
@option("-n", "--dry-run", is_flag=True, help="Plan and report, change nothing.")
@option(
    "--workers",
    type=click.IntRange(1, 64),
    default=8,
    help="Concurrent DeleteObjects requests.",
)
@option("--json", is_flag=True, help="Print the summary as one JSON object.")
@option("-v", "--verbose", is_flag=True, help="Log more, and show tracebacks.")
@option("-q", "--quiet", is_flag=True, help="Log warnings and errors only.")
@click.pass_context
def main(ctx: click.Context, /, **values: Any) -> None:
    """Delete the S3 source data of TRIAL jobs completed more than 90 days ago.

    A key goes only if no remaining job refers to it; OFFICIAL jobs and their data stay for ever.
    Start with --dry-run.
    """
    options = Options(**values)
    set_up_output(options)
    report = Report(
        mode="dry-run" if options.dry_run else "purge",
        bucket=options.bucket,
        prefix=options.prefix,
        table=".".join(options.table),
    )
    try:
        purge(options, report)
    except PurgeError as error:
        log.debug("stopped", exc_info=True)
        report.error = error
    except Exception as error:
        log.debug("stopped", exc_info=True)
        text = one_line(f"Unexpected {type(error).__name__}: {error}. -v shows where.")
        report.error = PurgeError(text)
    if options.json:
        click.echo(json.dumps(report.as_dict()))
    elif report.planned:
        click.echo(report.as_text())
    if report.error is not None:
        report.error.show()
    ctx.exit(report.exit_code)


def set_up_output(options: Options) -> None:
    """Log to standard error, in UTC; print any key on a terminal of any encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    log.handlers = [handler]
    log.propagate = False
    level = logging.WARNING if options.quiet else logging.INFO
    log.setLevel(logging.DEBUG if options.verbose else level)


def purge(options: Options, report: Report) -> None:
    """The run; see the top of this file. Raises PurgeError."""
    session = aws_session(options)
    bucket = Bucket(session, options.bucket, options.prefix, options.workers, report.requests)
    server = Server(
        host=options.db_host,
        port=options.db_port,
        user=options.db_user,
        database=options.db_name,
        ca_bundle=options.ca_bundle or (DEFAULT_CA_BUNDLE if DEFAULT_CA_BUNDLE.exists() else None),
        token=lambda: iam_token(session, options),
    )
    with closing(connect(server, PLAN_TIMEOUT)) as connection:
        jobs = JobTable(connection, *options.table)
        policy = options.policy(jobs.now())
        report.cutoff = policy.cutoff
        log.info("reading %s; cutoff %s", jobs.name, policy.cutoff.isoformat())
        names = Spool(references(jobs.names(policy.cutoff), options.prefix))
    with closing(names):
        report.versioning = bucket.versioning()
        candidates = make_plan(bucket, names, policy, report)
    with closing(candidates):
        if options.dry_run:
            show_plan(candidates, options)
        else:
            with closing(connect(server, RECHECK_TIMEOUT)) as connection:
                jobs = JobTable(connection, *options.table)
                execution = Execution(bucket, jobs, policy.cutoff, report, options.workers)
                execution.run(candidates)


def make_plan(
    bucket: Bucket, names: Spool[Reference], policy: Policy, report: Report
) -> Spool[Candidate]:
    """List what the policy needs of the bucket, merge it with the references, and keep the plan."""
    log.info("%d distinct keys in the job table; listing s3://%s", names.count, bucket.name)
    expired = (reference.key for reference in names if reference.expired)
    objects = bucket.find(expired) if policy.orphans_before is None else bucket.all()
    candidates = Spool(plan(outer_join(names, objects), policy, report.totals))
    report.planned = True
    log.info("planned: %s", in_words(report.totals.planned))
    return candidates


def show_plan(candidates: Iterable[Candidate], options: Options) -> None:
    """Print what a real run would delete: reason, bytes, last modified, key."""
    if options.json:
        return
    for chunk in chunks(candidates, 1000):
        click.echo(
            "\n".join(
                f"{item.reason}\t{item.size}\t{item.last_modified.isoformat()}\t{printable(item.key)}"
                for item in chunk
            )
        )


def aws_session(options: Options) -> boto3.Session:
    try:
        return boto3.Session(profile_name=options.profile, region_name=options.region)
    except BotoCoreError as error:
        raise UsageError(f"{error}. Check --profile.") from error


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
