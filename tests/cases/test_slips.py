"""An operator's slip can do no harm, and honest users' steady states stay exit 0.

All on MariaDB and on MySQL: a slip, how the run ends, what it says; rows and objects are untouched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from conftest import AS_OF, OLD, Result, World, version
from moto.s3.models import s3_backends
from proxies import Answer, TcpProxy
from sandbox import BUCKET, DATABASE, REGION, TABLE, Job, Sandbox

OPERATOR = "operator@'%'"
# What no database has a say in runs on one.
ONCE = pytest.mark.parametrize("box", ["mariadb"], indirect=True)


@pytest.fixture(scope="session", params=["mariadb", "mysql"])
def box(request: pytest.FixtureRequest, box: Sandbox) -> Sandbox:
    return box if request.param == "mariadb" else request.getfixturevalue("mysql_box")


@pytest.fixture
def world(world: World) -> Iterator[World]:
    """The seed's world, with a user who may delete job rows; what else is made goes at the end."""
    password, sql = "of-the-operator", world.box.sql
    sql(f"CREATE USER {OPERATOR} IDENTIFIED BY '{password}' REQUIRE SSL")
    sql(f"GRANT SELECT, DELETE ON {DATABASE}.* TO {OPERATOR}")
    login = {"RETENTION_PURGE_DB_USER": "operator", "RETENTION_PURGE_DB_PASSWORD": password}
    world.settings |= login
    yield world
    sql("SET GLOBAL read_only = 0", f"DROP USER {OPERATOR}")
    for (table,) in sql("SHOW TABLES"):
        if table != TABLE:
            sql("SET foreign_key_checks = 0", f"DROP TABLE {table}")
    for name in {*world.box.backend.buckets} - {BUCKET}:
        world.box.backend.buckets.pop(name)
        s3_backends.bucket_accounts.pop(name)


def purge(world: World, options: str) -> Result:
    """A run; among its options may be variables."""
    words = options.split()
    variables = dict(word.split("=") for word in words if word.startswith("RETENTION_PURGE_"))
    return world.purge(*AS_OF, *(word for word in words if "=" not in word), **variables)


def everything(box: Sandbox) -> Any:
    """All rows of all tables, all keys of all buckets."""
    names = [name for (name,) in box.sql("SHOW TABLES")]
    tables = {name: box.sql(f"SELECT * FROM {name} ORDER BY 1") for name in names}
    return tables, {name: sorted(bucket.keys) for name, bucket in box.backend.buckets.items()}


Prepare = Callable[[World], Any]


def nothing(world: World) -> None:
    pass


def sql(*statements: str) -> Prepare:
    return lambda world: world.box.sql(*statements)


def column(change: str) -> Prepare:
    return sql(f"ALTER TABLE {TABLE} MODIFY {change}")


def empty_bucket(world: World) -> None:
    world.box.backend.create_bucket("another", REGION)


def foreign_bucket(world: World) -> None:
    empty_bucket(world)
    for n in range(60):
        world.box.backend.put_object("another", f"{n:032x}.ts", b"of somebody else")


def kept_rows(world: World) -> None:
    """Years of expired rows without objects, some remaining jobs, one that has just expired."""
    jobs: list[Job] = [(f"{n}", OLD, "TRIAL", f"old{n}") for n in range(200)]
    jobs += [(f"k{n}", OLD, "OFFICIAL", f"kept{n}") for n in range(20)]
    world.box.load(jobs, [(f"kept{n}", 1) for n in range(20)] + [("old7", 1)])


# --- Slips ----------------------------------------------------------------------------------------

