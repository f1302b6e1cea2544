"""The delete phase in one process: each planned key ends once, whatever S3 and the table say."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import retention_purge as rp

PREFIX, WITNESSES = "p/", ["of", "remaining", "jobs"]
TERMS = rp.Terms(PREFIX, *2 * [datetime(2026, 3, 1, tzinfo=UTC)], None, True)
SHARED = {"p/shared": rp.Counts(2, 1), "p/expired": rp.Counts(1, 1), "p/vanished": None}
ENDS = "deleted", "failed", "retained"
SURE = SimpleNamespace(random=lambda: 1.0)  # dice that bring no trouble


class Book(rp.Ledger):
    """A ledger whose audit log is a list."""

    def __init__(self, versioned: bool) -> None:
        super().__init__(rp.Report(versioning="enabled" if versioned else "off"))
        self.file = "of no use"
        self.versioned = versioned
        self.events: list[tuple[str, str, str, str]] = []  # what, of which key, code, message

    def write(self, event: str, items: Iterable[dict[str, Any]], sync: bool = False) -> None:
        assert sync or not event
        for item in items:
            facts = [item.get(name, "") for name in ("key", "code", "message")]
            self.events.append((item.get("event", event), *facts))

    def keys(self, *events: str) -> list[str]:
        return [key for event, key, *_ in self.events if event in events]


No = rp.Verdict
# What a request may end in if it was not done, or if nobody knows.
VERDICTS = {
    "not sent": No("NotSent", "no connection"),
    "refused": No("AccessDenied", "no", whole=True),
    "busy": No("SlowDown", "later", whole=True),
    "lost before": No("NoAnswer", "timeout", in_doubt=True),
    "lost after": No("InvalidAnswer", "a gateway's", in_doubt=True),
    "late": No("NoAnswer", "timeout", in_doubt=True),
}
OF_A_KEY = [VERDICTS["busy"], No("AccessDenied"), No("NoAnswer", in_doubt=True)]
OF_A_KEY += [No("InternalError", in_doubt=True)]
SILENT = {"not sent", "lost before", "lost after", "late"}
ERRORS = {"bug": ZeroDivisionError, "stop": rp.Interrupted}
MOODS = ["well", "well", "some fail", *VERDICTS, *ERRORS]


class WaywardGate:
    """What `Rounds` asks and deletes by: the table's side and S3's, by their moods of the moment.
    What is `late` will be gone after the run, what is `kept` must stay."""

    terms = TERMS

    def __init__(self, moods: Callable[[], str], book: Book, dice: Any = SURE) -> None:
        self.moods, self.book, self.dice, self.lock = moods, book, dice, threading.Lock()
        self.comes: Callable[[str], None] = lambda trouble: None
        self.keeps: Callable[[], bool] = lambda: False
        self.gone, self.late, self.doubted = set[str](), set[str](), set[str]()
        self.kept, self.met, self.rows = set[str](), set[str](), set[str]()  # keys; moods; names
        self.permits: list[rp.Permit] = []  # that were used

    def ask(
        self, items: Sequence[rp.Candidate], witnesses: Sequence[str], size: int
    ) -> tuple[list[rp.Permit], dict[str, str]]:
        self.comes("re-check")
        assert witnesses == WITNESSES
        stay = {item.key: "in use" for item in items if self.keeps()}
        self.kept |= {*stay}
        free = [item.key for item in items if item.key not in stay]
        old = [rp.MAX_RECHECK_AGE + 1 if self.dice.random() < 0.1 else 0 for _ in free]
        starts = range(0, len(free), size)
        parts = [(tuple(free[n : n + size]), rp.boot_seconds() - old[n]) for n in starts]
        return [rp.Permit(*part) for part in parts], stay

    def delete(self, permit: rp.Permit) -> list[rp.Verdict]:
        with self.lock:
            keys, mood = {*permit.keys}, self.moods()
            assert keys <= {*self.book.keys("delete")} - self.kept, "no intent, or in use"
            assert permit not in self.permits
            assert rp.boot_seconds() - permit.asked <= rp.MAX_RECHECK_AGE
            assert not (self.book.versioned and keys & self.doubted), "a second marker"
            self.permits.append(permit)
            self.met.add(mood)
            self.late |= keys if mood == "late" else set()
            self.gone |= keys if mood in ("well", "lost after") else set()
            if mood in ERRORS:
                self.doubted |= keys
                raise ERRORS[mood]()
            return [self._verdict(key, mood) for key in permit.keys]

    def _verdict(self, key: str, mood: str) -> rp.Verdict:
        verdict = VERDICTS.get(mood, rp.Verdict(marker=f"marker of {key}"))
        if mood == "some fail":
            fails = self.dice.random() < 0.4
            verdict = self.dice.choice(OF_A_KEY)._replace(whole=False) if fails else verdict
            self.gone |= {key} if verdict.in_doubt or not fails else set()
        self.doubted |= {key} if verdict.in_doubt else set()
        return verdict

    def known(self, names: set[str]) -> tuple[bool, dict[str, rp.Counts]]:
        self.comes("table")
        found = {name: SHARED[PREFIX + name] for name in names}
        return True, {name: counts for name, counts in found.items() if counts}

    def delete_rows(self, rows: list[rp.Row]) -> int:
        names = {row.name for row in rows}
        assert {PREFIX + name for name in names} <= {*self.book.keys("delete-job")}, "no intent"
        self.rows |= names
        return len(rows)


# At a look into the database, where a stop signal would be heeded, at the start of a thread.
TROUBLES = {"re-check": rp.PurgeError("gone"), "table": rp.PurgeError("gone")}
TROUBLES |= {"stop": rp.Interrupted(), "thread": RuntimeError()}


def carry_out(
    plan: list[rp.Candidate], gate: Any, indexed: bool, workers: int, rate: int = 0, **more: Any
) -> None:
    """In small batches and rounds, without pauses. `gate.comes` raises when a trouble does."""
    stop, start, book = rp.Stop(), threading.Thread.start, gate.book
    stop.check = lambda: gate.comes("stop")
    totals = rp.Totals()
    totals.planned.update(item.reason for item in plan if item.reason in rp.OF_OBJECTS)
    book.report.plan(totals)

    def start_or_not(thread: threading.Thread) -> None:
        gate.comes("thread")
        start(thread)

    def expired_rows(names: set[str]) -> list[rp.Row]:
        gate.comes("table")
        return [rp.Row(1, name, {}) for name in names]

    table = {"ping": lambda: gate.comes("table"), "expired_rows": expired_rows}
    jobs: Any = SimpleNamespace(indexed=indexed, **table)
    sizes = {"BATCH": 4, "ROUND_KEYS": 13, "SQL_BYTES": 1700, "FIRST_PAUSE": 0, "LAST_PAUSE": 0}
    threads = patch.object(threading.Thread, "start", start_or_not)
    run: Any = SimpleNamespace(ledger=book, stop=stop, limits=rp.Limits(rate=rate, workers=workers))
    with patch.multiple(rp, **sizes | more), patch.object(rp.log, "disabled", True), threads:
        done = rp.Rounds(gate, jobs, run, WITNESSES).run(rp.Spool(plan))
        for wanted, item in zip(plan, done, strict=True):
            ends = book.keys(*ENDS)
            assert item == wanted
            assert item.reason not in rp.OF_OBJECTS or item.key in ends


SOME = st.lists(st.sampled_from(MOODS), min_size=1, max_size=8)
TROUBLE = st.tuples(st.sampled_from([None, *TROUBLES]), st.integers(0, 20))  # and its moment
RATE = st.sampled_from([0, 3, 3000])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 60), st.integers(0), SOME, st.booleans(), st.booleans(), TROUBLE, RATE)
def test_how_a_key_ends_is_told_exactly_once_be_it_expired_or_an_orphan(
    count, seed, moods, versioned, indexed, trouble, rate
):
    """While the run works, some keys come into use, some lose their rows."""
    reasons = {f"{PREFIX}{n:03}": ("expired", "orphan")[n % 2] for n in range(count)}
    rows = [*dict.fromkeys(SHARED, "shared").items(), ("p/missing", "missing")]
    plan = [rp.Candidate(key, reason, 1, "then") for key, reason in [*reasons.items(), *rows]]
    dice, book, before = random.Random(seed), Book(versioned), iter(range(trouble[1]))
    gate = WaywardGate(partial(dice.choice, moods), book, dice)
    gate.keeps = lambda: dice.random() < 0.1

    def comes(kind: str) -> None:
        if kind == trouble[0] and next(before, None) is None:
            raise TROUBLES[kind]

    gate.comes, finished = comes, False
    pauses = patch.object(rp.time, "sleep", lambda seconds: None)
    with suppress(rp.PurgeError, rp.Interrupted, ZeroDivisionError), pauses:
        carry_out(plan, gate, indexed, dice.randint(1, 4), rate)
        finished = True

    deleted, failed, retained = map(book.keys, ENDS)
    summary, ends = book.report.as_dict(), deleted + failed + retained
    assert len(ends) == len({*ends} & {*reasons})
    assert summary["not_attempted"] == count - len(ends)
    assert not (finished and summary["not_attempted"])
    counted = (book.report.deleted.objects, summary["retained"], summary["failed"])
    assert counted == (len(deleted), len(retained), len(failed))

    assert {*deleted} <= gate.gone <= {*deleted, *failed}
    assert gate.late <= {*deleted, *failed}, "said to be kept, but will go"
    assert {*retained} <= gate.kept - gate.doubted
    assert gate.kept <= {*retained, *failed} or not finished
    unsure = {key for event, key, _, why in book.events if event == "failed" and "may yet" in why}
    assert unsure == {*failed} & gate.doubted
    assert all(len(permit.keys) <= (rate or 4) for permit in gate.permits)
    stops = {"refused", "bug", "stop"} & gate.met
    assert not (finished and stops)
    assert finished or stops or trouble[0] or SILENT & gate.met
    tries = Counter(book.keys("delete"))
    undone = {key for _, key, code, _ in book.events if code in ("SlowDown", "NotSent")}
    assert not undone & gate.late
    assert not finished or {tries[key] for key in undone} <= {5}
    may_go = {key.removeprefix(PREFIX) for key in [*deleted, "p/missing", "p/shared"]}
    assert gate.rows <= may_go
    assert gate.rows == may_go or not finished


# Whether the bucket is versioned, what becomes of the requests for one key (`kept`: of the next
# question about it), how it ends, and by which code.
TRIES = [
    (False, ["well"], "deleted", ""),
    (False, ["lost before", "not sent", "busy", "lost after", "well"], "deleted", ""),
    (False, ["lost before"] * 5, "failed", "NoAnswer"),
    (False, ["busy"] * 5, "failed", "SlowDown"),
    (False, ["lost before", "busy", "kept"], "failed", "NoAnswer"),
    (False, ["busy", "not sent", "kept"], "retained", ""),
    (False, ["kept"], "retained", ""),
    (True, ["busy", "not sent", "well"], "deleted", ""),
    (True, ["lost before"], "failed", "NoAnswer"),
    (True, ["not sent", "lost after"], "failed", "NoAnswer"),
    (True, ["busy", "kept"], "retained", ""),
]


@pytest.mark.parametrize(("versioned", "moods", "end", "code"), TRIES)
def test_a_key_in_doubt_is_tried_again_but_in_a_versioned_bucket(versioned, moods, end, code):
    left, book = [*moods], Book(versioned)
    gate = WaywardGate(lambda: left.pop(0), book)
    gate.keeps = lambda: left[0] == "kept"
    carry_out([rp.Candidate("p/k", "expired")], gate, indexed=True, workers=1)
    assert len(gate.permits) == len(moods) - ("kept" in moods)
    ((event, _, told, why),) = [each for each in book.events if each[0] in ENDS]
    assert (event, told) == (end, code)
    assert ("may yet be deleted" in why) == (code == "NoAnswer")


# What becomes of the requests, each for a key of its own and the last one for all that follow; the
# number of the request that ends a run over 9 keys, or 0.
L, P = "lost before", "not sent"
OUTAGES = [
    (True, [L], 3),
    (True, ["well", L, L, P, L, L, L], 7),
    (True, [*[P] * 14, "well"], 0),
    (True, [*[P] * 15, "well"], 15),
    (True, [L, L, "busy", L, L, "well"], 0),
    (True, [L, L, "well", L, L, "well"], 0),
    (False, [*[L] * 14, "well"], 0),
    (False, [*[L, P] * 7, L, "well"], 15),
]


@pytest.mark.parametrize(("versioned", "moods", "ends_at"), OUTAGES)
def test_a_run_that_hears_nothing_of_s3_s_stops_and_leaves_the_rest_alone(
    versioned, moods, ends_at
):
    left, plan = [*moods], [rp.Candidate(f"p/{n}", "expired") for n in range(9)]
    gate = WaywardGate(lambda: left.pop(0) if left[1:] else left[0], Book(versioned))
    stops = pytest.raises(rp.PurgeError, match="deletes in a row got no word of S3's")
    with stops if ends_at else nullcontext():
        carry_out(plan, gate, indexed=True, workers=1, BATCH=1)
    assert ends_at in (0, len(gate.permits))
    summary = gate.book.report.as_dict()
    attempted = {key for permit in gate.permits for key in permit.keys}
    assert summary["not_attempted"] == 9 - len(attempted)


# With an index a re-check for each request; without one a re-check for as long as it is fresh.
PACED = [
    (True, 1, ["re-check", "4", "pause", "re-check", "4", "pause", "re-check", "1"]),
    (False, 1, ["re-check", "4", "pause", "4", "pause", "1"]),
    (False, 31, ["re-check", "4", "pause", "re-check", "4", "pause", "re-check", "1"]),
]


@pytest.mark.parametrize(("indexed", "slept", "wanted"), PACED)
def test_the_rate_is_waited_for_before_a_re_check_and_not_while_it_grows_old(
    indexed, slept, wanted
):
    """At 4 objects a second, where each pause takes `slept` seconds."""
    now, said, plan = [100.0], list[str](), [rp.Candidate(f"p/{n}", "expired") for n in range(9)]
    gate = WaywardGate(lambda: "well", Book(False))
    gate.comes = lambda kind: said.append(kind) if kind == "re-check" else None

    def sleep(seconds: float) -> None:
        if seconds > 0:
            said.append("pause")
            now.append(now[-1] + slept)

    def intend(items: Sequence[rp.Candidate]) -> None:
        said.append(str(len(items)))
        rp.Ledger.intend(gate.book, items)

    clocks = {"boot_seconds": lambda: now[-1], "Pace": partial(rp.Pace, clock=lambda: now[-1])}
    with patch.object(rp.time, "sleep", sleep), patch.object(gate.book, "intend", intend):
        carry_out(plan, gate, indexed, workers=1, rate=4, BATCH=1000, SQL_BYTES=10**6, **clocks)
    assert said == wanted


def test_the_rate_is_kept_over_time_and_a_rest_saves_up_no_burst():
    now, delays = [100.0], []
    pace = rp.Pace(3000, lambda: now[0])
    for rest in [0, 0, 0, 60, 0]:
        now[0] += pace.delay + rest
        pace.sent(1000)
        delays.append(pace.delay)
    assert delays == [pytest.approx(1 / 3)] * 5
