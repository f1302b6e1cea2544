#!/usr/bin/env python3
"""Delete the S3 source data of expired TRIAL jobs, and nothing that a remaining job refers to.

A job table in MySQL names the objects. A name is what stands in its column `sourceData`; the key
of the object is `prefix + sourceData`. Keys are compared as bytes, as S3 compares them.

    expired job     `type` is exactly TRIAL, and `completedAt` lies before the cutoff
    remaining job   any other row: OFFICIAL, completed later, not completed, of unknown type
    expired key     at least one expired job refers to it, and no remaining job does
    orphan          an object that no job refers to, older than the grace period
    missing         an expired key without an object
    dangling        a key of a remaining job without an object: reported, never acted on
    doubtful        an object that is kept because its name cannot be compared or sent safely

Only the objects of expired keys are deleted, and if the command line asks for it, orphans and the
rows of expired jobs. Whatever cannot be read whole is an error. Before step 5 nothing is deleted.

    1. A real run takes a lock against other runs. A dry run takes none, and deletes nothing.
    2. The job table is read at once into a spool file, grouped by key, sorted by its bytes.
    3. The bucket's listing has the same order. It is merged with the spool into the plan.
    4. Guards may refuse the plan. A dry run prints it and ends.
    5. Round by round: the gate asks the table again, the keys go to the audit log, the gate deletes
       them, every key is accounted for, then the job rows go if the command line asked for it.

READ THE GATE FIRST. It is the section after the words. Every delete leaves the program there.
A key's way: Reference -> outer_join -> reason_of -> Candidate -> refusals -> Gate.ask -> Permit ->
Ledger.intend -> Gate.delete -> Wire._last_look -> Ledger.account. The cutoff's way: Wishes -> Terms
-> Gate.expired, the SQL of every statement. A Ctrl-C's way: Stop -> Interrupted (while the run only
reads: at once; else before the next request) -> Rounds accounts for what is in flight -> main ->
Ledger.end -> exit code 130.
"""

from __future__ import annotations

import fcntl
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
import select
import shlex
import signal
import socket
import sqlite3
import ssl
import stat
import sys
import tempfile
import threading
import time
import uuid
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from email.utils import parsedate_to_datetime
from enum import StrEnum
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar
from unicodedata import normalize
from urllib.parse import quote, unquote, unquote_plus
from weakref import WeakKeyDictionary
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import boto3
import click
import pymysql
from botocore import exceptions as aws
from botocore.config import Config
from botocore.parsers import ResponseParserError
from click.core import ParameterSource

T = TypeVar("T")
Record = TypeVar("Record", bound=tuple[Any, ...])

log = logging.getLogger("retention_purge")

VERSION = "3.0.0"
# Exit codes; 75 is EX_TEMPFAIL of sysexits.h.
FAILED, USAGE, REFUSED, SOME_FAILED, LOCKED = 1, 2, 3, 4, 75
# Keys in one ListObjectsV2 answer and in one DeleteObjects request (S3 API reference). Bytes of
# UTF-8 in an object key (S3 user guide, "Creating object key names").
PAGE, BATCH, KEY_BYTES = 1000, 1000, 1024
# XML 1.0 cannot carry these characters (W3C, production 2), and a carriage return comes back as a
# line feed. No DeleteObjects request can name such a key safely, so its object is kept.
NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# Seconds. A connection to S3 may not take long, because the re-check grows old meanwhile. A long
# wait for the answer to a delete makes it rare that S3 deletes after we gave up.
S3_CONNECT_TIMEOUT, LIST_TIMEOUT, DELETE_TIMEOUT = 3, 30, 60
# Seconds that a DELETE of rows waits for a lock. Less than RECHECK_TIMEOUT, or the client would
# give up a statement that still waits on the server.
LOCK_TIMEOUT = 5
VARIABLES, PASSWORD_VARIABLE = "RETENTION_PURGE_", "RETENTION_PURGE_DB_PASSWORD"
S3_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
# Why the gate keeps a key.
TOO_YOUNG = "it is an orphan that is too young, or orphans were not asked for"
RELOADED = "the remaining jobs are not in the table as before"
IN_USE, UNSPELT = "a job refers to it by now", "doubtful, because no request can spell its name"


# --- Errors and stop signals ----------------------------------------------------------------------


class PurgeError(click.ClickException):
    """The run failed: one line that says what to do, and its exit code. `code` is the server's."""

    def __init__(self, message: str, exit_code: int = FAILED, code: str = "") -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code, self.code = exit_code, code  # type: ignore[misc]


class Interrupted(BaseException):
    """A stop signal came. Not an Exception: libraries catch those, and try again."""


class Stop:
    """SIGHUP, SIGINT, SIGTERM. The first one ends the run in order. The same one again, more than a
    second later, ends it at once. Inside `at_once` a signal raises Interrupted where it arrives.
    Elsewhere `check` raises it, at a place where all that is in flight can be accounted for."""

    def __init__(self) -> None:
        self.received, self._since, self._raises = 0, 0.0, False  # the number of the signal

    def listen(self) -> None:
        """Heed the signals from now on, except those that are ignored (nohup)."""
        for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._receive)

    def _receive(self, signum: int, _frame: Any) -> None:
        now = time.monotonic()
        if signum == self.received and now - self._since > 1:  # `timeout` sends each one twice
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        if signum != self.received:
            self.received, self._since = signum, now
        if self._raises:
            self._raises = False  # another signal must not disturb the way out
            raise Interrupted

    def check(self, **_: Any) -> None:
        if self.received:
            raise Interrupted

    @contextmanager
    def at_once(self) -> Iterator[None]:
        self._raises = True
        try:
            self.check()
            yield
        finally:
            self._raises = False


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


def query(connection: Any, doing: str, sql: str) -> list[tuple[Any, ...]]:
    """Return all rows of a statement. Raises PurgeError."""
    with database_errors(doing), connection.cursor() as cursor:
        cursor.execute(sql)
        return list(cursor.fetchall())


# --- Words: the values that the parts of the program exchange -------------------------------------


class Reason(StrEnum):
    """Why a key is in the plan. With the last two only expired job rows may go, not the object."""

    EXPIRED = "expired"
    ORPHAN = "orphan"
    MISSING = "missing"  # an expired key without an object
    SHARED = "shared"  # a key of expired jobs that remaining jobs refer to as well


class Wishes(NamedTuple):
    """What the command line asked for. Days are whole days; `as_of` is an aware UTC datetime."""

    bucket: str
    prefix: str = ""
    retention_days: int = 90
    as_of: datetime | None = None  # None: now, by the clock of the database
    orphan_grace_days: int | None = None  # None: orphans stay
    rows: bool = False  # expired job rows may go


class Counts(NamedTuple):
    """How many job rows refer to a name, and how many of these are expired."""

    jobs: int
    expired: int


class Candidate(NamedTuple):
    """A key in the plan. `size` in bytes, `last_modified` in ISO 8601, as the listing gave it."""

    key: str
    reason: str  # the value of a Reason
    size: int = 0
    last_modified: str = ""
    version_id: str | None = None  # in an undo: of the delete marker to remove


class Verdict(NamedTuple):
    """What came of one key. Codes of our own: NotSent, NoAnswer (none about the key, or none at
    all), InvalidAnswer (not S3's words)."""

    code: str = ""  # why it is not deleted; "" if it is
    message: str = ""
    marker: str | None = None  # in a versioned bucket: the version id of the delete marker
    in_doubt: bool = False  # it may have been deleted, or may yet be
    whole: bool = False  # S3 refused the request as a whole


class Row(NamedTuple):
    """A row of the job table: its primary key, its name, and all its columns by name."""

    job_id: str | int
    name: str
    columns: dict[str, Any]


# --- The gate: every delete leaves the program here -----------------------------------------------
# Read this section first; it can be read alone. Whatever is wrong in the rest of the file:
# - no object goes that a remaining job referred to when the table was asked, at most
#   MAX_RECHECK_AGE seconds before the first byte of the request left;
# - nothing outside the prefix goes, and no orphan that is too young or was not asked for;
# - no version of an object goes, only delete markers, and these only to bring objects back;
# - no job row goes that is not expired.
# Taken on trust: the command line (`Wishes`); connection, table, lock, the database's clock; an
# orphan's listed date; that no job spells its name in another way; of this file PurgeError, query,
# database_errors, s3_config, read_verdicts, words, constants. Unchecked: rows go after objects.
# The way of an object: Gate.ask -> known (the table answers) -> objection (must it stay?) -> Permit
# -> Gate.delete -> Wire._post (writes the body) -> _last_look (connected; same bytes; in time).

MAX_RECHECK_AGE, WITNESSES = 30, 20  # seconds; names of remaining jobs that vouch for the table
# The server's settings must not matter. With autocommit = 0 a re-check sees an old snapshot. The
# time zone moves TIMESTAMP values, a row limit cuts answers, SQL modes change strings. Only MariaDB
# reads /*M! */: a system-versioned table answers with its present, and long IN lists stay fast.
SESSION = (
    "ROLLBACK",
    "SET NAMES utf8mb4, autocommit = 1, time_zone = '+00:00', sql_mode = '', sql_safe_updates = 0, "
    "sql_select_limit = 18446744073709551615, sql_big_selects = 1, max_sort_length = 8192, "
    f"wait_timeout = 86400, innodb_lock_wait_timeout = {LOCK_TIMEOUT}, "
    f"lock_wait_timeout = {LOCK_TIMEOUT} /*M!100318 , system_versioning_asof = DEFAULT, "
    "in_predicate_conversion_threshold = 0 */",
    "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ",
)
# 1 if the session is as we set it, holds the lock, and its server can be written to. Servers answer
# 0, 1, OFF or ON, so flags are compared as text.
WITNESS = (
    "IS_USED_LOCK('{}') <=> CONNECTION_ID() AND CAST(@@autocommit AS CHAR) IN ('1', 'ON') "
    "AND @@time_zone = '+00:00' AND @@sql_mode = '' AND @@sql_select_limit > 18446744073709551614 "
    "AND CAST(@@global.read_only AS CHAR) IN ('0', 'OFF') "
    "AND CAST(@@innodb_read_only AS CHAR) IN ('0', 'OFF') "
    "/*M!100318 AND @@system_versioning_asof = 'DEFAULT' */"
)
NOT_OURS = "is not as it was set, lost its lock, or its server is read-only by now"
# TEXT: a text, given as its UTF-8 bytes in hexadecimal digits. No SQL mode changes its meaning.
# TEXT_BYTES: the bytes of a text column. They are equal only if identical, and ordered as in S3.
TEXT = "_utf8mb4 x'%s'"
TEXT_BYTES = "CAST(CONVERT({} USING utf8mb4) AS BINARY)"
NAME = f"IFNULL({TEXT_BYTES.format('`sourceData`')}, '')"
# UTF-8 comes back unchanged from these. Others, such as sjis, spell some characters in two ways.
CHARSETS = ("ascii", "latin1", "utf8", "utf8mb3", "utf8mb4")


def boot_seconds() -> float:
    """A clock, in seconds, that also counts while the machine is suspended (Linux)."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Terms(NamedTuple):
    """What this run may delete. Moments are aware UTC datetimes by the clock of the database. A job
    completed before `cutoff` (not at it) is expired. An orphan last modified before
    `orphans_before` may go; None keeps all orphans. `rows`: expired job rows may go."""

    prefix: str
    now: datetime
    cutoff: datetime
    orphans_before: datetime | None
    rows: bool


def terms_of(wishes: Wishes, now: datetime) -> Terms:
    """Raises PurgeError for an `as_of` in the future: jobs would expire before their time."""
    as_of, grace = wishes.as_of or now.replace(microsecond=0), wishes.orphan_grace_days
    if as_of > now or wishes.retention_days < 1:
        raise PurgeError(f"--as-of {as_of} is later than the database clock, {now}.", REFUSED)
    orphans_before = None if grace is None else now - timedelta(days=max(grace, 0))
    cutoff = as_of - timedelta(days=wishes.retention_days)
    return Terms(wishes.prefix, now, cutoff, orphans_before, wishes.rows)


@dataclass(frozen=True, eq=False)
class Permit:
    """Leave to delete these keys, once. Only `Gate.ask` gives it, and the gate keeps a copy of its
    own. `asked` is the moment before the table was asked, in `boot_seconds`."""

    keys: tuple[str, ...]
    asked: float


def watched(pool: Any, look: Callable[[str, str, Any], None]) -> Any:
    """Return the pool class with connections that call `look` last: after DNS, TCP and TLS, before
    the first byte of a request. If it raises, nothing leaves."""

    class Connection(pool.ConnectionCls):  # type: ignore[misc]
        def request(self, method: str, url: str, body: Any = None, *rest: Any, **more: Any) -> Any:
            if self.sock is None:
                self.connect()
            look(method, f"{getattr(self, '_tunnel_host', '') or self.host}{url}", body)
            return super().request(method, url, body, *rest, **more)

    return type("Pool", (pool,), {"ConnectionCls": Connection})


class Wire:
    """The way to one bucket, for any thread. A GET may leave, and a POST that the gate wrote.
    `count` gets the ages (seconds) of the re-checks of the POSTs that left, more in a redirect."""

    def __init__(self, session: boto3.Session, bucket: str, workers: int, count: Any) -> None:
        self.bucket, self._count, self._own = bucket, count, threading.local()
        name = re.escape(re.split("[/:]", bucket)[-1]) + r"-\d{12}" * (":" in bucket)  # an ARN's
        self._here = re.compile(rf"/{name}\?delete$|(^|/){name}\.[^/]*/\?delete$")  # path or host
        self.reader = self._watch(session.client("s3", config=s3_config(workers, LIST_TIMEOUT)))
        self._writer = self._watch(session.client("s3", config=s3_config(workers, DELETE_TIMEOUT)))
        events = self._writer.meta.events
        events.register_last(
            "before-call.s3.DeleteObjects", lambda params, **_: params.update(body=self._own.body)
        )
        events.register_first("before-parse.*", self._take_answer)

    def _watch(self, client: Any) -> Any:
        # Private, so botocore is pinned. It is changed before any pool exists; proxies share it.
        pools = client._endpoint.http_session._pool_classes_by_scheme
        pools.update({scheme: watched(pool, self._last_look) for scheme, pool in pools.items()})
        return client

    def _last_look(self, method: str, address: str, body: Any) -> None:
        if method == "GET":
            return
        own, ours = self._own, getattr(self._own, "body", b"")
        if method != "POST" or not ours or body != ours or not self._here.search(address):
            raise PurgeError("a request was about to leave that the gate did not write")
        if (age := boot_seconds() - own.asked) > MAX_RECHECK_AGE:
            raise PurgeError(f"its re-check was {age:.0f} s old when it was about to leave")
        own.ages.append(age)
        own.answer = None  # forget that of a redirect

    def _take_answer(self, response_dict: Any, operation_model: Any, **_: Any) -> None:
        self._own.answer = response_dict["status_code"], response_dict["body"]
        if response_dict["status_code"] == 200 and operation_model.name == "DeleteObjects":
            response_dict["body"] = b""  # botocore would spend most of a request's CPU on it

    def _post(self, items: Sequence[tuple[str, str]], asked: float) -> list[Verdict]:
        """Delete (key, version id or "") pairs in one request. Return a verdict for each."""
        own, fault, version = self._own, "no answer", "<VersionId>{}</VersionId>".format
        objects = (f"<Key>{escape(key)}</Key>{v and version(escape(v))}" for key, v in items)
        body = "".join(f"<Object>{item}</Object>" for item in objects)  # Quiet would prove nothing
        own.body = f'<Delete xmlns="{S3_NAMESPACE}">{body}</Delete>'.encode()
        own.asked, own.ages, own.answer = asked, [], None
        try:
            self._writer.delete_objects(Bucket=self.bucket, Delete={"Objects": []})
        except Exception as error:  # whatever it is: S3's own words are in own.answer
            fault = str(error)
        finally:
            own.body = b""
        if own.ages:  # it left
            self._count(own.ages)
            return read_verdicts(own.answer, [key for key, _ in items], fault)
        if own.answer is not None:
            raise PurgeError("S3 answered a delete that did not leave. Nothing more is deleted.")
        return [Verdict("NotSent", fault)] * len(items)  # certainly not done

    def restore(self, markers: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Remove delete markers, given as (key, version id), so that objects come back. A marker
        goes only if it is still the latest version of its key. Return a verdict for each."""
        verdicts = dict.fromkeys(markers, Verdict("NotLatest", "it is not the latest version"))
        good = []
        for key, version_id in verdicts:
            found = self._writer.list_object_versions(Bucket=self.bucket, Prefix=key, MaxKeys=50)
            named = {"Key": key, "VersionId": version_id, "IsLatest": True}.items()
            is_there = any(named <= item.items() for item in found.get("DeleteMarkers", []))
            if is_there and version_id not in ("", "null") and not NOT_XML.search(key):
                good.append((key, version_id))
        verdicts |= zip(good, self._post(good, boot_seconds()) if good else [], strict=True)
        return [verdicts[marker] for marker in markers]


