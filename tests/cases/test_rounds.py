"""The delete phase in one process: each planned key ends once, whatever S3 and the table say."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import retention_purge as rp

PREFIX = "p/"


@dataclass
class WaywardBucket:
    """S3's side of `Rounds`: deletes, refuses, forgets, fails, or deletes later, as the dice have
    it. `late` will be gone after the run."""

    dice: random.Random
    moods: list[str]
    book: Book
    workers: int
    name: str = "b"
    prefix: str = PREFIX
    s3_lead: timedelta = timedelta()
    gone: dict[str, rp.Version] = field(default_factory=dict)  # key -> its delete marker
    late: set[str] = field(default_factory=set)
    lock: Any = field(default_factory=threading.Lock)

    def delete(self, items: list[rp.Candidate], checked: float) -> list[rp.Verdict]:
        with self.lock:
            assert {item.key for item in items} <= self.book.intended
            mood = self.dice.choice(self.moods)
            if mood == "not sent":
                raise rp.PurgeError("too old", code="NotSent")
            if mood == "refused":
                raise rp.PurgeError("denied", code="AccessDenied")
            if mood == "bug":
                raise ZeroDivisionError
            if mood == "busy":
                raise rp.PurgeError("slow down", code="SlowDown")
            if mood == "late":
                self.late |= {item.key for item in items}
            if mood in ("late", "lost before"):
                raise rp.PurgeError("reset", code="NoAnswer")
            verdicts = [self._one(item, mood) for item in items]
            if mood == "lost after":
                raise rp.PurgeError("reset", code="NoAnswer")
            return verdicts

    def _one(self, item: rp.Candidate, mood: str) -> rp.Verdict:
        if mood == "some fail" and self.dice.random() < 0.4:
            return rp.Verdict(self.dice.choice(["SlowDown", "AccessDenied", "NoAnswer"]), "no")
        versioned = self.book.report.versioning == "enabled"
        assert item.key not in self.gone or not versioned, "a second marker"
        marker = rp.Version(f"marker of {item.key}", datetime.now(UTC), True, True)
        self.gone[item.key] = marker
        return rp.Verdict(marker=marker.version_id)

    def each(self, ask: Any, keys: Iterable[str]) -> Iterator[Any]:
        return map(ask, keys)

    def versions(self, key: str) -> list[rp.Version]:
        return [self.gone[key]] if key in self.gone else []


@dataclass
class WaywardTable:
    """The job table: some keys come into use, some lose their rows, while the run works."""

    dice: random.Random
    plan: list[rp.Candidate]
    breaks_after: int | None
    indexed: bool
    asked: int = 0
    kept: set[str] = field(default_factory=set)  # keys that a re-check has found in use, or rowless
    rows: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.reasons = {item.key: item.reason for item in self.plan}
        self.rows = {key for key, reason in self.reasons.items() if reason != "orphan"}

    def ping(self) -> None:
        self.asked += 1
        if self.breaks_after is not None and self.asked > self.breaks_after:
            raise rp.PurgeError("gone", code="2013")

    def referenced(self, names: Iterable[str]) -> dict[str, rp.Reference]:
        self.ping()
        return {name: jobs for name in names if (jobs := self._jobs(name)) is not None}

    def _jobs(self, name: str) -> rp.Reference | None:
        key, dice = PREFIX + name, self.dice.random()
        in_use = rp.Reference(name, 2, 1)
        if self.reasons[key] == "shared":
            return in_use if dice < 0.8 else rp.Reference(name, 1, 1)
        self.kept |= {key} if dice < 0.1 else set()
        if self.reasons[key] == "orphan":
            return in_use if dice < 0.1 else None
        return None if dice < 0.05 else in_use if dice < 0.1 else rp.Reference(name, 1, 1)

    def expired_rows(self, names: Iterable[str]) -> list[rp.JobRow]:
        found = [name for name in names if PREFIX + name in self.rows]
        return [(f"job {name}", "then", name) for name in found[: rp.ROWS]]

    def delete(self, rows: list[rp.JobRow]) -> int:
        self.rows -= {PREFIX + name for _, _, name in rows}
        return len(rows)


class Book(rp.Ledger):
    """A ledger that remembers how each key ended."""

    def __init__(self, report: rp.Report) -> None:
        super().__init__(report)
        self.ends: dict[str, list[str]] = {}
        self.whys: Counter[str] = Counter()
        self.intended: set[str] = set()
        self.row_intents: set[str] = set()

    def of(self, *ends: str) -> set[str]:
        return {key for key, found in self.ends.items() if found[0] in ends}

    def intend(self, items: list[rp.Candidate]) -> None:
        self.intended |= {item.key for item in items}

    def write(self, event: str, items: Iterable[dict[str, Any]], sync: bool = False) -> None:
        if event == "delete-job":
            self.row_intents |= {item["key"] for item in items if sync}

    def deleted(self, item: rp.Candidate, marker: str | None) -> None:
        super().deleted(item, marker)
        self.ends.setdefault(item.key, []).append("deleted")

    def retained(self, item: rp.Candidate, why: str) -> None:
        super().retained(item, why)
        self.ends.setdefault(item.key, []).append("retained")
        self.whys[why] += 1

    def failed(self, item: rp.Candidate, verdict: rp.Verdict) -> None:
        super().failed(item, verdict)
        self.ends.setdefault(item.key, []).append("failed")
        self.whys[verdict.message] += 1


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

    @contextmanager
    def reading(self) -> Iterator[None]:
        self.check()
        yield


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small batches and rounds, no pauses."""
    for name, value in {"BATCH": 4, "ROUND_KEYS": 13, "ROUND_BYTES": 900, "ROWS": 5}.items():
        monkeypatch.setattr(rp, name, value)
    for name, value in {"FIRST_PAUSE": 0.0, "LAST_PAUSE": 0.0, "ROWS_A_COMMIT": 2}.items():
        monkeypatch.setattr(rp, name, value)
    monkeypatch.setattr(rp.log, "disabled", True)