# What is set, without RETENTION_PURGE_, and what is said of it.
VARIABLES = {
    "DRYRUN=1": "is no option's variable: do you mean RETENTION_PURGE_DRY_RUN?",
    "MAX_OBJECT=0": "is no option's variable: do you mean RETENTION_PURGE_MAX_OBJECTS?",
    "MAX-PERCENT=1": "is no option's variable: do you mean RETENTION_PURGE_MAX_PERCENT?",
    "DB_PASS=x": "is no option's variable: do you mean RETENTION_PURGE_DB_PASSWORD?",
    "dry_run=1": "is no option's variable",
    "UNDO=audit.log": "is no option's variable",
    "RUN_ID=1": "is no option's variable",
    "DRY_RUN=": "RETENTION_PURGE_DRY_RUN is empty",
    "PREFIX=": "RETENTION_PURGE_PREFIX is empty",
    "DB_PASSWORD=": "RETENTION_PURGE_DB_PASSWORD is empty",
    "DRY_RUN=ja": "not a valid boolean",
    "MAX_PERCENT=nan": "--max-percent must be a number",
}
# Before the run, its options, its exit code and what it says.
Slip = tuple[Prepare, str, int, str]
REVOKE = f"REVOKE DELETE ON {DATABASE}.* FROM {OPERATOR}"
SJIS, GBK = (column(f"sourceData varchar(64) CHARSET {name} NOT NULL") for name in ("sjis", "gbk"))
BINARY, DATE = column("sourceData varbinary(64) NOT NULL"), column("completedAt date NULL")
LIMITS: dict[str, Slip] = {
    "objects": (nothing, "--max-objects 16", 3, "17 objects would be deleted, more than --max-obj"),
    "keys": (nothing, "--max-percent 37", 3, "17 of 45 keys that are planned or belong to remain"),
    "rows": (nothing, "--delete-jobs --max-percent 43", 3, "22 of 50 job rows would be deleted"),
    "years of rows": (kept_rows, "--delete-jobs --max-percent 50", 3, "200 of 220 job rows would"),
    "no DELETE": (sql(REVOKE), "--delete-jobs", 3, f"no DELETE on {DATABASE}.{TABLE}: grant it"),
    "future": (nothing, "--as-of 2999-01-01", 3, "is later than the database clock"),
}
WRONG: dict[str, Slip] = {
    "sjis": (SJIS, "", 1, "it is varchar(64) sjis"),
    "gbk": (GBK, "--delete-jobs", 1, "it is varchar(64) gbk"),
    "binary": (BINARY, "", 1, "must be a text column in one of"),
    "date": (DATE, "", 1, "must be a TIMESTAMP column, not date"),
    "no table": (nothing, "--db-table ndvr_job_statuses", 1, "Check --db-name and --db-table"),
    "no schema": (nothing, "--db-name no_such_schema", 1, "no_such_schema"),
    "no SELECT": (nothing, "--db-table mysql.user", 1, "Grant SELECT"),
    "no jobId": (nothing, "--db-table information_schema.COLUMNS", 1, "has no column jobId"),
    "replica": (sql("SET GLOBAL read_only = 1"), "", 3, "The database is read-only, so it may be"),
    "no bucket": (nothing, "--bucket no-such-bucket", 1, "Check --bucket"),
    "path": (nothing, "--bucket s3://incoming-data/", 2, "a path goes into --prefix"),
    # Nor a device: without the guard it would be replaced.
    "manifest": (nothing, "--manifest /tmp", 2, "--manifest must be a file"),
}
EMPTY = f"CREATE TABLE strangers LIKE {TABLE}"
FOREIGN = "INSERT INTO strangers SELECT jobId, completedAt, type, CONCAT('of-', jobId) FROM "
PLACES: dict[str, tuple[Prepare, str]] = {
    "prefix": (nothing, "--prefix wrong/"),
    "slash": (nothing, "--prefix /"),
    "part of a key": (nothing, "--prefix 0"),
    "empty bucket": (empty_bucket, "--bucket another"),
    "foreign bucket": (foreign_bucket, "--bucket another"),
    "foreign table": (sql(EMPTY, FOREIGN + TABLE), "--db-table strangers"),
    "empty table": (sql(EMPTY), "--db-table strangers"),
}
NOT_SEEN = "keys of remaining jobs has an object: --bucket, --prefix or --db-table must be wrong"
NOT_KNOWN = "jobs: --bucket, --prefix or --db-table must be wrong"
MODES = {
    "": NOT_SEEN,
    "--delete-jobs": NOT_SEEN,
    "--delete-jobs --max-percent 50 -n": NOT_SEEN,
    "--delete-jobs --orphans --orphan-grace-days 0": NOT_KNOWN,
}
SLIPS = {
    **{name: (nothing, f"--delete-jobs RETENTION_PURGE_{name}", 2, VARIABLES[name])
       for name in VARIABLES},
    **WRONG,
    **LIMITS,
    **{f"{name}, dry run": (make, f"{options} -n", code, says)
       for name, (make, options, code, says) in LIMITS.items()},
    **{f"{place} {mode}": (make, f"{wrong} {mode}", 3, says)
       for place, (make, wrong) in PLACES.items()
       for mode, says in MODES.items()
       if place != "empty table" or "--orphans" in mode},
}  # fmt: skip


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_ends_in_one_line_and_nothing_is_touched(world, proxy, tmp_path, slip):
    prepare, options, code, says = SLIPS[slip]
    prepare(world)
    before, path = everything(world.box), tmp_path / "manifest.csv"
    path.write_text("of an earlier run")
    result = purge(world, f"--manifest {path} {options}")
    assert everything(world.box) == before
    assert (result.code, says in result.error) == (code, True), result.err
    assert proxy.count("delete") == 0
    assert [*tmp_path.iterdir()] == ([] if code == 3 else [path]), "a refused run leaves none"
    if code == 2:
        assert (result.out, proxy.requests) == ("", [])


