"""What the re-check before each request decides, how often it is asked, and how old it may be."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import AS_OF, World, events, expire, sql
from proxies import DROP, Answer, Request, S3Proxy
from sandbox import TABLE, Sandbox
from test_seed import EXPIRED

INDEX = pytest.mark.parametrize("index", [True, False], ids=["index", "scan"])


def selects(box: Sandbox) -> int:
    return int(sql(box, "SHOW GLOBAL STATUS LIKE 'Com_select'")[0][1])


def once(proxy: S3Proxy, operation: str, *statements: str, box: Sandbox) -> None:
    """Run statements while S3 is asked for this operation for the first time."""
    left = list(statements)

    def before(request: Request) -> None:
        if request.operation == operation and left:
            sql(box, *left)
            left.clear()

    proxy.before = before


@pytest.mark.parametrize(("index", "asked"), [(True, 12), (False, 3)])
def test_with_an_index_each_request_is_checked_by_itself_without_one_each_round(
    world, index, asked
):
    before = selects(world.box)
    assert world.purge("--as-of", "1980-01-01").code == 0
    besides = selects(world.box) - before  # of a run that has nothing to check again
    expire(world, 12_000)
    if index:
        sql(world.box, f"CREATE INDEX k ON {TABLE} (sourceData)")
    before = selects(world.box)
    patch = "rp.ROUND_KEYS, rp.DEAR_RECHECK = 4000, 0"
    result = world.purge(*AS_OF, "--json", "--workers", "2", patch=patch)
    assert result.summary["deleted"]["expired"] == 12_000
    assert 0 < result.summary["max_recheck_age_seconds"] < 30
    assert selects(world.box) - before - besides == asked
    assert ("an index on sourceData would help" in result.err) is not index


# --- Keys that may not go any more ----------------------------------------------------------------


@INDEX
@pytest.mark.parametrize(
    "vanish", [f"TRUNCATE {TABLE}", f"DELETE FROM {TABLE} WHERE type = 'TRIAL'"]
)
def test_a_key_whose_rows_have_vanished_is_retained(may_delete, proxy, tmp_path, vanish, index):
    world, path = may_delete, tmp_path / "log"
    if index:
        sql(world.box, f"CREATE INDEX k ON {TABLE} (sourceData)")
    once(proxy, "list", vanish, box=world.box)
    result = world.purge(*AS_OF, "--delete-jobs", "--json", "--audit-log", str(path))
    assert (result.code, result.summary["retained"]) == (0, 17)
    assert "17 keys retained: its jobs have vanished (" in result.err
    assert [event["key"] for event in events(path, "retained")] == EXPIRED
    assert (proxy.count("delete"), result.summary["jobs_deleted"]) == (0, 0)
    assert len(world.box.live_keys()) == 48


def test_a_key_that_is_in_use_by_now_is_retained(world, proxy):
    new = f"INSERT INTO {TABLE} VALUES ('new', NULL, 'TRIAL', '{EXPIRED[0]}')"
    once(proxy, "list", new, box=world.box)
    summary = world.purge(*AS_OF, "--json").summary
    assert (summary["retained"], summary["deleted"]["expired"]) == (1, 16)
    assert EXPIRED[0] in world.box.live_keys()


@INDEX
@pytest.mark.parametrize(
    ("answer", "end"),
    [
        (DROP, "failed"),
        (Answer(500, b"<Error><Code>InternalError</Code></Error>"), "failed"),
        (Answer(503, b"<Error><Code>SlowDown</Code></Error>"), "retained"),
    ],
)
def test_a_key_in_use_after_a_request_without_an_answer_is_failed(
    world, proxy, tmp_path, answer, end, index
):
    """S3 may carry out the request yet, but one that it refused it will not."""
    if index:
        sql(world.box, f"CREATE INDEX k ON {TABLE} (sourceData)")
    path = tmp_path / "log"

    def before(request: Request) -> Answer | None:
        if request.operation == "delete" and proxy.count("delete") == 1:
            sql(world.box, f"INSERT INTO {TABLE} VALUES ('x', NULL, 'TRIAL', '{EXPIRED[3]}')")
            return answer
        return None

    proxy.before = before
    result = world.purge(*AS_OF, "--json", "--audit-log", str(path))
    assert result.code == (4 if end == "failed" else 0)
    assert result.summary["deleted"]["expired"] == 16
    (event,) = events(path, "failed", "retained")
    assert (event["event"], event["key"]) == (end, EXPIRED[3])
    assert ("it may yet be deleted" in event["message"]) == (end == "failed")


# --- The age of a re-check ------------------------------------------------------------------------


@pytest.fixture
def slow_credentials(world: World, tmp_path: Path) -> Path:
    """Credentials that are fetched anew for each request. It takes two seconds while this file is
    there, and each time leaves a file `begun` beside it."""
    slow, end = tmp_path / "slow", datetime.now(UTC) + timedelta(minutes=5)
    answer = {
        "Version": 1,
        "AccessKeyId": world.box.credentials["access_key"],
        "SecretAccessKey": world.box.credentials["secret_key"],
        "SessionToken": "token",
        "Expiration": end.isoformat(),
    }
    script = tmp_path / "fetch"
    script.write_text(
        f"[ -e {slow} ] && touch {tmp_path}/begun && sleep 2\necho '{json.dumps(answer)}'\n"
    )
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = sh {script}\n")
    world.settings["AWS_CONFIG_FILE"] = str(config)
    return slow


def test_a_request_whose_re_check_has_grown_old_is_not_sent_and_checked_again(
    world, proxy, slow_credentials
):
    def before(request: Request) -> None:
        if request.operation == "list":
            slow_credentials.touch()
            threading.Thread(target=reload, daemon=True).start()

    def reload() -> None:
        while not slow_credentials.with_name("begun").exists():
            time.sleep(0.02)
        slow_credentials.unlink()  # the next time is fast
        sql(world.box, f"INSERT INTO {TABLE} VALUES ('x', NULL, 'TRIAL', '{EXPIRED[0]}')")

    proxy.before = before
    patch = "rp.MAX_RECHECK_AGE = 1"
    result = world.purge(
        *AS_OF, "--json", AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None, patch=patch
    )
    summary = result.summary
    assert (summary["deleted"]["expired"], summary["retained"]) == (16, 1), result.err
    assert proxy.count("delete") == summary["requests"]["delete"] == 1
    assert summary["max_recheck_age_seconds"] < 1


@pytest.mark.parametrize("what", ["credentials", "fsync"])
def test_nothing_leaves_while_every_re_check_grows_old(
    world, proxy, slow_credentials, tmp_path, what
):
    """Slow is the refresh of credentials, or the disk of the audit log."""
    patch = "rp.MAX_RECHECK_AGE, rp.ATTEMPTS = 1, 2"
    if what == "credentials":
        proxy.before = lambda request: slow_credentials.touch()
    else:
        patch += "\nfsync = rp.os.fsync; rp.os.fsync = lambda n: (rp.time.sleep(1.5), fsync(n))"
    result = world.purge(
        *AS_OF,
        "--json",
        "--audit-log",
        str(tmp_path / "log"),
        patch=patch,
        AWS_ACCESS_KEY_ID=None,
        AWS_SECRET_ACCESS_KEY=None,
    )
    assert (result.code, result.summary["failed"]) == (4, 17), result.err
    assert "17 keys failed: NotSent: its re-check was" in result.err
    assert (proxy.count("delete"), result.summary["requests"]["delete"]) == (0, 0)
    assert len(world.box.live_keys()) == 48


def test_a_re_check_that_takes_too_long_stops_the_run(world, proxy):
    patch = (
        "rp.MAX_RECHECK_AGE, ask = 1, rp.JobTable.referenced\n"
        "rp.JobTable.referenced = lambda *a: (rp.time.sleep(1.2), ask(*a))[1]"
    )
    result = world.purge(*AS_OF, "--json", patch=patch)
    assert result.code == 1
    assert "make an index on sourceData" in result.summary["error"]
    assert result.summary["not_attempted"] == 17
    assert proxy.count("delete") == 0
