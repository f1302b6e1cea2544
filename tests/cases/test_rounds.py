"""The delete phase in one process: each planned key ends once, whatever S3 and the table say."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import chain, repeat
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import retention_purge as rp

PREFIX = "p/"
Jobs = tuple[int, int] | None  # of a key at its re-check: all, and the expired ones
EXPIRED, USED, VANISHED = (1, 1), (2, 1), None


class Book(rp.Ledger):
    """A ledger whose audit log is a list."""

    def __init__(self, report: rp.Report) -> None:
        super().__init__(report)
        self._file: Any = "of no use"
        self.events: list[tuple[str, str, str]] = []  # what, of which key, why

    def write(self, event: str, items: Iterable[dict[str, Any]], sync: bool = False) -> None:
        assert sync or not event.startswith("delete") or event == "deleted"
        self.events += [(event, item["key"], item.get("message", "")) for item in items]

    def keys(self, *events: str) -> list[str]:
        return [key for event, key, _ in self.events if event in events]


# What S3 makes of a request, and the code of the error that the run gets for it.
ERRORS = {"not sent": "NotSent", "refused": "AccessDenied", "busy": "SlowDown", "late": "NoAnswer",
          "lost before": "NoAnswer", "lost after": "NoAnswer"}  # fmt: skip


@dataclass
class WaywardBucket:
    """S3's side of `Rounds`: deletes, refuses, forgets, fails, or deletes later, each request by
    the next of its moods. `late` will be gone after the run."""

    moods: Iterator[str]
    book: Book
    dice: random.Random
    workers: int = 1
    name: str = "b"
    prefix: str = PREFIX
    s3_lead: timedelta = timedelta()
    gone: dict[str, rp.Version] = field(default_factory=dict)  # key -> its delete marker
    late: set[str] = field(default_factory=set)
    lock: Any = field(default_factory=threading.Lock)

    def delete(self, items: list[rp.Candidate], checked: float) -> list[rp.Verdict]:
        with self.lock:
            keys, mood = {item.key for item in items}, next(self.moods)
            assert keys <= {*self.book.keys("delete")}, "no intent"
            if mood == "bug":
                raise ZeroDivisionError
            if mood == "stop":
                raise rp.Interrupted
            if mood == "late":
                self.late |= keys
            verdicts = []
            if mood in ("well", "some fail", "lost after"):
                verdicts = [self._one(item.key, mood) for item in items]
            if mood in ERRORS:
                raise rp.PurgeError(mood, code=ERRORS[mood])
            return verdicts

    def _one(self, key: str, mood: str) -> rp.Verdict:
        if mood == "some fail" and self.dice.random() < 0.4:
            return rp.Verdict(self.dice.choice(["SlowDown", "AccessDenied", "NoAnswer"]), "no")
        versioned = self.book.report.versioning == "enabled"
        assert key not in self.gone or not versioned, "a second marker"
        self.gone[key] = rp.Version(f"marker of {key}", datetime.now(UTC), True, True)
        return rp.Verdict(marker=self.gone[key].version_id)

    def each(self, ask: Any, keys: Iterable[str]) -> Iterator[Any]:
        return map(ask, keys)

    def versions(self, key: str) -> list[rp.Version]:
        return [self.gone[key]] if key in self.gone else []


@dataclass
class WaywardTable:
    """The job table: what it answers of a key, and which keys have rows of expired jobs."""

    answer: Callable[[str], Jobs]
    rows: set[str] = field(default_factory=set)
    indexed: bool = True
    breaks_after: int | None = None
    asked: list[int] = field(default_factory=list)  # how many names at a time

    def ping(self, names: int = 0) -> None:
        self.asked.append(names)
        if self.breaks_after is not None and len(self.asked) > self.breaks_after:
            raise rp.PurgeError("gone", code="2013")

    def referenced(self, names: set[str]) -> dict[str, rp.Reference]:
        self.ping(len(names))
        found = {name: self.answer(PREFIX + name) for name in names}
        return {name: rp.Reference(name, *jobs) for name, jobs in found.items() if jobs}

    def expired_rows(self, names: Iterable[str]) -> list[rp.JobRow]:
        found = [name for name in names if PREFIX + name in self.rows]
        return [(f"job {name}", "then", name) for name in found[: rp.ROWS]]

    def delete(self, rows: list[rp.JobRow]) -> int:
        self.rows -= {PREFIX + name for _, _, name in rows}
        return len(rows)


class StopAfter(rp.Stop):
    """A stop signal comes at the `left`th moment at which one would be heeded."""

    def __init__(self, left: int | None) -> None:
        super().__init__()
        self.left = left

    def check(self) -> None:
        if self.left is not None:
            self.left -= 1
            self.received = 15 if self.left < 0 else 0
        super().check()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small batches and rounds, no pauses."""
    sizes = {"BATCH": 4, "ROUND_KEYS": 13, "ROUND_BYTES": 900, "ROWS": 5, "ROWS_A_COMMIT": 2}
    for name, value in {**sizes, "FIRST_PAUSE": 0.0, "LAST_PAUSE": 0.0}.items():
        monkeypatch.setattr(rp, name, value)
    monkeypatch.setattr(rp.log, "disabled", True)