def candidates(count: int, *reasons: str) -> list[rp.Candidate]:
    reasons = reasons or ("expired",)
    return [
        rp.Candidate(f"{PREFIX}{n:03}", reasons[n % len(reasons)], 1, "then") for n in range(count)
    ]


def report_of(plan: list[rp.Candidate], versioning: str = "off") -> rp.Report:
    totals = rp.Totals()
    for item in plan:
        totals.planned.add(item)
    report = rp.Report(versioning=versioning)
    report.plan(totals)
    return report


MOODS = ["well", "well", "some fail", "lost before", "lost after", "late", "busy", "not sent",
         "refused", "bug"]  # fmt: skip


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
)
def test_every_key_ends_exactly_once(
    count, seed, moods, workers, versioning, indexed, rows, breaks_after, stops_after
):
    plan = candidates(count, "expired", "orphan", *(("missing", "shared") if rows else ()))
    report = report_of(plan, versioning)
    book = Book(report)
    bucket: Any = WaywardBucket(random.Random(seed), moods, book, workers)
    table: Any = WaywardTable(random.Random(seed + 1), plan, breaks_after, indexed)
    stop = StopAfter(stops_after)
    finished = False
    with suppress(rp.PurgeError, rp.Interrupted, ZeroDivisionError):
        spool = rp.Spool(plan)
        rp.Rounds(bucket, book, stop, rp.Pace(0), table).run(spool, rows)
        finished = True

    planned = {item.key for item in plan if item.reason in ("expired", "orphan")}
    assert all(len(ends) == 1 for ends in book.ends.values())
    assert set(book.ends) <= planned
    left = report.as_dict()["not_attempted"]
    assert left == len(planned) - len(book.ends)
    assert left == 0 or not finished
    assert report.deleted.objects + report.retained + report.failed + left == len(planned)

    gone = set(bucket.gone)
    assert book.of("deleted") <= gone <= book.of("deleted", "failed")
    assert bucket.late <= book.of("deleted", "failed"), "said to be kept, but will go"
    assert book.of("retained") <= table.kept
    unlucky = {"refused", "bug"} & {*moods} or breaks_after is not None or stops_after is not None
    assert finished or unlucky
    if set(moods) == {"well"} and not unlucky:
        assert gone == planned - table.kept

    rowless = {key for key, reason in table.reasons.items() if reason != "orphan"} - table.rows
    assert rowless <= book.row_intents
    assert len(rowless) == report.jobs_deleted
    may = {key for key, reason in table.reasons.items() if reason in ("missing", "shared")}
    assert rowless <= (may | book.of("deleted") if rows else set())
    if finished and rows:
        due = book.of("deleted") | {item.key for item in plan if item.reason == "missing"}
        assert not due & table.rows


# --- How a key may end ----------------------------------------------------------------------------


class Table(WaywardTable):
    """Jobs as they are given, for each time that it is asked."""

    def __init__(self, *answers: tuple[int, int] | None) -> None:
        super().__init__(random.Random(), [], None, indexed=True)
        self.answers = list(answers)

    def _jobs(self, name: str) -> rp.Reference | None:
        found = self.answers.pop(0)
        return None if found is None else rp.Reference(name, *found)


class Bucket(WaywardBucket):
    """Moods as they are given, for each request."""

    def __init__(self, *moods: str, book: Book) -> None:
        super().__init__(random.Random(), list(moods), book, workers=1)
        self.dice.choice = lambda moods: moods.pop(0)  # type: ignore[method-assign]


EXPIRED, USED, VANISHED = (1, 1), (2, 1), None