class Gate:
    """Asks the job table SCHEMA.TABLE, and lets go what may go. One thread asks; any may delete. A
    real run holds `lock`. Others read the public names. The gate decides by its private ones."""

    def __init__(self, wire: Wire, connection: Any, table: str, lock: str, wishes: Wishes) -> None:
        self._wire, self._connection, self.table = wire, connection, table
        if wire.bucket != wishes.bucket:
            raise PurgeError("The way to S3 leads to another bucket. Nothing was deleted.")
        for statement in SESSION:
            self._run(statement, "set up the session for")
        ((now,),) = self._run("SELECT UTC_TIMESTAMP(6)", "ask the clock of the database of")
        self._witness = WITNESS.format(lock)
        self.terms = self._terms = terms_of(wishes, now.replace(tzinfo=UTC))
        schema, _, name = table.replace("`", "``").rpartition(".")  # a schema may have dots
        self.source = self._source = f"FROM `{schema}`.`{name}`"
        moment = self._terms.cutoff.replace(tzinfo=None).isoformat(" ", "microseconds")
        # A date with a zero in it, such as 0000-00-00, is no completion. TO_DAYS makes it NULL.
        in_time = f"TO_DAYS(`completedAt`) IS NOT NULL AND `completedAt` < TIMESTAMP'{moment}'"
        is_trial = f"{TEXT_BYTES.format('`type`')} = 'TRIAL'"
        # "This job is expired", 0 or 1. NULL makes the AND NULL, and IS TRUE makes that 0.
        self.expired = self._expired = f"(({in_time} AND {is_trial}) IS TRUE)"
        self.counts = self._counts = f"{NAME}, COUNT(*), COUNT({self._expired} OR NULL)"
        self.columns = self._run(f"SHOW FULL COLUMNS {self._source}", "read")
        collation = {row[0].lower(): row[2] for row in self.columns}.get("sourcedata") or ""
        if (charset := collation.split("_")[0]) not in CHARSETS:
            kinds = f"a text column in one of {', '.join(CHARSETS)}, not {charset or 'in none'}"
            raise PurgeError(f"{table}.sourceData must be {kinds}: is it the job table?")
        # SQL for a name, in the character set of the column, so that an index serves it.
        cast = f"CONVERT({TEXT} USING {charset}) COLLATE {collation}"
        self._literal = TEXT if charset == "utf8mb4" else cast
        self._granted = WeakKeyDictionary[Permit, tuple[tuple[str, ...], float]]()

    def _run(self, sql: str, doing: str = "re-check") -> list[tuple[Any, ...]]:
        return query(self._connection, f"Cannot {doing} {self.table}", sql)

    def among(self, names: Iterable[str]) -> str:
        """SQL that finds the jobs of these names, and under some collations other jobs as well."""
        return f"`sourceData` IN ({','.join(self._literal % n.encode().hex() for n in names)})"

    def known(self, names: Collection[str]) -> tuple[bool, dict[str, Counts]]:
        """Return whether the session is ours, and how many jobs refer to each name just now."""
        wanted = {name.encode(): name for name in names}
        nonce = time.monotonic_ns()  # it ties the answer to this question
        self._run("ROLLBACK")  # an open transaction would answer from its snapshot
        question = f"SELECT NULL, {self._witness}, {nonce} UNION ALL SELECT {self._counts} "
        rows = self._run(f"{question}{self._source} WHERE {self.among(names)} GROUP BY 1")
        once = len({row[0] for row in rows}) == len(rows)  # else the server cut a group apart
        ours = once and [row[1:] for row in rows if row[0] is None] == [(1, nonce)]
        return ours, {wanted[row[0]]: Counts(*row[1:]) for row in rows if row[0] in wanted}

    def objection(self, item: Candidate, counts: Counts | None) -> str:
        """Why the key must stay, by what is known of its name; "" if it may go."""
        before, prefix = self._terms.orphans_before, self._terms.prefix
        if not item.key.startswith(prefix) or item.key == prefix:
            return "it lies outside the prefix"
        if NOT_XML.search(item.key):
            return UNSPELT
        if item.reason == Reason.ORPHAN:
            if before is None or datetime.fromisoformat(item.last_modified) >= before:
                return TOO_YOUNG
            return IN_USE if counts else ""
        if counts is None:
            return "its jobs have vanished"  # they may come back: a table is being reloaded
        may_go = item.reason == Reason.EXPIRED and counts.expired == counts.jobs > 0
        return "" if may_go else IN_USE

    def ask(
        self, items: Sequence[Candidate], witnesses: Sequence[str], size: int = BATCH
    ) -> tuple[list[Permit], dict[str, str]]:
        """Ask the table. Return permits, of up to `size` keys each, for those that may go, and why
        each other key stays. Unless most `witnesses` (names of remaining jobs) are in the answer,
        the table may be half loaded: all keys stay. With none, orphans stay. Raises PurgeError."""
        asked, start, few = boot_seconds(), len(self._terms.prefix), {*witnesses[:WITNESSES]}
        ours, known = self.known({item.key[start:] for item in items} | few)
        if not ours:
            raise PurgeError(f"The database session {NOT_OURS}. Nothing more goes; run again.")
        stay = {item.key: self.objection(item, known.get(item.key[start:])) for item in items}
        seen = [name for name in few if name in known and known[name].expired < known[name].jobs]
        if 2 * len(seen) <= len(few):
            stay |= {item.key: RELOADED for item in items if few or item.reason == Reason.ORPHAN}
        free, size = sorted(key for key in stay if not stay[key]), min(size, BATCH)
        permits = [Permit(tuple(free[n : n + size]), asked) for n in range(0, len(free), size)]
        self._granted.update({permit: (permit.keys, asked) for permit in permits})
        return permits, {key: why for key, why in stay.items() if why}

    def delete(self, permit: Permit) -> list[Verdict]:
        """Delete what the permit names, in one request. Return a verdict for each key, in order.
        Raises PurgeError for a permit that the gate did not give, or that was used before."""
        keys, asked = self._granted.pop(permit, ((), 0.0))
        if not keys or (keys, asked) != (permit.keys, permit.asked):
            raise PurgeError("A delete was asked for without a permit. Nothing was deleted by it.")
        return self._wire._post([(key, "") for key in keys], asked)

    def delete_rows(self, rows: Sequence[Row]) -> int:
        """Delete these jobs, if they are still expired and have one of these names. Return how many
        went, once that is certain. The server rolls back what we give up. Raises PurgeError."""
        ids = ",".join(
            f"{row.job_id:d}" if isinstance(row.job_id, int) else TEXT % row.job_id.encode().hex()
            for row in rows
        )
        names = ",".join({f"x'{row.name.encode().hex()}'" for row in rows})
        which = f"`jobId` IN ({ids}) AND {NAME} IN ({names}) AND {self._expired}"
        self._run("ROLLBACK")  # after an error below, the next `known` does it
        self._run("START TRANSACTION")
        if not self._terms.rows or self._run(f"SELECT {self._witness}") != [(1,)]:
            raise PurgeError(f"No job rows may go: not asked for, or the session {NOT_OURS}.")
        with database_errors(f"Cannot delete from {self.table}"):
            count = self._connection.cursor().execute(f"DELETE {self._source} WHERE {which}")
        self._run("COMMIT", "commit the deletes of job rows in")
        return int(count)


# --- Policy, merge and guards: no clock, no network -----------------------------------------------
# Keys are `str`. Python compares and orders them by code point, with the same result as by their
# bytes in UTF-8. That is the order of an S3 listing.

MAX_SKEW = timedelta(minutes=5)  # between the clocks of this host, the database and S3
SAMPLE = 50  # keys of remaining jobs that are looked for before absence is believed
WRONG_PLACE = "--bucket, --prefix or --db-table must be wrong"


class Reference(NamedTuple):
    """A key that `jobs` rows of the job table refer to. `expired` of these are expired jobs."""

    key: str
    jobs: int
    expired: int


class S3Object(NamedTuple):
    """An object in the bucket. `size` (bytes) and `last_modified` (ISO 8601) as S3 spells them."""

    key: str
    size: str
    last_modified: str


OF_OBJECTS = {Reason.EXPIRED, Reason.ORPHAN}
Pairs = Iterable[tuple[Reference | None, S3Object | None]]
Plan = Iterator[Candidate]


def reason_of(terms: Terms, reference: Reference | None, item: S3Object | None) -> Reason | None:
    """Why a key belongs in the plan; None if it does not. `item` is its object, if there is one."""
    if reference is None:
        if item is None or terms.orphans_before is None or item.key == terms.prefix:
            return None  # the "folder" that a console makes is called like the prefix
        modified = datetime.fromisoformat(item.last_modified)
        return Reason.ORPHAN if modified < terms.orphans_before else None
    if reference.expired == reference.jobs and item is not None:
        return Reason.EXPIRED
    if not reference.expired or not terms.rows:
        return None
    return Reason.SHARED if reference.expired < reference.jobs else Reason.MISSING


class Tally(Counter[str]):
    """Objects counted by reason, and their `bytes`."""

    def __init__(self) -> None:
        super().__init__(expired=0, orphan=0, bytes=0)

    def add(self, item: Any, times: int = 1) -> None:
        self[item.reason] += times
        self["bytes"] += times * item.size

    @property
    def objects(self) -> int:
        return self["expired"] + self["orphan"]


def pick(sample: list[str], seen: int, name: str) -> None:
    """Keep a fair sample of at most SAMPLE of the `seen` names, of which this is the last one."""
    if len(sample) < SAMPLE:
        sample.append(name)
    elif (place := random.randrange(seen)) < SAMPLE:  # reservoir sampling
        sample[place] = name


@dataclass
class Totals:
    """What the table and the listing told: the size of the plan, and what the guards must know."""

    planned: Tally = field(default_factory=Tally)
    jobs: int = 0  # rows of the table
    nameless: int = 0  # of these, without a sourceData that can be a key
    expired_jobs: int = 0  # expired ones, whose name can be a key
    expired: int = 0  # expired keys
    missing: int = 0  # of these, without an object
    remaining: int = 0  # distinct keys of remaining jobs
    dangling: int = 0  # of these, without an object, where all objects are listed
    dangling_key: str = ""  # one of these
    listed: int = 0  # objects that the listing gave
    doubtful: int = 0  # objects that are kept because of their name
    unanswered: int = 0  # in an undo: objects that are there, and that S3 may yet delete


def ascending(items: Iterable[Record], source: str, last: str | None = None) -> Iterator[Record]:
    """Yield the same items. Raises PurgeError where their keys do not ascend, above `last`."""
    for item in items:
        if last is not None and item[0] <= last:
            places = f"{printable(str(item[0]))} came after {printable(str(last))}"
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


def plan(pairs: Pairs, terms: Terms, totals: Totals, lost: Callable[[str], Any] = str) -> Plan:
    """Yield what may go, in key order, while `totals` grows. `lost` is told each dangling key."""
    for reference, item in pairs:
        reason = reason_of(terms, reference, item)
        totals.listed += item is not None
        if reference and not item:
            totals.missing += reference.expired == reference.jobs
            if reference.expired < reference.jobs:
                totals.dangling += 1
                totals.dangling_key = reference.key
                lost(reference.key)
        if item and reason in OF_OBJECTS:
            if NOT_XML.search(item.key):
                totals.doubtful += 1
                continue
            modified = datetime.fromisoformat(item.last_modified).isoformat()
            candidate = Candidate(item.key, reason, int(item.size), modified)
            totals.planned.add(candidate)
            yield candidate
        elif reference and reason:
            yield Candidate(reference.key, reason)


def without_doubtful(items: Plan, totals: Totals, is_doubtful: Callable[[str], bool]) -> Plan:
    """Yield the plan without the orphans that a job may mean by another spelling."""
    for item in items:
        if item.reason == Reason.ORPHAN and is_doubtful(item.key):
            totals.doubtful += 1
            totals.planned.add(item, -1)
        else:
            yield item


def folded(name: str) -> str:
    """The name without what people and programs confuse: letter case, percent-encoding, Unicode
    normalization, a slash at the beginning."""
    return normalize("NFC", normalize("NFC", unquote(name)).casefold()).lstrip("/")


class Limits(NamedTuple):
    """What the command line allows."""

    objects: int | None = None
    percent: float = 50  # of keys, objects or rows
    rate: int = 3000  # objects per second, 0 for no limit
    workers: int = 8  # requests at the same time


def shares(totals: Totals, terms: Terms) -> Iterator[tuple[int, int, str]]:
    """Yield what --max-percent limits: a part, the whole, and what they are."""
    planned = totals.planned.objects
    yield planned, planned + totals.remaining, "keys that are planned or belong to remaining jobs"
    if terms.orphans_before is not None:
        yield planned, totals.listed, "objects in the listing"
    if terms.rows:
        yield totals.expired_jobs, totals.jobs, "job rows"


def refusals(totals: Totals, terms: Terms, limits: Limits) -> Iterator[str]:
    """Yield each reason why this plan must not be carried out."""
    planned = totals.planned.objects
    if limits.objects is not None and planned > limits.objects:
        yield f"{planned} objects would be deleted, more than --max-objects {limits.objects}"
    for part, whole, name in shares(totals, terms):
        if part > whole * limits.percent / 100:
            share = f"{part} of {whole} {name} would be deleted ({100 * part / whole:.1f} %)"
            yield f"{share}, more than --max-percent {limits.percent:g}"
    if totals.planned["orphan"] and not totals.remaining:
        yield f"--orphans, but {totals.jobs} jobs have no remaining one among them: {WRONG_PLACE}"
    found = totals.expired - totals.missing
    if terms.rows and not totals.remaining and 2 * found < totals.expired:
        told = f"only {found} of {totals.expired} expired keys have an object"
        yield f"rows of missing keys would go, but {told}, and no job remains: {WRONG_PLACE}"


def clock_refusals(database: timedelta, s3: timedelta) -> Iterator[str]:
    """Yield why the clocks cannot be trusted, by how much they are ahead of this host's."""
    clocks = [(timedelta(), "this host"), (database, "the database"), (s3, "S3")]
    (behind, slow), _, (ahead_by, fast) = sorted(clocks)
    if ahead_by - behind > MAX_SKEW:
        apart = f"{(ahead_by - behind).total_seconds():.0f} seconds ahead of that of {slow}"
        yield f"the clock of {fast} is {apart}, more than {MAX_SKEW}: set the clocks"


def just_before(key: str) -> str:
    """Return a StartAfter value so close below `key` that `key` is normally the first result. It is
    cut before the first character that XML cannot carry, as a listing's answer may repeat it."""
    below = key[:-1] + chr(max(ord(key[-1]) - 1, 0)) + "\U0010ffff"
    seek = NOT_XML.split(re.sub("[\ufffe\uffff]", "\ufffd", below))[0]
    return seek if len(seek.encode()) <= KEY_BYTES else seek[:-2]


def printable(key: str) -> str:
    """The key as it is, or as a JSON string where a line with it could be misread."""
    plain = key.isprintable() and key == key.strip() and not key.startswith('"')
    return key if plain and key else json.dumps(key)


# --- Streams: ahead of their reader, on disk, and watched -----------------------------------------

