"""Large tables and buckets: few requests, a steady rate, a full disk, progress, the manifest."""

from __future__ import annotations

import csv
import os
import pty
import re
import subprocess
import sys
from bisect import bisect_right
from collections import Counter
from urllib.parse import unquote

import pytest
from conftest import AS_OF, SCRIPT
from hypothesis import given, settings
from hypothesis import strategies as st
from proxies import Answer, Request
from sandbox import BUCKET
from test_bucket import ODD, PLAIN, expire

import retention_purge as rp

MODIFIED = b"2026-03-01T00:00:00.000Z"


class ListedBucket(rp.Bucket):
    """The leapfrog over a sorted list of keys instead of S3's listing."""

    def __init__(self, keys: list[str], workers: int = 3) -> None:
        self.keys, self.prefix = sorted(keys), ""
        self._workers, self._seekers = workers, workers * 4
        self.asked: list[int] = []

    def page(self, after: str = "", limit: int = rp.PAGE, token: str | None = None) -> rp.Page:
        start = bisect_right(self.keys, after)
        self.asked.append(limit)
        keys = self.keys[start : start + limit]
        token = "more" if start + limit < len(self.keys) else None
        return rp.Page(keys, [b"1"] * len(keys), [MODIFIED] * len(keys), token, "bucket")


KEYS = st.text(st.sampled_from("ab\x01\x02\n \U0010ffff\ue000\ud7ff"), min_size=1, max_size=6)


@given(st.sets(KEYS, max_size=60), st.sets(KEYS, max_size=60), st.integers(1, 12))
def test_the_leapfrog_finds_exactly_the_keys_that_exist(objects, wanted, page):
    before = rp.PAGE, rp.SEEK
    rp.PAGE, rp.SEEK = page, min(page, 2)
    try:
        found = [item.key for item in ListedBucket(list(objects)).find(sorted(wanted))]
    finally:
        rp.PAGE, rp.SEEK = before
    assert found == sorted(objects & wanted)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(1, 30), st.randoms(use_true_random=False))
def test_the_leapfrog_makes_no_more_requests_than_keys_and_twice_the_pages(count, every, dice):
    """Runs of dense and of sparse wanted keys."""
    objects = [f"{n:07}" for n in range(count * every * 10)]
    wanted, n = [], 0
    while n < len(objects):
        step = dice.choice([1, 1, every, every * 40])
        for _ in range(dice.randrange(1, 1500)):
            if n < len(objects):
                wanted.append(objects[n])
            n += step
    bucket = ListedBucket(objects)
    assert [item.key for item in bucket.find(wanted)] == wanted
    assert len(bucket.asked) <= len(wanted) + 1


@pytest.mark.parametrize("every", [1, 2, 7, 20])
def test_where_hits_are_dense_the_requests_are_about_the_pages(every):
    objects = [f"{n:07}" for n in range(100_000)]
    bucket = ListedBucket(objects)
    assert len(list(bucket.find(objects[::every]))) == len(objects[::every])
    assert len(bucket.asked) <= 2 * len(objects) / 1000
    assert sum(bucket.asked) <= 2 * len(objects)


def test_where_hits_are_sparse_each_costs_one_small_request():
    objects = [f"{n:07}" for n in range(1_000_000)]
    bucket = ListedBucket(objects)
    assert len(list(bucket.find(objects[::1000]))) == 1000
    assert len(bucket.asked) <= 1001
    assert sum(bucket.asked) <= 1000 * rp.SEEK + rp.PAGE


def test_a_run_of_missing_keys_costs_a_request_a_thousand():
    wanted = [f"m{n:06}" for n in range(50_000)]
    bucket = ListedBucket(["a", "z"])
    assert list(bucket.find(wanted)) == []
    assert len(bucket.asked) <= 60


def test_a_page_out_of_order_is_noticed_by_the_leapfrog_too(world, proxy):
    def after(request: Request, answer: Answer) -> Answer:
        if request.operation == "list":
            parts = re.findall(rb"<Contents>.*?</Contents>", answer.body, re.DOTALL)
            answer.body = answer.body.replace(b"".join(parts), b"".join(parts[::-1]))
        return answer

    expire(world, ["k5"])  # alone, it is in order
    for n in range(10):
        world.box.put(f"k{n}")
    proxy.after = after
    result = world.purge(*AS_OF)
    assert result.code == 1
    assert "out of order" in result.error
    assert proxy.count("delete") == 0


# --- Rate -----------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_rate_is_kept_over_time_and_may_begin_with_one_batch():
    clock = Clock()
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


def test_no_rate_is_no_limit():
    pace = rp.Pace(0, Clock())
    pace.sent(10**9)
    assert pace.delay == 0


