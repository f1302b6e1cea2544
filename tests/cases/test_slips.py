"""An operator's slip can do no harm, and honest users' steady states stay exit 0.

All on MariaDB and on MySQL: a slip, how the run ends, what it says; rows and objects are untouched.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from conftest import AS_OF, OLD, Result, World, version
from proxies import Answer
from sandbox import DATABASE, REGION, TABLE, USER, Sandbox

GRANT = f"GRANT DELETE ON {DATABASE}.* TO {USER}@'%'"
REVOKE = f"REVOKE DELETE ON {DATABASE}.* FROM {USER}@'%'"


@pytest.fixture(scope="session", params=["mariadb", "mysql"])
def box(request: pytest.FixtureRequest, box: Sandbox) -> Sandbox:
    return box if request.param == "mariadb" else request.getfixturevalue("mysql_box")


@pytest.fixture
def world(world: World) -> Iterator[World]:
    """The seed's world, with all defaults, whose user may delete job rows, and a foreign bucket."""
    world.box.sql(GRANT)
    del world.settings["RETENTION_PURGE_MAX_PERCENT"]
    if "foreign" not in world.box.backend.buckets:
        world.box.backend.create_bucket("foreign", REGION)
        world.box.backend.put_object("foreign", "of somebody else.ts", b"")
    yield world
    world.box.sql("SET GLOBAL read_only = 0, GLOBAL init_connect = ''", GRANT, REVOKE)
    world.box.sql("DROP TABLE IF EXISTS strangers, child")


def purge(world: World, options: str) -> Result:
    """A run; among its options may be variables."""
    words = options.split()
    variables = dict(word.split("=") for word in words if "=" in word)
    return world.purge(*AS_OF, *(word for word in words if "=" not in word), **variables)


def everything(box: Sandbox) -> Any:
    """All rows of all tables, all keys of all buckets."""
    tables = [box.sql(f"SELECT * FROM {name} ORDER BY 1") for (name,) in box.sql("SHOW TABLES")]
    return tables, {name: sorted(bucket.keys) for name, bucket in box.backend.buckets.items()}


# --- Slips ----------------------------------------------------------------------------------------

