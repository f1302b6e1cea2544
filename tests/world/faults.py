"""Faults of S3, of the database and of the process, on real sockets and on schedule.

`Scene` is the sandbox behind `FaultyS3` and `FaultyDatabase`, and the purge in it; `verify` is what
must hold after every run, whatever broke, seen from the outside. Every fault that took place is
counted in `Scene.injected`, by part and kind.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pymysql
from proxies import RESET, Answer, Request, S3Proxy, TcpProxy
from sandbox import DATABASE, Sandbox
from script import Process, Result, World, ended

USER, PASSWORD = "faults", "of-the-sandbox"

# --- S3 -------------------------------------------------------------------------------------------

Forward = Callable[[Request], Answer]
# Answers in S3's place; None if the fault makes no sense for this request.
Act = Callable[[Request, Forward], Answer | None]


def error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()


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


def late(seconds: float) -> Act:
    """Carried out when the client may have given up, or ended."""

    def act(request: Request, forward: Forward) -> Answer:
        time.sleep(seconds)
        return forward(request)

    return act


def keys_of(request: Request) -> list[str]:
    """The keys that a delete or delete-one names."""
    if request.operation == "delete-one":
        return [unquote(urlsplit(request.path).path.split("/", 2)[2])]
    root = ElementTree.fromstring(request.body)
    return [node.text or "" for node in root.iterfind(".//{*}Key")]


Change = Callable[[list[bytes]], list[bytes]]


def edited(body: bytes, tag: bytes, change: Change) -> bytes:
    """The same XML with its elements of this name, which follow one another, changed."""
    pattern = rb"(?s)<%b>.*</%b>" % (tag, tag)
    each = rb"(?s)<%b>.*?</%b>" % (tag, tag)
    return re.sub(pattern, lambda all_: b"".join(change(re.findall(each, all_[0]))), body)


# Headers that tell of the body.
CHECKED = re.compile("content-length|content-md5|x-amz-checksum", re.IGNORECASE)
REFUSED = b"<Error><Key>%b</Key><Code>%b</Code><Message>injected</Message></Error>"


def others(entries: list[bytes]) -> list[bytes]:
    return [entry for place, entry in enumerate(entries) if place % 3]


def for_some_keys(code: str = "", effect: bool = False) -> Act:
    """A 200 in which every third key has this error, or is not mentioned. Without an effect S3 is
    not asked to delete these keys."""

    def act(request: Request, forward: Forward) -> Answer:
        keys = re.findall(rb"(?s)<Key>(.*?)</Key>", request.body)
        if not effect:
            headers = {k: v for k, v in request.headers.items() if not CHECKED.match(k)}
            body = edited(request.body, b"Object", others)
            request = replace(request, body=body, headers=headers)
        answer = forward(request) if effect or len(keys) > 1 else Answer(200, NOTHING)
        body = edited(answer.body, b"Deleted", others) if effect else answer.body
        told = b"".join(REFUSED % (key, code.encode()) for key in keys[::3] if code)
        return replace(answer, body=body.replace(b"</DeleteResult>", told + b"</DeleteResult>"))

    return act


NOTHING = b"<DeleteResult></DeleteResult>"


def reordered(change: Change) -> Act:
    """A listing's page with its entries changed."""

    def act(request: Request, forward: Forward) -> Answer | None:
        answer = forward(request)
        if answer.body.count(b"<Contents>") < 2:
            return None
        body = edited(answer.body, b"Contents", change)
        count = b"<KeyCount>%d" % body.count(b"<Contents>")
        return replace(answer, body=re.sub(rb"<KeyCount>\d+", count, body))

    return act


def first_page_again(request: Request, forward: Forward) -> Answer | None:
    """The listing's first page where a further one was asked for."""
    path = re.sub("(continuation-token|start-after)=[^&]+&?", "", request.path)
    return forward(replace(request, path=path)) if path != request.path else None


HTML = Answer(200, b"<html><body>Please sign in</body></html>")
ANSWERED = ("versioning", "list", "delete", "other")  # by XML; other: the list of versions
ALL = (*ANSWERED, "delete-one")

