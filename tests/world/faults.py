"""Faults of S3, of the database and of the process, on real sockets and on schedule.

`Scene` is the sandbox behind both proxies, and the purge in it; `verify` is what must hold after
every run, whatever broke, seen from the outside. Every fault that took place is counted in
`Scene.injected`, by part and kind.
"""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass, field, replace
from datetime import datetime
from typing import Any, Self
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pymysql
from proxies import DROP, Answer, Request, S3Proxy, TcpProxy
from sandbox import DATABASE, Sandbox
from script import ERROR, Process, Result, World, ended

USER, PASSWORD = "faults", "of-the-sandbox"
MAX_AGE = 30.0  # of a re-check, in seconds

# --- S3 -------------------------------------------------------------------------------------------

Forward = Callable[[Request], Answer]
Act = Callable[[Request, Forward], Answer]  # answers in S3's place


def instead(answer: Answer, effect: bool = False) -> Act:
    """This answer; the request took effect or never reached S3."""

    def act(request: Request, forward: Forward) -> Answer:
        if effect:
            forward(request)
        return answer

    return act


def truncated(request: Request, forward: Forward) -> Answer:
    """Half of the XML, as if that were all."""
    answer = forward(request)
    return replace(answer, body=answer.body[: len(answer.body) // 2])


def cut_short(request: Request, forward: Forward) -> Answer:
    """Half of the body, then the connection closes."""
    half = truncated(request, forward)
    whole = {"Content-Length": str(2 * len(half.body) + 2), "Connection": "close"}
    return replace(half, headers=half.headers | whole)


def keys_of(request: Request) -> list[str]:
    """The keys that a delete or delete-one names."""
    if request.operation == "delete-one":
        return [unquote(urlsplit(request.path).path.split("/", 2)[2])]
    root = ElementTree.fromstring(request.body)
    return [node.text or "" for node in root.iterfind(".//{*}Key")]


def edited(body: bytes, tag: bytes, change: Callable[[list[bytes]], list[bytes]]) -> bytes:
    """The same XML with its elements of this name, which follow one another, changed."""
    whole, each = (rb"(?s)<%b>%b</%b>" % (tag, inner, tag) for inner in (b".*", b".*?"))
    return re.sub(whole, lambda all_: b"".join(change(re.findall(each, all_[0]))), body)


# Headers that tell of the body.
CHECKED = re.compile("content-length|content-md5|x-amz-checksum", re.IGNORECASE)
REFUSED = b"<Error><Key>%b</Key><Code>%b</Code><Message>injected</Message></Error>"
NOTHING = b"<DeleteResult></DeleteResult>"


def but_every_third(entries: list[bytes]) -> list[bytes]:
    return [entry for place, entry in enumerate(entries) if place % 3]


def for_some_keys(code: str = "", effect: bool = False) -> Act:
    """A 200 in which every third key has this error, or is not mentioned. Without an effect S3 is
    not asked to delete these keys."""

    def act(request: Request, forward: Forward) -> Answer:
        keys = re.findall(rb"(?s)<Key>(.*?)</Key>", request.body)
        if not effect:
            headers = {k: v for k, v in request.headers.items() if not CHECKED.match(k)}
            body = edited(request.body, b"Object", but_every_third)
            request = replace(request, body=body, headers=headers)
        answer = forward(request) if effect or len(keys) > 1 else Answer(200, NOTHING)
        body = edited(answer.body, b"Deleted", but_every_third) if effect else answer.body
        told = b"".join(REFUSED % (key, code.encode()) for key in keys[::3] if code)
        return replace(answer, body=body.replace(b"</DeleteResult>", told + b"</DeleteResult>"))

    return act


def without_start_after(_: Request, answer: Answer) -> Answer:
    """moto echoes it as it came, though XML may not carry it."""
    return replace(answer, body=re.sub(rb"(?s)<StartAfter>.*?</StartAfter>", b"", answer.body))


ANSWERED = ("versioning", "list", "delete", "other")  # by XML; other: the list of versions
ALL = (*ANSWERED, "delete-one")

S3_FAULTS: dict[str, tuple[tuple[str, ...], Act]] = {  # where it can happen, and what it does
    "500 InternalError": (ALL, instead(Answer(500, b"<Error><Code>InternalError</Code></Error>"))),
    "503 SlowDown": (ALL, instead(Answer(503, b"<Error><Code>SlowDown</Code></Error>"))),
    "connection lost before the request took effect": (ALL, instead(DROP)),
    "connection lost after the request took effect": (ALL, instead(DROP, effect=True)),
    "200 without a body": (ANSWERED, instead(Answer(200))),
    "200 with HTML": (ALL, instead(Answer(200, b"<html>Please sign in</html>"))),
    "200 with truncated XML": (ANSWERED, truncated),
    "connection closed in mid-body": (ANSWERED, cut_short),
    "204 without effect": (ANSWERED, instead(Answer(204))),
    "204 after the request took effect": (("delete",), instead(Answer(204), effect=True)),
    "InternalError for some keys": (("delete",), for_some_keys("InternalError")),
    "InternalError for some keys, yet deleted": (("delete",), for_some_keys("InternalError", True)),
    "SlowDown for some keys": (("delete",), for_some_keys("SlowDown")),
    "AccessDenied for some keys": (("delete",), for_some_keys("AccessDenied")),
    "keys missing from the answer": (("delete",), for_some_keys()),
    "keys missing from the answer, yet deleted": (("delete",), for_some_keys(effect=True)),
}


# --- Runs -----------------------------------------------------------------------------------------


@dataclass
class Run(Result):
    """How a run of the script ended, and the bucket before and after it."""

    before: set[str] = field(repr=False)
    after: set[str] = field(repr=False)
    events: list[dict[str, Any]] = field(repr=False)  # this run's in the log, each with its `line`
    requests: list[Request] = field(repr=False)  # its deletes
    signals: int  # that it was sent
    limit: float  # seconds: no request leaves with an older re-check

    @property
    def gone(self) -> set[str]:
        return self.before - self.after

    @property
    def began(self) -> bool:
        """It has done anything, so by then it listens to signals."""
        return bool(self.out or self.events)

    @property
    def was_killed(self) -> bool:
        """By SIGKILL, by a second signal, or before it could listen, or after its last word."""
        told = not self.began or bool(self.out)
        return self.code < 0 and (-self.code == signal.SIGKILL or self.signals > 1 or told)

    @property
    def age(self) -> float:
        """Of the oldest re-check (seconds), as far as the run tells."""
        told = None if self.was_killed else self.summary["max_recheck_age_seconds"]
        return self.limit if told is None else float(told)

    def all(self, kind: str) -> list[dict[str, Any]]:
        """The events of this kind."""
        return [event for event in self.events if event["event"] == kind]

    def keys(self, kind: str) -> list[str]:
        return [event["key"] for event in self.all(kind)]

    def counted(self, name: str) -> int:
        """`planned` or `deleted`, of any reason."""
        tally = self.summary[name]
        return int(tally["expired"] + tally["orphan"])


def as_seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def verify(run: Run) -> None:
    """Bucket, requests, audit log, summary, standard error and exit code tell the same story."""
    # Python, while it imports, ends at a Ctrl-C with one.
    assert not (run.began and "Traceback" in run.err), run.err
    assert run.gone <= set(run.keys("delete")), "gone without an intent in the log"
    assert not set(run.keys("deleted")) & run.after, "said to be deleted, but there"
    asked_in_order(run)
    ends = Counter(key for name in ("deleted", "failed", "retained") for key in run.keys(name))
    assert not [key for key, count in ends.items() if count > 1], "a key ended twice"
    assert not run.gone & set(run.keys("retained")), "gone, but said to be retained"
    if run.was_killed:
        return
    assert set(run.keys("delete")) <= set(ends), "asked for, but not accounted for"
    adds_up(run, run.summary)
    if run.events:
        assert [run.events[0]["event"], run.events[-1]["event"]] == ["start", "end"]
        assert run.events[-1]["exit_code"] == run.code


def asked_in_order(run: Run) -> None:
    """Each key that S3 was asked to delete stood in the log by then, and its re-check was as young
    as the run says (a second is for the request's way)."""
    intents = defaultdict[str, list[dict[str, Any]]](list)
    for event in run.all("delete"):
        intents[event["key"]].append(event)
    for request in run.requests:
        for key in keys_of(request):
            known = [event for event in intents[key] if event["line"] < request.logged]
            assert known, f"{key!r} was asked for without an intent on disk"
            age = request.at - as_seconds(known[-1]["time"])
            assert age < run.age + 1, "a request came later than its age says"


def adds_up(run: Run, summary: dict[str, Any]) -> None:
    """Every planned key ended as one of four, and the exit code tells."""
    clean, dry = summary["error"] is None, summary["mode"] == "dry-run"
    allowed = (4 if summary["failed"] else 0,) if clean else (1, 3, 75, 129, 130, 143)
    assert run.code in allowed, run
    told = (run.counted("deleted"), summary["failed"], summary["retained"])
    if run.events:
        logged = tuple(len(run.keys(name)) for name in ("deleted", "failed", "retained"))
        assert told == logged, "summary and log differ"
    left = summary["not_attempted"]
    assert (left is None) == (summary["planned"] is None)
    if left is not None and not dry:
        assert left >= 0
        assert sum(told) + left == run.counted("planned"), "the sum is wrong"
    assert not (clean and left), "not attempted, without a cause"
    assert not ((dry or run.code == 3) and (any(told) or run.requests)), "deleted, though not to"
    age = summary["max_recheck_age_seconds"]
    sent = (summary["requests"] or {"delete": 0})["delete"]
    assert (age is None) == (not sent), f"age {age} of {sent} requests"
    assert (age or 0) <= run.limit, "the re-check was too old"
    assert len(run.requests) <= sent
    assert ERROR.findall(run.err) == [summary["error"]] * (not clean)


class Scene(World):
    """The sandbox behind both proxies. The purge logs in with a password: an IAM token is signed
    for the real port, and the way leads through a proxy's.

    `choose` names the fault, if any, that a request to S3 meets, and may do other harm. S3 lists at
    most `page` keys at a time, and takes up to `latency` seconds more for a request.
    """

    def __init__(self, box: Sandbox, patch: str = "") -> None:
        super().__init__(box, patch)
        self.audit = box.home / "audit.jsonl"
        self.audit.write_bytes(b"")
        self.injected: Counter[tuple[str, str]] = Counter()
        self.faults, self.page, self.signals = dict(S3_FAULTS), 1000, 0
        self.s3, self.db = S3Proxy(box.s3_url), TcpProxy(box.database.port)
        self.s3.before, self.s3.after = self._meet, without_start_after
        self.calm()
        self.settings |= {
            "AWS_ENDPOINT_URL_S3": self.s3.url,
            "RETENTION_PURGE_DB_PORT": str(self.db.port),
            "RETENTION_PURGE_DB_USER": USER,
            "RETENTION_PURGE_DB_PASSWORD": PASSWORD,
        }

    def __enter__(self) -> Self:
        self.s3.__enter__()
        self.db.__enter__()
        self.box.sql(
            f"DROP USER IF EXISTS {USER}@'%'",
            f"CREATE USER {USER}@'%' IDENTIFIED BY '{PASSWORD}' REQUIRE SSL",
            f"GRANT SELECT, DELETE ON {DATABASE}.* TO {USER}@'%'",
            "SET GLOBAL wait_timeout = 1",  # the session's own is longer
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.db.__exit__()
        self.s3.__exit__()
        self.box.sql("SET GLOBAL wait_timeout = DEFAULT")

    # What breaks.

    def calm(self) -> None:
        """No more faults of S3, and the script's own limit of a re-check's age."""
        self.choose: Callable[[Request], str | None] = lambda request: None
        self.latency, self.limit = 0.0, MAX_AGE

    def _meet(self, request: Request) -> Answer | None:
        request.logged = self.audit.read_bytes().count(b"\n")
        if found := re.search(r"(?<=max-keys=)\d+", request.path):
            most = min(self.page, int(found[0]))
            request.path = request.path.replace(f"max-keys={found[0]}", f"max-keys={most}")
        kind = self.choose(request)
        time.sleep(random.random() * self.latency)
        if kind is None:
            return None
        self.injected["S3 " + request.operation, kind] += 1
        return self.faults[kind][1](request, self.s3.forward)

    def cut(self) -> None:
        """The database's connections, on the wire."""
        self.injected["database", "connection cut on the wire"] += 1
        self.db.cut()

    def kill(self, what: str = "CONNECTION") -> None:
        """KILL CONNECTION or KILL QUERY, for all that the purge has open."""
        where = f"user = '{USER}'" + (" AND command = 'Query'" if what == "QUERY" else "")
        which = f"SELECT id FROM information_schema.processlist WHERE {where}"
        with suppress(pymysql.Error):  # it has ended by itself, or MySQL cannot spell its statement
            for (thread,) in self.box.sql(which):
                self.box.sql(f"KILL {what} {thread}")
                self.injected["database", f"KILL {what}"] += 1

    def freeze(self, seconds: float) -> None:
        """The database's server takes no more steps for so long."""
        self.injected["database", "server stops answering (SIGSTOP)"] += 1
        self.box.database.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.box.database.process.send_signal(signal.SIGCONT)

    def signal(self, signum: int) -> None:
        """Send it to the run that is under way."""
        for process in self.processes[-1:]:
            if process.poll() is None:
                self.signals += 1
                process.send_signal(signum)
                self.injected["process", signal.Signals(signum).name] += 1

    # What is run.

    def start(self, *arguments: str, **settings: Any) -> Process:
        """A run that answers in JSON; with an audit log, but for an undo."""
        log = [] if "--undo" in arguments else ["--audit-log", str(self.audit)]
        self._before, self._logged = set(self.box.live_keys()), self.audit.read_bytes().count(b"\n")
        self._asked, self.signals = len(self.s3.requests), 0
        return super().start("--json", *log, *arguments, **settings)

    def finish(self) -> Run:
        """Wait for the run; what it left, verified."""
        told = astuple(ended(self.processes[-1]))
        self.s3.settle()
        after, events = set(self.box.live_keys()), self.events(self._logged)
        asked = [r for r in self.s3.requests[self._asked :] if r.operation.startswith("delete")]
        run = Run(*told, self._before, after, events, asked, self.signals, self.limit)
        verify(run)
        return run

    def purge(self, *arguments: str, **settings: Any) -> Run:
        self.start(*arguments, **settings)
        return self.finish()

    def converges(self, *arguments: str) -> Run:
        """Without faults a run finishes the work, and the next finds nothing to do; the first."""
        run, again = self.purge(*arguments), self.purge(*arguments)
        assert (run.code, again.code) == (0, 0), (run, again)
        assert (again.counted("planned"), again.summary["jobs_deleted"]) == (0, 0)
        return run

    def events(self, start: int = 0) -> list[dict[str, Any]]:
        """The events from that line of the audit log on; a cut line is skipped."""
        found = []
        for number, line in enumerate(self.audit.read_bytes().splitlines()):
            with suppress(ValueError):
                found.append(json.loads(line) | {"line": number})
        return [event for event in found if event["line"] >= start]
