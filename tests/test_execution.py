"""The delete phase in one process: every planned key is counted once, whatever S3 answers."""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import retention_purge as rp

NOW = datetime(2026, 3, 1, tzinfo=UTC)


@dataclass
class WaywardBucket:
    """S3's side of `Execution`: deletes, refuses, forgets, or fails, as the dice have it."""

    dice: random.Random
    moods: list[str]
    versioning: str = "off"
    gone: dict[str, str] = field(default_factory=dict)  # key → its delete marker
    lock: Any = field(default_factory=threading.Lock)

    def delete(self, candidates: list[rp.Candidate]) -> list[rp.Verdict]:
        with self.lock:
            mood = self.dice.choice(self.moods)
            if mood == "refused":
                raise rp.BucketError("denied", "AccessDenied")
            if mood == "bug":
                raise ZeroDivisionError
            if mood == "lost before":
                raise rp.BucketError("reset", "NoAnswer")
            verdicts = [self._one(item, mood) for item in candidates]
            if mood == "lost after":
                raise rp.BucketError("reset", "NoAnswer")
            return verdicts

    def _one(self, item: rp.Candidate, mood: str) -> rp.Verdict:
        code = self.dice.choice(["SlowDown", "AccessDenied"])
        if mood == "some fail" and self.dice.random() < 0.4:
            return rp.Verdict(item.key, code, "no")
        assert item.key not in self.gone or self.versioning == "off", "a second marker"
        self.gone[item.key] = f"marker of {item.key}"
        return rp.Verdict(item.key, marker=self.gone[item.key])

    def find(self, keys: list[str]) -> list[rp.S3Object]:
        return [rp.S3Object(key, 1, NOW) for key in keys if key not in self.gone]

    def markers(self, key: str) -> dict[str, bool]:
        return {self.gone[key]: True} if key in self.gone else {}


class Book(rp.Ledger):
    """A ledger that remembers how each key ended."""

    def __init__(self, report: rp.Report) -> None:
        super().__init__(report)
        self.ends: Counter[str] = Counter()
        self.deleted_keys: set[str] = set()
        self.retained_keys: set[str] = set()
        self.intended: set[str] = set()

    def intend(self, candidates: list[rp.Candidate]) -> None:
        self.intended |= {item.key for item in candidates}

    def deleted(self, item: rp.Candidate, marker: str | None) -> None:
        super().deleted(item, marker)
        self.ends[item.key] += 1
        self.deleted_keys.add(item.key)

    def retained(self, item: rp.Candidate) -> None:
        super().retained(item)
        self.retained_keys.add(item.key)
        self.ends[item.key] += 1

    def failed(self, item: rp.Candidate, verdict: rp.Verdict) -> None:
        super().failed(item, verdict)
        self.ends[item.key] += 1


MOODS = ["well", "well", "some fail", "lost before", "lost after", "refused", "bug"]


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(0, 60),
    seed=st.integers(0, 10**9),
    moods=st.lists(st.sampled_from(MOODS), min_size=1, max_size=8),
    workers=st.integers(1, 4),
    versioning=st.sampled_from(["off", "enabled"]),
    dear=st.booleans(),
    break_after=st.none() | st.integers(0, 12),
)
def test_every_key_ends_exactly_once(count, seed, moods, workers, versioning, dear, break_after):
    bucket = WaywardBucket(random.Random(seed), moods, versioning)
    report = rp.Report("purge", "b", "", "t", versioning=versioning)
    book = Book(report)
    stop: Any = SimpleNamespace(event=threading.Event(), check=lambda: None)
    dice, asked = random.Random(seed + 1), Counter()
    used_ever: set[str] = set()

    def in_use(candidates: list[rp.Candidate]) -> set[str]:
        asked["n"] += 1
        if break_after is not None and asked["n"] > break_after:
            raise rp.DatabaseError("gone")
        used = {item.key for item in candidates if dice.random() < 0.05}
        used_ever.update(used)
        return used

    planned = [
        rp.Candidate(f"k{n:03}", 1, NOW.isoformat(), rp.Reason.EXPIRED) for n in range(count)
    ]
    options: Any = SimpleNamespace(workers=workers, max_rate=0)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "BATCH": 4,
            "CHUNK_BYTES": 600,
            "FIRST_PAUSE": 0,
            "LAST_PAUSE": 0,
        }.items():
            patch.setattr(rp, name, value)
        for bound in ("CHEAP_RECHECK", "DEAR_RECHECK"):
            patch.setattr(rp, bound, -1 if dear else 10)
        patch.setattr(rp.log, "disabled", True)
        try:
            rp.Execution(bucket, book, stop, options, in_use, 8).run(planned)  # type: ignore[arg-type]
            finished = True
        except (rp.PurgeError, ZeroDivisionError):
            finished = False
    assert book.ends == Counter(item.key for item in planned)
    assert report.deleted.objects + report.retained + report.failed == count
    assert book.deleted_keys <= set(bucket.gone) <= book.intended
    assert not set(bucket.gone) & book.retained_keys, "said to be kept, but gone"
    assert finished or "refused" in moods or "bug" in moods or break_after is not None
    if set(moods) == {"well"} and break_after is None:
        assert set(bucket.gone) == {item.key for item in planned} - used_ever
    assert not threading.active_count() > workers + 20