Fault = tuple[tuple[str, ...], Act]  # where it can happen, and what it does
S3_FAULTS: dict[str, Fault] = {
    "500 InternalError": (ALL, instead(Answer(500, error("InternalError")))),
    "503 SlowDown": (ALL, instead(Answer(503, error("SlowDown")))),
    "connection reset before the request took effect": (ALL, instead(RESET)),
    "connection reset after the request took effect": (ALL, instead(RESET, effect=True)),
    "200 without a body": (ANSWERED, instead(Answer(200))),
    "200 with HTML": (ALL, instead(HTML)),
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
    "listing page reversed": (("list",), reordered(lambda parts: parts[::-1])),
    "listing page with a key twice": (("list",), reordered(lambda parts: [*parts, parts[-1]])),
    "listing page repeated": (("list",), first_page_again),
}


class FaultyS3(S3Proxy):
    """Before moto: `choose` names the fault, if any, that a request meets.

    `page` makes S3 list at most so many keys at a time, as it may. `latency` is a request's random
    extra time, in seconds at most. `watch` sees each request before it is answered. A fault may be
    added to `faults`.
    """

    def __init__(self, url: str, injected: Counter[tuple[str, str]], audit: Path) -> None:
        super().__init__(url)
        self.choose: Callable[[Request], str | None] = lambda request: None
        self.watch: Callable[[Request], None] = lambda request: None
        self.page: int | None = None
        self.latency = 0.0
        self.faults = dict(S3_FAULTS)
        self._audit, self._injected = audit, injected
        self._busy, self._lock = 0, threading.Lock()

    def answer(self, request: Request) -> Answer:
        with suppress(FileNotFoundError):
            request.logged = self._audit.stat().st_size
        with self._lock:
            self._busy += 1
            self.requests.append(request)
            kind = self.choose(request)
        try:
            self.watch(request)
            time.sleep(random.random() * self.latency)
            answer = self.faults[kind][1](request, self.ask) if kind else None
            if answer is None:
                return self.ask(request)
            self._injected["S3 " + request.operation, kind or ""] += 1
            return answer
        finally:
            with self._lock:
                self._busy -= 1

    def ask(self, request: Request) -> Answer:
        """moto's own answer; it echoes a StartAfter as it came, though XML may not carry it."""
        if self.page and request.operation == "list":
            most = min(self.page, int(request.query.get("max-keys", ["1000"])[0]))
            path = re.sub(r"max-keys=\d+", f"max-keys={most}", request.path)
            request = replace(request, path=path)
        answer = self._forward(request)
        if request.operation == "list":
            answer.body = re.sub(rb"(?s)<StartAfter>.*?</StartAfter>", b"", answer.body)
        return answer

    def settle(self) -> None:
        """Wait until all that was asked is answered: a killed client leaves requests behind."""
        while self._busy:
            time.sleep(0.01)


Choice = Callable[[Request], str | None]


def scripted(faults: dict[str, Iterable[str]]) -> Choice:
    """The first requests of each operation meet these faults, one after the other."""
    left = {operation: deque(kinds) for operation, kinds in faults.items()}

    def choose(request: Request) -> str | None:
        kinds = left.get(request.operation)
        return kinds.popleft() if kinds else None

    return choose


def always(operation: str, kind: str) -> Choice:
    return lambda request: kind if request.operation == operation else None


def at_random(dice: random.Random, rate: float, most: int, faults: dict[str, Fault]) -> Choice:
    """A share of the requests meets one of the faults, `most` at most."""
    left = iter(range(most))

    def choose(request: Request) -> str | None:
        kinds = [kind for kind, (where, _) in faults.items() if request.operation in where]
        if not kinds or dice.random() > rate or next(left, None) is None:
            return None
        return dice.choice(kinds)

    return choose


# --- Database -------------------------------------------------------------------------------------


