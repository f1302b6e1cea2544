"""An operator's slip can do no harm, and honest users' steady states stay exit 0.

All on MariaDB and on MySQL. The first tables: a slip, how the run ends, what it says.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest
from conftest import AS_OF, OLD, Held, Result, World, events, version
from moto.s3.models import s3_backends
from proxies import Answer, Request, TcpProxy
from sandbox import BUCKET, DATABASE, REGION, TABLE, USER, Job, Sandbox

DRY = pytest.mark.parametrize("dry", ["", "--dry-run"], ids=["real", "dry"])
ROWS = pytest.mark.parametrize("rows", ["", "--delete-jobs"], ids=["objects", "rows"])


@pytest.fixture(scope="session", params=["mariadb", "mysql"])
def box(request: pytest.FixtureRequest, box: Sandbox) -> Sandbox:
    return box if request.param == "mariadb" else request.getfixturevalue("mysql_box")


@pytest.fixture
def world(world: World) -> Iterator[World]:
    """The seed's world, whose user may delete job rows; other tables and buckets go at the end."""
    world.box.sql(f"GRANT DELETE ON {DATABASE}.* TO {USER}@'%'")
    yield world
    clean(world)
    # As the sandboxes have it.
    world.box.sql(f"GRANT DELETE ON {DATABASE}.* TO {USER}@'%'")
    if world.box.database.kind == "mariadb":
        revoke(world)


def clean(world: World) -> None:
    sql = world.box.sql
    for (table,) in sql("SHOW TABLES"):
        if table != TABLE:
            sql("SET foreign_key_checks = 0", f"DROP TABLE {table}")
    for name in {*world.box.backend.buckets} - {BUCKET}:
        world.box.backend.buckets.pop(name)
        s3_backends.bucket_accounts.pop(name)


def everything(box: Sandbox) -> Any:
    """All rows of all tables, all keys of all buckets."""
    tables = {
        table: box.sql(f"SELECT * FROM {table} ORDER BY 1") for (table,) in box.sql("SHOW TABLES")
    }
    return tables, {name: sorted(bucket.keys) for name, bucket in box.backend.buckets.items()}


def untouched(world: World, options: str, code: int, *says: str, **variables: str) -> Result:
    """Run it: it ends with this code, says this, and changes nothing."""
    before = everything(world.box)
    result = world.purge(*AS_OF, *options.split(), **variables)
    assert everything(world.box) == before
    assert result.code == code, result.err
    for words in says:
        assert words in result.err
    if code:
        assert says[0] in result.error  # one line tells why
    return result


# What no database has a say in runs on one.
ONCE = pytest.mark.parametrize("box", ["mariadb"], indirect=True)


# --- Variables ------------------------------------------------------------------------------------


@ONCE
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("DRYRUN", "1", "is no option's variable: do you mean RETENTION_PURGE_DRY_RUN?"),
        ("DRY_RUNS", "1", "is no option's variable: do you mean RETENTION_PURGE_DRY_RUN?"),
        ("UNDO", "audit.log", "is no option's variable"),
        ("RUN_ID", "1", "is no option's variable"),
        ("VERSION", "1", "is no option's variable"),
        ("HELP", "1", "is no option's variable"),
        ("MAX_OBJECT", "0", "is no option's variable: do you mean RETENTION_PURGE_MAX_OBJECTS?"),
        ("MAX-PERCENT", "1", "is no option's variable: do you mean RETENTION_PURGE_MAX_PERCENT?"),
        ("RETENTION", "365", "do you mean RETENTION_PURGE_RETENTION_DAYS?"),
        ("DB_PASS", "x", "is no option's variable: do you mean RETENTION_PURGE_DB_PASSWORD?"),
        ("dry_run", "1", "is no option's variable"),
        ("RETENTION_DAYS", "", "is empty"),
        ("DRY_RUN", "", "is empty"),
        ("DRY_RUN", " ", "is empty"),
        ("PREFIX", "", "is empty"),
        ("MAX_OBJECTS", "", "is empty"),
        ("DB_PASSWORD", "", "is empty"),
        ("DRY_RUN", "ja", "not a valid boolean"),
        ("RETENTION_DAYS", "0", "--retention-days"),
        ("MAX_PERCENT", "nan", "--max-percent must be a number"),
        ("MAX_PERCENT", "inf", "--max-percent"),
    ],
)
def test_a_variable_that_is_a_slip_ends_the_run_before_anything(world, proxy, name, value, says):
    name = f"RETENTION_PURGE_{name}"
    says = f"{name} {says}" if says.startswith("is ") else says
    result = untouched(world, "--delete-jobs", 2, says, **{name: value})
    assert (result.out, proxy.requests) == ("", [])