def test_all_ease_off_together_and_recover():
    clock = Clock()
    pace = rp.Pace(0, clock)
    pauses = []
    for _ in range(12):
        for _ in range(8):  # eight workers are told to slow down at the same time: one pause
            pace.ease_off()
        pauses.append(pace.delay)
        clock.now += pace.delay
    assert 0.05 <= pauses[0] <= 0.1
    assert 5 <= pauses[-1] <= rp.LAST_PAUSE
    for _ in range(10):
        pace.recover()
    pace.ease_off()
    assert pace.delay <= 0.1


def test_max_rate_holds_a_real_run_back(world):
    expire(world, [f"k{n:05}" for n in range(3000)])
    slow = world.purge(*AS_OF, "--json", "--max-rate", "1000").summary
    assert slow["deleted"]["expired"] == 3000
    assert slow["seconds"] >= 2


def test_slow_down_of_s3_makes_the_run_slower_not_wrong(world, proxy):
    expire(world, [f"k{n:05}" for n in range(5000)])
    dice = Counter()

    def before(request: Request) -> Answer | None:
        if request.operation == "delete":
            dice["n"] += 1
            if dice["n"] % 3:
                body = b"<Error><Code>SlowDown</Code><Message>easy</Message></Error>"
                return Answer(503, body)
        return None

    proxy.before = before
    result = world.purge(*AS_OF, "--json", "--workers", "4")
    assert result.summary["deleted"]["expired"] + result.summary["failed"] == 5000
    assert result.summary["deleted"]["expired"] >= 4000


# --- Disk, memory ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs privileges that this machine does not give")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_for_the_spool_ends_the_run_with_nothing_deleted(world, small_disk):
    expire(world, [f"{'k' * 50}{n:05}" for n in range(9000)])
    result = world.purge(*AS_OF, TMPDIR=str(small_disk))
    assert result.code == 1
    assert "TMPDIR" in result.error
    assert len(world.box.live_keys()) == 9000
    assert os.listdir(small_disk) == []


def test_a_full_disk_for_the_audit_log_ends_the_run_between_batches(world, small_disk):
    expire(world, [f"k{n:05}" for n in range(5000)])
    log = small_disk / "audit.jsonl"
    result = world.purge(*AS_OF, "--audit-log", str(log), "--json", "--workers", "1")
    assert result.code == 1
    summary = result.summary
    assert "audit log" in summary["error"]
    assert summary["deleted"]["expired"] == 5000 - len(world.box.live_keys())
    assert summary["deleted"]["expired"] + summary["failed"] == 5000
    gone = {f"k{n:05}" for n in range(5000)} - set(world.box.live_keys())
    intended = set(re.findall(r'"event": "delete", .*?"key": "(.*?)"', log.read_text()))
    assert gone <= intended


# --- Progress -------------------------------------------------------------------------------------


def test_on_a_terminal_each_phase_has_a_progress_bar(world):
    expire(world, [f"k{n:05}" for n in range(3000)])
    ours, theirs = pty.openpty()
    environment = world.box.environment | world.settings | {"TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *AS_OF],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:
        pass  # the terminal is gone with the process
    assert process.wait(60) == 0
    text = shown.decode()
    for phase in ("reading references", "listing", "deleting"):
        assert phase in text
    assert "3000/3000" in text
    assert re.search(r"[\d,]+/s", text)


def test_a_cron_log_gets_a_line_a_minute_at_most(monkeypatch, caplog):
    clock = Clock()
    monkeypatch.setattr(rp.time, "monotonic", clock)
    monkeypatch.setattr(rp.log, "propagate", True)

    def items():
        for n in range(100_000):
            clock.now += 0.003  # 300 seconds in all
            yield n

    with caplog.at_level("INFO", "retention_purge"):
        assert sum(1 for _ in rp.watched(items(), "listing", 100_000)) == 100_000
    lines = [record.getMessage() for record in caplog.records]
    assert 4 <= len(lines) <= 5
    assert re.fullmatch(r"listing: [\d,]+ of 100,000, 240 s left, 333/s", lines[0])


# --- Manifest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dry", [[], ["-n"]], ids=["real", "dry"])
def test_the_manifest_is_the_plan_for_s3_batch_operations(world, tmp_path, dry):
    keys = [*ODD, *PLAIN, "a,b", 'c"d']
    expire(world, keys)
    path = tmp_path / "manifest.csv"
    assert world.purge(*AS_OF, "--manifest", str(path), *dry).code == 0
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == [BUCKET] * len(keys)
    assert [unquote(row[1]) for row in rows] == sorted(keys)
    assert all(len(row) == 2 and row[1].isascii() for row in rows)
    assert os.listdir(tmp_path) == ["manifest.csv"]


def test_a_refused_plan_gets_no_manifest(world, tmp_path):
    path = tmp_path / "manifest.csv"
    assert world.purge(*AS_OF, "-n", "--manifest", str(path), "--max-objects", "1").code == 3
    assert not path.exists()


def test_a_manifest_that_cannot_be_written_stops_the_run(world):
    result = world.purge(*AS_OF, "--manifest", "/no/such/folder/manifest")
    assert result.code == 1
    assert "manifest" in result.error
    assert len(world.box.live_keys()) == 48