BLOCK = 1000  # records in a block of a spool file
SQL_BYTES = 4_000_000  # of a statement; max_allowed_packet is 4 MiB by default in MySQL 5.7
SILENCE = 60  # seconds without progress after which a phase warns


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` consecutive items; the last one may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def fitting(items: Iterable[T], most: int, size: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield lists of up to `most` items that fit into one SQL statement; `size` in bytes."""
    some, total = list[T](), 0
    for item in items:
        total += size(item)
        if some and (len(some) >= most or total > SQL_BYTES):
            yield some
            some, total = [], size(item)
        some.append(item)
    if some:
        yield some


def ahead(streams: Iterable[Iterable[T]], width: int, depth: int = 0) -> Iterator[T]:
    """Yield every item in stream order. Up to `width` streams are read at once, each by a thread
    that may run `depth` items ahead of the consumer (0: no limit). Raises what a stream raises."""
    waiting, running, end = iter(streams), deque[queue.Queue[Any]](), object()

    def draw(stream: Iterable[T], results: queue.Queue[Any]) -> None:
        try:
            for item in stream:
                results.put(item)
            results.put(end)
        except BaseException as error:
            results.put(error)

    while True:
        for stream in islice(waiting, width - len(running)):
            running.append(queue.Queue(depth))
            try:
                start_thread(draw, stream, running[-1])
            except PurgeError as error:
                running[-1].put(error)  # the streams before it come to their end first
                waiting = iter(())
                break
        if not running:
            return
        for item in iter(running.popleft().get, end):
            if isinstance(item, BaseException):
                raise item
            yield item


def start_thread(work: Callable[..., None], *args: Any) -> None:
    """Do the work in a thread of its own. Raises PurgeError if the system has no more threads."""
    try:
        threading.Thread(target=work, args=args, daemon=True).start()
    except RuntimeError as error:
        raise PurgeError(f"Cannot start a thread ({error}): lower --workers.") from error


def no_space(error: Exception) -> PurgeError:
    advice = "Free some space in TMPDIR, or point TMPDIR elsewhere."
    return PurgeError(f"Cannot write a spool file: {error}. {advice}")


class Spool(Generic[Record]):
    """Named tuples in an unnamed file in TMPDIR, which vanishes with the process. It is written
    once, then read in order as often as needed, by any thread. Raises PurgeError."""

    def __init__(self, records: Iterable[Record]) -> None:
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
        except OSError as error:
            raise no_space(error) from error
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
        """Yield the records from one place up to before another."""
        for number in range(start // BLOCK, -(-end // BLOCK)):
            begin, after = self._ends[number : number + 2]
            block = pickle.loads(os.pread(self._file.fileno(), after - begin, begin))
            first = number * BLOCK
            yield from map(self._make, block[max(start - first, 0) : end - first])

    def __getitem__(self, place: int) -> Record:
        return next(self.slice(place, place + 1))


class Spellings:
    """Names on disk that are found again by any spelling that `folded` takes for the same."""

    def __init__(self) -> None:
        self._names = sqlite3.connect("")  # an unnamed file in TMPDIR
        self._names.execute("CREATE TABLE names (name TEXT PRIMARY KEY) WITHOUT ROWID")

    def add(self, name: str) -> None:
        try:
            self._names.execute("INSERT OR IGNORE INTO names VALUES (?)", [folded(name)])
        except sqlite3.OperationalError as error:
            raise no_space(error) from error

    def has(self, name: str) -> bool:
        sql = "SELECT 1 FROM names WHERE name = ?"
        return self._names.execute(sql, [folded(name)]).fetchone() is not None


class Screen(logging.Handler):
    """Standard output for the result, standard error for the log. A stop signal ends the wait for a
    pipe that nobody reads: at most PIPE_BUF bytes are written at a time, once they fit."""

    def __init__(self, stop: Stop) -> None:
        super().__init__()
        self._stop, self._unread = stop, set[Any]()  # streams that nobody reads after a stop signal
        self.out_is_terminal, self.err_is_terminal = sys.stdout.isatty(), sys.stderr.isatty()
        style, times = "%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ"
        self.setFormatter(logging.Formatter(style, times))

    def _write(self, stream: Any, text: str) -> None:
        data = text.encode(stream.encoding or "utf-8", "backslashreplace")
        while data:
            while not select.select([], [stream], [], stream not in self._unread)[1]:
                if self._stop.received:
                    self._unread.add(stream)
                    return
            data = data[os.write(stream.fileno(), data[: select.PIPE_BUF]) :]

    def show(self, text: str) -> None:
        """Print a part of the result. Raises PurgeError if standard output is closed or full."""
        try:
            self._write(sys.stdout, f"{text}\n")
        except OSError as error:
            raise PurgeError(f"Cannot print the result: {error.strerror}.") from error

    def tell(self, text: str, end: str = "\n") -> None:
        """Print on standard error, over a progress line. What cannot be printed is dropped."""
        with suppress(OSError, ValueError):
            self._write(sys.stderr, f"\r\x1b[K{text}{end}" if self.err_is_terminal else text + end)

    def emit(self, record: logging.LogRecord) -> None:
        self.tell(self.format(record))


class Progress:
    """Says on standard error how far a phase is: on a terminal in one line, twice a second, else
    (a cron log) in a line a minute. Where nothing moves for SILENCE seconds it warns, even when
    the run is quiet. A thread of its own does it, so that the work itself only counts."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._shows = screen.err_is_terminal and log.isEnabledFor(logging.INFO)

    def over(
        self, items: Iterable[T], phase: str, total: int = 0, minutely: Any = list
    ) -> Iterator[T]:
        """Yield the same items, of which there are `total` (0: not known). Call `minutely` about
        once a minute, between two items."""
        self._count, self._due, done = 0, False, threading.Event()
        teller = threading.Thread(target=self._tell, args=(phase, total, done), daemon=True)
        teller.start()
        try:
            for item in items:
                self._count += 1
                if self._due:
                    self._due = False
                    minutely()
                yield item
        finally:
            done.set()
            teller.join(1)

    def _tell(self, phase: str, total: int, done: threading.Event) -> None:
        started = told = moved = time.monotonic()
        last, warned = 0, False
        while not done.wait(0.5):
            count, now = self._count, time.monotonic()
            if count != last:
                last, moved, warned = count, now, False
            share = f" of {total:,} ({100 * count // total} %)" if total else ""
            line = f"{phase}: {count:,}{share}, {count / (now - started):,.0f}/s"
            if self._shows and not done.is_set():
                columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
                self._screen.tell(line[: columns - 1], end="")
            if now - told >= 60:
                told, self._due = now, True
                if not self._shows:
                    log.info("%s", line)
            if now - moved >= SILENCE and not warned:
                warned = True
                log.warning("%s: no answer for %d seconds, still waiting", phase, SILENCE)
        if self._shows:
            self._screen.tell("", end="")


# --- MySQL ----------------------------------------------------------------------------------------

CA_BUNDLE_URL = "https://truststore.pki.rds.amazonaws.com/global/global-bundle.pem"
DEFAULT_CA_BUNDLE = Path(__file__).resolve().parent / "rds-ca-bundle.pem"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Seconds. A login and a re-check may not take long. The grouped query may sort for an hour before
# its first row.
CONNECT_TIMEOUT, PLAN_TIMEOUT, RECHECK_TIMEOUT = 10, 3600, 40
# Job rows that are read at a time, and that are deleted in one transaction.
ROWS, ROWS_A_COMMIT = 1000, 200
# Errors after which job rows stay for the next run: a deadlock, a lock that another transaction
# holds, a foreign key, a trigger's SIGNAL (MySQL manual, "Error Message Reference").
DEADLOCK = "1213"
ROWS_STAY = {DEADLOCK, "1205", "1451", "1644"}
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
    1524: "IAM authentication is not enabled on the instance",
    2003: "Check --db-host, --db-port, DNS, and the security group",
    2026: "No secret was sent: the server offers no TLS, or --ca-bundle is outdated (the current "
    f"one: {CA_BUNDLE_URL}), or --db-host is not the real endpoint, or not the server you mean",
}


class Login(NamedTuple):
    """Where the job table is, and who asks. `table` is SCHEMA.TABLE. `password` None: IAM."""

    host: str
    port: int
    user: str
    schema: str
    table: str
    ca_bundle: Path | None = None
    password: str | None = None


def tls_settings(login: Login) -> dict[str, Any]:
    """Return PyMySQL's arguments for TLS with certificate and host name verified. Only a password
    for this machine, without a CA bundle, may go without verified TLS.

    `ssl_verify_identity` is what verifies: `ssl_ca` alone encrypts and trusts anyone. Raises
    PurgeError without a usable CA bundle.
    """
    bundle = login.ca_bundle
    if bundle is None and login.password is not None and login.host in LOOPBACK:
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


def log_in(session: boto3.Session, login: Login, s3_lead: timedelta) -> Any:
    """Connect to the database, with the password or an IAM token. The token is made now, because it
    lives 15 minutes. Raises PurgeError; a refused IAM login tells what can be known of its cause:
    `s3_lead` is by how much S3's clock is ahead of this host's."""
    settings = tls_settings(login) | {"host": login.host, "port": login.port, "user": login.user}
    log.info("connecting to %s:%d", login.host, login.port)
    password = login.password
    if password is None and not session.region_name:
        raise PurgeError("No AWS region: give --region, that of the database.", USAGE)
    if password is None:
        rds = session.client("rds")
        password = rds.generate_db_auth_token(login.host, login.port, login.user)
    settings |= {"database": login.schema, "password": password.encode(), "charset": "utf8mb4"}
    settings |= {f"{kind}_timeout": CONNECT_TIMEOUT for kind in ("connect", "read", "write")}
    try:
        with database_errors(f"Cannot log in to {login.host}:{login.port} as {login.user}"):
            connection: Any = pymysql.connect(**settings)
    except PurgeError as error:
        if error.code == "1045" and login.password is None:
            found: Any = session.get_credentials()
            facts = f"user {login.user}, region {session.region_name}, access key "
            facts += f"{found.access_key}, S3's clock {s3_lead.total_seconds():+.0f} s from ours"
            raise PurgeError(f"{error.message} Known here: {facts}.", code="1045") from error
        raise
    connection._read_timeout = RECHECK_TIMEOUT  # PyMySQL applies it at its next read
    # A minute's silence sends a probe: NAT gateways forget idle connections after 350 seconds.
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            connection._sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def lock_name(connection: Any, wishes: Wishes, table: str) -> str:
    """The name of the lock on bucket, prefix and table, of at most 64 characters. A server that
    folds the letter case of table names has one lock for all spellings."""
    ((folds,),) = query(connection, "Cannot ask the server", "SELECT @@lower_case_table_names")
    subject = [wishes.bucket, wishes.prefix, table.lower() if folds else table]
    return f"retention_purge:{hashlib.sha256(json.dumps(subject).encode()).hexdigest()[:40]}"


def take_lock(connection: Any, lock: str, table: str) -> None:
    """Take the lock, until the connection ends. Raises PurgeError if another run has it, or on a
    read replica, where the lock would not be the primary's and the table not up to date."""
    doing = f"Cannot take the lock on {table}"
    flags = "CAST(@@global.read_only AS CHAR), CAST(@@innodb_read_only AS CHAR)"
    if not {*query(connection, doing, f"SELECT {flags}")[0]} <= {"0", "OFF"}:
        message = "The database is read-only, so it may be a replica: give the primary's host."
        raise PurgeError(message, REFUSED)
    sql = f"SELECT GET_LOCK('{lock}', 0), IS_USED_LOCK('{lock}')"
    ((got, holder),) = query(connection, doing, sql)
    if not got:  # 0, or NULL if it failed
        sql = "SELECT HOST, COMMAND, TIME FROM information_schema.PROCESSLIST WHERE ID = "
        rows = []
        with suppress(PurgeError):  # MySQL cannot spell everything that others run: error 3854
            rows = query(connection, doing, f"{sql}{int(holder or 0)}")
        facts = [f" of {host} ({command} for {seconds} s)" for host, command, seconds in rows]
        message = "Another run works on the same bucket, prefix and table: database connection "
        message += f"{holder}{''.join(facts)} holds the lock. Try again later."
        raise PurgeError(message, LOCKED)


class JobTable:
    """What the run reads of the job table, with the gate's own SQL. It never writes. All methods
    raise PurgeError."""

    def __init__(self, connection: Any, gate: Gate) -> None:
        self._connection, self._gate, self.name = connection, gate, gate.table
        self._columns = {row[0].lower(): row for row in gate.columns}
        for name in ("jobId", "completedAt", "type", "sourceData"):
            if name.lower() not in self._columns:
                raise PurgeError(f"{self.name} has no column {name}: is it the job table?")
        moment = self._columns["completedat"][1].lower()
        if moment.startswith("datetime"):
            log.warning("completedAt is a DATETIME: its values are taken as UTC")
        elif not moment.startswith("timestamp"):
            raise PurgeError(f"{self.name}.completedAt must be a TIMESTAMP column, not {moment}.")
        doing, sql = f"Cannot read {self.name}", f"SHOW INDEX {gate.source}"
        with database_errors(doing), connection.cursor(pymysql.cursors.DictCursor) as cursor:
            cursor.execute(sql)
            self._indexes = [*cursor.fetchall()]
        # Whether an index leads with `sourceData` and is used, so that a re-check scans nothing.
        self.indexed = any(
            (row["Column_name"] or "").lower() == "sourcedata"
            and (row["Seq_in_index"], row["Index_type"]) == (1, "BTREE")
            and (row.get("Visible", "YES"), row.get("Ignored", "NO")) == ("YES", "NO")
            for row in self._indexes
        )

    def can_hold(self, name: str) -> bool:
        """Whether the column can store the name. If not, a job for it is stored cut or altered, so
        the object may be in use."""
        kind, collation = self._columns["sourcedata"][1].lower(), self._columns["sourcedata"][2]
        charset = collation.split("_")[0]
        codec = {"ascii": "ascii", "latin1": "cp1252"}.get(charset, "utf-8")
        length = re.search(r"char\((\d+)\)", kind)
        fits = len(name) <= (int(length[1]) if length else KEY_BYTES)
        spelt = name.encode(codec, "ignore").decode(codec) == name
        narrow = charset in ("utf8", "utf8mb3") and max(name) > "\uffff"
        stripped = kind.startswith("char") and name.endswith(" ")  # a CHAR gives none back
        return fits and spelt and not narrow and not stripped

    def references(self) -> Iterator[tuple[bytes, int, int]]:
        """Yield each distinct `sourceData` as UTF-8, in byte order, its jobs and expired jobs.

        SQL_BIG_RESULT makes the server sort instead of filling a temporary table keyed by the
        group: five times faster on millions of rows. Read it at once: a client that stops reading
        is cut off after net_write_timeout (60 s), and an open read keeps a snapshot alive.
        """
        self._connection._read_timeout = PLAN_TIMEOUT
        sql = f"SELECT SQL_BIG_RESULT {self._gate.counts} {self._gate.source} GROUP BY 1 ORDER BY 1"
        with database_errors(f"Cannot read {self.name}"):
            cursor = self._connection.cursor(pymysql.cursors.SSCursor)
            try:
                cursor.execute(sql)
                while rows := cursor.fetchmany(BLOCK):  # half as dear as one by one
                    yield from rows
            finally:
                # PyMySQL would first read all that is left. The connection is closed instead.
                if cursor._result is not None:
                    cursor._result.unbuffered_active = False
        self._connection._read_timeout = RECHECK_TIMEOUT

    def ping(self) -> None:
        """Keep the connection, and the lock on it, from being cut as idle."""
        query(self._connection, "The database connection is lost", "DO 0")

    def _select(self, columns: str, names: Collection[str], which: str) -> list[tuple[Any, ...]]:
        exact = ",".join(f"x'{name.encode().hex()}'" for name in names)
        sql = f"SELECT {columns} {self._gate.source} WHERE {self._gate.among(names)} "
        doing = f"Cannot read jobs in {self.name}"
        return query(self._connection, doing, f"{sql} AND {NAME} IN ({exact}) {which}")

    def expired_rows(self, names: Collection[str], most: int = ROWS) -> list[Row]:
        """Up to `most` expired jobs of these names, with all columns that an INSERT can set. Values
        are exact: int, float, str (also moments, in UTC, and decimals), None, or {"hex": bytes}."""
        columns, texts, parts = [], [], [NAME]
        for name, kind, collation, _, _, _, extra, *_ in self._gate.columns:
            if not re.search(r"(VIRTUAL|STORED) GENERATED|PERSISTENT", extra, re.IGNORECASE):
                columns.append(name)
                texts.append(collation is not None)
                parts.append(exactly(f"`{name.replace('`', '``')}`", kind.lower(), collation))
        rows = []
        which = f"AND {self._gate.expired} LIMIT {most}"
        for raw, *values in self._select(", ".join(parts), names, which):
            row = dict(zip(columns, map(logged, values, texts), strict=True))
            (job_id,) = [value for name, value in row.items() if name.lower() == "jobid"]
            if isinstance(job_id, str | int):  # else it is no UTF-8: such a row stays
                rows.append(Row(job_id, raw.decode(), row))
        return rows

    def jobs_of(self, name: str, most: int) -> list[tuple[Any, ...]]:
        """Up to `most` jobs of a name: id, type, completedAt, whether it is expired. Those that
        keep the object come first, then the one that expired last."""
        job_id = exactly("`jobId`", *self._columns["jobid"][1:3])
        kind, moment = TEXT_BYTES.format("`type`"), "CAST(`completedAt` AS CHAR)"
        columns = f"{job_id}, {kind}, {moment}, {self._gate.expired}"
        found = self._select(columns, [name], f"ORDER BY 4, `completedAt` DESC, 1 LIMIT {most}")
        return [
            tuple(v.decode(errors="replace") if isinstance(v, bytes) else v for v in row)
            for row in found
        ]

    def row_refusals(self) -> Iterator[str]:
        """Yield each reason why job rows cannot be deleted. EXPLAIN asks for the rights of the
        statement that it explains, and does nothing. On a read-only server (a dry run's) it tells
        nothing."""
        kind, collation = self._columns["jobid"][1:3]
        if not re.match(r"\w*int\b", kind.lower()) and collation is None:
            yield f"--delete-jobs, but {self.name}.jobId is {kind}, neither a text nor an integer"
        parts = Counter(row["Key_name"] for row in self._indexes)
        if self._columns["jobid"][3] != "NO" or not any(
            (row["Column_name"] or "").lower() == "jobid"
            and (row["Non_unique"], row["Sub_part"], parts[row["Key_name"]]) == (0, None, 1)
            for row in self._indexes
        ):
            yield f"--delete-jobs, but {self.name}.jobId is not unique: make it the primary key"
        self.expired_rows([""], 0)  # an error in a column of an odd type comes here, not later
        try:
            sql = f"EXPLAIN DELETE {self._gate.source} WHERE FALSE"
            query(self._connection, f"Cannot check the right to delete from {self.name}", sql)
        except PurgeError as error:
            if error.code == "1142":
                yield f"--delete-jobs, but the user has no DELETE on {self.name}: grant it"
            elif error.code != "1290":
                raise


def exactly(column: str, kind: str, collation: str | None) -> str:
    """SQL that reads a column without loss: texts as UTF-8, moments and decimals as text. A FLOAT
    would be printed with six digits."""
    if collation is not None:
        return TEXT_BYTES.format(column)
    if kind.startswith("float"):
        return f"{column} + 0E0"
    plain = r"\w*int\b|double|bit|json|\w*binary|\w*blob|geom|point|line|polygon|multi"
    return column if re.match(plain, kind) else f"CAST({column} AS CHAR)"


def logged(value: Any, is_text: bool) -> Any:
    """A column's value for the audit log: bytes as text if they are one, else in hexadecimal."""
    if not isinstance(value, bytes):
        return value
    text = utf8(value) if is_text else None
    return {"hex": value.hex()} if text is None else text


def read_references(
    jobs: JobTable, terms: Terms, totals: Totals, sample: list[str]
) -> Iterator[Reference]:
    """Yield the references that the run must know, while `totals` counts all of the table: with
    --orphans every one, else those of expired jobs: most rows are of remaining jobs."""
    every, rows, prefix = terms.orphans_before is not None, terms.rows, terms.prefix
    room = KEY_BYTES - len(prefix.encode())
    for raw, count, expired in ascending(jobs.references(), "list of the table's keys"):
        totals.jobs += count
        if not 0 < len(raw) <= room or (name := utf8(raw)) is None:
            totals.nameless += count
            continue
        totals.expired_jobs += expired
        totals.expired += expired == count
        if expired < count:
            totals.remaining += 1
            pick(sample, totals.remaining, name)
        if every or (expired if rows else expired == count):
            yield Reference(prefix + name, count, expired)
    if totals.nameless:
        log.warning("%d jobs have no sourceData that can be a key", totals.nameless)


def utf8(raw: bytes) -> str | None:
    """None for bytes that are no UTF-8: MariaDB stores such names, S3 has no such keys."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


# --- S3: what lies in the bucket, and what S3 says ------------------------------------------------

# Without --orphans: where fewer than one in SPARSE objects is wanted, each wanted key is sought by
# a request of its own. It lists SEEK objects, to notice where wanted keys are dense.
SPARSE, SEEK = 40, 10
# How far the listing runs ahead: in references (of all objects, of the wanted ones); in pages.
LISTED_AHEAD, SOUGHT_AHEAD, PAGES_AHEAD = 40_000, 24_000, 6
END = "\U0010ffff" * KEY_BYTES  # above every key
# The root of the answer to each operation that reads.
ROOTS = {
    "ListObjectsV2": "ListBucketResult",
    "ListObjectVersions": "ListVersionsResult",
    "GetBucketVersioning": "Versioning",
}
WHOLE = re.compile(r"\s*(?:<\?xml[^>]*>\s*)?<([\w:]+)[^>]*(?:/>|>.*</\1>)\s*", re.DOTALL)
# Of an object in a listing.
MOMENT = r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(?:\.\d+)?Z"
PATTERNS = {"Key": "[^<]*", "Size": "[0-9]+", "LastModified": MOMENT}
COLUMNS = [re.compile(f"<{tag}>({content})</{tag}>", re.ASCII) for tag, content in PATTERNS.items()]
OBJECTS = re.compile("<Contents>.*</Contents>", re.DOTALL)
# S3's codes (S3 API reference, "List of error codes") and what to do.
BUCKET_ADVICE = {
    "AccessDenied": "The AWS identity needs {right}.",
    "NoSuchBucket": "Check --bucket.",
    "ExpiredToken": "The AWS credentials ended; run again with fresh ones.",
    "InvalidAccessKeyId": "The AWS access key does not exist: check --profile, the credentials.",
    "SignatureDoesNotMatch": "The AWS secret key is not that of the access key.",
    "PermanentRedirect": "Check --region: the bucket is in another one.",
    "RequestTimeTooSkewed": "Set this host's clock.",
}
# Codes after which nothing is certain: S3's, and ours for answers that are not in S3's words.
MAYBE_DONE = {"InternalError", "RequestTimeout", "OperationAborted", "NoAnswer", "InvalidAnswer"}


class Page(NamedTuple):
    """One ListObjectsV2 answer; `token` continues the listing, None at its end."""

    objects: list[S3Object]
    token: str | None
    bucket: str
    begins: list[str]  # where, as it was asked for: after a key, or with a token


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


def s3_config(workers: int, timeout: int) -> Config:
    """The settings of a client; `timeout` in seconds. botocore repeats no delete: each try needs a
    re-check of its own."""
    return Config(
        retries={"mode": "standard", "total_max_attempts": 1 if timeout == DELETE_TIMEOUT else 5},
        max_pool_connections=4 * workers,
        connect_timeout=S3_CONNECT_TIMEOUT,
        read_timeout=timeout,
        parameter_validation=False,  # half of the CPU of a request
    )


class Bucket:
    """Reads one bucket below one prefix; any thread may use it. Every answer must be what was asked
    for, whole: an empty or foreign body would parse to an empty listing. All methods raise
    PurgeError."""

    def __init__(self, wire: Wire, prefix: str, workers: int, stop: Stop, count: Any) -> None:
        self.name, self.prefix, self.workers = wire.bucket, prefix, workers
        self._read, self._stop, self._count = wire.reader, stop, count
        # The wildcard puts it before botocore's own parse of the body for errors.
        self._read.meta.events.register_first("before-parse.*", check_answer)
        self._read.meta.events.register("before-send.s3", self._before_send)

    def _before_send(self, event_name: str, **_: Any) -> None:
        self._stop.check()
        if ".List" in event_name:
            self._count()

    def look(self) -> tuple[str, timedelta]:
        """Return the bucket's versioning (off, enabled, suspended), and by how much S3's clock is
        ahead of this host's."""
        doing = f"Cannot read the versioning of bucket {self.name}"
        with bucket_errors(doing, "s3:GetBucketVersioning"):
            answer = self._read.get_bucket_versioning(Bucket=self.name)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        if date is None:
            raise PurgeError("S3's answer has no Date header: is this S3?")
        return answer.get("Status", "off").lower(), parsedate_to_datetime(date) - datetime.now(UTC)

    def page(
        self, after: str = "", limit: int = PAGE, token: str | None = None, prefix: str = ""
    ) -> Page:
        """Return up to `limit` objects after the key `after`, where `token` may continue the
        listing. A page without keys, but with a token, is followed."""
        while True:
            where: Any = {"ContinuationToken": token} if token else {"StartAfter": after}
            where |= {"Prefix": prefix or self.prefix, "MaxKeys": limit}
            with bucket_errors(f"Cannot list bucket {self.name}", "s3:ListBucket"):
                answer = self._read.list_objects_v2(Bucket=self.name, **where)
            page: Page = answer["Page"]
            self._check(page, after, token or after)
            if page.objects or page.token is None:
                if not prefix:  # no key lies between these: other parts need not ask
                    self._gap = after, page.objects[0].key if page.objects else END
                return page
            if page.token == token:
                raise PurgeError(f"The listing of {self.name} does not go on: same token again.")
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

    def find(self, key: str) -> S3Object | None:
        """Return the object, if it is there. It sorts first among those that begin with its key."""
        found = self.page(limit=1, prefix=key).objects
        return found[0] if found and found[0].key == key else None

    def objects(self, references: Spool[Reference], whole: bool) -> Iterator[S3Object]:
        """Yield all objects if `whole`, else at least those that the references name, in order. The
        references cut the listing into parts, and several parts are listed at the same time. It
        takes about one request for each reference or, where these are dense, for each page."""
        count, enough = len(references), PAGE // SPARSE  # wanted keys on a page
        first = self.page("" if whole or not count else just_before(references[0].key))
        if first.token is None or not (whole or count):
            yield from first.objects
            return
        dense = whole or (count > enough and references[enough].key <= first.objects[-1].key)
        # A page keeps the CPU busy and the memory full. A seek mostly waits.
        width, limit = (self.workers, PAGE) if dense else (4 * self.workers, SEEK)
        size = max(min(count, LISTED_AHEAD if whole else SOUGHT_AHEAD) // width, 1)
        places = ((start, min(start + size, count)) for start in range(0, max(count, 1), size))
        parts = (self._part(references, *place, whole, limit) for place in places)
        yield from chain.from_iterable(ahead(parts, width, PAGES_AHEAD if whole else 0))

    def _part(
        self, references: Spool[Reference], start: int, end: int, whole: bool, limit: int
    ) -> Iterator[list[S3Object]]:
        """Yield lists of objects: if `whole`, all above the reference before `start` and up to the
        one before `end`. Else those with a key of these references; then each request starts just
        before the next wanted key. The first request lists `limit` objects."""
        keys = [item.key for item in references.slice(start, end)]
        low = references[start - 1].key if start else ""
        if whole:
            keys = [END if end == len(references) else keys[-1]]
        nothing_above, nothing_below = self._gap  # both at once: other threads replace it
        if nothing_above <= low and keys[-1] < nothing_below:
            return
        wanted, place, token, after = {*keys}, 0, None, just_before(low) if low else ""
        while place < len(keys):
            seek = just_before(keys[place])
            if not whole and seek > after:
                after, token = seek, None
            page = self.page(after, limit, token)
            known = (item for item in page.objects if low < item.key <= keys[-1])
            yield [item for item in known if whole or item.key in wanted]
            if page.token is None:
                return
            after, token, sought = page.objects[-1].key, page.token, place
            place = bisect_right(keys, after, place)
            is_dense = (place - sought - 1) * SPARSE >= len(page.objects)  # the first was sought
            limit = PAGE if whole or is_dense else SEEK

    def each(self, ask: Callable[[str], T], keys: Iterable[str]) -> Iterator[T]:
        """Yield the answers for some keys, in their order. Several are asked for at once."""
        return ahead((map(ask, [key]) for key in keys), 4 * self.workers)

    def versions(self, key: str) -> list[Version]:
        """Return the newest versions and delete markers of a key, the latest first."""
        doing = f"Cannot list the versions in bucket {self.name}"
        with bucket_errors(doing, "s3:ListBucketVersions"):
            answer: Any = self._read.list_object_versions(Bucket=self.name, Prefix=key, MaxKeys=50)
        # The versions of the key come before those of longer keys. Of two of the same second a
        # marker counts as the later one: nothing is restored on a guess.
        found = [
            Version(item["VersionId"], item["LastModified"], item["IsLatest"], kind != "Versions")
            for kind in ("Versions", "DeleteMarkers")
            for item in answer.get(kind, [])
            if item["Key"] == key
        ]
        return sorted(found, key=lambda it: (it.is_latest, it.modified, it.is_marker), reverse=True)


def check_answer(operation_model: Any, response_dict: Any, **more: Any) -> None:
    """Event `before-parse`: check that the body answers the operation, and parse a listing. An
    answer that is not what S3 documents becomes a 500 with the code InvalidAnswer, which is tried
    again. botocore accepts whatever is well-formed, and spends most of its time on timestamps."""
    wanted = ROOTS.get(operation_model.name)
    if wanted is None or response_dict["status_code"] >= 300:
        return
    try:
        body = response_dict["body"].decode()
        root = WHOLE.fullmatch(body)
        if root and root[1] == "Error":
            return  # botocore knows these: S3 answers 200 before it knows that it fails
        if not root or wanted not in root[1]:
            raise ValueError(f"no <{wanted}>, or not its end")
        if wanted == "ListVersionsResult":
            only("IsTruncated", body)
        if wanted == "ListBucketResult":
            more["customized_response_dict"]["Page"] = parse_listing(body)  # added to its result
            response_dict["body"] = b""
    except (ElementTree.ParseError, ValueError) as error:
        fault = f"<Code>InvalidAnswer</Code><Message>{escape(str(error))}</Message>"
        response_dict.update(status_code=500, body=f"<Error>{fault}</Error>".encode())


def parse_listing(body: str) -> Page:
    """Read a ListBucketResult, by pattern, in a third of the time of an XML parser. Its end, its
    KeyCount, and each column of each object show that it is whole. botocore asks for
    EncodingType=url, so keys are percent-encoded. Raises ValueError or ParseError."""
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
    """Return the text of the only element that is called so. Raises ValueError."""
    found = re.findall(f"<{tag}>([^<]*)</{tag}>", text)
    if len(found) != 1:
        raise ValueError(f"{len(found)} <{tag}>")
    return plain(found[0])


def plain(text: str) -> str:
    """Character data without its XML escapes."""
    return (ElementTree.fromstring(f"<x>{text}</x>").text or "") if "&" in text else text


def read_verdicts(answer: Any, keys: Sequence[str], fault: str) -> list[Verdict]:
    """Read S3's answer to a DeleteObjects request, given as (status, body), or None if there was
    none because of `fault`. Return a verdict for each key, in order. Only S3's own words are
    believed. All else, such as what a gateway says, leaves keys in doubt."""
    if answer is None:
        return [Verdict("NoAnswer", fault, in_doubt=True)] * len(keys)
    status, body = answer
    root = ElementTree.Element("none")
    with suppress(ElementTree.ParseError, ValueError, LookupError):
        root = ElementTree.fromstring(body)
    space = root.tag.rpartition("}")[0] + "}" * ("}" in root.tag)  # the namespace of every tag
    if root.tag == f"{space}Error":
        return [refusal(root, space)._replace(whole=True)] * len(keys)
    if (root.tag, status) != (f"{space}DeleteResult", 200):
        message = f"the answer with HTTP status {status} is not in S3's words"
        return [Verdict("InvalidAnswer", message, in_doubt=True)] * len(keys)
    name, marker = f"{space}Key", f"{space}DeleteMarkerVersionId"
    found = {
        item.findtext(name): Verdict(marker=item.findtext(marker))
        for item in root.iterfind(f"{space}Deleted")
    }
    for item in root.iterfind(f"{space}Error"):  # of two answers to a key the error counts
        found[item.findtext(name)] = refusal(item, space)
    silence = Verdict("NoAnswer", "S3's answer does not mention the key", in_doubt=True)
    return [found.get(key, silence) for key in keys]


def refusal(error: ElementTree.Element, space: str) -> Verdict:
    code = error.findtext(f"{space}Code") or "unknown"
    message = error.findtext(f"{space}Message", "")
    return Verdict(code, message, in_doubt=not is_certain(code))


def is_certain(code: str) -> bool:
    """Whether this code says that nothing was done: S3's own ones are words that begin with a
    capital. botocore gives the number of a status where a gateway has answered."""
    return bool(re.fullmatch("[A-Z][A-Za-z]+", code)) and code not in MAYBE_DONE


@contextmanager
def bucket_errors(doing: str, right: str) -> Iterator[None]:
    """Turn what botocore raises into a PurgeError of one line: what was done, why it failed.
    `right` is the IAM permission that it takes."""
    try:
        yield
    except aws.ClientError as error:
        facts = error.response.get("Error", {})
        code, message = facts.get("Code") or "unknown", facts.get("Message") or ""
        advice = advice_for(code, right)
        raise PurgeError(f"{doing}: {code}: {message.rstrip('.')}. {advice}", code=code) from error
    except (aws.HTTPClientError, aws.ConnectionError, ResponseParserError) as error:
        raise PurgeError(f"{doing} (check network, --region): {error}", code="NoAnswer") from error


def advice_for(code: str, right: str) -> str:
    return BUCKET_ADVICE.get(code, "").format(right=right)


# --- Report: what is counted, logged and returned -------------------------------------------------


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
    seen: dict[str, int | None] | None = None
    planned: dict[str, int] | None = None
    deleted: Tally = field(default_factory=Tally)  # in an undo "restored"
    retained: int = 0
    failed: int = 0
    not_attempted: int | None = None
    missing: int | None = None
    dangling: int | None = None
    doubtful: int | None = None
    jobs_deleted: int = 0
    recoverable: bool | None = None
    requests: dict[str, int] = field(default_factory=lambda: {"list": 0, "delete": 0})
    max_recheck_age_seconds: float | None = None
    seconds: float | None = None
    exit_code: int = 0
    error: str | None = None

    def __post_init__(self) -> None:
        self._counting, self._started = threading.Lock(), time.monotonic()
        self.incomplete = False  # something else is left for the next run: exit code 4

    @property
    def undoes(self) -> bool:
        return self.mode.startswith("undo")

    @property
    def is_dry(self) -> bool:
        return self.mode.endswith("dry-run")

    def count_list(self) -> None:
        with self._counting:
            self.requests["list"] += 1

    def count_deletes(self, ages: list[float]) -> None:
        """Deletes left, by re-checks that were so old (seconds)."""
        with self._counting:
            self.requests["delete"] += len(ages)
            if not self.undoes:
                oldest = self.max_recheck_age_seconds or 0.0
                self.max_recheck_age_seconds = max(oldest, *(round(age, 3) for age in ages))

    def plan(self, totals: Totals, whole: bool = False, rows: bool = False) -> None:
        """The plan is complete. `whole`: all objects were listed. `rows`: job rows may go."""
        self.planned = {**totals.planned, "jobs": totals.expired_jobs if rows else 0}
        self.missing, self.dangling = totals.missing, totals.dangling if whole else None
        if not self.undoes:
            self.doubtful = totals.doubtful
            self.seen = {"jobs": totals.jobs, "expired_jobs": totals.expired_jobs}
            self.seen |= {"expired_keys": totals.expired, "remaining_keys": totals.remaining}
            self.seen["objects"] = totals.listed if whole else None

    def end(self, error: PurgeError | None) -> None:
        """Set the exit code: that of the first error; else 4 if something is left to do, or 0."""
        if self.error is None:
            left = self.failed or self.incomplete or (self.undoes and self.retained)
            self.error = None if error is None else error.message
            self.exit_code = error.exit_code if error else SOME_FAILED if left else 0

    def as_dict(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        facts["seconds"] = round(time.monotonic() - self._started, 3)
        if self.planned is not None:
            ended = self.deleted.objects + self.failed + (0 if self.undoes else self.retained)
            planned = self.planned["expired"] + self.planned["orphan"]
            facts["not_attempted"] = 0 if self.is_dry else planned - ended
        name = {"deleted": "restored"} if self.undoes else {}
        return {name.get(key, key): value for key, value in facts.items()}

    def as_text(self) -> str:
        """The same for an operator: a line for each fact that is known."""
        facts, lines = self.as_dict() | {"bucket": f"s3://{self.bucket}/{self.prefix}"}, []
        hidden = {"prefix", "version", "error"}
        if self.is_dry:
            hidden |= {"deleted", "restored", "failed", "not_attempted", "jobs_deleted"}
            hidden |= set() if self.undoes else {"retained"}
        for name, fact in facts.items():
            if name in hidden or fact is None:
                continue
            text = fact
            if isinstance(fact, dict):
                counts = [(what, n) for what, n in fact.items() if n is not None]
                text = ", ".join(f"{what} {n}{in_units(n, what)}" for what, n in counts)
            lines.append(f"{name:<24}{text}")
        return "\n".join(lines)


def in_units(count: int, what: str) -> str:
    """Many bytes in larger units, as a remark."""
    unit = min((max(count, 1).bit_length() - 1) // 10, 4) if what == "bytes" else 0
    return f" ({count / 1024**unit:.1f} {'KMGT'[unit - 1]}iB)" if unit else ""


def hold(file: Any, path: Path, how: int) -> None:
    """Lock an audit log until the file is closed. Raises PurgeError if another process uses it."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"Another run or undo uses the audit log {path}. Try again later."
        raise PurgeError(message, LOCKED) from error


End = tuple[str, Any, dict[str, Any]]  # what became of a key: event, candidate, further facts


def facts_of(item: Candidate) -> dict[str, Any]:
    return {name: fact for name, fact in item._asdict().items() if fact is not None}


class Ledger:
    """Accounts for every key: in the report, in the audit log, and causes of failure also on
    standard error, the same on many keys in one line.

    The audit log is JSON Lines, appended: `start`; `plan`; for each key `delete` (the intent, on
    disk before its request leaves) and `deleted`, `failed` or `retained`; for each job row
    `delete-job` (the intent); `end` with the summary. An undo writes `restore` and `restored`.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        self.file: io.FileIO | None = None
        self._broken: OSError | None = None
        # What happened -> how many keys it happened to, and the first three of them.
        self._causes: dict[str, tuple[int, list[str]]] = {}

    def start(self, path: Path, settings: dict[str, Any]) -> None:
        """Raises PurgeError if the file cannot be appended to, or if another process uses it."""
        try:
            file = io.FileIO(path, "a+", opener=lambda name, how: os.open(name, how, 0o600))
            hold(file, path, fcntl.LOCK_EX)
            self.file = file
            if os.fstat(file.fileno()).st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                log.warning("%s can be written by others than its owner: chmod 600", path)
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                file.write(b"\n")  # a run that was killed left its last line cut
        except OSError as error:
            message = f"Cannot write the audit log {path}: {error.strerror}."
            raise PurgeError(message, USAGE) from error
        names = ("version", "mode", "bucket", "prefix", "table")
        facts = {name: getattr(self.report, name) for name in names}
        self.write("start", [{**facts, "options": settings}], sync=True)

    def write(self, event: str, items: Iterable[dict[str, Any]], sync: bool = False) -> None:
        """Append a line for each item, all at once. After a failed write nothing more is written:
        the log ends where it broke. Raises PurgeError then, and ever after."""
        if self.file is None:
            return
        head = {"event": event, "run_id": self.report.run_id, "time": datetime.now(UTC).isoformat()}
        try:
            if self._broken is not None:
                raise self._broken
            lines = "".join(json.dumps(head | item, default=str) + "\n" for item in items).encode()
            while lines:
                lines = lines[self.file.write(lines) :]
            if sync:
                os.fsync(self.file.fileno())
        except OSError as error:
            self._broken = error
            reason = f"Cannot write the audit log {self.file.name}: {error.strerror}."
            raise PurgeError(f"{reason} Mend that and run again.") from error

    def intend(self, items: Sequence[Any]) -> None:
        """Put the keys on disk, before their request leaves. Raises PurgeError if that fails."""
        event = "restore" if self.report.undoes else "delete"
        self.write(event, (facts_of(item) for item in items), sync=True)

    def account(self, ends: Sequence[End]) -> None:
        """Each of these keys has ended, as deleted, restored, failed or retained."""
        for event, item, facts in ends:
            if event in ("deleted", "restored"):
                self.report.deleted.add(item)
            else:
                setattr(self.report, event, getattr(self.report, event) + 1)
                cause = " ".join(f"{event}: {': '.join(filter(None, facts.values()))}".split())
                self._note(cause, item.key)
        if self.file is not None:
            with suppress(PurgeError):  # the next intent, or the end, will say so
                self.write("", ({"event": e, **facts_of(item), **more} for e, item, more in ends))

    def _note(self, cause: str, key: str) -> None:
        if len(self._causes) >= 20 and cause not in self._causes:
            cause = f"{cause.partition(':')[0]}: other causes"
        count, keys = self._causes.get(cause, (0, []))
        self._causes[cause] = count + 1, [*keys, printable(key)][:3]

    def end(self) -> None:
        """Write the summary. Raises PurgeError if the log has a gap."""
        self.write("end", [self.report.as_dict()], sync=True)

    def tell_causes(self) -> None:
        for cause, (count, keys) in self._causes.items():
            more = ", ..." if count > len(keys) else ""
            level = logging.ERROR if cause.startswith("failed") else logging.WARNING
            log.log(level, "%d keys %s (%s%s)", count, cause, ", ".join(keys), more)


# --- Rounds: the plan is carried out --------------------------------------------------------------

# Without an index each re-check scans the whole table, so one serves a long round. Its limits:
# seconds at --max-rate, and keys.
ROUND_SECONDS, ROUND_KEYS = 10, 25 * BATCH
DEAR_RECHECK = 0.5  # seconds; a re-check that takes longer is worth the advice to make an index
# Tries of a key while S3 is busy, each after a new re-check and a pause (seconds) that doubles.
ATTEMPTS, FIRST_PAUSE, LAST_PAUSE = 5, 0.1, 10.0
# Codes that a later try may not meet, though nothing was done.
BUSY = {"SlowDown", "ServiceUnavailable", "NotSent"}
# A run in a versioned bucket stops after so many requests in a row that are wholly in doubt. In
# another bucket, or if they were not sent, it stops after so many for each try and worker.
OUTAGE = 3
LOCKED_BATCHES = 3  # in a row, after which all further job rows stay for the next run
NOT_SENT = Verdict("NotSent", "the run stopped before its request left")


class Pace:
    """When the next request may leave. All leave through one thread, so all workers ease off alike.

    `rate` is in objects per second, 0 for no limit: a token bucket that holds one request. `clock`
    is monotonic, in seconds.
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
        """After a failure that may pass (`again`): pause before the next request, longer each time.
        Answers to requests that left before the pause do not make it longer."""
        if not again:
            self._pause /= 2
        elif self._clock() >= self._until:
            self._pause = min(max(self._pause * 2, FIRST_PAUSE), LAST_PAUSE)
            self._until = self._clock() + self._pause * random.uniform(0.5, 1)  # jitter


@dataclass(slots=True)
class Tried:
    """What became of a key's requests so far."""

    item: Candidate
    tries: int = 0
    lost: bool = False  # one of them may yet take effect
    verdict: Verdict = NOT_SENT  # the last one


def refused_whole(verdicts: Iterable[Verdict], bucket: str, right: str) -> PurgeError | None:
    """The error of a request that S3 refused as a whole, as it would refuse the next one."""
    for verdict in verdicts:
        if verdict.whole and not verdict.in_doubt and verdict.code not in BUSY:
            told = (
                f"{verdict.code}: {verdict.message.rstrip('.')}. {advice_for(verdict.code, right)}"
            )
            return PurgeError(f"Cannot delete in bucket {bucket}: {told}", code=verdict.code)
    return None


def rounds_of(plan: Iterable[Candidate], most: int, times: int = 1) -> Iterator[list[Candidate]]:
    """Cut the plan into lists of at most `most` keys, whose names may stand so many `times` in one
    SQL statement, in hexadecimal digits."""
    return fitting(plan, most, lambda item: times * (2 * len(item.key.encode()) + 70))


class Rounds:
    """Carries out a plan, round by round: the gate is asked, intents go to disk, requests leave,
    answers are accounted for; the same again with what may be tried again; then job rows go. This
    thread decides, others send.

    With an index each batch is asked about just before its own request. Without one, one query
    serves the round.
    """

    def __init__(self, gate: Gate, jobs: JobTable, run: Setting, witnesses: Sequence[str]) -> None:
        self._gate, self._jobs, self._witnesses = gate, jobs, witnesses
        self._ledger, self._stop, self._workers = run.ledger, run.stop, run.limits.workers
        self._pace, self._size = Pace(run.limits.rate), min(BATCH, run.limits.rate or BATCH)
        self._versioned = run.ledger.report.versioning == "enabled"
        self._in_flight = self._silent = self._lost = self._locked = 0
        self._advised = False
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()  # of _request, for _settle

    def run(self, plan: Spool[Candidate]) -> Iterator[Candidate]:
        """Yield each candidate once it has ended as deleted, failed or retained in the ledger, and
        its job rows are gone if they may go.

        Raises PurgeError, or Interrupted, if the run had to stop. What was in flight is finished
        and accounted for; the rest of the plan is not attempted.
        """
        for items in self._cut(plan):
            self._round(items)
            if self._gate.terms.rows:
                self._delete_rows(items)
            yield from items

    def _cut(self, plan: Iterable[Candidate]) -> Iterator[list[Candidate]]:
        most = self._workers * BATCH if self._jobs.indexed else ROUND_KEYS
        most = min(most, self._pace.rate * ROUND_SECONDS or most)
        return rounds_of(plan, most, 1 + self._gate.terms.rows)

    def _round(self, items: list[Candidate]) -> None:
        # Keys of the round without an end yet; keys whose object was deleted in it.
        self._pending = {it.key: Tried(it) for it in items if it.reason in OF_OBJECTS}
        self._gone = set[str]()
        try:
            while self._pending:
                self._attempt()
                self._give_up(ATTEMPTS)
        finally:
            while self._in_flight:
                with suppress(Exception, Interrupted):  # the run stops already, for the first one
                    self._settle()
            self._give_up(1)

    def _attempt(self) -> None:
        """Send each pending key in one request, unless it must stay or its re-check has grown too
        old."""
        batches = chunks([*self._pending], self._size if self._jobs.indexed else ROUND_KEYS)
        for keys in batches:
            self._wait()
            for permit in self._ask([self._pending[key].item for key in keys]):
                if not self._jobs.indexed:
                    self._wait()
                    with self._stop.at_once():
                        self._jobs.ping()  # the lock may be lost
                if boot_seconds() - permit.asked > MAX_RECHECK_AGE:
                    break
                self._send(permit)
        while self._in_flight:
            self._settle()

    def _wait(self) -> None:
        """Wait until a worker is free and the pace lets a request out."""
        while self._in_flight >= self._workers:
            self._settle()
        with self._stop.at_once():
            time.sleep(self._pace.delay)

    def _ask(self, items: list[Candidate]) -> list[Permit]:
        """Ask the gate. Keys that must stay get their end."""
        started, advice = boot_seconds(), "make an index on sourceData"
        with self._stop.at_once():
            permits, stay = self._gate.ask(items, self._witnesses, self._size)
        seconds = boot_seconds() - started
        if seconds > MAX_RECHECK_AGE:
            limit = f"{MAX_RECHECK_AGE} seconds, too long to delete by it"
            raise PurgeError(f"A re-check took more than {limit}: {advice}.")
        if seconds > DEAR_RECHECK and not (self._jobs.indexed or self._advised):
            self._advised = True
            log.warning("a re-check took %.1f s: %s", seconds, advice)
        ends = [self._ended("retained", key, Verdict(message=why)) for key, why in stay.items()]
        self._ledger.account(ends)
        return permits

    def _send(self, permit: Permit) -> None:
        """Write the intents, and let the request go."""
        self._ledger.intend([self._pending[key].item for key in permit.keys])
        for key in permit.keys:
            tried = self._pending[key]
            tried.tries, tried.verdict = tried.tries + 1, NOT_SENT
        start_thread(self._request, permit)
        self._in_flight += 1
        self._pace.sent(len(permit.keys))

    def _request(self, permit: Permit) -> None:
        """In a thread of its own. Whatever comes of it, no key may go uncounted."""
        try:
            self._answers.put((permit, self._gate.delete(permit), None))
        except BaseException as error:
            told = Verdict("NoAnswer", f"{type(error).__name__}: {error}", in_doubt=True)
            self._answers.put((permit, [told] * len(permit.keys), error))

    def _settle(self) -> None:
        """Wait for an answer, and account for every key of it. Raises PurgeError if the next
        request would fare no better."""
        permit, verdicts, error = self._answers.get()
        self._in_flight -= 1
        ends: list[End] = []
        for key, verdict in zip(permit.keys, verdicts, strict=True):
            tried = self._pending[key]
            tried.verdict, tried.lost = verdict, tried.lost or verdict.in_doubt
            # In a versioned bucket a second delete would put a second marker on top of the first.
            is_final = self._versioned if verdict.in_doubt else verdict.code not in BUSY
            if not verdict.code:
                self._gone.add(key)
                marker = {"version_id": verdict.marker} if verdict.marker else {}
                ends.append(("deleted", self._pending.pop(key).item, marker))
            elif is_final:
                ends.append(self._ended("failed", key, verdict))
        self._ledger.account(ends)
        self._pace.answered(again=len(ends) < len(permit.keys))
        if error is not None:
            raise error
        self._stop_if_hopeless(verdicts)

    def _stop_if_hopeless(self, verdicts: list[Verdict]) -> None:
        name = self._ledger.report.bucket
        if error := refused_whole(verdicts, name, "s3:DeleteObject"):
            raise error
        silent = all(verdict.in_doubt or verdict.code == "NotSent" for verdict in verdicts)
        self._silent = self._silent + 1 if silent else 0
        self._lost = self._lost + 1 if all(verdict.in_doubt for verdict in verdicts) else 0
        most = OUTAGE * ATTEMPTS * self._workers
        if (self._versioned and self._lost >= OUTAGE) or self._silent >= most:
            message = f"{self._silent} deletes in a row got no word of S3's ({verdicts[0].message})"
            raise PurgeError(f"{message}. Check the network to bucket {name}, then run again.")

    def _give_up(self, tries: int) -> None:
        """Keys that were tried so often have failed."""
        tired = [key for key, tried in self._pending.items() if tried.tries >= tries]
        ends = [self._ended("failed", key, self._pending[key].verdict) for key in tired]
        self._ledger.account(ends)

    def _ended(self, event: str, key: str, verdict: Verdict) -> End:
        """The end of a key that is not deleted. It has failed if an earlier request had no answer:
        it may still be deleted."""
        tried = self._pending.pop(key)
        if tried.lost:
            why = f"{verdict.message or verdict.code}; it may yet be deleted"
            event, verdict = "failed", Verdict("NoAnswer", why)
        facts = {"code": verdict.code, "message": verdict.message}
        return event, tried.item, {name: fact for name, fact in facts.items() if fact}

    def _delete_rows(self, items: list[Candidate]) -> None:
        """Delete the rows of expired jobs whose object is gone in this round, was listed as absent,
        or is kept by a remaining job. Raises Interrupted between two transactions."""
        if self._locked >= LOCKED_BATCHES:
            return
        start = len(self._gate.terms.prefix)
        names = {key[start:] for key in self._gone}
        names |= {item.key[start:] for item in items if item.reason == Reason.MISSING}
        shared = {item.key[start:] for item in items if item.reason == Reason.SHARED}
        with self._stop.at_once():
            ours, known = self._gate.known(shared) if shared else (True, {})
        if not ours:
            raise PurgeError(f"The database session {NOT_OURS}. No rows go; run again.")
        names |= {name for name, counts in known.items() if counts.expired < counts.jobs}
        more, report, prefix = bool(names), self._ledger.report, self._gate.terms.prefix
        while more:
            with self._stop.at_once():
                rows = self._jobs.expired_rows(names)
            before = report.jobs_deleted
            for chunk in chunks(rows, ROWS_A_COMMIT):
                self._stop.check()
                if self._locked >= LOCKED_BATCHES:
                    return
                facts = [{"key": prefix + row.name, "row": row.columns} for row in chunk]
                self._ledger.write("delete-job", facts, sync=True)
                report.jobs_deleted += self._commit(chunk)
            more = len(rows) == ROWS and report.jobs_deleted > before

    def _commit(self, rows: list[Row]) -> int:
        """Delete some rows. A deadlock is tried again. Rows that another transaction holds, or that
        a foreign key or a trigger protects, stay for the next run. Raises PurgeError for any other
        failure."""
        why = ""
        for _ in range(ATTEMPTS):
            try:
                count, self._locked = self._gate.delete_rows(rows), 0
                return count
            except PurgeError as error:
                if error.code not in ROWS_STAY:
                    raise
                why = error.message
                if error.code != DEADLOCK:
                    break
        self._locked, self._ledger.report.incomplete = self._locked + 1, True
        log.error("%d job rows stay for the next run: %s", len(rows), why)
        return 0


# --- Undo, of objects and of rows -----------------------------------------------------------------

RESTORED_AT_ONCE = 10  # keys in one request of an undo; the versions of each are listed before
INSERTED_AT_ONCE = 100  # rows in one INSERT
# After the last line of a run that has no end, S3 may still be carrying out its last requests.
STILL_AT_WORK = timedelta(minutes=5)
# The types of an event's fields. A field may be absent or null.
LOG_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("event", "run_id", "time", "bucket", "key", "reason", "table"), str),
    **dict.fromkeys(("last_modified", "version_id", "code"), str),
    **{"size": int, "s3_lead_seconds": int | float, "planned": dict, "row": dict},
}


class Intent(NamedTuple):
    """A key that the run meant to delete, and between which moments of S3's clock it may have done
    so. `marker` is the delete marker that the answer named, or why there is none; None if no answer
    is on record."""

    item: Candidate
    since: datetime
    until: datetime
    marker: str | None


def log_events(path: Path, cut: list[int]) -> Iterator[dict[str, Any]]:
    """Yield the events of an audit log. A cut line, which a killed run leaves, is skipped, and its
    number put into `cut`. Raises PurgeError if the file cannot be read, or is no audit log."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    event = json.loads(line) if number > 1 or line[:1] == b"{" else None
                except ValueError:
                    cut.append(number)
                    continue
                if event is None or not fits(event):
                    message = f"{path}, line {number}: not of an audit log of this tool"
                    raise PurgeError(f"{message}; is it compressed? Nothing was done.", REFUSED)
                yield event
    except OSError as error:
        raise PurgeError(f"Cannot read the audit log {path}: {error.strerror}.", USAGE) from error


def fits(event: Any) -> bool:
    """Whether a line of a log has the fields of an event, each of its type."""
    if not isinstance(event, dict):
        return False
    known = {name: event[name] for name in LOG_FIELDS if event.get(name) is not None}
    needed = {"event", "run_id", "time"}
    if event.get("event") in ("delete", "deleted", "failed", "retained", "delete-job"):
        needed.add("key")
    with suppress(KeyError, ValueError, TypeError):
        json.dumps(known, ensure_ascii=False, allow_nan=False).encode()  # lone surrogates, NaN
        typed = all(isinstance(fact, LOG_FIELDS[name]) for name, fact in known.items())
        typed = typed and all(isinstance(n, int) for n in known.get("planned", {}).values())
        typed = typed and all(map(is_logged, known.get("row", {}).values()))
        zoned = datetime.fromisoformat(known["time"]).tzinfo is not None
        return needed <= {*known} and typed and zoned and abs(known.get("size", 0)) < 2**63
    return False


def is_logged(value: Any) -> bool:
    """Whether this can be the value of a column, as `logged` makes it."""
    if isinstance(value, dict):
        return {*value} == {"hex"} and bool(re.fullmatch("([0-9a-f]{2})*", value["hex"]))
    return value is None or isinstance(value, str | int | float)


class Log:
    """The events of an audit log, in an unnamed file in TMPDIR. Raises PurgeError."""

    def __init__(self, path: Path, stop: Stop, progress: Progress) -> None:
        self._stop, names, cut = stop, ", ".join(f'"{name}"' for name in LOG_FIELDS), list[int]()
        self._events = sqlite3.connect("")
        self._events.set_progress_handler(lambda: stop.received, 100_000)  # ends a long statement
        self.query(f"CREATE TABLE events ({names})")
        sql = f"INSERT INTO events VALUES ({', '.join('?' for _ in LOG_FIELDS)})"
        for event in progress.over(log_events(path, cut), "reading the audit log"):
            planned = event.get("planned") or {}
            own = {"planned": sum(planned.get(reason, 0) for reason in OF_OBJECTS), "row": None}
            own["code"] = event.get("code") if is_certain(event.get("code") or "") else None
            self.query(sql, [(event | own).get(name) for name in LOG_FIELDS])
        for number in cut:
            log.warning("%s: line %d is cut; skipped", path, number)

    def query(self, sql: str, arguments: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        try:
            return iter(self._events.execute(sql, arguments))
        except sqlite3.OperationalError as error:
            self._stop.check()
            raise no_space(error) from error

    def choose(self, run_id: str | None, bucket: str) -> tuple[str, int]:
        """Return the run to undo, and of how many keys it has an intent. Raises PurgeError."""
        sql = "SELECT run_id, MIN(time), MAX(bucket), COUNT(DISTINCT key) FROM events "
        sql += "WHERE event IN ('start', 'delete') GROUP BY 1 ORDER BY 2"
        found = {run: (since, place, count) for run, since, place, count in self.query(sql)}
        counts, since = {r: f[2] for r, f in found.items()}, {r: f[0] for r, f in found.items()}
        chosen = choose_run(counts, since, run_id, "objects")
        if found[chosen][1] != bucket:
            place = found[chosen][1] or "unknown (its first line is missing)"
            message = f"Run {chosen} is of bucket {place}, not {bucket}."
            raise PurgeError(message, REFUSED)
        return chosen, counts[chosen]

    def intents(self, run_id: str, last: datetime) -> Iterator[Intent]:
        """Yield each key that the run meant to delete, once. Moments are corrected to S3's clock.
        What has no answer on record was done within minutes after the run's `last` line, or never.
        """
        sql = "SELECT COALESCE(MAX(s3_lead_seconds), 0) FROM events WHERE run_id = ?"
        ((seconds,),) = self.query(sql, [run_id])
        lead = timedelta(seconds=seconds)
        answer = "CASE WHEN event = 'retained' OR (event = 'failed' AND code IS NOT NULL) "
        answer += "THEN event ELSE version_id END"
        sql = f"SELECT key, reason, size, last_modified, MIN(time), MAX({answer}) FROM events "
        sql += "WHERE run_id = ? AND event IN ('delete', 'deleted', 'failed', 'retained') "
        sql += "GROUP BY key HAVING MIN(event) = 'delete'"
        for key, reason, size, modified, since, marker in self.query(sql, [run_id]):
            item = Candidate(key, reason or Reason.EXPIRED, size or 0, modified or "")
            begun = datetime.fromisoformat(since) + lead
            yield Intent(item, begun, last + STILL_AT_WORK + lead, marker)

    def ending(self, run_id: str) -> tuple[datetime, bool, int]:
        """The moment of the run's last line, whether it has an end, and how many it planned."""
        sql = "SELECT MAX(time), MAX(event = 'end'), "
        sql += "MAX(CASE WHEN event = 'plan' THEN planned END) FROM events WHERE run_id = ?"
        ((last, has_end, planned),) = self.query(sql, [run_id])
        return datetime.fromisoformat(last), bool(has_end), planned or 0


def choose_run(runs: dict[str, int], since: dict[str, str], run_id: str | None, what: str) -> str:
    """Return the run to bring back: the one named, or the only one with `what`. `runs` has the
    number of these. Raises PurgeError if the log does not tell."""
    found = {run: count for run, count in runs.items() if count}
    known = "; ".join(f"{since[run]} {run} {count}" for run, count in found.items())
    if run_id and run_id not in runs:
        raise PurgeError(f"Run {run_id} is not in the audit log. It holds: {known}.", REFUSED)
    if not run_id and not found:
        raise PurgeError(f"The audit log holds no run that deleted {what}.", REFUSED)
    if not run_id and len(found) > 1:
        message = f"The audit log holds {len(found)} runs that deleted {what}: name one with "
        raise PurgeError(f"{message}--run-id. Time, run id and {what} of each: {known}.", REFUSED)
    return run_id or next(iter(found))


def looked_up(intents: Iterable[Intent], bucket: Bucket) -> Iterator[tuple[Intent, list[Version]]]:
    """Yield each intent with the versions of its key."""
    for chunk in chunks(intents, PAGE):
        found = bucket.each(bucket.versions, [intent.item.key for intent in chunk])
        yield from zip(chunk, found, strict=True)


def plan_undo(
    found: Iterable[tuple[Intent, list[Version]]], totals: Totals, ledger: Ledger
) -> Plan:
    """Yield the delete markers to remove: each hides its key, is the run's, and has a version
    below. Anything else is left alone, and counted."""
    for (item, since, until, marker), versions in found:
        latest, below = (*versions, None, None)[:2]
        why = ""
        if latest is not None and not latest.is_marker:
            totals.missing += 1
            totals.unanswered += marker is None
            continue
        if latest is None or below is None or below.is_marker:
            why = "no version lies right below a delete marker"
        elif latest.version_id == "null":
            why = "versioning was suspended: an object may take its place"
        elif latest.version_id != marker and (marker or not latest.hides(since, until)):
            why = "somebody else's delete marker hides it"
        if why or latest is None:
            ledger.account([("retained", item, {"message": why})])
            continue
        totals.planned.add(item)
        yield item._replace(version_id=latest.version_id)


def restore(plan: Spool[Candidate], wire: Wire, ledger: Ledger, stop: Stop, limits: Limits) -> Plan:
    """Remove the delete markers of the plan. Yield each one once it is accounted for. After a stop
    signal or an error no request leaves any more; those in flight are accounted for first."""
    pace, errors, count = Pace(limits.rate), list[Exception](), ledger.report.count_list

    def requests() -> Iterator[Any]:
        for items in chunks(plan, min(RESTORED_AT_ONCE, limits.rate or RESTORED_AT_ONCE)):
            if stop.received or errors:
                return
            time.sleep(pace.delay)
            try:
                ledger.intend(items)
            except PurgeError as error:  # what is in flight is accounted for first
                errors.append(error)
                return
            pace.sent(len(items))
            yield ((some, restore_some(some, wire, errors, stop, count)) for some in [items])

    for items, verdicts in ahead(requests(), limits.workers):
        ledger.account([*map(end_of_restore, items, verdicts)])
        yield from items
    stop.check()
    for error in errors:
        with bucket_errors("Cannot bring objects back", "s3:DeleteObjectVersion"):
            raise error


def restore_some(
    items: list[Candidate], wire: Wire, errors: list[Exception], stop: Stop, count: Any
) -> Collection[Verdict]:
    """In a thread of its own: remove some markers, with more tries where S3 is busy. What ends it
    early is put into `errors`. `count` is called for each listing."""
    verdicts = dict.fromkeys(items, NOT_SENT)
    for tries in range(ATTEMPTS):
        left = [item for item, verdict in verdicts.items() if verdict.code in BUSY]
        if not left or stop.received or errors:
            break
        time.sleep(FIRST_PAUSE * tries)
        for _ in left:
            count()
        try:
            found = wire.restore([(item.key, str(item.version_id)) for item in left])
            verdicts |= zip(left, found, strict=True)
        except Interrupted:
            break  # before anything was sent
        except Exception as error:  # the versions could not be listed, so nothing was sent
            code = getattr(error, "response", {}).get("Error", {}).get("Code", "NoAnswer")
            final = is_certain(code) and code not in BUSY
            if tries == ATTEMPTS - 1 or final or isinstance(error, PurgeError):
                errors.append(error)
    refused = refused_whole(verdicts.values(), wire.bucket, "s3:DeleteObjectVersion")
    errors += [refused] if refused else []
    return verdicts.values()


def end_of_restore(item: Candidate, verdict: Verdict) -> End:
    if not verdict.code:
        return "restored", item, {}
    return "failed", item, {"code": verdict.code, "message": verdict.message}


def rows_sql(path: Path, run_id: str | None) -> Iterator[str]:
    """Yield the SQL that brings back the job rows of one run. Raises PurgeError."""
    cut, counts, since, tables = list[int](), Counter[str](), dict[str, str](), dict[str, str]()
    for event in log_events(path, cut):
        run = event["run_id"]
        since.setdefault(run, event["time"])
        counts[run] += event["event"] == "delete-job"
        if event["event"] == "start":
            tables[run] = event.get("table") or ""
    chosen = choose_run(counts, since, run_id, "job rows")
    schema, _, name = tables.get(chosen, "").replace("`", "``").rpartition(".")
    if not schema:
        raise PurgeError(f"{path} does not tell the table of run {chosen}.", REFUSED)
    own = (event for event in log_events(path, []) if event["run_id"] == chosen)
    rows = (event.get("row") for event in own if event["event"] == "delete-job")
    yield "SET NAMES utf8mb4;"
    yield "SET time_zone = '+00:00', sql_mode = 'NO_AUTO_VALUE_ON_ZERO';"
    total = 0
    for columns, group in groupby(rows, key=lambda row: [*(row or {})]):
        texts = (f"({', '.join(map(literal, (row or {}).values()))})" for row in group)
        for some in fitting(texts, INSERTED_AT_ONCE, len):
            yield insert_of(f"`{schema}`.`{name}`", columns, some)
            total += len(some)
    yield f"-- {total} rows of run {chosen}; {len(cut)} cut lines of the log were skipped"


