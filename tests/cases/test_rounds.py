"""The delete phase in one process: each planned key ends once, whatever S3 and the table say."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import retention_purge as rp

PREFIX = "p/"
EXPIRED, USED, VANISHED = (1, 1), (2, 1), None  # jobs of a key at its re-check: all, expired


class Book(rp.Ledger):
    """A ledger whose audit log is a list."""

    def __init__(self, report: rp.Report) -> None:
        super().__init__(report)
        self._file: Any = "of no use"
        self.events: list[tuple[str, str, str]] = []  # what, of which key, by which code

    def write(self, event: str, items: Iterable[dict[str, Any]], sync: bool = False) -> None:
        assert sync or event != "delete"
        self.events += [(event, item["key"], item.get("code", "")) for item in items]

    def keys(self, *events: str) -> list[str]:
        return [key for event, key, _ in self.events if event in events]


# What a request may end in, and the error that the run gets for it, if any.
CODES = {"not sent": "NotSent", "refused": "AccessDenied", "busy": "SlowDown", "late": "NoAnswer",
         "lost before": "NoAnswer", "lost after": "NoAnswer"}  # fmt: skip
ERRORS = {mood: partial(rp.PurgeError, mood, code=code) for mood, code in CODES.items()}
ERRORS |= {"bug": ZeroDivisionError, "stop": rp.Interrupted}
MOODS = ["well", "well", "some fail", *ERRORS]


class WaywardBucket:
    """S3's side of `Rounds`: deletes, refuses, forgets, fails, or deletes later, by its mood of the
    moment. What is `late` will be gone after the run, what is `kept` must stay."""

    prefix, s3_lead, each = PREFIX, timedelta(), map

    def __init__(self, moods: list[str], book: Book, dice: random.Random, kept: set[str]) -> None:
        self.moods, self.book, self.dice, self.kept = moods, book, dice, kept
        self.workers, self.lock = dice.randint(1, 4), threading.Lock()
        self.gone: dict[str, rp.Version] = {}  # key -> its delete marker
        self.late, self.met = set[str](), set[str]()  # keys; moods

    def delete(self, items: list[rp.Candidate], checked: float) -> list[rp.Verdict]:
        with self.lock:
            keys, mood = {item.key for item in items}, self.dice.choice(self.moods)
            assert keys <= {*self.book.keys("delete")} - self.kept, "no intent, or in use"
            self.met.add(mood)
            self.late |= keys if mood == "late" else set()
            acts = mood in ("well", "some fail", "lost after")
            verdicts = [self._one(item.key, mood) for item in items if acts]
            if mood in ERRORS:
                raise ERRORS[mood]()
            return verdicts

    def _one(self, key: str, mood: str) -> rp.Verdict:
        if mood == "some fail" and self.dice.random() < 0.4:
            return rp.Verdict(self.dice.choice(["SlowDown", "AccessDenied", "NoAnswer"]), "no")
        versioned = self.book.report.versioning == "enabled"
        assert key not in self.gone or not versioned, "a second marker"
        self.gone[key] = rp.Version(f"marker of {key}", datetime.now(UTC), True, True)
        return rp.Verdict(marker=self.gone[key].version_id)

    def versions(self, key: str) -> list[rp.Version]:
        return [self.gone[key]] if key in self.gone else []


# At a look into the database, where a stop signal would be heeded, at the start of a thread.
TROUBLES = {"table": rp.PurgeError("gone"), "stop": rp.Interrupted(), "thread": RuntimeError()}


def carry_out(plan: Any, bucket: Any, answer: Any, indexed: bool, comes: Any, **more: int) -> None:
    """In small batches and rounds, without pauses. `comes` raises when a trouble does."""
    bucket.stop, start = rp.Stop(), threading.Thread.start
    bucket.stop.check = lambda: comes("stop")

    def referenced(names: set[str]) -> dict[str, rp.Reference]:
        comes("table")
        found = {name: answer(PREFIX + name) for name in names}
        return {name: rp.Reference(name, *jobs) for name, jobs in found.items() if jobs}

    def start_or_not(thread: threading.Thread) -> None:
        comes("thread")
        start(thread)

    jobs: Any = SimpleNamespace(indexed=indexed, referenced=referenced, ping=lambda: comes("table"))
    sizes = {"BATCH": 4, "ROUND_KEYS": 13, "ROUND_BYTES": 900, "FIRST_PAUSE": 0, "LAST_PAUSE": 0}
    threads = patch.object(threading.Thread, "start", start_or_not)
    with patch.multiple(rp, **sizes | more), patch.object(rp.log, "disabled", True), threads:
        rp.Rounds(bucket, bucket.book, rp.Pace(0), jobs).run(rp.Spool(plan))


SOME = st.lists(st.sampled_from(MOODS), min_size=1, max_size=8)
TROUBLE = st.tuples(st.sampled_from([None, *TROUBLES]), st.integers(0, 20))  # and its moment


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 60), st.integers(0), SOME, st.booleans(), st.booleans(), TROUBLE)
def test_how_a_key_ends_is_told_exactly_once_be_it_expired_or_an_orphan(
    count, seed, moods, versioned, indexed, trouble
):
    """While the run works, some keys come into use, some lose their rows."""
    reasons = {f"{PREFIX}{n:03}": ("expired", "orphan")[n % 2] for n in range(count)}
    plan = [rp.Candidate(key, reason, 1, "then") for key, reason in reasons.items()]
    orphans = {key for key, reason in reasons.items() if reason == "orphan"}
    dice, kept, totals = random.Random(seed), set[str](), rp.Totals()
    before = iter(range(trouble[1]))

    def comes(kind: str) -> None:
        if kind == trouble[0] and next(before, None) is None:
            raise TROUBLES[kind]

    def answer(key: str) -> tuple[int, int] | None:
        right, wrong = (VANISHED, [EXPIRED]) if key in orphans else (EXPIRED, [VANISHED, USED])
        if dice.random() < 0.9:
            return right
        kept.add(key)
        return dice.choice(wrong)

    totals.planned.update(Counter(reasons.values()))
    report = rp.Report(versioning="enabled" if versioned else "off")
    report.plan(totals)
    book = Book(report)
    bucket = WaywardBucket(moods, book, random.Random(seed + 1), kept)
    finished = False
    with suppress(rp.PurgeError, rp.Interrupted, ZeroDivisionError):
        carry_out(plan, bucket, answer, indexed, comes)
        finished = True

    deleted, failed, retained = map(book.keys, ("deleted", "failed", "retained"))
    told, ends = report.as_dict(), deleted + failed + retained
    assert len(ends) == len({*ends} & {*reasons})
    assert told["not_attempted"] == count - len(ends)
    assert not (finished and told["not_attempted"])
    counted = (report.deleted.objects, told["retained"], told["failed"])
    assert counted == (len(deleted), len(retained), len(failed))

    assert {*deleted} <= {*bucket.gone} <= {*deleted, *failed}
    assert bucket.late <= {*deleted, *failed}, "said to be kept, but will go"
    assert {*retained} <= kept <= {*retained, *failed} or not finished
    stops = {"refused", "bug", "stop"} & bucket.met
    assert not (finished and stops)
    assert finished or stops or trouble[0]
    tries = Counter(book.keys("delete"))
    undone = {key for _, key, code in book.events if code in ("SlowDown", "NotSent")}
    assert not undone & bucket.late
    assert not finished or {tries[key] for key in undone} <= {5}


@pytest.mark.parametrize("indexed", [True, False])
def test_the_rate_is_waited_for_before_a_re_check_and_not_while_it_grows_old(indexed):
    plan, told = [rp.Candidate(f"{PREFIX}{n}", "expired") for n in range(8)], list[str]()
    bucket = WaywardBucket(["well"], Book(rp.Report()), random.Random(0), set())
    bucket.workers = 1

    def answer(key: str) -> tuple[int, int]:
        told.append("re-check")
        return EXPIRED

    with patch.object(rp.time, "sleep", lambda seconds: told.append("pause")):
        carry_out(plan, bucket, answer, indexed, lambda kind: None, ROUND_KEYS=4)
    assert told == 2 * ["pause", *4 * ["re-check"]]


def test_the_rate_is_kept_over_time_and_a_rest_saves_up_no_burst():
    now, delays = [100.0], []
    pace = rp.Pace(3000, lambda: now[0])
    for rest in [0, 0, 0, 60, 0]:
        now[0] += pace.delay + rest
        pace.sent(1000)
        delays.append(pace.delay)
    assert delays == [pytest.approx(1 / 3)] * 5