MODIFY = f"ALTER TABLE {TABLE} MODIFY"
# The clock stands still from the login on: on a slow machine it is less than 450 seconds ahead.
AHEAD = "SET GLOBAL init_connect = 'SET timestamp = unix_timestamp() + 450'"
STRANGERS = f"CREATE TABLE strangers LIKE {TABLE}; INSERT INTO strangers SELECT UUID(), "
STRANGERS += f"a.completedAt, a.type, UUID() FROM {TABLE} a, {TABLE} b"
NOT_SEEN = "keys of remaining jobs has an object: --bucket, --prefix or --db-table must be wrong"
NOT_KNOWN = "jobs: --bucket, --prefix or --db-table must be wrong"
# Statements before the run, its options, its exit code and what it says.
SLIPS: dict[str, tuple[str, str, int, str]] = {
    "variable": ("DO 0", "RETENTION_PURGE_DB_PASS=x", 2, "mean RETENTION_PURGE_DB_PASSWORD?"),
    "in small letters": ("DO 0", "RETENTION_PURGE_dry_run=1", 2, "is no option's variable"),
    "undo": ("DO 0", "RETENTION_PURGE_UNDO=audit.log", 2, "is no option's variable"),
    "run-id": ("DO 0", "RETENTION_PURGE_RUN_ID=1", 2, "is no option's variable"),
    "no password": ("DO 0", "RETENTION_PURGE_DB_PASSWORD=", 2, "_DB_PASSWORD is empty"),
    "not English": ("DO 0", "RETENTION_PURGE_DELETE_JOBS=ja", 2, "not a valid boolean"),
    # Nor a device: without the guard it would be replaced.
    "manifest": ("DO 0", "--manifest /tmp", 2, "--manifest must be a file"),
    "sjis": (f"{MODIFY} sourceData varchar(64) CHARSET sjis", "", 1, "it is varchar(64) sjis"),
    "binary": (f"{MODIFY} sourceData varbinary(64)", "", 1, "must be a text column in one of"),
    "date": (f"{MODIFY} completedAt date", "", 1, "must be a TIMESTAMP column, not date"),
    "no table": ("DO 0", "--db-table ndvr_job_statuses", 1, "Check --db-name and --db-table"),
    "no SELECT": ("DO 0", "--db-table mysql.user", 1, "Grant SELECT"),
    "no jobId": ("DO 0", "--db-table information_schema.COLUMNS", 1, "has no column jobId"),
    "no bucket": ("DO 0", "--bucket no-such-bucket", 1, "Check --bucket"),
    "objects": ("DO 0", "--max-objects 16", 3, "17 objects would be deleted, more than --max-o"),
    "keys": ("DO 0", "--max-percent 37.7", 3, "17 of 45 keys that are planned or belong to remain"),
    "default": (f"DELETE FROM {TABLE} WHERE type = 'OFFICIAL'", "", 3, "than --max-percent 50"),
    "rows": ("DO 0", "--delete-jobs --max-percent 43", 3, "22 of 50 job rows would be deleted (44"),
    "no DELETE": (REVOKE, "--delete-jobs", 3, f"no DELETE on {DATABASE}.{TABLE}: grant it"),
    "future": ("DO 0", "--as-of 2999-01-01", 3, "is later than the database clock"),
    "clock": (AHEAD, "", 3, "the clock of the database is 4"),
    "prefix": ("DO 0", "--prefix wrong/", 3, NOT_SEEN),
    "prefix, orphans": ("DO 0", "--prefix wrong/ --delete-jobs --orphans", 3, NOT_KNOWN),
    "bucket, rows": ("DO 0", "--bucket foreign --delete-jobs", 3, NOT_SEEN),
    "bucket, orphans": ("DO 0", "--bucket foreign --orphans --orphan-grace-days 0", 3, NOT_KNOWN),
    "table, rows": (STRANGERS, "--db-table strangers --delete-jobs", 3, NOT_SEEN),
    "table, orphans": (STRANGERS, "--db-table strangers --orphans", 3, NOT_KNOWN),
}


@pytest.mark.parametrize("dry", ["", "-n"], ids=["real", "dry"])
@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_ends_in_one_line_and_nothing_is_touched(world, proxy, tmp_path, slip, dry):
    """A dry run shows its plan all the same; looking for its place takes 50 requests at most."""
    prepare, options, code, says = SLIPS[slip]
    world.box.sql(*prepare.split("; "))
    before, path = everything(world.box), tmp_path / "manifest.csv"
    path.write_text("of an earlier run")
    result = purge(world, f"--manifest {path} {options} {dry}")
    assert everything(world.box) == before
    assert (result.code, says in result.error) == (code, True), result.err
    assert (proxy.count("delete"), proxy.count("list") <= 1 + 50) == (0, True)
    assert [*tmp_path.iterdir()] == ([] if code == 3 else [path]), "a refused run leaves none"
    planned = re.findall(r"planned: (\d+)", result.err) if dry else []
    assert [str(len(result.listed))] == (planned or ["0"])
    if code == 2:
        assert (result.out, proxy.requests) == ("", [])


def test_a_clock_of_s3_that_differs_is_refused(world, proxy):
    date = format_datetime(datetime.now(UTC) - timedelta(seconds=400), usegmt=True)
    proxy.after = lambda request, answer: Answer(answer.status, answer.body, {"Date": date})
    result = purge(world, "")
    assert (result.code, proxy.count("delete")) == (3, 0)
    assert "seconds ahead of that of S3" in result.error


def test_a_replica_will_do_for_a_dry_run_only(world):
    world.box.sql("SET GLOBAL read_only = 1")
    assert purge(world, "-n --delete-jobs").code == 0
    result = purge(world, "")
    assert (result.code, "The database is read-only" in result.error) == (3, True)


def test_a_silent_database_server_ends_the_run_within_seconds(world):
    with socket.create_server(("localhost", 0)) as silent:
        port = str(silent.getsockname()[1])
        result = world.purge("--db-port", port, "--json", patch="rp.CONNECT_TIMEOUT = 2")
    assert (result.code, f"Cannot log in to localhost:{port}" in result.error) == (1, True)
    assert result.summary["seconds"] < 60