def insert_of(table: str, columns: list[str], rows: list[str]) -> str:
    """An INSERT of logged rows that leaves alone those that are there. Raises PurgeError."""
    names = [f"`{column.replace('`', '``')}`" for column in columns]
    keys = [name for name in names if name.lower() == "`jobid`"]
    if not keys:
        message = "The audit log was written by a version that logged no whole rows"
        raise PurgeError(f"{message}: bring them back from a backup.", REFUSED)
    values = ",\n".join(rows)
    insert = f"INSERT INTO {table} ({', '.join(names)}) VALUES\n{values}"
    return f"{insert}\nON DUPLICATE KEY UPDATE {keys[0]} = {keys[0]};"


def literal(value: Any) -> str:
    """SQL for a logged value, the same under any SQL mode."""
    if value is None:
        return "NULL"
    if isinstance(value, str):
        return TEXT % value.encode().hex() if value else "''"
    if isinstance(value, dict):
        return f"x'{bytes.fromhex(value['hex']).hex()}'"
    return repr(value)


# --- Explain: why one key goes, or stays ----------------------------------------------------------


def explain(key: str, gate: Gate, jobs: JobTable, bucket: Bucket, wishes: Wishes) -> dict[str, Any]:
    """Say what a run would do with this key, and why. The gate's own code decides."""
    name = key.removeprefix(wishes.prefix)
    is_inside = key.startswith(wishes.prefix) and name != ""
    item = bucket.find(key) if is_inside else None
    counts = gate.known([name])[1].get(name) if is_inside else None
    rows = jobs.jobs_of(name, most=20) if counts else []
    told = [facts_of_job(row, wishes.retention_days) for row in rows]
    reason = Reason.EXPIRED if counts else Reason.ORPHAN
    seen = item.last_modified if item else gate.terms.now.isoformat()
    why = gate.objection(Candidate(key, reason, 0, seen), counts)
    if is_inside and item is None:
        verdict = "nothing to delete: the bucket has no such object"
    elif why:
        verdict = f"kept: {because(why, told, wishes)}"
    elif counts is None and is_doubtful(name, jobs, bucket):
        verdict = "kept: doubtful, because a job may mean it by another spelling of its name"
    elif counts is None:
        verdict = "would be deleted: no job refers to it, and its grace period is over"
    else:
        verdict = f"would be deleted: the last of its jobs {told[0]['state']}"
    if wishes.rows and counts:
        verdict += rows_too(counts, is_doubtful=item is not None and why == UNSPELT)
    facts = {"size": int(item.size), "last_modified": item.last_modified} if item else None
    more = counts.jobs - len(told) if counts else 0
    return {"key": key, "object": facts, "jobs": told, "more_jobs": more, "verdict": verdict}


