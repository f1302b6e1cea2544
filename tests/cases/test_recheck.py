"""What the re-check before each request decides, and how old it may be."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from conftest import AS_OF, EVERYTHING, Held, World, ended, events, setting, sql, until
from proxies import DROP, Answer, Request
from sandbox import DATABASE, TABLE
from test_job_rows import during
from test_seed import EXPIRED, ORPHANS

IN_USE = f"INSERT INTO {TABLE} VALUES ('new', NULL, 'TRIAL', '{EXPIRED[0]}')"
CHANGES = {  # of the table, the keys that it retains, and why
    "vanished": (f"DELETE FROM {TABLE} WHERE type = 'TRIAL'", EXPIRED, "its jobs have vanished"),
    "in use": (IN_USE, EXPIRED[:1], "a job refers to it by now"),
}


@contextmanager
def locked_table(world: World) -> Iterator[Callable[[], None]]:
    """Whoever reads the job table waits. Yields what waits for a reader to be there."""
    with world.box.database.admin(database=DATABASE) as connection:
        connection.cursor().execute(f"LOCK TABLES {TABLE} WRITE")
        waits = "SELECT 1 FROM information_schema.processlist WHERE state LIKE 'Waiting for%'"
        yield lambda: until(world.box, waits)


INDEX = f"CREATE INDEX k ON {TABLE} (sourceData)"
# What a server may do to each new session: a run must not stay in one snapshot.
SNAPSHOTS = ["SET autocommit = 0", "START TRANSACTION WITH CONSISTENT SNAPSHOT"]


@pytest.mark.parametrize(
    ("index", "login"),
    [(INDEX, "DO 0"), ("DO 0", "DO 0"), ("DO 0", SNAPSHOTS[0]), (INDEX, SNAPSHOTS[1])],
)
@pytest.mark.parametrize("case", CHANGES)
def test_a_key_that_is_in_use_or_whose_rows_have_vanished_since_is_retained_and_on_record(
    may_delete, proxy, tmp_path, index, case, login
):
    world, path, (change, retained, why) = may_delete, tmp_path / "log", CHANGES[case]
    sql(world.box, index)
    held = Held(proxy, "list")
    with setting(world.box, "init_connect", login):
        run = world.start(*AS_OF, "--delete-jobs", "--json", "--audit-log", str(path))
        held.wait()
        sql(world.box, change)
        rows = len(world.box.job_ids())
        held.release()
        result = ended(run)
    deleted, gone = result.summary["deleted"]["expired"], {*EXPIRED} - {*world.box.live_keys()}
    assert (result.code, deleted, gone) == (0, 17 - len(retained), {*EXPIRED} - {*retained})
    assert f"{len(retained)} keys retained: {why} (" in result.err
    assert [event["key"] for event in events(path, "retained")] == retained
    assert deleted or not (proxy.count("delete") or result.summary["jobs_deleted"])
    told = result.summary["jobs_deleted"]
    assert len(world.box.job_ids()) == rows - told, "said to be deleted, but still there"


# What may become of a session in the middle of a run: a switch-over, a proxy with other backends.
SESSIONS = [
    "SET time_zone = '+13:00'", "SET autocommit = 0", "SET sql_mode = 'PAD_CHAR_TO_FULL_LENGTH'",
    "SET sql_select_limit = 1", "DO RELEASE_ALL_LOCKS()",
]  # fmt: skip
CHANGED = """
def query(connection, doing, sql, real=rp.query):
    if "re-check" in doing and rp.Path({!r}).exists():
        real(connection, doing, {!r})
    return real(connection, doing, sql)