# --- What is not ours -----------------------------------------------------------------------------

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
# "in/gone" is of an expired job; remaining ones name "kept", COMPOSED and DECOMPOSED + "2", another
# expired one names nothing. A console's folder is called like the prefix.
GO = ["in/gone", "in/below/", "in/../x", "in/" + "x" * 64, f"in/{DECOMPOSED}3"]
STAY = ["in/kept", "gone", "io", "in/", "in/" + "x" * 65, f"in/{DECOMPOSED}", f"in/{COMPOSED}2"]


def test_objects_that_may_be_somebodys_are_kept_and_said(world):
    jobs: Any = [(name, OLD, "OFFICIAL", name) for name in ("kept", COMPOSED, f"{DECOMPOSED}2")]
    world.box.load([*jobs, ("nameless", OLD, "TRIAL", ""), ("gone", OLD, "TRIAL", "gone")], [])
    for key in GO + STAY:
        world.box.put(key, age=timedelta(days=8))
    result = purge(world, "--prefix in/ --orphans --max-percent 100")
    assert world.box.live_keys() == sorted(STAY)
    assert "3 orphans are kept: the table cannot hold the name, or holds it in ano" in result.err
    assert "2 keys of remaining jobs have no object" in result.err


# --- Honest users ---------------------------------------------------------------------------------

CHILD = "CREATE TABLE child (jobId varchar(64) CHARSET utf8mb4 COLLATE utf8mb4_general_ci, "
CHILD += f"FOREIGN KEY (jobId) REFERENCES {TABLE} (jobId) ON DELETE CASCADE)"
# A statement before the run, its options, objects and rows that go, and what is said.
HONEST: dict[str, tuple[str, str, int, int, str]] = {
    "none expired": (f"UPDATE {TABLE} SET type = ''", "--delete-jobs", 0, 0, "0 keys are expired"),
    "new table": (f"DELETE FROM {TABLE}", "--delete-jobs", 0, 0, "0 stay"),
    "limits": ("DO 0", "--delete-jobs --max-objects 17 --max-percent 44", 17, 22, "17 objects"),
    "datetime": (f"{MODIFY} completedAt datetime", "", 17, 0, "its values are taken as UTC"),
    "child": (CHILD, "--delete-jobs -n", 0, 0, f"in {DATABASE}.{TABLE} opens other tables"),
    "child, no rows": (CHILD, "-n", 0, 0, "17 objects"),
}


@pytest.mark.parametrize("state", HONEST)
def test_honest_steady_states_are_exit_0(world, state):
    prepare, options, objects, rows, says = HONEST[state]
    world.box.sql(prepare)
    before = len(world.box.live_keys()), len(world.box.job_ids())
    result = purge(world, options)
    assert (result.code, says in result.err) == (0, True), result.err
    assert ("opens other tables" in result.err) == (state == "child")
    left = len(world.box.live_keys()), len(world.box.job_ids())
    assert left == (before[0] - objects, before[1] - rows)


# --- Truth ----------------------------------------------------------------------------------------


def test_recoverable_is_what_an_undo_can_bring_back(world, tmp_path):
    log = f"--audit-log {tmp_path}/log"
    cases = [("Suspended", log, False), ("Enabled", "", False), ("Enabled", log, True)]
    for status, options, recoverable in cases:
        version(world, status)
        summary = purge(world, f"--json {options}").summary
        assert (summary["versioning"], summary["recoverable"]) == (status.lower(), recoverable)


def test_what_a_failed_run_does_not_know_is_null(world, proxy):
    proxy.before = lambda request: Answer(403, b"<Error><Code>AccessDenied</Code></Error>")
    summary = purge(world, "--json --orphans").summary
    unknown = {"cutoff", "versioning", "planned", "not_attempted", "missing", "dangling"}
    unknown |= {"recoverable", "max_recheck_age_seconds"}
    assert {name for name, fact in summary.items() if fact is None} == unknown