def because(why: str, told: list[dict[str, Any]], wishes: Wishes) -> str:
    """Say the gate's objection in terms of the first job, or of the command line."""
    if why == IN_USE and told:  # the jobs that keep the object come first
        return f"job {told[0]['job_id']} {told[0]['state']}"
    if why == TOO_YOUNG and wishes.orphan_grace_days is None:
        return "no job refers to it, and --orphans was not given"
    if why == TOO_YOUNG:
        return f"younger than the grace period of {wishes.orphan_grace_days} days"
    return why


def rows_too(counts: Counts, is_doubtful: bool) -> str:
    """What --delete-jobs does. Where a doubtful object stays, its expired jobs stay too."""
    if not counts.expired or (is_doubtful and counts.expired == counts.jobs):
        return ""
    return f"; {counts.expired} rows of expired jobs would be deleted"


def facts_of_job(row: tuple[Any, ...], retention_days: int) -> dict[str, Any]:
    """What is told of a job. Its `state` says whether it is expired, or why not."""
    job_id, kind, completed, is_expired = row
    state = f"is {kind or 'of no type'}"
    if kind == "TRIAL":
        state = "is not completed"
        with suppress(ValueError, OverflowError):  # no date, a zero in it, or the year 9999
            end = datetime.fromisoformat(completed or "") + timedelta(days=retention_days)
            state = f"{'expired' if is_expired else 'will expire'} on {end.date()}"
    return {"job_id": job_id, "type": kind, "completed_at": completed, "state": state}