rp.query = query
"""


@pytest.mark.parametrize("change", [*SESSIONS, "read-only"])
def test_a_session_that_is_no_longer_as_it_was_set_ends_the_run(
    may_delete, proxy, tmp_path, change
):
    """After the second of five requests. Under another time zone jobs expire too early."""
    world, met = may_delete, tmp_path / "met"

    def act() -> None:
        met.touch()
        if change == "read-only":
            sql(world.box, "SET GLOBAL read_only = 1")

    during(proxy, "delete", act, 2)
    patch = "rp.BATCH = rp.ROUND_KEYS = 4"
    patch += CHANGED.format(str(met), change) if change != "read-only" else ""
    try:
        options = (*AS_OF, *EVERYTHING, "--delete-jobs", "--workers", "1", "--json")
        summary = world.purge(*options, patch=patch).summary
    finally:
        sql(world.box, "SET GLOBAL read_only = 0")
    told = [summary[name] for name in ("exit_code", "not_attempted", "retained", "failed")]
    assert [*told, proxy.count("delete")] == [1, 20 - 8, 0, 0, 2]
    assert "is not as it was set, lost its lock, or its server is read-only" in summary["error"]


@pytest.mark.parametrize("share", [0, 2])
def test_a_table_that_is_reloaded_in_the_middle_loses_no_orphan(world, proxy, share):
    """Most names of remaining jobs must come back in the re-check. With the table half empty, each
    object whose rows are away would be an orphan."""
    away = (
        "CREATE TABLE away AS SELECT * FROM {0}; TRUNCATE {0}; INSERT INTO {0} SELECT * FROM away"
    )
    half = f"{away} WHERE MOD(CRC32(sourceData), 10) < {share}"
    steps = ["DROP TABLE IF EXISTS away", *half.format(TABLE).split("; ")]
    during(proxy, "list", lambda: sql(world.box, *steps))
    result = world.purge(*AS_OF, *EVERYTHING, "--json")
    assert {*ORPHANS} <= {*world.box.live_keys()}
    assert "keys retained: the remaining jobs are not in the table as before" in result.err
    assert result.summary["deleted"]["orphan"] == 0
    sql(world.box, f"TRUNCATE {TABLE}", f"INSERT INTO {TABLE} SELECT * FROM away")
    assert world.purge(*AS_OF, *EVERYTHING, "--json").summary["deleted"]["orphan"] == 3


# No words of S3's: the connection broke, or a gateway answered.
NO_ANSWERS = [DROP, *(Answer(status, b"<html>sorry</html>") for status in (503, 520, 408))]


@pytest.mark.parametrize("answer", NO_ANSWERS, ids=lambda answer: answer.status)
def test_a_key_in_use_after_a_request_without_an_answer_is_failed(world, proxy, answer):
    """S3 may carry it out yet."""

    def before(request: Request) -> Answer | None:
        if request.operation != "delete" or proxy.count("delete") > 1:
            return None
        sql(world.box, IN_USE)
        return answer

    proxy.before = before
    result = world.purge(*AS_OF, "--json")
    summary = result.summary
    assert (summary["deleted"]["expired"], summary["retained"], summary["failed"]) == (16, 0, 1)
    assert f"it may yet be deleted ({EXPIRED[0]})" in result.err


# Called once the file is there, this removes it, and waits until whoever made it closes it.
SLOW = """
def slow(*args, real=real, **named):
    if rp.os.path.exists({0!r}):
        with open({0!r}) as gate:
            rp.os.unlink({0!r})
            gate.read()
    return real(*args, **named)
"""
SIGNING = "from botocore.signers import RequestSigner as border\nreal = border.sign"


@pytest.mark.parametrize("what", ["sign", "fsync"])
def test_a_request_whose_re_check_grows_old_is_not_sent_and_checked_again(
    world, proxy, tmp_path, what
):
    """The first delete waits to be signed, with fresh credentials, or for its intent on disk. The
    limit is one that no other re-check here reaches, even on a slow machine."""
    gate, path = tmp_path / "gate", tmp_path / "log"
    patch = SIGNING if what == "sign" else "border, real = rp.os, rp.os.fsync"
    patch += f"{SLOW.format(str(gate))}border.{what} = slow\nrp.MAX_RECHECK_AGE = 3"
    held = Held(proxy, "list")
    run = world.start(*AS_OF, "--json", "--audit-log", str(path), patch=patch)
    held.wait()
    os.mkfifo(gate)
    with gate.open("r+b", buffering=0):
        held.release()
        while gate.exists() and run.poll() is None:
            time.sleep(0.02)
        sql(world.box, IN_USE)
        time.sleep(3.2)  # its re-check began before: now it is older than the limit
    summary = ended(run).summary
    assert (summary["deleted"]["expired"], summary["retained"]) == (16, 1), summary
    assert proxy.count("delete") == summary["requests"]["delete"] == 1
    assert 0 < summary["max_recheck_age_seconds"] <= 3


def test_a_re_check_that_takes_too_long_stops_the_run(world, proxy):
    held = Held(proxy, "list")
    run = world.start(*AS_OF, "--json", patch="rp.MAX_RECHECK_AGE = 1")
    held.wait()
    with locked_table(world) as wait:
        held.release()
        wait()
        time.sleep(1.2)  # the re-check waits already: it takes longer than the limit
    summary = ended(run).summary
    assert (summary["exit_code"], summary["not_attempted"], proxy.count("delete")) == (1, 17, 0)
    assert "make an index on sourceData" in summary["error"]