@ONCE
@pytest.mark.parametrize("bytes_", [0, 1], ids=["says nothing", "greets and says nothing"])
def test_a_silent_database_server_ends_the_run_within_seconds(world, bytes_):
    with TcpProxy(world.box.database.port) as silent:
        silent.on_received = lambda total: time.sleep(0 if total < 200 and bytes_ else 30)
        began, place = time.monotonic(), f"localhost:{silent.port}"
        result = world.purge("--db-port", str(silent.port), patch="rp.CONNECT_TIMEOUT = 2")
    assert time.monotonic() - began < 15
    assert (result.code, f"Cannot log in to {place}" in result.error) == (1, True)
    assert result.err.index(f"connecting to {place}") < result.err.index("Error: ")


# --- What is not ours -----------------------------------------------------------------------------

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
# Objects that no job refers to, and whether they stay. Remaining jobs name "kept", COMPOSED and
# DECOMPOSED + "2", an expired one names nothing.
STRANGE = {
    "elsewhere": True,  # not below the prefix
    "in/": True,  # a console's folder, called like the prefix
    "in/below/": False,
    "in/" + "x" * 64: False,
    "in/" + "x" * 65: True,  # longer than the column
    "in/" + DECOMPOSED: True,
    "in/" + COMPOSED + "2": True,
    "in/" + DECOMPOSED + "3": False,
}


def test_objects_that_may_be_somebodys_are_kept_and_said(world):
    names = ["kept", COMPOSED, f"{DECOMPOSED}2"]
    jobs: list[Job] = [(name, OLD, "OFFICIAL", name) for name in names]
    jobs.append(("nameless", OLD, "TRIAL", ""))
    world.box.load(jobs, [("in/kept", 1)])
    for key in STRANGE:
        world.box.put(key, age=timedelta(days=8))
    result = purge(world, "--prefix in/ --orphans --json")
    stay = [key for key, stays in STRANGE.items() if stays]
    assert world.box.live_keys() == sorted(["in/kept", *stay])
    assert (result.summary["planned"]["orphan"], result.summary["dangling"]) == (3, 2)
    assert "3 orphans are kept: the table cannot hold the name, or holds it in ano" in result.err
    assert "2 keys of remaining jobs have no object" in result.err


# --- Honest users ---------------------------------------------------------------------------------


def purged(world: World) -> None:
    for _, key in purge(world, "-n").listed:
        world.box.backend.delete_object(BUCKET, key)


