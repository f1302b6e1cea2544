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
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Self
from xml.etree import ElementTree

import pymysql
from proxies import DROP, Answer, Request, S3Proxy, TcpProxy
from sandbox import DATABASE, Sandbox
from script import ERROR, Process, Result, World, ended

USER, PASSWORD = "faults", "of-the-sandbox"

# --- S3 -------------------------------------------------------------------------------------------

Forward = Callable[[Request], Answer]


def instead(request: Request, forward: Forward, answer: Answer, effect: bool = False) -> Answer:
    """This answer; the request took effect or never reached S3."""
    if effect:
        forward(request)
    return answer


def halved(request: Request, forward: Forward, *headers: tuple[str, str]) -> Answer:
    """Half of the body, as if that were all, or under headers that promise more."""
    answer = forward(request)
    body = answer.body[: len(answer.body) // 2]
    return replace(answer, body=body, headers=answer.headers | dict(headers))


def keys_of(request: Request) -> list[str]:
    """The keys that a delete names."""
    root = ElementTree.fromstring(request.body)
    return [node.text or "" for node in root.iterfind(".//{*}Key")]


def edited(body: bytes, tag: bytes, change: Callable[[list[bytes]], list[bytes]]) -> bytes:
    """The same XML with its elements of this name, which follow one another, changed."""
    whole, each = (rb"(?s)<%b>%b</%b>" % (tag, inner, tag) for inner in (b".*", b".*?"))
    return re.sub(whole, lambda all_: b"".join(change(re.findall(each, all_[0]))), body)


REFUSED = b"<Error><Key>%b</Key><Code>%b</Code><Message>injected</Message></Error>"
NOTHING = b"<DeleteResult></DeleteResult>"


def but_every_third(entries: list[bytes]) -> list[bytes]:
    return [entry for place, entry in enumerate(entries) if place % 3]


def for_some_keys(request: Request, forward: Forward, code: bytes, effect: bool = False) -> Answer:
    """A 200 in which every third key has this error, or is not mentioned. Without an effect S3 is
    not asked to delete these keys."""
    keys = re.findall(rb"(?s)<Key>(.*?)</Key>", request.body)
    if not effect:  # no headers: they tell of the body
        body = edited(request.body, b"Object", but_every_third)
        request = replace(request, body=body, headers={})
    answer = forward(request) if effect or len(keys) > 1 else Answer(200, NOTHING)
    body = edited(answer.body, b"Deleted", but_every_third) if effect else answer.body
    told = b"".join(REFUSED % (key, code) for key in keys[::3] if code)
    return replace(answer, body=body.replace(b"</DeleteResult>", told + b"</DeleteResult>"))


ANSWERED = ("versioning", "list", "delete", "other")  # by XML; other: the list of versions
DELETE = ("delete",)
CLOSED = ("Content-Length", "1000000"), ("Connection", "close")  # in mid-body

# Where it can happen; what answers in S3's place, and the rest of its arguments.
S3_FAULTS: dict[str, tuple[Any, ...]] = {
    "500 InternalError": (
        ANSWERED,
        instead,
        Answer(500, b"<Error><Code>InternalError</Code></Error>"),
    ),
    "503 SlowDown": (ANSWERED, instead, Answer(503, b"<Error><Code>SlowDown</Code></Error>")),
    "connection lost before the request took effect": (ANSWERED, instead, DROP),
    "connection lost after the request took effect": (ANSWERED, instead, DROP, True),
    "200 without a body": (ANSWERED, instead, Answer(200)),
    "200 with HTML": (ANSWERED, instead, Answer(200, b"<html>Please sign in</html>")),
    "200 with truncated XML": (ANSWERED, halved),
    "connection closed in mid-body": (ANSWERED, halved, *CLOSED),
    "204 without effect": (ANSWERED, instead, Answer(204)),
    "204 after the request took effect": (DELETE, instead, Answer(204), True),
    "InternalError for some keys": (DELETE, for_some_keys, b"InternalError"),
    "InternalError for some keys, yet deleted": (DELETE, for_some_keys, b"InternalError", True),
    "SlowDown for some keys": (DELETE, for_some_keys, b"SlowDown"),
    "AccessDenied for some keys": (DELETE, for_some_keys, b"AccessDenied"),
    "keys missing from the answer": (DELETE, for_some_keys, b""),
    "keys missing from the answer, yet deleted": (DELETE, for_some_keys, b"", True),
}
# A gateway answers in its own words, whatever S3 did.
SORRY = b"<html><body>upstream request timeout</body></html>"
for status in (503, 520, 524, 408, 429):
    own = DELETE, instead, Answer(status, SORRY)
    S3_FAULTS[f"{status} of a gateway, no effect"] = own
    S3_FAULTS[f"{status} of a gateway after the request took effect"] = (*own, True)


# --- Runs -----------------------------------------------------------------------------------------


@dataclass
class Run(Result):
    """How a run of the script ended, and the bucket before and after it."""

    before: set[str] = field(repr=False)
    after: set[str] = field(repr=False)
    events: list[dict[str, Any]] = field(repr=False)  # this run's in the log, as `Scene.events`
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
        return sum(self.summary[name][reason] for reason in ("expired", "orphan"))


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


def signed_at(request: Request) -> float:
    """When it was signed, after a wait for credentials (Unix time, cut to whole seconds)."""
    stamp = {name.lower(): text for name, text in request.headers.items()}["x-amz-date"]
    return datetime.strptime(f"{stamp}+0000", "%Y%m%dT%H%M%SZ%z").timestamp()


def asked_in_order(run: Run) -> None:
    """Each key that S3 was asked to delete stood in the log by then, and its re-check was as young
    as the run says when its request was signed. How long the request's way takes, the machine
    decides: a minute at most."""
    intents = run.all("delete")
    for request in run.requests:
        known = {each["key"]: each["at"] for each in intents if each["line"] < request.logged}
        for key in keys_of(request):
            assert key in known, f"{key!r} was asked for without an intent on disk"
            assert signed_at(request) - known[key] < run.age + 0.01, (
                "signed later than its age says"
            )
            assert request.at - known[key] < run.age + 60, "it came later than its age says"


def adds_up(run: Run, summary: dict[str, Any]) -> None:
    """Every planned key ended as one of four, and the exit code tells."""
    clean, dry = summary["error"] is None, summary["mode"] == "dry-run"
    rest = summary["failed"] or "job rows stay for the next run" in run.err
    allowed = (4 if rest else 0,) if clean else (1, 3, 75, 129, 130, 143)
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
    most `page` keys at a time, and takes up to `latency` seconds more for a request. The database
    runs `login` in each new session of the purge.
    """

    def __init__(self, box: Sandbox, patch: str = "", login: str = "") -> None:
        super().__init__(box, patch)
        self.login = login
        self.audit = box.home / "audit.jsonl"
        self.audit.write_bytes(b"")
        self.injected: Counter[tuple[str, str]] = Counter()
        self.faults, self.page, self.signals = dict(S3_FAULTS), 1000, 0
        self.s3, self.db = S3Proxy(box.s3_url), TcpProxy(box.database.port)
        self.s3.before = self._meet
        # moto echoes it as it came, though XML may not carry it.
        self.s3.after = lambda _, a: replace(a, body=edited(a.body, b"StartAfter", lambda _: []))
        self.calm()
        login = {"PORT": str(self.db.port), "USER": USER, "PASSWORD": PASSWORD}
        self.settings |= {f"RETENTION_PURGE_DB_{name}": value for name, value in login.items()}
        self.settings["AWS_ENDPOINT_URL_S3"] = self.s3.url

    def __enter__(self) -> Self:
        self.box.sql(
            f"CREATE USER IF NOT EXISTS {USER}@'%' IDENTIFIED BY '{PASSWORD}' REQUIRE SSL",
            f"GRANT SELECT, DELETE ON {DATABASE}.* TO {USER}@'%'",
            "SET GLOBAL wait_timeout = 1",  # the session's own is longer
            f"SET GLOBAL init_connect = {self.login!r}",
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.db.__exit__()
        self.s3.__exit__()
        self.box.sql("SET GLOBAL wait_timeout = DEFAULT, GLOBAL init_connect = ''")
        self.box.sql("SET GLOBAL read_only = 0")

    # What breaks.

    def calm(self) -> None:
        """No more faults of S3, and re-checks of the script's own age at most."""
        self.choose: Callable[[Request], str | None] = lambda request: None
        self.latency, self.limit = 0.0, 30.0

    def _meet(self, request: Request) -> Answer | None:
        request.logged = self.audit.read_bytes().count(b"\n")
        if request.operation == "list":
            most = min(self.page, int(request.query.get("max-keys", ["1000"])[0]))
            request.path = re.sub(r"max-keys=\d+", f"max-keys={most}", request.path)
        kind = self.choose(request)
        time.sleep(random.random() * self.latency)
        if kind is None:
            return None
        self.injected["S3 " + request.operation, kind] += 1
        _, act, *more = self.faults[kind]
        return act(request, self.s3.forward, *more)

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
        self.wake()

    def halt(self) -> None:
        """The database's server, with all its threads, takes no more steps until `wake`."""
        self.injected["database", "server stops answering (SIGSTOP)"] += 1
        self.box.database.process.send_signal(signal.SIGSTOP)
        threads = Path(f"/proc/{self.box.database.process.pid}/task")
        while any("State:\tT" not in (one / "status").read_text() for one in threads.iterdir()):
            time.sleep(0.01)

    def wake(self) -> None:
        self.box.database.process.send_signal(signal.SIGCONT)

    def switch_over(self, seconds: float) -> None:
        """The database's server is read-only for so long, as in a switch-over. Sessions stay."""
        self.injected["database", "read-only for a moment"] += 1
        self.box.sql("SET GLOBAL read_only = 1")
        time.sleep(seconds)
        self.box.sql("SET GLOBAL read_only = 0")

    def signal(self, signum: int) -> None:
        """Send it to the run that is under way."""
        for process in self.processes[-1:]:
            if process.poll() is None:
                self.signals += 1
                process.send_signal(signum)
                self.injected["process", signal.Signals(signum).name] += 1

    # What is run.

    def _begin(self) -> tuple[str, ...]:
        """What stood before the run; the options of each run."""
        self._before, self._logged = set(self.box.live_keys()), self.audit.read_bytes().count(b"\n")
        self._asked, self.signals = len(self.s3.requests), 0
        return "--json", "--audit-log", str(self.audit)

    def start(self, *arguments: str, **settings: Any) -> Process:
        """A run with an audit log that answers in JSON, which signals can reach."""
        return super().start(*self._begin(), *arguments, **settings)

    def finish(self) -> Run:
        """Wait for the run; what it left, verified."""
        return self._verified(ended(self.processes[-1]))

    def purge(self, *arguments: str, **settings: Any) -> Run:
        """The same, of a run that no signal is sent to."""
        return self._verified(super().purge(*self._begin(), *arguments, **settings))

    def _verified(self, result: Result) -> Run:
        told = astuple(result)
        self.s3.settle()
        # The server still works for a run that was killed, and keeps its lock, for a moment.
        mine = f"SELECT 1 FROM information_schema.processlist WHERE user = '{USER}'"
        while self.box.sql(mine):
            time.sleep(0.05)
        after, events = set(self.box.live_keys()), self.events(self._logged)
        asked = [r for r in self.s3.requests[self._asked :] if r.operation.startswith("delete")]
        run = Run(*told, self._before, after, events, asked, self.signals, self.limit)
        verify(run)
        return run

    def converges(self, *arguments: str) -> Run:
        """Without faults a run finishes the work, and the next finds nothing to do; the first."""
        self.calm()
        run, again = self.purge(*arguments), self.purge(*arguments)
        assert (run.code, again.code) == (0, 0), (run, again)
        assert (again.counted("planned"), again.summary["jobs_deleted"]) == (0, 0), again
        return run

    def events(self, start: int = 0) -> list[dict[str, Any]]:
        """The events from that line of the audit log on, each with its `line` and the Unix time
        that it came `at`; a cut line is skipped."""
        found = []
        for number, line in enumerate(self.audit.read_bytes().splitlines()):
            with suppress(ValueError):
                event = json.loads(line)
                at = datetime.fromisoformat(event["time"]).timestamp()
                found.append(event | {"line": number, "at": at})
        return [event for event in found if event["line"] >= start]
