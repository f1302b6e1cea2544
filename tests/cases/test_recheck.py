"""What the re-check before each request decides, and how old it may be."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from conftest import AS_OF, Held, World, ended, events, sql, until
from proxies import DROP, Answer, Request
from sandbox import DATABASE, TABLE
from test_seed import EXPIRED

IN_USE = f"INSERT INTO {TABLE} VALUES ('new', NULL, 'TRIAL', '{EXPIRED[0]}')"
INDEX = pytest.mark.parametrize(
    "index", [f"CREATE INDEX k ON {TABLE} (sourceData)", "DO 0"], ids=["index", "scan"]
)


@contextmanager
def locked_table(world: World) -> Iterator[Callable[[], None]]:
    """Whoever reads the job table waits. Yields what waits for a reader to be there."""
    with world.box.database.admin(database=DATABASE) as connection:
        connection.cursor().execute(f"LOCK TABLES {TABLE} WRITE")
        waits = "SELECT 1 FROM information_schema.processlist WHERE state LIKE 'Waiting for%'"
        yield lambda: until(world.box, waits)


# --- Keys that may not go any more ----------------------------------------------------------------


@INDEX
@pytest.mark.parametrize(
    ("change", "retained", "why"),
    [
        (f"TRUNCATE {TABLE}", EXPIRED, "its jobs have vanished"),
        (f"DELETE FROM {TABLE} WHERE type = 'TRIAL'", EXPIRED, "its jobs have vanished"),
        (IN_USE, EXPIRED[:1], "a job refers to it by now"),
    ],
    ids=["all vanished", "vanished", "in use"],
)
def test_a_key_that_is_in_use_or_whose_rows_have_vanished_since_is_retained_and_on_record(
    may_delete, proxy, tmp_path, index, change, retained, why
):
    world, path = may_delete, tmp_path / "log"
    sql(world.box, index)
    held = Held(proxy, "list")
    run = world.start(*AS_OF, "--delete-jobs", "--json", "--audit-log", str(path))
    held.wait()
    sql(world.box, change)
    held.release()
    result = ended(run)
    deleted = 17 - len(retained)
    assert (result.code, result.summary["deleted"]["expired"]) == (0, deleted)
    assert result.summary["retained"] == len(retained)
    assert f"{len(retained)} keys retained: {why} (" in result.err
    assert [event["key"] for event in events(path, "retained")] == retained
    assert {*retained} <= {*world.box.live_keys()}
    assert (proxy.count("delete") > 0, len(world.box.live_keys())) == (deleted > 0, 48 - deleted)
    assert deleted or not result.summary["jobs_deleted"]


@INDEX
@pytest.mark.parametrize(
    ("answer", "end"),
    [
        (DROP, "failed"),
        (Answer(500, b"<Error><Code>InternalError</Code></Error>"), "failed"),
        (Answer(503, b"<Error><Code>SlowDown</Code></Error>"), "retained"),
    ],
    ids=["no answer", "error", "refused"],
)
def test_a_key_in_use_after_a_request_that_may_yet_take_effect_is_failed(
    world, proxy, tmp_path, index, answer, end
):
    """S3 may carry out the request yet, but one that it refused it will not."""
    sql(world.box, index)
    path = tmp_path / "log"

    def before(request: Request) -> Answer | None:
        if request.operation == "delete" and proxy.count("delete") == 1:
            sql(world.box, IN_USE)
            return answer
        return None

    proxy.before = before
    result = world.purge(*AS_OF, "--json", "--audit-log", str(path))
    assert result.code == (4 if end == "failed" else 0)
    assert result.summary["deleted"]["expired"] == 16
    (event,) = events(path, "failed", "retained")
    assert (event["event"], event["key"]) == (end, EXPIRED[0])
    assert ("it may yet be deleted" in event["message"]) == (end == "failed")


# --- The age of a re-check ------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["credentials", "disk"])
def test_a_request_whose_re_check_grows_old_is_not_sent_and_checked_again(
    world, proxy, tmp_path, what
):
    """For two seconds the first delete waits to be signed, or for its intent to be on disk."""
    slow, begun, path = tmp_path / "slow", tmp_path / "begun", tmp_path / "log"
    wait = f"[ -e {slow} ] && rm {slow} && touch {begun} && sleep 2"
    end = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()  # so near, fetched each time
    secrets = {"AccessKeyId": "access_key", "SecretAccessKey": "secret_key"}
    answer = {name: world.box.credentials[key] for name, key in secrets.items()}
    answer |= {"Version": 1, "SessionToken": "token", "Expiration": end}
    script, config = tmp_path / "fetch", tmp_path / "config"
    script.write_text(
        (f"{wait}\n" if what == "credentials" else "") + f"echo '{json.dumps(answer)}'"
    )
    config.write_text(f"[default]\ncredential_process = sh {script}\n")
    patch = "rp.MAX_RECHECK_AGE = 1\n"
    if what == "disk":
        patch += f"sync = rp.os.fsync\nrp.os.fsync = lambda n: (rp.os.system({wait!r}), sync(n))"

    def reload() -> None:
        while not begun.exists():
            time.sleep(0.02)
        sql(world.box, IN_USE)

    def before(request: Request) -> None:
        if request.operation == "list":
            slow.touch()
            threading.Thread(target=reload, daemon=True).start()

    proxy.before = before
    keys = dict.fromkeys(["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
    options = (*AS_OF, "--json", "--audit-log", str(path))
    result = world.purge(*options, patch=patch, AWS_CONFIG_FILE=str(config), **keys)
    summary = result.summary
    assert begun.exists()
    assert (summary["deleted"]["expired"], summary["retained"]) == (16, 1), result.err
    assert proxy.count("delete") == summary["requests"]["delete"] == 1
    assert summary["max_recheck_age_seconds"] < 1


def test_a_re_check_that_takes_too_long_stops_the_run(world, proxy):
    held = Held(proxy, "list")
    run = world.start(*AS_OF, "--json", patch="rp.MAX_RECHECK_AGE = 1")
    held.wait()
    with locked_table(world) as wait:
        held.release()
        wait()
        time.sleep(1.2)
    result = ended(run)
    assert result.code == 1
    assert "make an index on sourceData" in result.summary["error"]
    assert (result.summary["not_attempted"], proxy.count("delete")) == (17, 0)
