"""Ctrl-C, SIGTERM, SIGHUP, kill -9: what is in flight finishes, every key is accounted for."""

from __future__ import annotations

import signal
import threading
import time

import pytest
from conftest import AS_OF, Held, ended, events, expire
from proxies import Answer, Request
from test_recheck import locked_table

SMALL = "rp.BATCH = 100"


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_what_is_in_flight_finishes_and_the_next_run_does_the_rest(
    world, proxy, tmp_path, signum, code
):
    expire(world, 600)
    path = tmp_path / "audit.jsonl"
    held = Held(proxy, "delete")
    options = (*AS_OF, "--json", "--workers", "2", "--audit-log", str(path))
    process = world.start(*options, patch=SMALL)
    held.wait()
    process.send_signal(signum)
    time.sleep(0.3)
    held.release()
    result = ended(process)
    summary, deleted = result.summary, 600 - len(world.box.live_keys())
    assert (result.code, summary["failed"]) == (code, 0)
    assert deleted in (100, 200)
    assert (summary["deleted"]["expired"], summary["not_attempted"]) == (deleted, 600 - deleted)
    assert signal.Signals(signum).name in result.error
    assert events(path)[-1]["event"] == "end"
    assert len(events(path, "delete")) == len(events(path, "deleted")) == deleted
    assert world.purge(*AS_OF).code == 0
    assert world.box.live_keys() == []


def test_a_second_one_stops_at_once(world, proxy):
    held = Held(proxy, "delete")
    process = world.start(*AS_OF)
    held.wait()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None, "the first signal waits for what is in flight"
    process.send_signal(signal.SIGTERM)
    assert ended(process, 10).code == -signal.SIGTERM
    held.release()


# --- In each phase within 10 seconds --------------------------------------------------------------


@pytest.mark.parametrize(
    ("signum", "patch", "code", "left"),
    [
        (signal.SIGINT, "", 130, 48),
        (signal.SIGHUP, "rp.signal.signal(rp.signal.SIGHUP, rp.signal.SIG_IGN)", 0, 31),
    ],
    ids=["stops", "ignored under nohup"],
)
def test_while_the_bucket_is_listed_it_ends_the_run_with_nothing_deleted(
    world, proxy, signum, patch, code, left
):
    held = Held(proxy, "list")
    process = world.start(*AS_OF, "--json", patch=patch)
    held.wait()
    process.send_signal(signum)
    time.sleep(0.3)
    held.release()
    result = ended(process, 10)
    assert (result.code, len(world.box.live_keys())) == (code, left)
    assert (result.summary["planned"] is None) == (code > 0)


@pytest.mark.parametrize(
    ("after", "options", "gone"),
    [("versioning", [], None), ("list", [], 0), ("delete", ["--delete-jobs"], 17)],
    ids=["while_the_table_is_read", "re-check", "job rows are read"],
)
def test_it_is_heeded_while_the_database_is_slow(may_delete, proxy, after, options, gone):
    world = may_delete
    held = Held(proxy, after)
    process = world.start(*AS_OF, "--json", *options)
    held.wait()
    with locked_table(world) as wait:
        held.release()
        wait()
        process.send_signal(signal.SIGINT)
        result = ended(process, 10)
    summary = result.summary
    assert result.code == 130
    assert (summary["planned"] is None) == (gone is None)
    assert (summary["deleted"]["expired"], summary["jobs_deleted"]) == (gone or 0, 0)
    assert summary["not_attempted"] == (None if gone is None else 17 - gone)
    assert len(world.box.live_keys()) == 48 - (gone or 0)


def test_it_is_heeded_while_s3_asks_to_slow_down(world, proxy):
    asked = threading.Event()

    def before(request: Request) -> Answer | None:
        if request.operation != "delete":
            return None
        asked.set()
        return Answer(503, b"<Error><Code>SlowDown</Code></Error>")

    proxy.before = before
    process = world.start(*AS_OF, "--json", patch="rp.FIRST_PAUSE = rp.LAST_PAUSE = 25")
    assert asked.wait(60)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    result = ended(process, 10)
    assert (result.code, result.summary["failed"]) == (143, 17), "tried, and S3 did not do it"
    assert len(world.box.live_keys()) == 48


def test_after_kill_9_the_next_run_finishes_the_work(world, proxy):
    """What an undo then finds in the log is in test_undo; random moments are in test_properties."""
    expire(world, 300)
    held = Held(proxy, "delete")
    process = world.start(*AS_OF, patch=SMALL)
    held.wait()
    process.kill()
    held.release()
    assert ended(process).code == -signal.SIGKILL
    assert world.purge(*AS_OF).code == 0
    assert world.box.live_keys() == []
    assert world.purge(*AS_OF, "--json").summary["planned"]["expired"] == 0
