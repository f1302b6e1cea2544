"""Ctrl-C, SIGTERM, SIGHUP: what is in flight finishes, every key is accounted for. kill -9 is in
test_undo, and at random moments in test_properties."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import termios
import time
from contextlib import ExitStack, suppress
from subprocess import PIPE, TimeoutExpired
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import AS_OF, Held, ended, events, expire, until, until_gone
from proxies import Answer
from test_recheck import locked_table

import retention_purge as rp


def test_it_is_heeded_while_the_database_is_silent_between_two_requests(world):
    """Where the lock is looked for, before each request of a round without an index."""
    silent = "rp.query(jobs._connection, 'ping', 'SELECT SLEEP(100)')"
    process = world.start(*AS_OF, patch=f"rp.JobTable.ping = lambda jobs: {silent}")
    asleep = "SELECT id FROM information_schema.processlist WHERE info LIKE 'SELECT SLEEP%'"
    until(world.box, asleep)
    process.send_signal(signal.SIGTERM)
    assert process.wait(25) == 143, "10 seconds, and time to end on a slow machine"
    for (thread,) in world.box.sql(asleep):
        world.box.sql(f"KILL {thread}")
    until_gone(world.box)


def test_after_a_stop_nothing_is_waited_for_twice_where_nobody_reads(monkeypatch):
    stop, (reader, writer), waits = rp.Stop(), full_pipe(), list[float]()
    stop.received = signal.SIGTERM
    monkeypatch.setattr(rp.sys, "stderr", os.fdopen(writer, "w"))
    screen, real = rp.Screen(stop), rp.select.select

    def select(*streams: Any) -> Any:
        waits.append(streams[3])
        return real(*streams[:3], 0)

    monkeypatch.setattr(rp.select, "select", select)
    for _ in range(3):
        screen.tell("why")
    assert waits == [1, 0, 0]
    os.close(reader)


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_what_is_in_flight_finishes_and_the_next_run_does_the_rest(world, proxy, tmp_path, signum):
    code = {signal.SIGHUP: 129, signal.SIGINT: 130, signal.SIGTERM: 143}[signum]
    expire(world, 600)
    path, held = tmp_path / "log", Held(proxy, "delete")
    options = (*AS_OF, "--json", "--workers", "2", "--audit-log", str(path))
    process = world.start(*options, patch="rp.BATCH = 100")
    held.wait()
    process.send_signal(signum)
    time.sleep(0.3)  # in which a wrong program may send more
    held.release()
    result = ended(process)
    summary, deleted = result.summary, 600 - len(world.box.live_keys())
    assert (result.code, summary["failed"], deleted in (100, 200)) == (code, 0, True)
    assert (summary["deleted"]["expired"], summary["not_attempted"]) == (deleted, 600 - deleted)
    assert signal.Signals(signum).name in result.error
    assert events(path)[-1]["event"] == "end"
    assert len(events(path, "delete")) == len(events(path, "deleted")) == deleted
    assert (world.purge(*AS_OF).code, world.box.live_keys()) == (0, [])


def test_a_second_one_stops_at_once_and_the_next_run_finishes_the_work(world, proxy):
    held = Held(proxy, "delete")
    process = world.start(*AS_OF)
    held.wait()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)  # in which a wrong program may end
    assert process.poll() is None, "the first signal waits for what is in flight"
    for _ in range(100):  # one that comes in the same second as the first counts for nothing
        process.send_signal(signal.SIGTERM)
        with suppress(TimeoutExpired):
            process.wait(0.3)
            break
    assert ended(process, 30).code == -signal.SIGTERM
    held.release()
    until_gone(world.box)
    assert (world.purge(*AS_OF).code, len(world.box.live_keys())) == (0, 31)


def test_a_hang_up_is_ignored_under_nohup(world, proxy):
    held = Held(proxy, "list")
    process = world.start(*AS_OF, patch="rp.signal.signal(rp.signal.SIGHUP, rp.signal.SIG_IGN)")
    held.wait()
    process.send_signal(signal.SIGHUP)
    held.release()
    assert (ended(process).code, len(world.box.live_keys())) == (0, 31)


@pytest.mark.parametrize(
    ("held_at", "is_locked", "gone"),
    [("versioning", True, None), ("list", False, None), ("list", True, 0), ("delete", True, 17)],
    ids=["while_the_table_is_read", "listing", "re-check", "job rows are read"],
)
def test_it_is_heeded_within_10_seconds(may_delete, proxy, held_at, is_locked, gone):
    """Though S3 lets the run wait, or the table that it reads next is locked."""
    world, held = may_delete, Held(proxy, held_at)
    process = world.start(*AS_OF, "--json", "--delete-jobs")
    held.wait()
    with ExitStack() as stack:
        if is_locked:
            wait = stack.enter_context(locked_table(world))
            held.release()
            wait()
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)  # a right program ends the same way, however long this is
        held.release()
        result = ended(process, 25)  # 10, and time to end on a slow machine
    summary = result.summary
    assert (result.code, summary["planned"] is None) == (130, gone is None)
    assert (summary["deleted"]["expired"], summary["jobs_deleted"]) == (gone or 0, 0)
    assert summary["not_attempted"] == (None if gone is None else 17 - gone)
    assert len(world.box.live_keys()) == 48 - (gone or 0)


def test_it_is_heeded_while_s3_asks_to_slow_down(world, proxy):
    slow = Answer(503, b"<Error><Code>SlowDown</Code></Error>")
    proxy.before = lambda request: slow if request.operation == "delete" else None
    process = world.start(*AS_OF, "--json", patch="rp.FIRST_PAUSE = rp.LAST_PAUSE = 120")
    while not proxy.count("delete") and process.poll() is None:
        time.sleep(0.1)
    time.sleep(0.5)  # in which the pause begins; a signal that comes before it must do the same
    process.send_signal(signal.SIGTERM)
    result = ended(process, 30)  # the pause is 60 at least
    assert (result.code, result.summary["failed"]) == (143, 17), "tried, and S3 did not do it"
    assert len(world.box.live_keys()) == 48


def full_pipe() -> tuple[int, int]:
    """Both ends of a pipe into which nothing more goes."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for size in 65536, 1:
        with suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(size))
    os.set_blocking(writer, True)
    return reader, writer