@ONCE
@pytest.mark.parametrize("option", ["--max-percent nan", "--max-percent NaN", "--max-percent 101"])
def test_a_percentage_that_is_no_number_is_refused_where_it_is_typed(world, option):
    untouched(world, option, 2, "--max-percent")


# --- The wrong place ------------------------------------------------------------------------------


def empty_bucket(world: World) -> None:
    world.box.backend.create_bucket("another", REGION)


def foreign_bucket(world: World) -> None:
    empty_bucket(world)
    for n in range(60):
        world.box.backend.put_object("another", f"{n:032x}.ts", b"of somebody else")


def nothing(world: World) -> None:
    pass


def empty_table(world: World) -> None:
    world.box.sql(f"CREATE TABLE strangers LIKE {TABLE}")


def foreign_table(world: World) -> None:
    empty_table(world)
    world.box.sql(
        f"INSERT INTO strangers SELECT jobId, completedAt, type, CONCAT('of-', jobId) FROM {TABLE}"
    )


PLACES: dict[str, tuple[Callable[[World], None], str]] = {
    "prefix": (nothing, "--prefix wrong/"),
    "slash": (nothing, "--prefix /"),
    "part of a key": (nothing, "--prefix 0"),
    "empty bucket": (empty_bucket, "--bucket another"),
    "foreign bucket": (foreign_bucket, "--bucket another"),
    "foreign table": (foreign_table, "--db-table strangers"),
}
MODES = ["", "--dry-run", "--delete-jobs", "--delete-jobs --dry-run --max-percent 50"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", PLACES)
def test_a_place_without_any_key_of_the_table_is_refused(world, place, mode):
    prepare, wrong = PLACES[place]
    prepare(world)
    says = "keys of remaining jobs has an object: --bucket, --prefix or --db-table must be wrong"
    untouched(world, f"{wrong} {mode}", 3, says)


@pytest.mark.parametrize("mode", MODES[1:3])
@pytest.mark.parametrize("place", [*PLACES, "empty table"])
def test_with_orphans_too_and_even_of_an_empty_table(world, place, mode):
    prepare, wrong = PLACES.get(place, (empty_table, "--db-table strangers"))
    prepare(world)
    says = "objects listed is referred to by any of the", "--prefix or --db-table must be wrong"
    untouched(world, f"--orphans --orphan-grace-days 0 {wrong} {mode}", 3, *says)


@ONCE
def test_the_look_at_remaining_keys_costs_50_requests_and_none_where_something_is_planned(
    world, proxy
):
    jobs: list[Job] = [(f"{n}", OLD, "TRIAL", f"old{n}") for n in range(9)]
    jobs += [(f"k{n}", OLD, "OFFICIAL", f"kept{n}") for n in range(300)]
    world.box.load(jobs, [("kept0", 1), ("old0", 1)])
    world.purge("-n")
    right = proxy.requests[:]
    assert not looks(right)
    world.purge("-n", "--prefix", "wrong/")
    assert len(looks(proxy.requests)) == 50
    assert proxy.count("list") - len([each for each in right if each.operation == "list"]) <= 51


def looks(requests: list[Request]) -> list[Request]:
    """Those that ask for one key."""
    return [each for each in requests if each.query.get("max-keys") == ["1"]]


# --- Limits, rights, columns ----------------------------------------------------------------------


def revoke(world: World) -> None:
    world.box.sql(f"REVOKE DELETE ON {DATABASE}.* FROM {USER}@'%'")


def column(change: str) -> Callable[[World], None]:
    return lambda world: world.box.sql(f"ALTER TABLE {TABLE} MODIFY {change}") and None


NAME_COLUMN = "sourceData varchar(64) CHARACTER SET {} NOT NULL"
SLIPS: dict[str, tuple[Callable[[World], None], str, int, str]] = {
    "objects": (nothing, "--max-objects 16", 3, "17 objects would be deleted, more than --max-obj"),
    "keys": (nothing, "--max-percent 37", 3, "17 of 45 keys that are planned or belong to remain"),
    "rows": (
        nothing,
        "--delete-jobs --max-percent 43",
        3,
        "22 of 50 job rows would be deleted (44",
    ),
    "rights": (
        revoke,
        "--delete-jobs",
        3,
        f"the user has no DELETE on {DATABASE}.{TABLE}: grant it",
    ),
    "sjis": (column(NAME_COLUMN.format("sjis")), "", 1, "it is varchar(64) sjis"),
    "gbk": (column(NAME_COLUMN.format("gbk")), "--delete-jobs", 1, "it is varchar(64) gbk"),
    "binary": (
        column("sourceData varbinary(64) NOT NULL"),
        "",
        1,
        "must be a text column in one of",
    ),
    "date": (column("completedAt date NULL"), "", 1, "must be a TIMESTAMP column, not date"),
    "future": (nothing, "--as-of 2999-01-01", 3, "is later than the database clock"),
    "table": (nothing, "--db-table ndvr_job_statuses", 1, "Check --db-name and --db-table"),
    "no bucket": (nothing, "--bucket no-such-bucket", 1, "Check --bucket"),
    "path": (nothing, "--bucket s3://incoming-data/", 2, "a path goes into --prefix"),
}


@DRY
@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_ends_in_one_line_and_nothing_is_touched(world, proxy, slip, dry):
    prepare, options, code, says = SLIPS[slip]
    prepare(world)
    untouched(world, f"{options} {dry}", code, says)
    assert proxy.count("delete") == 0


@ONCE
@pytest.mark.parametrize("bytes_", [0, 1], ids=["says nothing", "greets and says nothing"])
def test_a_silent_database_server_ends_the_run_within_seconds(world, bytes_):
    with TcpProxy(world.box.database.port) as silent:
        silent.on_received = lambda total: time.sleep(0 if total < 200 and bytes_ else 60)
        began = time.monotonic()
        port = {"RETENTION_PURGE_DB_PORT": str(silent.port)}
        said = f"connecting to localhost:{silent.port}"
        result = untouched(world, "", 1, f"Cannot log in to localhost:{silent.port}", said, **port)
    assert time.monotonic() - began < 25  # 10, and a busy machine's start
    assert result.err.index(said) < result.err.index("Error: ")


# --- What is not ours -----------------------------------------------------------------------------

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
# Objects that no job refers to, and whether they stay. Remaining jobs name "kept", COMPOSED and
# DECOMPOSED + "2".
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


@DRY
def test_objects_that_may_be_somebodys_are_kept_and_said(world, dry):
    names = ["kept", COMPOSED, f"{DECOMPOSED}2"]
    jobs: list[Job] = [(name, OLD, "OFFICIAL", name) for name in names]
    world.box.load(jobs, [("in/kept", 1), *((key, 1) for key in STRANGE)])
    options = f"--prefix in/ --orphans --orphan-grace-days 0 --json {dry}"
    result = world.purge(*options.split())
    stay = [key for key, stays in STRANGE.items() if stays or dry]
    assert world.box.live_keys() == sorted(["in/kept", *stay])
    assert result.summary["planned"]["orphan"] == 3
    assert "3 orphans are kept: the table cannot hold the name, or holds it in ano" in result.err
    # Of the three remaining keys two have no object.
    assert result.summary["dangling"] == 2
    assert "2 keys of remaining jobs have no object" in result.err


# --- Honest users ---------------------------------------------------------------------------------


def purged(world: World) -> None:
    for key in world.purge(*AS_OF, "-n").listed:
        world.box.backend.delete_object(BUCKET, key[1])


def kept_rows(world: World) -> None:
    """Years of expired rows without objects, some remaining jobs, one that has just expired."""
    jobs: list[Job] = [(f"{n}", OLD, "TRIAL", f"old{n}") for n in range(200)]
    jobs += [(f"k{n}", OLD, "OFFICIAL", f"kept{n}") for n in range(20)]
    world.box.load(jobs, [(f"kept{n}", 1) for n in range(20)] + [("old7", 1)])


def change(statement: str) -> Callable[[World], None]:
    return lambda world: world.box.sql(statement.format(TABLE)) and None


HALF = "--max-percent 50"
# Objects and rows that go, and what is said.
HONEST: dict[str, tuple[Callable[[World], None], str, int, int, str]] = {
    "all purged": (purged, HALF, 0, 0, "planned: 0 objects"),
    "all purged, rows go": (purged, f"{HALF} --delete-jobs", 0, 22, "planned: 0 objects"),
    "none expired": (
        change("DELETE FROM {} WHERE type = 'TRIAL'"),
        HALF,
        0,
        0,
        "0 keys are expired",
    ),
    "none expired, orphans": (
        *(change("DELETE FROM {} WHERE type = 'TRIAL' AND completedAt < '2019-03-05'"),),
        *(f"{HALF} --orphans", 0, 0, "planned: 0 objects"),
    ),
    "none expired, rows go": (
        *(change("UPDATE {} SET type = 'OFFICIAL'"), f"{HALF} --delete-jobs", 0, 0),
        "0 keys are expired",
    ),
    "new table": (change("DELETE FROM {}"), HALF, 0, 0, "0 keys are expired, 0 stay"),
    "new table, rows go": (change("DELETE FROM {}"), f"{HALF} --delete-jobs", 0, 0, "0 stay"),
    "rows kept for years": (kept_rows, HALF, 1, 0, "planned: 1 objects"),
    "datetime": (column("completedAt datetime NULL"), HALF, 17, 0, "its values are taken as UTC"),
}


@pytest.mark.parametrize("state", HONEST)
def test_honest_steady_states_are_exit_0(world, state):
    prepare, options, objects, rows, says = HONEST[state]
    prepare(world)
    before = len(world.box.live_keys()), len(world.box.job_ids())
    result = world.purge(*AS_OF, *options.split())
    assert result.code == 0, result.err
    assert says in result.err
    assert "opens other tables" not in result.err  # no child, no trigger
    left = len(world.box.live_keys()), len(world.box.job_ids())
    assert left == (before[0] - objects, before[1] - rows)


def test_delete_jobs_after_years_without_it_is_refused_once_by_the_share_of_rows(world):
    kept_rows(world)
    share = "200 of 220 job rows would be deleted (90.9 %), more than --max-percent 50"
    untouched(world, f"{HALF} --delete-jobs", 3, share)
    summary = world.purge(*AS_OF, "--delete-jobs", "--json").summary
    assert (summary["deleted"]["expired"], summary["jobs_deleted"]) == (1, 200)
    summary = world.purge(*AS_OF, *HALF.split(), "--delete-jobs", "--json").summary
    assert (summary["exit_code"], summary["planned"]["jobs"]) == (0, 0)


# --- Other tables that a DELETE changes -----------------------------------------------------------

CHILD = (
    "CREATE TABLE child (jobId varchar(64) CHARSET utf8mb4 COLLATE utf8mb4_general_ci, "
    f"FOREIGN KEY (jobId) REFERENCES {TABLE} (jobId) ON DELETE CASCADE)",
    f"INSERT INTO child SELECT jobId FROM {TABLE}",
)
TRIGGER = (
    "CREATE TABLE history (jobId varchar(64))",
    f"CREATE TRIGGER t AFTER DELETE ON {TABLE} FOR EACH ROW INSERT INTO history VALUES (OLD.jobId)",
)


@pytest.mark.parametrize(
    ("statements", "table", "rows"), [(CHILD, "child", 28), (TRIGGER, "history", 22)]
)
def test_what_a_delete_of_rows_changes_besides_is_said_before_it_happens(
    world, proxy, tmp_path, statements, table, rows
):
    world.box.sql(*statements)
    said = "a DELETE in ndvr.ndvr_job_status opens other tables"
    untouched(world, "--delete-jobs --dry-run", 0, said)
    assert said not in untouched(world, "--dry-run", 0).err
    held = Held(proxy, "delete")
    with (tmp_path / "err").open("w") as err:
        process = world.start(*AS_OF, "--delete-jobs", stderr=err)
    held.wait()
    assert said in (tmp_path / "err").read_text()
    held.release()
    assert process.wait(60) == 0
    assert len(world.box.sql(f"SELECT * FROM {table}")) == rows


# --- Truth ----------------------------------------------------------------------------------------


@ONCE
@pytest.mark.parametrize(
    "option", ["--db-port 1", "--bucket no-such-bucket", "--max-objects 1", ""]
)
def test_the_audit_log_tells_of_every_attempt_and_is_private(world, tmp_path, option):
    path = tmp_path / "audit.log"
    result = world.purge(*AS_OF, *option.split(), "--audit-log", str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    start, *_, end = events(path)
    assert (start["event"], start["version"]) == ("start", "2.0.0")
    assert (end["event"], end["exit_code"]) == ("end", result.code)


@ONCE
def test_the_audit_log_agrees_with_the_exit_code_also_where_standard_output_is_full(
    world, tmp_path
):
    path = tmp_path / "audit.log"
    with open("/dev/full", "w") as full:
        process = world.start(*AS_OF, "--audit-log", str(path), stdout=full)
        process.communicate(timeout=60)
    assert process.returncode == 1
    assert events(path, "end")[-1]["exit_code"] == 1
    assert len(events(path, "deleted")) == 17


@ONCE
def test_zeros_are_options_too_in_the_audit_log(world, tmp_path):
    path = tmp_path / "audit.log"
    world.purge(
        *AS_OF, *["--max-objects", "0", "--orphan-grace-days", "0", "--audit-log"], str(path)
    )
    options = events(path, "start")[0]["options"]
    assert (options["max_objects"], options["orphan_grace_days"]) == (0, 0)


def read_only(world: World) -> None:
    world.box.sql("SET GLOBAL read_only = 1")


@pytest.mark.parametrize(
    ("prepare", "option"),
    [(nothing, "--max-objects 1"), (nothing, "--prefix wrong/"), (nothing, "--as-of 2999-01-01"),
     (revoke, "--delete-jobs"), (read_only, "")],
)  # fmt: skip
def test_a_refused_run_leaves_no_manifest_of_an_earlier_one(world, tmp_path, prepare, option):
    path = tmp_path / "manifest.csv"
    path.write_text("incoming-data,of-an-earlier-run\n")
    prepare(world)
    try:
        untouched(world, f"{option} --manifest {path}", 3, "")
    finally:
        world.box.sql("SET GLOBAL read_only = 0")
    assert list(tmp_path.iterdir()) == []


@ONCE
@DRY
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_manifest_that_is_no_file_is_refused(world, tmp_path, make, dry):
    """Such as /dev/null, which must not be tried here: without the guard it would be deleted."""
    path = tmp_path / "manifest"
    make(path)
    untouched(world, f"--manifest {path} {dry}", 2, "--manifest must be a file")
    assert path.exists()
    assert not path.is_file()


@ONCE
@pytest.mark.parametrize(
    ("status", "logs", "versioning", "recoverable"),
    [
        ("Enabled", True, "enabled", True),
        ("Enabled", False, "enabled", False),
        ("Suspended", True, "suspended", False),
        ("", True, "off", False),
        ("denied", True, None, None),
    ],
)
def test_recoverable_is_what_an_undo_can_bring_back(
    world, proxy, tmp_path, status, logs, versioning, recoverable
):
    if status in ("Enabled", "Suspended"):
        version(world, status)
    denial = Answer(403, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>")
    if status == "denied":
        proxy.before = lambda request: denial if request.operation == "versioning" else None
    options = ["--audit-log", str(tmp_path / "log")] if logs else []
    summary = world.purge(*AS_OF, "--json", *options).summary
    assert (summary["versioning"], summary["recoverable"]) == (versioning, recoverable)
    assert (summary["planned"] is None) == (status == "denied")
    assert summary["exit_code"] == (1 if status == "denied" else 0)


@ONCE
def test_what_a_failed_run_does_not_know_is_null(world):
    summary = world.purge(*AS_OF, "--json", "--db-port", "1", "--orphans").summary
    unknown = [
        "cutoff",
        "planned",
        "not_attempted",
        "missing",
        "dangling",
        "max_recheck_age_seconds",
    ]
    assert [name for name in unknown if summary[name] is not None] == []
    assert summary["versioning"] == "off"
    text = world.purge(*AS_OF, "--db-port", "1").out
    assert "planned" not in text


@ONCE
def test_suspended_versioning_is_described_as_it_is(world):
    version(world, "Suspended")
    out = world.purge(*AS_OF, "-n").out
    assert "Versioning is suspended: objects written since are gone once deleted" in out
    assert "--undo" not in out


@ONCE
def test_requests_are_those_sent_retries_too(world, proxy):
    busy = Answer(503, b"<Error><Code>SlowDown</Code><Message>slow</Message></Error>")
    first = {"list", "delete"}

    def before(request: Request) -> Answer | None:
        if request.operation not in first:
            return None
        first.remove(request.operation)
        return busy

    proxy.before = before
    summary = world.purge(*AS_OF, "--json").summary
    assert summary["deleted"]["expired"] == 17
    assert summary["requests"] == {"list": proxy.count("list"), "delete": proxy.count("delete")}
    assert proxy.count("delete") == 2


@ONCE
@pytest.mark.parametrize("options", ["", "--prefix wrong/", "--orphans --orphan-grace-days 0"])
def test_a_page_without_keys_but_with_a_token_is_followed(world, proxy, options):
    """The sample's look-ups as well, for the key that they are about."""
    followed: list[bool] = []

    def before(request: Request) -> Answer | None:
        if request.operation != "list":
            return None
        query = {name: values[0] for name, values in request.query.items()}
        token, prefix = query.get("continuation-token"), query["prefix"]
        if token is None:
            token = f"{prefix}|{query.get('start-after', '')}"
            return Answer(200, EMPTY_PAGE.format(BUCKET, token).encode())
        of, last = token.split("|")
        followed.append(of == prefix)
        start = f"start-after={quote(last)}"
        request.path = re.sub("continuation-token=[^&]*", start, request.path)
        return None

    def after(request: Request, answer: Answer) -> Answer:
        body = re.sub(rb"<StartAfter>[^<]*</StartAfter>", b"", answer.body)
        return Answer(answer.status, body, answer.headers)

    proxy.before, proxy.after = before, after
    result = world.purge(*AS_OF, *options.split(), "-n", "--json")
    assert result.code == (3 if "wrong" in options else 0), result.err
    assert len(followed) == (1 if options.startswith("--orphans") or not options else 29)
    assert all(followed)


EMPTY_PAGE = (
    "<ListBucketResult><Name>{}</Name><KeyCount>0</KeyCount><IsTruncated>true</IsTruncated>"
    "<NextContinuationToken>{}</NextContinuationToken></ListBucketResult>"
)