@pytest.mark.parametrize(
    ("jobs", "moods", "end", "why"),
    [
        ([EXPIRED], ["well"], "deleted", None),
        ([USED], [], "retained", "a job refers to it by now"),
        ([VANISHED], [], "retained", "its jobs have vanished"),
        ([EXPIRED, USED], ["busy"], "retained", "a job refers to it by now"),
        ([EXPIRED, USED], ["not sent"], "retained", "a job refers to it by now"),
        ([EXPIRED, USED], ["late"], "failed", "it may yet be deleted"),
        ([EXPIRED, VANISHED], ["late"], "failed", "it may yet be deleted"),
        ([EXPIRED, EXPIRED, USED], ["late", "busy"], "failed", "it may yet be deleted"),
        ([EXPIRED, EXPIRED], ["late", "well"], "deleted", None),
        ([EXPIRED, EXPIRED], ["not sent", "well"], "deleted", None),
        (5 * [EXPIRED], 5 * ["not sent"], "failed", "too old"),
        (5 * [EXPIRED], 5 * ["lost before"], "failed", "reset"),
    ],
)
def test_how_a_key_ends(jobs, moods, end, why):
    plan = candidates(1)
    book = Book(report_of(plan))
    table: Any = Table(*jobs)
    bucket: Any = Bucket(*moods, book=book)
    rp.Rounds(bucket, book, rp.Stop(), rp.Pace(0), table).run(rp.Spool(plan))
    assert book.ends == {plan[0].key: [end]}
    assert why is None or [found for found in book.whys if why in found]
    assert (table.answers, bucket.moods) == ([], [])


@pytest.mark.parametrize(("reason", "jobs", "end"), [("orphan", (1, 1), "retained"),
                         ("orphan", None, "deleted"), ("expired", (1, 1), "deleted")])  # fmt: skip
def test_an_orphan_that_any_job_took_in_since_is_kept(reason, jobs, end):
    plan = candidates(1, reason)
    book = Book(report_of(plan))
    table, bucket = Table(jobs), Bucket("well", book=book)
    rp.Rounds(bucket, book, rp.Stop(), rp.Pace(0), table).run(  # type: ignore[arg-type]
        rp.Spool(plan)
    )
    assert book.ends == {plan[0].key: [end]}


def test_a_thread_that_cannot_start_stops_the_run_and_it_still_adds_up(monkeypatch):
    plan = candidates(20)
    report = report_of(plan)
    book = Book(report)
    bucket: Any = WaywardBucket(random.Random(), ["well"], book, workers=1)
    table: Any = WaywardTable(random.Random(3), plan, None, indexed=True)
    monkeypatch.setattr(table, "_jobs", lambda name: rp.Reference(name, 1, 1))
    start = threading.Thread.start
    left = [2]

    def few(thread: threading.Thread) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", few)
    with pytest.raises(rp.PurgeError, match="lower --workers"):
        rp.Rounds(bucket, book, rp.Stop(), rp.Pace(0), table).run(rp.Spool(plan))
    left_over = report.as_dict()["not_attempted"]
    assert (len(book.of("deleted")), report.failed + left_over) == (8, 12)
    assert set(bucket.gone) == book.of("deleted")


# --- Pace -----------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_rate_is_kept_over_time_and_may_begin_with_one_batch(clock):
    pace = rp.Pace(3000, clock)
    left = []
    for _ in range(30):
        clock.now += pace.delay
        left.append(clock.now)
        pace.sent(1000)
    assert left[0] == 100.0
    assert left[-1] - left[0] == pytest.approx(29 * 1000 / 3000)
    clock.now += 60  # a rest does not save up for a burst
    pace.sent(1000)
    assert pace.delay == pytest.approx(1000 / 3000)


def test_no_rate_is_no_limit(clock):
    pace = rp.Pace(0, clock)
    pace.sent(10**9)
    assert pace.delay == 0


def test_all_ease_off_together_and_recover(clock, monkeypatch):
    monkeypatch.setattr(rp, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(rp, "LAST_PAUSE", 10.0)
    pace = rp.Pace(0, clock)
    pauses = []
    for _ in range(12):
        for _ in range(8):  # eight workers are told to slow down at the same time: one pause
            pace.answered(again=True)
        pauses.append(pace.delay)
        clock.now += pace.delay
    assert 0.05 <= pauses[0] <= 0.1
    assert 5 <= pauses[-1] <= 10
    for _ in range(10):
        pace.answered(again=False)
    pace.answered(again=True)
    assert pace.delay <= 0.1


def test_without_an_index_a_round_holds_what_the_rate_lets_out_in_ten_seconds(monkeypatch):
    monkeypatch.setattr(rp, "ROUND_BYTES", 10**9)
    plan = candidates(50)
    book = Book(report_of(plan))
    bucket: Any = WaywardBucket(random.Random(), ["well"], book, workers=1)
    for rate, sizes in {0: [13, 13, 13, 11], 1: [10] * 5}.items():
        table: Any = WaywardTable(random.Random(), plan, None, indexed=False)
        rounds = rp.Rounds(bucket, book, rp.Stop(), rp.Pace(rate), table)
        assert [len(items) for items in rounds._cut(plan)] == sizes