def candidates(count: int, *reasons: str) -> list[rp.Candidate]:
    """Of these reasons in turn."""
    return [
        rp.Candidate(f"{PREFIX}{n:03}", reasons[n % len(reasons)], 1, "then") for n in range(count)
    ]


def book_of(plan: list[rp.Candidate], versioning: str = "off") -> Book:
    totals, report = rp.Totals(), rp.Report(versioning=versioning)
    for item in plan:
        totals.planned.add(item)
    report.plan(totals)
    return Book(report)


def carry_out(
    plan: list[rp.Candidate], bucket: Any, jobs: Any, rows=False, stops_after=None, rate=0
) -> None:
    stop, pace = StopAfter(stops_after), rp.Pace(rate)
    rp.Rounds(bucket, bucket.book, stop, pace, jobs).run(rp.Spool(plan), rows)


MOODS = ["well", "well", "some fail", "bug", *ERRORS]


@settings(max_examples=250, deadline=None)
@given(
    count=st.integers(0, 60),
    seed=st.integers(0, 10**9),
    moods=st.lists(st.sampled_from(MOODS), min_size=1, max_size=8),
    workers=st.integers(1, 4),
    versioning=st.sampled_from(["off", "enabled"]),
    indexed=st.booleans(),
    rows=st.booleans(),
    breaks_after=st.none() | st.integers(0, 12),
    stops_after=st.none() | st.integers(0, 30),
    threads=st.none() | st.integers(0, 9),
)
def test_every_key_ends_exactly_once(
    count, seed, moods, workers, versioning, indexed, rows, breaks_after, stops_after, threads
):
    """While the run works, some keys come into use, some lose their rows."""
    plan = candidates(count, "expired", "orphan", *(("missing", "shared") if rows else ()))
    reasons = {item.key: item.reason for item in plan}
    dice, kept = random.Random(seed), set[str]()  # found in use, or without rows

    def answer(key: str) -> Jobs:
        luck = dice.random()
        if reasons[key] == "shared":
            return USED if luck < 0.8 else EXPIRED
        if luck >= 0.1:
            return None if reasons[key] == "orphan" else EXPIRED
        kept.add(key)
        return VANISHED if luck < 0.05 and reasons[key] == "expired" else USED

    book = book_of(plan, versioning)
    chance = random.Random(seed + 1)
    bucket = WaywardBucket(iter(lambda: chance.choice(moods), None), book, chance, workers)
    with_rows = {key for key, reason in reasons.items() if reason != "orphan"}
    table = WaywardTable(answer, {*with_rows}, indexed, breaks_after)
    starts = chain(repeat(threading.Thread.start, 10**9 if threads is None else threads),
                   repeat(Mock(side_effect=RuntimeError("can't start new thread"))))  # fmt: skip

    def start(*thread: Any) -> None:
        next(starts)(*thread)

    finished, errors = False, (rp.PurgeError, rp.Interrupted, ZeroDivisionError)
    with pytest.MonkeyPatch.context() as patch, suppress(*errors):
        patch.setattr(threading.Thread, "start", start)
        carry_out(plan, bucket, table, rows, stops_after)
        finished = True

    planned = {key for key, reason in reasons.items() if reason in ("expired", "orphan")}
    ends = book.keys("deleted", "retained", "failed")
    deleted, failed = {*book.keys("deleted")}, {*book.keys("failed")}
    assert len(ends) == len({*ends})
    assert {*ends} <= planned
    told = book.report.as_dict()
    assert told["not_attempted"] == len(planned) - len(ends)
    assert told["not_attempted"] == 0 or not finished
    counted = (book.report.deleted.objects, told["retained"], told["failed"])
    assert counted == (len(deleted), len(book.keys("retained")), len(failed))

    assert deleted <= {*bucket.gone} <= deleted | failed
    assert bucket.late <= deleted | failed, "said to be kept, but will go"
    assert {*book.keys("retained")} <= kept
    unlucky = {"refused", "bug"} & {*moods} or {breaks_after, stops_after, threads} != {None}
    assert finished or unlucky
    if {*moods} == {"well"} and not unlucky:
        assert {*bucket.gone} == planned - kept

    rowless = with_rows - table.rows
    assert rowless <= {*book.keys("delete-job")}
    assert len(rowless) == told["jobs_deleted"]
    may = {key for key, reason in reasons.items() if reason in ("missing", "shared")}
    assert rowless <= (may | deleted if rows else set())
    if finished and rows:
        due = deleted | {key for key, reason in reasons.items() if reason == "missing"}
        assert not due & table.rows