def waiting(pipe: int) -> int:
    """Bytes in a pipe that nobody has read yet."""
    return int(struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0])


def test_it_is_heeded_while_nobody_reads_the_plan(world):
    expire(world, 3000)  # lines of 180 kB; a pipe takes 64 kB
    process = world.start(*AS_OF, "-n")
    assert process.stdout
    while waiting(process.stdout.fileno()) < 60_000 and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(25) == 143, "10 seconds, and time to end on a slow machine"
    result = ended(process)
    assert (result.out.count("\n") < 3000, "SIGTERM" in result.error) == (True, True)


def test_it_is_heeded_while_nobody_reads_the_log(world, proxy, tmp_path):
    """The first line of the log does not fit any more. Nothing is asked of S3 before it is told."""
    path, (reader, writer) = tmp_path / "log", full_pipe()
    command = world.command(*AS_OF, "--json", "--audit-log", str(path))
    with subprocess.Popen(command, env=world.environment(), stdout=PIPE, stderr=writer) as process:
        while not (path.exists() and proxy.count("versioning")) and process.poll() is None:
            time.sleep(0.1)
        time.sleep(1)  # in which it comes to its first line
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(25) == 130
    os.close(reader)
    os.close(writer)
    assert (proxy.count("list"), events(path)[-1]["exit_code"]) == (0, 130)
    assert len(world.box.live_keys()) == 48


def test_only_the_same_one_more_than_a_second_later_disturbs_the_way_out(monkeypatch):
    """`timeout` sends each signal twice at the same time. A terminal that is closed may, too."""
    stop, now, way = rp.Stop(), [100.0], list[object]()
    monkeypatch.setattr(rp, "time", SimpleNamespace(monotonic=lambda: now[0]))
    handlers = {"signal": lambda *what: way.append(what), "raise_signal": way.append}
    monkeypatch.setattr(rp, "signal", SimpleNamespace(**handlers, SIG_DFL=signal.SIG_DFL))
    with suppress(rp.Interrupted), stop.at_once():
        try:
            stop._receive(signal.SIGTERM, None)
        finally:
            stop._receive(signal.SIGTERM, None)
            now[0] += 2
            stop._receive(signal.SIGHUP, None)
            stop._receive(signal.SIGHUP, None)
            way.append("ended well")
    now[0] += 2
    stop._receive(signal.SIGTERM, None)
    assert way == ["ended well"]
    now[0] += 2
    stop._receive(signal.SIGTERM, None)
    assert way[1:] == [(signal.SIGTERM, signal.SIG_DFL), signal.SIGTERM]
