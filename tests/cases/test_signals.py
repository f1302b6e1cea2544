"""Ctrl-C, SIGTERM, SIGHUP, kill -9: what is in flight finishes, every key is accounted for."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from contextlib import contextmanager, suppress
from subprocess import Popen

import pytest
from conftest import AS_OF, Held, World, ended, events, expire, sql
from proxies import Answer, Request
from sandbox import DATABASE, TABLE

SIGNALS = pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)


@SIGNALS
def test_what_is_in_flight_finishes(world, proxy, tmp_path, signum, code):
    expire(world, 6000)
    path = tmp_path / "audit.jsonl"
    held = Held(proxy, "delete")
    process = world.start(*AS_OF, "--json", "--workers", "2", "--audit-log", str(path))
    held.wait()
    process.send_signal(signum)
    time.sleep(0.3)
    held.release()
    result = ended(process, 60)
    assert result.code == code
    summary = result.summary
    assert summary["deleted"]["expired"] == 6000 - len(world.box.live_keys())
    assert 1000 <= summary["deleted"]["expired"] <= 2000
    assert summary["deleted"]["expired"] + summary["not_attempted"] == 6000
    assert summary["failed"] == 0
    assert signal.Signals(signum).name in result.error
    assert events(path)[-1]["event"] == "end"
    assert len(events(path, "delete")) == len(events(path, "deleted"))
    assert world.purge(*AS_OF).code == 0
    assert world.box.live_keys() == []


@SIGNALS
def test_while_planning_it_ends_the_run_with_nothing_deleted(world, proxy, signum, code):
    held = Held(proxy, "list")
    process = world.start(*AS_OF, "--json")
    held.wait()
    process.send_signal(signum)
    time.sleep(0.3)
    held.release()
    result = ended(process, 20)
    assert result.code == code == result.summary["exit_code"]
    assert result.summary["planned"] is None
    assert len(world.box.live_keys()) == 48


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


def test_a_hang_up_is_ignored_under_nohup(world, proxy):
    held = Held(proxy, "list")
    ignore = "rp.signal.signal(rp.signal.SIGHUP, rp.signal.SIG_IGN)"
    process = world.start(*AS_OF, "--json", patch=ignore)
    held.wait()
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    held.release()
    assert ended(process).summary["deleted"]["expired"] == 17


# --- While the database is slow -------------------------------------------------------------------


@contextmanager
def locked_table(world: World):
    """Whoever reads the job table waits. Yields what waits for a reader to be there."""
    with world.box.database.admin(database=DATABASE) as connection:
        connection.cursor().execute(f"LOCK TABLES {TABLE} WRITE")

        def wait() -> None:
            waits = "SELECT 1 FROM information_schema.processlist WHERE state LIKE 'Waiting for%'"
            for _ in range(600):
                if sql(world.box, waits):
                    return
                time.sleep(0.1)
            raise AssertionError("nobody waits")

        yield wait


def heeded(process: Popen[str], signum: int = signal.SIGINT) -> dict[str, object]:
    """The summary of a run that ends by a signal within 10 seconds."""
    process.send_signal(signum)
    result = ended(process, 10)
    assert result.code == 128 + signum
    return result.summary


def test_it_is_heeded_while_the_table_is_read(world):
    with locked_table(world) as wait:
        process = world.start(*AS_OF, "--json")
        wait()
        assert heeded(process)["planned"] is None
    assert len(world.box.live_keys()) == 48


@pytest.mark.parametrize("at", ["list", "delete"], ids=["re-check", "look for rows"])
def test_it_is_heeded_during_a_query_of_the_delete_phase(may_delete, proxy, at):
    world = may_delete
    rows = ["--delete-jobs"] * (at == "delete")  # else its guard would be the first to wait
    held = Held(proxy, at)
    process = world.start(*AS_OF, "--json", *rows)
    held.wait()
    with locked_table(world) as wait:
        held.release()
        wait()
        summary = heeded(process)
    gone = 17 if at == "delete" else 0
    assert (summary["deleted"]["expired"], summary["not_attempted"]) == (gone, 17 - gone)
    assert summary["jobs_deleted"] == 0
    assert len(world.box.live_keys()) == 48 - gone


def test_it_is_heeded_while_s3_asks_to_slow_down(world, proxy):
    slow = Answer(503, b"<Error><Code>SlowDown</Code></Error>")
    asked = threading.Event()

    def before(request: Request) -> Answer | None:
        if request.operation == "delete":
            asked.set()
            return slow
        return None

    proxy.before = before
    process = world.start(*AS_OF, "--json", patch="rp.FIRST_PAUSE = rp.LAST_PAUSE = 25")
    assert asked.wait(60)
    time.sleep(0.5)
    summary = heeded(process, signal.SIGTERM)
    assert summary["failed"] == 17, "it was tried, and S3 did not do it"
    assert len(world.box.live_keys()) == 48


# --- kill -9 --------------------------------------------------------------------------------------


def test_after_kill_9_the_log_names_every_key_that_may_be_gone(world, proxy, tmp_path):
    """Ten runs on one bucket, each killed at a random moment of its delete phase."""
    dice = random.Random(20261123)
    keys = set(expire(world, 3000))
    path = tmp_path / "audit.jsonl"
    killed = 0
    for _ in range(10):
        if len(world.box.live_keys()) < 1000:
            for key in keys:
                world.box.put(key)
        begun = threading.Event()

        def before(request: Request, begun: threading.Event = begun) -> None:
            if request.operation == "delete":
                begun.set()
                time.sleep(dice.random() / 20)

        proxy.before = before
        process = world.start(*AS_OF, "--workers", "2", "--audit-log", str(path))
        assert begun.wait(60)
        time.sleep(dice.random() / 8)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        process.communicate()
        time.sleep(0.2)  # moto finishes what it was asked
        lines = path.read_bytes().split(b"\n")
        whole = [json.loads(line) for line in lines[:-1] if is_json(line)]
        intended = {event["key"] for event in whole if event["event"] == "delete"}
        assert keys - set(world.box.live_keys()) <= intended
        assert lines[-1] == b"" or not is_json(lines[-1])
    assert killed >= 5
    assert world.purge(*AS_OF, "--audit-log", str(path)).code == 0
    assert world.box.live_keys() == []
    assert not [name for name in os.listdir("/tmp") if name.startswith("retention_purge-")]


def is_json(line: bytes) -> bool:
    with suppress(ValueError):
        json.loads(line)
        return True
    return False