IN_USE, GONE, YET = "a job refers to it by now", "its jobs have vanished", "may yet be deleted"
ENDS: list[tuple[str, list[Jobs], list[str], str, str]] = [
    ("expired", [EXPIRED], ["well"], "deleted", ""),
    ("expired", [USED], [], "retained", IN_USE),
    ("expired", [VANISHED], [], "retained", GONE),
    ("expired", [EXPIRED, USED], ["busy"], "retained", IN_USE),
    ("expired", [EXPIRED, USED], ["not sent"], "retained", IN_USE),
    ("expired", [EXPIRED, USED], ["late"], "failed", YET),
    ("expired", [EXPIRED, EXPIRED, USED], ["late", "busy"], "failed", YET),
    ("expired", [EXPIRED, EXPIRED], ["late", "well"], "deleted", ""),
    ("expired", 5 * [EXPIRED], ["late", "busy", "busy", "busy", "not sent"], "failed", YET),
    ("expired", 5 * [EXPIRED], 5 * ["not sent"], "failed", "not sent"),
    ("expired", 5 * [EXPIRED], 5 * ["lost before"], "failed", "lost before"),
    ("orphan", [EXPIRED], [], "retained", IN_USE),
    ("orphan", [None], ["well"], "deleted", ""),
]


@pytest.mark.parametrize(("reason", "jobs", "moods", "end", "why"), ENDS)
def test_how_a_key_ends(reason, jobs, moods, end, why):
    plan, answers, left = candidates(1, reason), iter(jobs), iter(moods)
    book = book_of(plan)
    bucket = WaywardBucket(left, book, random.Random())
    carry_out(plan, bucket, WaywardTable(lambda key: next(answers)))
    (told,) = [event for event in book.events if event[0] != "delete"]
    assert told[:2] == (end, plan[0].key)
    assert why in told[2]
    assert [*answers, *left] == [], "asked less often"


def test_a_stop_in_two_requests_at_once_still_accounts_for_the_third():
    plan = candidates(12, "expired")
    book = book_of(plan)
    bucket = WaywardBucket(iter(["stop", "stop", "well"]), book, random.Random(), workers=3)
    with pytest.raises(rp.Interrupted):
        carry_out(plan, bucket, WaywardTable(lambda key: EXPIRED))
    ends = book.keys("deleted") + book.keys("failed")
    assert ({*bucket.gone}, len(ends)) == ({*book.keys("deleted")}, 12)


# --- Pace -----------------------------------------------------------------------------------------


def test_the_rate_is_kept_over_time_and_may_begin_with_one_batch():
    now, left = [100.0], []
    pace, unlimited = (rp.Pace(rate, lambda: now[0]) for rate in (3000, 0))
    for _ in range(30):
        now[0] += pace.delay
        left.append(now[0])
        pace.sent(1000)
    assert left[0] == 100.0
    assert left[-1] - left[0] == pytest.approx(29 * 1000 / 3000)
    now[0] += 60  # a rest does not save up for a burst
    pace.sent(1000)
    assert pace.delay == pytest.approx(1000 / 3000)
    unlimited.sent(10**9)
    assert unlimited.delay == 0


def test_all_ease_off_together_and_recover(monkeypatch):
    monkeypatch.setattr(rp, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(rp, "LAST_PAUSE", 10.0)
    now, pauses = [100.0], []
    pace = rp.Pace(0, lambda: now[0])
    for _ in range(12):
        for _ in range(8):  # eight workers are told to slow down at the same time: one pause
            pace.answered(again=True)
        pauses.append(pace.delay)
        now[0] += pace.delay
    assert 0.05 <= pauses[0] <= 0.1
    assert 5 <= pauses[-1] <= 10
    for _ in range(10):
        pace.answered(again=False)
    pace.answered(again=True)
    assert pace.delay <= 0.1


@pytest.mark.parametrize(("rate", "sizes"), [(0, [13, 13, 13, 11]), (1, [10] * 5)])
def test_without_an_index_a_round_holds_what_the_rate_lets_out_in_ten_seconds(rate, sizes):
    """All keys have lost their rows, so that no request waits for the rate."""
    plan = candidates(50, "expired")
    table = WaywardTable(lambda key: VANISHED, indexed=False)
    carry_out(plan, WaywardBucket(iter(()), book_of(plan), random.Random()), table, rate=rate)
    assert table.asked == sizes