def is_doubtful(name: str, jobs: JobTable, bucket: Bucket) -> bool:
    """Whether a job may mean this orphan by another spelling, whose own object is not there."""
    if not jobs.can_hold(name):
        return True
    others = (utf8(raw) for raw, count, expired in jobs.references() if expired < count)
    like = [other for other in others if other and folded(other) == folded(name)]
    return any(bucket.find(bucket.prefix + other) is None for other in like)


def explanation(facts: dict[str, Any]) -> str:
    """The same for an operator."""
    item = facts["object"]
    told = f"{item['size']} bytes, last modified {item['last_modified']}" if item else "none"
    lines = [f"key      {printable(facts['key'])}", f"object   {told}"]
    for job in facts["jobs"]:
        told = f"{job['job_id']}, type {job['type']}, completed {job['completed_at']}"
        lines.append(f"job      {told}: {job['state']}")
    if facts["more_jobs"]:
        lines.append(f"jobs     {facts['more_jobs']} more")
    for event in facts.get("history", []):
        code = f" ({event['code']})" if event["code"] else ""
        lines.append(f"earlier  {event['time']} run {event['run_id']}: {event['event']}{code}")
    return "\n".join([*lines, f"verdict  {facts['verdict']}"])


# --- Output: plan, digest, manifest, summary ------------------------------------------------------