NO_TRIALS, NO_JOBS = sql(f"DELETE FROM {TABLE} WHERE type = 'TRIAL'"), sql(f"DELETE FROM {TABLE}")
NO_OLD_ONES = sql(f"DELETE FROM {TABLE} WHERE type = 'TRIAL' AND completedAt < '2019-03-05'")
ALL_OFFICIAL = sql(f"UPDATE {TABLE} SET type = 'OFFICIAL'")
DATETIME = column("completedAt datetime NULL")
# Objects and rows that go, and what is said.
HONEST: dict[str, tuple[Prepare, str, int, int, str]] = {
    "all purged": (purged, "", 0, 0, "planned: 0 objects"),
    "all purged, rows go": (purged, "--delete-jobs", 0, 22, "planned: 0 objects"),
    "none expired": (NO_TRIALS, "", 0, 0, "0 keys are expired"),
    "none expired, orphans": (NO_OLD_ONES, "--orphans", 0, 0, "planned: 0 objects"),
    "none expired, rows go": (ALL_OFFICIAL, "--delete-jobs", 0, 0, "0 keys are expired"),
    "new table": (NO_JOBS, "", 0, 0, "0 keys are expired, 0 stay"),
    "new table, rows go": (NO_JOBS, "--delete-jobs", 0, 0, "0 stay"),
    "replica, dry run": (sql("SET GLOBAL read_only = 1"), "-n", 0, 0, "planned: 17 objects"),
    "rows kept for years": (kept_rows, "", 1, 0, "planned: 1 objects"),
    "rows go once": (kept_rows, "--delete-jobs --max-percent 100", 1, 200, "planned: 1 objects"),
    "datetime": (DATETIME, "", 17, 0, "its values are taken as UTC"),
}


def counts(world: World) -> tuple[int, int]:
    return len(world.box.live_keys()), len(world.box.job_ids())


@pytest.mark.parametrize("state", HONEST)
def test_honest_steady_states_are_exit_0(world, state):
    prepare, options, objects, rows, says = HONEST[state]
    prepare(world)
    before = counts(world)
    result = purge(world, f"--max-percent 50 {options}")
    assert result.code == 0, result.err
    assert says in result.err
    assert "opens other tables" not in result.err  # no child, no trigger
    assert counts(world) == (before[0] - objects, before[1] - rows)


CHILD = "CREATE TABLE child (jobId varchar(64) CHARSET utf8mb4 COLLATE utf8mb4_general_ci, "
CHILD += f"FOREIGN KEY (jobId) REFERENCES {TABLE} (jobId) ON DELETE CASCADE)"


def test_a_dry_run_says_what_a_delete_of_rows_changes_besides(world):
    world.box.sql(CHILD, f"INSERT INTO child SELECT jobId FROM {TABLE}")
    before, said = everything(world.box), "a DELETE in ndvr.ndvr_job_status opens other tables"
    assert said in purge(world, "--delete-jobs -n").err
    assert said not in purge(world, "-n").err
    assert everything(world.box) == before
    assert purge(world, "--delete-jobs").code == 0
    assert world.box.sql("SELECT COUNT(*) FROM child") == ((28,),)


# --- Truth ----------------------------------------------------------------------------------------


@ONCE
@pytest.mark.parametrize(
    ("status", "logs", "recoverable"),
    [("enabled", 1, True), ("enabled", 0, False), ("suspended", 1, False), ("off", 1, False)],
)
def test_recoverable_is_what_an_undo_can_bring_back(world, tmp_path, status, logs, recoverable):
    if status != "off":
        version(world, status.title())
    summary = purge(world, f"--json {f'--audit-log {tmp_path}/log' * logs}").summary
    assert (summary["versioning"], summary["recoverable"]) == (status, recoverable)


@ONCE
def test_what_a_failed_run_does_not_know_is_null(world, proxy):
    denied = Answer(403, b"<Error><Code>AccessDenied</Code></Error>")
    proxy.before = lambda request: denied
    summary = purge(world, "--json --orphans").summary
    unknown = {"cutoff", "versioning", "planned", "not_attempted", "missing", "dangling"}
    unknown |= {"recoverable", "max_recheck_age_seconds"}
    assert {name for name, fact in summary.items() if fact is None} == unknown