class FaultyDatabase(TcpProxy):
    """Before the server, with its root's means to break things."""

    def __init__(self, box: Sandbox, injected: Counter[tuple[str, str]]) -> None:
        super().__init__(box.database.port)
        self.sql, self.patience = box.sql, box.database.patience
        self._server, self._injected = box.database.process, injected

    def count(self, kind: str) -> None:
        self._injected["database", kind] += 1

    def break_connections(self) -> None:
        self.count("connection cut on the wire")
        self.cut()

    def kill(self, what: str = "CONNECTION") -> None:
        """KILL CONNECTION or KILL QUERY, for all that the purge has open."""
        where = f"user = '{USER}'" + (" AND command = 'Query'" if what == "QUERY" else "")
        which = f"SELECT id FROM information_schema.processlist WHERE {where}"
        with suppress(pymysql.Error):  # it has ended by itself, or MySQL cannot spell its statement
            for (thread,) in self.sql(which):
                self.sql(f"KILL {what} {thread}")
                self.count(f"KILL {what}")

    def freeze(self, seconds: float) -> None:
        """The server takes no more steps for so long."""
        self.count("server stops answering (SIGSTOP)")
        os.kill(self._server.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(self._server.pid, signal.SIGCONT)

    @contextmanager
    def setting(self, *assignments: str) -> Iterator[None]:
        """Global variables of the server, `name = number`, for sessions that begin from now on."""
        with ExitStack() as stack:
            for assignment in assignments:
                name = assignment.split()[0]
                ((before,),) = self.sql(f"SELECT @@GLOBAL.{name}")
                stack.callback(self.sql, f"SET GLOBAL {name} = {before}")
                self.count(assignment)
                self.sql(f"SET GLOBAL {assignment}")
            yield


# --- Runs -----------------------------------------------------------------------------------------


@dataclass
class Run(Result):
    """How a run of the script ended, and the bucket before and after it."""

    before: set[str] = field(repr=False)
    after: set[str] = field(repr=False)
    # This run's, in the audit log; `ends_at` is where each one's line ends, in bytes.
    events: list[dict[str, Any]] = field(repr=False, default_factory=list)
    requests: list[Request] = field(repr=False, default_factory=list)  # its deletes
    signals: int = 0  # that it was sent
    limit: float = 30.0  # seconds: no request leaves with an older re-check

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

    def keys(self, event: str) -> list[str]:
        return [item["key"] for item in self.events if item["event"] == event]

    def counted(self, name: str) -> int:
        """`planned` or `deleted`, of any reason."""
        tally = self.summary[name]
        return int(tally["expired"] + tally["orphan"])


def as_seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def verify(run: Run) -> None:
    """Bucket, requests, audit log, summary, standard error and exit code tell the same story."""
    if run.began:  # Python, while it imports, ends at a Ctrl-C with one
        assert "Traceback" not in run.err, run.err
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
    intents: dict[str, list[tuple[int, float]]] = {}
    for event in run.events:
        if event["event"] == "delete":
            times = intents.setdefault(event["key"], [])
            times.append((event["ends_at"], as_seconds(event["time"])))
    for request in run.requests:
        for key in keys_of(request):
            times = [time for ends_at, time in intents.get(key, []) if ends_at <= request.logged]
            assert times, f"{key!r} was asked for without an intent on disk"
            assert request.at - times[-1] < run.age + 1, "a request came later than its age says"


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
    on_standard_error(run, summary)


def on_standard_error(run: Run, summary: dict[str, Any]) -> None:
    """The error in one line, with time and run id; a line for each cause, with its keys counted."""
    found = re.findall(r"(?m)^(?:(\S+Z) )?Error: (.*?)(?: \(run (\S+)\))?$", run.err)
    assert len(found) == (summary["error"] is not None), run.err
    for moment, message, run_id in found:
        assert abs(as_seconds(moment) - time.time()) < 120
        assert (message, run_id) == (summary["error"], summary["run_id"])
    for name in ("failed", "retained"):
        causes = re.findall(rf"(?m) (\d+) keys {name}: (.*) \(.*\)$", run.err)
        assert sum(int(count) for count, _ in causes) == summary[name], run.err
        assert len({cause for _, cause in causes}) == len(causes)


# Patches that bring faults with them.
PATIENCE = ("SIGN", "MAX_RECHECK_AGE", "DELETE_TIMEOUT", "LIST_TIMEOUT", "RECHECK_TIMEOUT")


class Scene(World):
    """The sandbox behind both fault layers. The purge logs in with a password: an IAM token is
    signed for the real port, and the way leads through a proxy's.

    `patches` change constants of the script: with small batches, many of them take few objects.
    """

    def __init__(self, box: Sandbox, patches: dict[str, Any] | None = None) -> None:
        super().__init__(box, dict(patches or {}))
        self.audit = box.home / "audit.jsonl"
        self.signals = 0
        self.injected: Counter[tuple[str, str]] = Counter()
        self.s3 = FaultyS3(box.s3_url, self.injected, self.audit)
        self.db = FaultyDatabase(box, self.injected)
        self.settings |= {
            "AWS_ENDPOINT_URL_S3": self.s3.url,
            "RETENTION_PURGE_DB_PORT": str(self.db.port),
            "RETENTION_PURGE_DB_USER": USER,
            "RETENTION_PURGE_DB_PASSWORD": PASSWORD,
        }

    def __enter__(self) -> Self:
        self.audit.unlink(missing_ok=True)
        self.s3.__enter__()
        self.db.__enter__()
        self.db.sql(
            f"DROP USER IF EXISTS {USER}@'%'",
            f"CREATE USER {USER}@'%' IDENTIFIED BY '{PASSWORD}' REQUIRE SSL",
            f"GRANT SELECT, DELETE ON {DATABASE}.* TO {USER}@'%'",
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.db.__exit__()
        self.s3.__exit__()

    def start(self, *arguments: str, **settings: Any) -> Process:
        """A run that answers in JSON; with an audit log, but for an undo."""
        log = [] if "--undo" in arguments else ["--audit-log", str(self.audit)]
        self._asked, self.signals = len(self.s3.requests), 0
        return super().start("--json", *log, *arguments, **settings)

    def signal(self, process: Process, signum: int) -> None:
        if process.poll() is None:
            self.signals += 1
            process.send_signal(signum)
            self.injected["process", signal.Signals(signum).name] += 1

    def finish(self, process: Process, before: set[str], logged: int, check: bool = True) -> Run:
        """Wait for a run; what it left, verified. `logged`: bytes in the audit log before it."""
        told = astuple(ended(process))
        self.s3.settle()
        after, events = set(self.box.live_keys()), self.events(logged)
        asked = [r for r in self.s3.requests[self._asked :] if r.operation.startswith("delete")]
        limit = self.patches.get("MAX_RECHECK_AGE", 30)
        run = Run(*told, before, after, events, asked, self.signals, limit)
        if check:
            verify(run)
        return run

    def purge(self, *arguments: str, check: bool = True, **settings: Any) -> Run:
        before, logged = set(self.box.live_keys()), self.logged()
        return self.finish(self.start(*arguments, **settings), before, logged, check)

    def undo(self, *arguments: str) -> dict[str, Any]:
        """Undo a run of the audit log; the summary."""
        result = ended(self.start("--undo", str(self.audit), *arguments))
        assert result.code == 0, result.err
        return result.summary

    def calm(self) -> None:
        """No more faults."""
        for name in PATIENCE:
            self.patches.pop(name, None)
        self.s3.choose, self.s3.watch = lambda request: None, lambda request: None
        self.s3.latency = 0.0
        self.db.on_received = lambda total: None

    def logged(self) -> int:
        return self.audit.stat().st_size if self.audit.exists() else 0

    def events(self, start: int = 0) -> list[dict[str, Any]]:
        """The events after that byte of the audit log; a cut line is skipped."""
        found = []
        text = self.audit.read_bytes()[start:] if self.audit.exists() else b""
        for line in text.splitlines(keepends=True):
            start += len(line)
            with suppress(ValueError):
                found.append(json.loads(line) | {"ends_at": start})
        return found


def table_of(injected: Counter[tuple[str, str]], runs: int) -> str:
    """`injected` as a Markdown table, for the page MEASURED.md."""
    kinds: dict[str, Counter[str]] = {}
    for (place, kind), count in sorted(injected.items()):
        kinds.setdefault(kind, Counter())[place] += count
    lines = [f"{runs:,} random schedules.", "", "| what broke | where | times |", "|---|---|---|"]
    for kind, places in sorted(kinds.items(), key=lambda item: (min(item[1]), item[0])):
        where = ", ".join(f"{place} {count:,}" for place, count in places.items())
        lines.append(f"| {kind} | {where} | {places.total():,} |")
    return "\n".join(lines)