def show_plan(plan: Spool[Candidate], run: Setting, totals: Totals, terms: Terms | None) -> None:
    """In a dry run, print what a real one would do: for each object reason, bytes, last modified
    and key, on a terminal for ten of them; then a digest, with the limits of a purge's `terms`."""
    screen = run.screen
    if not run.ledger.report.is_dry or run.json or run.quiet:
        return
    objects = (item for item in plan if item.reason in OF_OBJECTS)
    if screen.out_is_terminal:
        places = {n * totals.planned.objects // 10 for n in range(10)}
        objects = (item for place, item in enumerate(objects) if place in places)
    lines = (f"{it.reason}\t{it.size}\t{it.last_modified}\t{printable(it.key)}" for it in objects)
    for chunk in chunks(lines, 1000):
        screen.show("\n".join(chunk))
    limited = limits_text(totals, terms, run.limits) if terms else ()
    digest = "\n".join([*digest_of(plan), *limited])
    screen.show(digest)
    if screen.err_is_terminal and not screen.out_is_terminal:
        screen.tell(digest)  # the plan went into a file


def digest_of(plan: Iterable[Candidate]) -> Iterator[str]:
    """Yield a line for each month of last modification, with a bar; then the oldest and newest."""
    objects, sizes = Counter[str](), Counter[str]()
    oldest = newest = None
    for item in plan:
        if item.reason in OF_OBJECTS:
            objects[item.last_modified[:7]] += 1
            sizes[item.last_modified[:7]] += item.size
            oldest = min(oldest or item, item, key=lambda it: it.last_modified)
            newest = max(newest or item, item, key=lambda it: it.last_modified)
    most = max(objects.values(), default=1)
    for month in sorted(objects):
        bar = "#" * max(1, 20 * objects[month] // most)
        yield f"{month:<8}{objects[month]:>10} {bar:<20}{in_units(sizes[month], 'bytes')}".rstrip()
    if oldest and newest:
        yield f"oldest  {oldest.last_modified}  {printable(oldest.key)}"
        yield f"newest  {newest.last_modified}  {printable(newest.key)}"


def limits_text(totals: Totals, terms: Terms, limits: Limits) -> Iterator[str]:
    """Yield a line for each share that --max-percent limits."""
    for part, whole, name in shares(totals, terms):
        percent = 100 * part / (whole or 1)
        yield f"share   {percent:.1f} % of {whole} {name} (limit {limits.percent:g} %)"


def write_manifest(plan: Iterable[Candidate], bucket: str, path: Path) -> None:
    """Write the plan as S3 Batch Operations reads it, `bucket,url-encoded-key` on each line; beside
    first, then renamed, never through a link. Raises PurgeError."""
    part = path.with_name(f"{path.name}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL  # EXCL follows no link
    objects = (item for item in plan if item.reason in OF_OBJECTS)
    try:
        part.unlink(missing_ok=True)  # of a run that was killed
        try:
            with open(os.open(part, flags, 0o600), "w", encoding="ascii", newline="") as file:
                file.writelines(f"{bucket},{quote(item.key)}\n" for item in objects)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise PurgeError(f"Cannot write the manifest {path}: {error.strerror}.") from error


def show_summary(run: Setting) -> None:
    """Print the summary, and the command that takes the run back, if one does."""
    screen, report = run.screen, run.ledger.report
    if run.json:
        screen.show(json.dumps(report.as_dict()))
        return
    if report.planned is None or (run.quiet and report.exit_code == 0):
        return
    text = report.as_text()
    if report.requests["delete"] and report.recoverable:
        text += f"\n{'undo':<24}{run.undo}"
    if report.deleted.objects and report.undoes:
        text += "\nThe next run deletes these keys again, unless the schedule is stopped or a job "
        text += "keeps them."
    screen.show(text)
    if report.is_dry and screen.err_is_terminal and not screen.out_is_terminal:
        screen.tell(text)  # the plan went into a file


def finish(run: Setting) -> None:
    """Tell how it went: audit log, standard output and error, all with the same exit code."""
    ledger, report = run.ledger, run.ledger.report
    report.end(outcome(ledger.end))
    ledger.tell_causes()
    error = outcome(lambda: show_summary(run))
    if error is not None and report.error is None:
        report.end(error)
        outcome(ledger.end)  # the last `end` counts
    if report.error is not None:
        line = f"Error: {report.error}"
        if not run.screen.err_is_terminal:
            line = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {line} (run {report.run_id})"
        run.screen.tell(line)


def outcome(action: Callable[[], None]) -> PurgeError | None:
    """Do it. Return the error that ended it, in one line, whatever it was."""
    try:
        action()
    except Exception as error:
        log.debug("stopped", exc_info=True)
        if isinstance(error, PurgeError):
            return error
        if not isinstance(error, aws.BotoCoreError):
            return PurgeError(f"Unexpected {type(error).__name__}: {error}. -v shows where.")
        usage = type(error).__name__ in ("ProfileNotFound", "NoCredentialsError", "NoRegionError")
        advice = f"{str(error).rstrip('.')}. Check AWS credentials, --profile, --region."
        return PurgeError(advice, USAGE if usage else FAILED)
    return None


# --- The run: from the settings to the rounds -----------------------------------------------------


class Setting(NamedTuple):
    """A run, ready to begin. The command line is taken apart into these values, once."""

    wishes: Wishes
    login: Login
    limits: Limits
    stop: Stop
    ledger: Ledger
    screen: Screen
    progress: Progress
    undo: str  # the command that takes the run back
    json: bool  # the summary is one JSON object
    quiet: bool
    manifest: Path | None
    audit_log: Path | None
    session: Any = None  # of boto3; made once the audit log has begun


def open_bucket(run: Setting) -> tuple[Wire, Bucket, timedelta]:
    """Return the ways to the bucket, and by how much S3's clock is ahead of this host's."""
    report, workers = run.ledger.report, run.limits.workers
    # The gate's own listing in an undo heeds stop signals, too.
    run.session.events.register("before-send.s3.ListObjectVersions", run.stop.check)
    wire = Wire(run.session, run.wishes.bucket, workers, report.count_deletes)
    bucket = Bucket(wire, run.wishes.prefix, workers, run.stop, report.count_list)
    report.versioning, lead = bucket.look()
    enabled = report.versioning == "enabled" and not report.undoes
    report.recoverable = enabled and run.audit_log is not None
    return wire, bucket, lead


def open_all(run: Setting, stack: ExitStack) -> tuple[Bucket, Gate, JobTable, timedelta]:
    """Open the bucket, log in, take the lock of a real run, open the gate. Raises PurgeError."""
    wire, bucket, lead = open_bucket(run)
    connection = stack.enter_context(closing(log_in(run.session, run.login, lead)))
    lock = lock_name(connection, run.wishes, run.login.table)
    if not run.ledger.report.is_dry:
        take_lock(connection, lock, run.login.table)
    gate = Gate(wire, connection, run.login.table, lock, run.wishes)
    return bucket, gate, JobTable(connection, gate), lead


def purge(run: Setting) -> None:
    """Plan, and unless it is a dry run, carry out the plan. Raises PurgeError."""
    with ExitStack() as stack:
        with run.stop.at_once():
            bucket, gate, jobs, lead = open_all(run, stack)
            plan, witnesses = guarded_plan(run, bucket, gate, jobs, lead)
            if run.manifest:
                write_manifest(plan, bucket.name, run.manifest)
        if not run.ledger.report.is_dry:
            rounds = Rounds(gate, jobs, run, witnesses)
            deque(run.progress.over(rounds.run(plan), "deleting", len(plan)), maxlen=0)


def guarded_plan(
    run: Setting, bucket: Bucket, gate: Gate, jobs: JobTable, lead: timedelta
) -> tuple[Spool[Candidate], list[str]]:
    """Return the plan, shown in a dry run, and names of remaining jobs as witnesses. Raises
    PurgeError if a guard refuses the plan."""
    terms, report, totals, sample = gate.terms, run.ledger.report, Totals(), list[str]()
    report.cutoff = terms.cutoff.isoformat()
    reasons = [*clock_refusals(terms.now - datetime.now(UTC), lead)]
    plan = make_plan(run, bucket, terms, jobs, totals, sample)
    report.plan(totals, terms.orphans_before is not None, terms.rows)
    # How far S3's clock is ahead tells an undo which markers are younger than an intent.
    facts = {"s3_lead_seconds": lead.total_seconds()}
    run.ledger.write("plan", [vars(totals) | report.as_dict() | facts])
    reasons += refusals(totals, terms, run.limits)
    reasons += wrong_place(totals, terms, sample, bucket)
    reasons += jobs.row_refusals() if terms.rows else []
    show_plan(plan, run, totals, terms)
    if report.is_dry and totals.planned.objects and not jobs.indexed:
        try_recheck(gate, plan)
    if reasons:
        raise PurgeError(f"Refused, nothing was deleted: {'; '.join(reasons)}.", REFUSED)
    return plan, sample


def try_recheck(gate: Gate, plan: Iterable[Candidate]) -> None:
    """In a dry run: measure a re-check as a real run would make it, without an index."""
    keys = [item.key for item in next(rounds_of(plan, ROUND_KEYS), [])]
    started = boot_seconds()
    gate.known([key.removeprefix(gate.terms.prefix) for key in keys])
    seconds = boot_seconds() - started
    if seconds > DEAR_RECHECK:
        text = "a re-check takes %.1f s without an index on sourceData; a run needs less than %d s"
        log.warning(text, seconds, MAX_RECHECK_AGE)


def make_plan(
    run: Setting, bucket: Bucket, terms: Terms, jobs: JobTable, totals: Totals, sample: list[str]
) -> Spool[Candidate]:
    """Read the table, list what the terms need of the bucket, merge, and keep the plan."""
    whole, over, start = terms.orphans_before is not None, run.progress.over, len(terms.prefix)
    log.info("reading %s; cutoff %s", jobs.name, terms.cutoff.isoformat())
    found = read_references(jobs, terms, totals, sample)
    references = Spool(over(found, "reading references"))
    log.info("%d keys are expired, %d stay; listing the bucket", totals.expired, totals.remaining)
    lost = Spellings()

    def is_doubtful(key: str) -> bool:
        return not jobs.can_hold(key[start:]) or lost.has(key[start:])

    pairs = outer_join(references, bucket.objects(references, whole))
    pairs = over(pairs, "listing", 0 if whole else len(references), minutely=jobs.ping)
    candidates = Spool(plan(pairs, terms, totals, lambda key: lost.add(key[start:])))
    if totals.planned["orphan"]:
        candidates = Spool(without_doubtful(iter(candidates), totals, is_doubtful))
    log.info("planned: %d objects, %d bytes", totals.planned.objects, totals.planned["bytes"])
    if whole and totals.dangling:
        log.warning("%d keys of remaining jobs have no object: lost data?", totals.dangling)
    if totals.doubtful:
        why = "a request cannot spell their name, or a job may mean them by another spelling"
        log.warning("%d objects are kept as doubtful: %s", totals.doubtful, why)
    return candidates


def wrong_place(totals: Totals, terms: Terms, sample: list[str], bucket: Bucket) -> Iterator[str]:
    """Yield a reason to refuse if something is concluded from absence, but fewer than half of the
    keys of remaining jobs have an object: of all of them where all is listed, else of a sample."""
    whole, all_missing = terms.orphans_before is not None, 0 < totals.expired == totals.missing
    if not (whole or all_missing or (terms.rows and totals.missing)):
        return
    looked, lost, example = totals.remaining, totals.dangling, totals.dangling_key
    if not whole:
        keys = [terms.prefix + name for name in sample]
        found = zip(keys, bucket.each(bucket.find, keys), strict=True)
        absent = [key for key, item in found if item is None]
        looked, lost, example = len(keys), len(absent), (absent or [""])[0]
    if 2 * lost > looked:
        told = f"only {looked - lost} of {looked} keys of remaining jobs have an object"
        yield f"{told}; {printable(example)}, for one, has none: {WRONG_PLACE}"


def undo(run: Setting, source: Path, run_id: str | None) -> None:
    """Bring back what one run hid. Raises PurgeError."""
    ledger, report, over, totals = run.ledger, run.ledger.report, run.progress.over, Totals()
    with held(source, ledger):
        with run.stop.at_once():
            wire, bucket, _ = open_bucket(run)
            if report.versioning == "off":
                raise PurgeError(f"Bucket {bucket.name} is not versioned: no undo.", REFUSED)
            events = Log(source, run.stop, run.progress)
            chosen, count = events.choose(run_id, bucket.name)
            last, has_end, planned = events.ending(chosen)
            pairs = looked_up(events.intents(chosen, last), bucket)
            pairs = over(pairs, "looking for delete markers", count)
            found = Spool(plan_undo(pairs, totals, ledger))
            report.plan(totals)
            if not has_end and count < planned:
                text = "the run was killed: it planned %d objects, and tried %d"
                log.warning(text, planned, count)
            if not has_end or totals.unanswered:
                warn_of_late(report, last)
            show_plan(found, run, totals, None)
        if not report.is_dry:
            done = restore(found, wire, ledger, run.stop, run.limits)
            deque(over(done, "restoring", len(found)), maxlen=0)


@contextmanager
def held(source: Path, ledger: Ledger) -> Iterator[None]:
    """Lock the log that is undone, unless this run writes to the same file and holds it already.
    Raises PurgeError."""
    if not source.is_file():  # a pipe cannot be read twice
        raise PurgeError(f"{source} is no file: unpack the log into one, and name that.", USAGE)
    with source.open("rb") as file:
        if not ledger.file or not os.path.sameopenfile(ledger.file.fileno(), file.fileno()):
            hold(file, source, fcntl.LOCK_SH)
        yield


def warn_of_late(report: Report, last: datetime) -> None:
    """Say until when S3 may carry out requests that it has not answered."""
    if (until := last + STILL_AT_WORK) > datetime.now(UTC):
        report.incomplete = True
        message = "S3 may still be deleting for this run: run the undo again after %s"
        log.error(message, until.isoformat(timespec="seconds"))


def tell_why(run: Setting, key: str, as_json: bool) -> None:
    """Print the explanation of one key. Raises PurgeError."""
    with ExitStack() as stack, run.stop.at_once():
        bucket, gate, jobs, _ = open_all(run, stack)
        facts = explain(key, gate, jobs, bucket, run.wishes)
        if run.audit_log and run.audit_log.exists():
            events = (e for e in log_events(run.audit_log, []) if e.get("key") == key)
            told = ("time", "run_id", "event", "code")
            facts["history"] = [{name: event.get(name) for name in told} for event in events]
        run.screen.show(json.dumps(facts, default=str) if as_json else explanation(facts))


# --- Command line ---------------------------------------------------------------------------------


def moment(text: str) -> datetime:
    """Type of an option: ISO 8601, taken as UTC if it has no offset."""
    with suppress(ValueError, OverflowError):
        found = datetime.fromisoformat(text)
        found = (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
        if found.year >= 1970:
            return found
    raise click.BadParameter(f"{text!r} is not ISO 8601 since 1970, such as 2019-06-03T00:00:00Z.")


class Number(click.ParamType[Any]):
    """Type of an option: a number between two limits, both included."""

    def __init__(self, kind: type, low: float, high: float) -> None:
        self.name, self._kind, self._low, self._high = "N", kind, low, high

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        with suppress(ValueError):
            number = self._kind(value)
            if self._low <= number <= self._high:
                return number
        kind = "whole number" if self._kind is int else "number"
        return self.fail(f"{value!r} is not a {kind} from {self._low} to {self._high}.", param, ctx)


PERCENT, COUNT = Number(float, 0, 100), Number(int, 0, 10**12)
DAYS, SOME_DAYS = Number(int, 0, 36500), Number(int, 1, 36500)
PORT, THREADS = Number(int, 1, 65535), Number(int, 1, 64)
FILE = click.Path(readable=False, path_type=Path)
LOG = click.Path(exists=True, dir_okay=False, path_type=Path)


def option(names: str, kind: Any, default: Any, text: str, metavar: str | None = None) -> Any:
    """Where `metavar` says what the value is, no variable can set the option."""
    more: Any = {"is_flag": kind is bool, "metavar": metavar, "allow_from_autoenv": not metavar}
    return click.Option(names.split(), type=kind, default=default, help=text, **more)


OPTIONS: list[click.Option] = [
    option("--db-host", str, None, "RDS endpoint, not an alias.  [required]"),
    option("--db-port", PORT, 3306, "Port of the database."),
    option("--db-user", str, None, "Database user.  [required]"),
    option("--db-name", str, None, "Schema of the job table.  [required]"),
    option("--db-table", str, "ndvr_job_status", "TABLE or SCHEMA.TABLE."),
    option("--ca-bundle", FILE, None, "CA bundle.  [default: rds-ca-bundle.pem beside the script]"),
    option("--bucket", str, None, "Bucket with the source data.  [required]"),
    option("--prefix", str, "", "Put before sourceData; nothing outside it is touched."),
    option("--profile", str, None, "AWS profile.  [default: the AWS chain]"),
    option("--region", str, None, "AWS region of the database.  [default: the AWS chain]"),
    option("--retention-days", SOME_DAYS, 90,
           "Days after completedAt at which a TRIAL job expires."),
    option("--as-of", moment, None, "Expire as of this time, ISO 8601.  [default: database clock]"),
    option("--orphans", bool, False, "Also delete objects that no job refers to."),
    option("--orphan-grace-days", DAYS, 7, "Keep younger orphans, whatever --as-of says."),
    option("--delete-jobs", bool, False, "Also delete expired job rows."),
    option("-n --dry-run", bool, False, "Plan and report, change nothing."),
    option("--max-objects", COUNT, None, "Refuse the run if more objects would be deleted."),
    option("--max-percent", PERCENT, 50, "Refuse a plan above N % of the keys; with --orphans "
           "also of the objects listed, with --delete-jobs also of the rows."),
    option("--max-rate", COUNT, 3000, "Objects deleted per second at most, 0 = no limit."),
    option("--workers", THREADS, 8, "Concurrent requests; up to four times as many to list."),
    option("--audit-log", FILE, None, "Append what is deleted to this file, as JSON Lines."),
    option("--manifest", FILE, None, "Write the plan as an S3 Batch Operations manifest."),
    option("--json", bool, False, "Print the summary as one JSON object."),
    option("-v --verbose", bool, False, "Log more, and show tracebacks."),
    option("-q --quiet", bool, False, "Print nothing but problems."),
    option("--explain", str, None, "Say what a run would do with this key, and why.", "KEY"),
    option("--undo", LOG, None, "Bring back what one run hid.", "AUDIT_LOG"),
    option("--undo-rows", LOG, None, "Print SQL that brings back the run's job rows.", "AUDIT_LOG"),
    option("--run-id", str, None, "The run to undo, if the log holds several.", "ID"),
]  # fmt: skip
# What must match as a whole, and what to say if it does not. A bucket may be an access point's ARN.
HOST, PLACE = r"[^\s:/]+|[^\s/]*:[^\s/]*:[^\s/]*", r"arn:.+|[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
SPELLINGS = {
    "db_host": (HOST, "is no host; a port goes into --db-port"),
    "db_table": (r"[^.]+(\.[^.]+)?", "is neither TABLE nor SCHEMA.TABLE"),
    "bucket": (PLACE, "is not a bucket name; a path goes into --prefix"),
}
NEEDED = ("db_host", "db_user", "db_name", "bucket")  # but for those that an undo does not take
ALONE = ("undo", "undo_rows", "explain")  # the options that do something else than a purge
# What an undo takes of a purge's options.
OF_UNDO = {"undo", "run_id", "bucket", "profile", "region", "dry_run", "audit_log", "json"}
OF_UNDO |= {"verbose", "quiet", "workers", "max_rate"}
OF_UNDO_ROWS = {"undo_rows", "run_id", "verbose", "quiet"}

HELP = {"help_option_names": ["-h", "--help"], "show_default": True}
CONTEXT = {"auto_envvar_prefix": VARIABLES[:-1], **HELP}
EPILOG = f"""\b
Each option but --explain, --undo, --undo-rows and --run-id can also be set
as {VARIABLES}<NAME>, a flag as 1 or 0. An unknown or empty
variable of that kind is an error. {PASSWORD_VARIABLE}
replaces the IAM token; a loopback host then needs no CA bundle.
AWS_ENDPOINT_URL_S3 leads to another S3 server.

\b
Exit codes:
  0  done, or nothing to do
  1  an operation failed (database, S3)
  2  wrong usage
  3  refused by a guard, nothing deleted
  4  finished, but some keys failed or could not be brought back
  75  another run holds the lock or the audit log
  129, 130, 143  stopped by SIGHUP, SIGINT, SIGTERM; run again to finish
"""


class Command(click.Command):
    """A command whose usage errors are one line."""

    def make_context(self, *given: Any, **more: Any) -> click.Context:
        try:
            return super().make_context(*given, **more)
        except click.UsageError as error:  # click itself would print two lines before
            variable = VARIABLES + str(getattr(getattr(error, "param", None), "name", "")).upper()
            hint = f" Look at {variable}." if variable in os.environ else ""
            raise PurgeError(error.format_message() + hint, USAGE) from None


@click.command(cls=Command, params=OPTIONS, context_settings=CONTEXT, epilog=EPILOG)
@click.version_option(VERSION, message="%(prog)s %(version)s", allow_from_autoenv=False)
@click.pass_context
def main(ctx: click.Context, /, **given: Any) -> None:
    """Delete the S3 source data of TRIAL jobs completed more than 90 days ago.

    An object goes only if no other job refers to it. OFFICIAL jobs and their data stay for ever.
    Start with --dry-run.
    """
    gc.freeze()  # a tenth of all CPU went into walks over what the imports made
    gc.set_threshold(20_000)
    check_usage(ctx, given)
    run = setting_of(given)
    report = run.ledger.report
    try:
        run.stop.listen()
        report.end(outcome(lambda: carry_out(run, given)))
    except Interrupted:  # here, so that no moment of the run is without a catcher
        name = signal.Signals(run.stop.received).name
        report.error = f"Stopped by {name}; run again to finish the work."
        report.exit_code = 128 + run.stop.received  # as shells have it
    if run.manifest and report.exit_code == REFUSED and report.mode == "purge":
        with suppress(OSError):
            run.manifest.unlink()  # an earlier run's
    finish(run)
    sys.exit(report.exit_code)


def check(fine: Any, message: str) -> None:
    if not fine:
        raise PurgeError(message, USAGE)


def check_usage(ctx: click.Context, given: dict[str, Any]) -> None:
    """What click cannot check for a single option: variables, required options, files."""
    known = {VARIABLES + name.upper() for name in {*given, "db_password"} - {*ALONE, "run_id"}}
    for name in sorted(name for name in os.environ if name.startswith(VARIABLES)):
        if name not in known:
            nearest = get_close_matches(name, known, 1, 0)[0]
            raise PurgeError(f"{name} is no option's variable: do you mean {nearest}?", USAGE)
        check(os.environ[name].strip(), f"{name} is empty: give it a value, or unset it.")
        check_characters(name, os.environ[name])
    for name, value in given.items():
        check_characters(flag(name), value)
    alone = [name for name in ALONE if given[name] is not None]
    check(len(alone) < 2, f"Give only one of {', '.join(map(flag, ALONE))}.")
    task = "".join(alone)
    check(not given["run_id"] or task.startswith("undo"), "--run-id goes with --undo.")
    allowed = {"undo": OF_UNDO, "undo_rows": OF_UNDO_ROWS}.get(task, {*given})
    for name in given:
        on_line = ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        check(name in allowed or not on_line, f"{flag(name)} does not go with {flag(task)}.")
    for name in NEEDED:
        check(given[name] or name not in allowed, f"Missing option '{flag(name)}'.")
    for name, (pattern, advice) in SPELLINGS.items():
        fine = not given[name] or re.fullmatch(pattern, given[name])
        check(fine, f"{flag(name)}: {given[name]!r} {advice}.")
    if target := given["manifest"]:  # it is renamed into its place, so it may be no other file
        check(os.path.isfile(target) or not os.path.exists(target), "--manifest must be a file.")
        own = {os.path.realpath(target), os.path.realpath(f"{target}.part")}
        apart = os.path.realpath(given["audit_log"] or "") not in own
        check(apart, "--manifest and --audit-log must be two files.")


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_characters(name: str, value: Any) -> None:
    """Refuse control characters, such as an editor's carriage return, but not in a key. Refuse what
    is not UTF-8."""
    text = str(value) if isinstance(value, str | Path) else ""
    odd = [] if name == "--explain" else [c for c in text if ord(c) < 32 or ord(c) == 127]
    check(not odd, f"{name} has a control character in it ({''.join(odd)!r}): remove it.")
    check(not re.search("[\ud800-\udfff]", text), f"{name} is not UTF-8.")


def screen_of(given: dict[str, Any], stop: Stop) -> Screen:
    """Log to standard error, in UTC; print any key on a terminal of any encoding."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  None: the caller closed it
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    screen = Screen(stop)
    logging.Formatter.converter = time.gmtime
    log.addHandler(screen)
    level = logging.WARNING if given["quiet"] else logging.INFO
    log.setLevel(logging.DEBUG if given["verbose"] else level)
    return screen


def setting_of(given: dict[str, Any]) -> Setting:
    """Take the command line apart into values."""
    bucket, prefix, days = given["bucket"], given["prefix"], given["retention_days"]
    grace = given["orphan_grace_days"] if given["orphans"] else None
    wishes = Wishes(bucket, prefix, days, given["as_of"], grace, given["delete_jobs"])
    host, port, user, schema = (given[f"db_{name}"] for name in ("host", "port", "user", "name"))
    report = report_of(given)
    password = os.environ.get(PASSWORD_VARIABLE)
    login = Login(host, port, user, schema, report.table or "", given["ca_bundle"], password)
    objects, percent = given["max_objects"], given["max_percent"]
    limits = Limits(objects, percent, given["max_rate"], given["workers"])
    stop = Stop()
    screen = screen_of(given, stop)
    places = [f"--{name}={given[name]}" for name in ("bucket", "profile", "region") if given[name]]
    words = [*places, "--undo", str(given["audit_log"]), "--run-id", report.run_id]
    undo = shlex.join([sys.executable, sys.argv[0], *words])
    as_json = given["json"] and given["explain"] is None and given["undo_rows"] is None
    same = {name: given[name] for name in ("quiet", "manifest", "audit_log")}
    return Setting(
        wishes, login, limits, stop, Ledger(report), screen, Progress(screen), undo, as_json, **same
    )


def report_of(given: dict[str, Any]) -> Report:
    """An empty report. An undo has no table."""
    undoes = given["undo"] is not None or given["undo_rows"] is not None
    is_dry = given["dry_run"] or given["explain"] is not None
    mode = ("undo-" * undoes + "dry-run") if is_dry else "undo" if undoes else "purge"
    schema = "" if "." in given["db_table"] else f"{given['db_name']}."
    table = None if undoes else schema + given["db_table"]
    return Report(mode=mode, bucket=given["bucket"] or "", prefix=given["prefix"], table=table)


def carry_out(run: Setting, given: dict[str, Any]) -> None:
    """Do what the command line asks for. Raises PurgeError."""
    if given["undo_rows"] is not None:
        with run.stop.at_once(), held(given["undo_rows"], run.ledger):
            for part in rows_sql(given["undo_rows"], given["run_id"]):
                run.screen.show(part)
        return
    if run.audit_log and not run.ledger.report.is_dry:
        run.ledger.start(run.audit_log, given)
    session = boto3.Session(profile_name=given["profile"], region_name=given["region"])
    run = run._replace(session=session)
    if given["undo"] is not None:
        undo(run, given["undo"], given["run_id"])
    elif given["explain"] is not None:
        tell_why(run, given["explain"], given["json"])
    else:
        purge(run)


if __name__ == "__main__":
    main()
