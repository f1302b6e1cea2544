"""An operator's slip can do no harm, and honest users' steady states stay exit 0.

All on MariaDB and on MySQL: a slip, how the run ends, what it says; rows and objects are untouched.
"""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from conftest import AS_OF, OLD, Result, World, version
from proxies import Answer
from sandbox import BUCKET, DATABASE, REGION, TABLE, USER, Sandbox
from test_seed import EXPIRED

REMAINING = "incoming_000001"
GRANT = f"GRANT DELETE ON {DATABASE}.* TO {USER}@'%'"
REVOKE = f"REVOKE DELETE ON {DATABASE}.* FROM {USER}@'%'"


@pytest.fixture(scope="session", params=["mariadb", "mysql"])
def box(request: pytest.FixtureRequest, box: Sandbox) -> Sandbox:
    return box if request.param == "mariadb" else request.getfixturevalue("mysql_box")


@pytest.fixture
def world(world: World) -> Iterator[World]:
    """The seed's world, with all defaults, whose user may delete job rows, and two more buckets: a
    foreign one, and one for tests with a copy of 1 of 17 expired and 1 of 28 remaining keys."""
    world.box.sql(GRANT)
    del world.settings["RETENTION_PURGE_MAX_PERCENT"]
    if "foreign" not in world.box.backend.buckets:
        copies = [f"{place}{key}" for place in ("", "in/") for key in (EXPIRED[0], REMAINING)]
        for bucket, keys in {"foreign": ["of somebody else.ts"], "staging": copies}.items():
            world.box.backend.create_bucket(bucket, REGION)
            for key in keys:
                world.box.backend.put_object(bucket, key, b"")
    yield world
    world.box.sql("SET GLOBAL read_only = 0, GLOBAL init_connect = ''", GRANT, REVOKE)
    world.box.sql("DROP TABLE IF EXISTS strangers, child")


def purge(world: World, options: str) -> Result:
    """A run; among its options may be variables."""
    words = [word for word in options.split(" ") if word]
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
ONLY_EXPIRED = f"DELETE FROM {TABLE} WHERE type <> 'TRIAL' OR completedAt IS NULL "
ONLY_EXPIRED += "OR completedAt >= '2019-03-05'"
ORPHANS = "--orphans --orphan-grace-days 0 --max-percent 100"
JOB_ID = f"ALTER TABLE {TABLE} DROP COLUMN jobId; ALTER TABLE {TABLE} ADD jobId"
KEYS = f"ALTER TABLE {TABLE} DROP PRIMARY KEY"
NOT_SEEN = "of 28 keys of remaining jobs have an object; "
WRONG_PLACE = "--bucket, --prefix or --db-table must be wrong"
NEITHER = "neither a text nor an integer"
NOT_UNIQUE = "jobId is not unique: make it the primary key"
# Statements before the run, its options, its exit code and what it says.
SLIPS: dict[str, tuple[str, str, int, str]] = {
    "variable": ("DO 0", "RETENTION_PURGE_DB_PASS=x", 2, "mean RETENTION_PURGE_DB_PASSWORD?"),
    "in small letters": ("DO 0", "RETENTION_PURGE_dry_run=1", 2, "is no option's variable"),
    "undo": ("DO 0", "RETENTION_PURGE_UNDO=audit.log", 2, "is no option's variable"),
    "run-id": ("DO 0", "RETENTION_PURGE_RUN_ID=1", 2, "is no option's variable"),
    "no password": ("DO 0", "RETENTION_PURGE_DB_PASSWORD=", 2, "_DB_PASSWORD is empty"),
    "not English": ("DO 0", "RETENTION_PURGE_DELETE_JOBS=ja", 2, "RETENTION_PURGE_DELETE_JOBS"),
    # Nor a device: without the guard it would be replaced.
    "manifest": ("DO 0", "--manifest /tmp", 2, "--manifest must be a file"),
    "sjis": (
        f"{MODIFY} sourceData varchar(64) CHARSET sjis",
        "",
        1,
        "one of ascii, latin1, utf8, utf8mb3, utf8mb4, not sjis",
    ),
    "binary": (f"{MODIFY} sourceData varbinary(64)", "", 1, "must be a text column in one of"),
    "date": (f"{MODIFY} completedAt date", "", 1, "must be a TIMESTAMP column, not date"),
    "no table": ("DO 0", "--db-table ndvr_job_statuses", 1, "Check --db-name and --db-table"),
    "no SELECT": ("DO 0", "--db-table mysql.user", 1, "Grant SELECT"),
    "no jobId": ("DO 0", "--db-table information_schema.COLUMNS", 1, "is it the job tab"),
    "no type": (f"ALTER TABLE {TABLE} DROP COLUMN type", "", 1, "has no column type"),
    "no bucket": ("DO 0", "--bucket no-such-bucket", 1, "Check --bucket"),
    "objects": ("DO 0", "--max-objects 16", 3, "17 objects would be deleted, more than --max-o"),
    "keys": ("DO 0", "--max-percent 37.7", 3, "17 of 45 keys that are planned or belong to remain"),
    "default": (f"DELETE FROM {TABLE} WHERE type = 'OFFICIAL'", "", 3, "than --max-percent 50"),
    "rows": ("DO 0", "--delete-jobs --max-percent 43", 3, "22 of 50 job rows would be deleted (44"),
    "no DELETE": (REVOKE, "--delete-jobs", 3, f"no DELETE on {DATABASE}.{TABLE}: grant it"),
    "future": ("DO 0", "--as-of 2999-01-01", 3, "is later than the database clock"),
    "clock": (AHEAD, "", 3, "the clock of the database is 4"),
    "carriage return": ("DO 0", "RETENTION_PURGE_AUDIT_LOG=log\r", 2, "has a control character"),
    "bell": ("DO 0", "--prefix in/\a", 2, "--prefix has a control character"),
    "undo and purge": ("DO 0", "--undo /dev/null", 2, "--as-of does not go with --undo"),
    "two ways": ("DO 0", "--undo /dev/null --explain key", 2, "Give only one of"),
    "which run": ("DO 0", "--run-id 1", 2, "--run-id goes with --undo"),
    "jobId binary": (f"{JOB_ID} binary(16) UNIQUE", "--delete-jobs", 3, NEITHER),
    "jobId datetime": (f"{JOB_ID} datetime UNIQUE", "--delete-jobs", 3, NEITHER),
    "jobId decimal": (f"{JOB_ID} decimal(9) UNIQUE", "--delete-jobs", 3, NEITHER),
    "jobId no key": (KEYS, "--delete-jobs", 3, NOT_UNIQUE),
    "jobId index": (f"{KEYS}, ADD INDEX (jobId)", "--delete-jobs", 3, NOT_UNIQUE),
    "half a key": (f"{KEYS}, ADD PRIMARY KEY (jobId, sourceData)", "--delete-jobs", 3, NOT_UNIQUE),
    "second half": (f"{KEYS}, ADD PRIMARY KEY (sourceData, jobId)", "--delete-jobs", 3, NOT_UNIQUE),
    "prefix of it": (f"{KEYS}, ADD UNIQUE (jobId(36))", "--delete-jobs", 3, NOT_UNIQUE),
    "prefix": ("DO 0", "--prefix wrong/", 3, f"only 0 {NOT_SEEN}wrong/"),
    "prefix, orphans": ("DO 0", "--prefix wrong/ --delete-jobs --orphans", 3, f"only 0 {NOT_SEEN}"),
    "bucket, rows": ("DO 0", "--bucket foreign --delete-jobs", 3, f"only 0 {NOT_SEEN}"),
    "bucket, orphans": ("DO 0", f"--bucket foreign {ORPHANS}", 3, f"only 0 {NOT_SEEN}"),
    "staging, rows": ("DO 0", "--bucket staging --delete-jobs", 3, f"only 1 {NOT_SEEN}"),
    "staging, prefix": ("DO 0", "--bucket staging --prefix in/ --delete-jobs", 3, f"1 {NOT_SEEN}"),
    "staging, orphans": ("DO 0", f"--bucket staging {ORPHANS}", 3, f"only 1 {NOT_SEEN}"),
    "expired jobs alone": (
        ONLY_EXPIRED,
        "--prefix wrong/ --delete-jobs --max-percent 100",
        3,
        f"0 of 17 expired keys have an object, and no job remains: {WRONG_PLACE}",
    ),
    "orphans of no jobs": (ONLY_EXPIRED, ORPHANS, 3, f"no remaining one among them: {WRONG_PLACE}"),
    "table, rows": (STRANGERS, "--db-table strangers --delete-jobs", 3, "keys of remaining jobs"),
    "table, orphans": (STRANGERS, f"--db-table strangers {ORPHANS}", 3, "keys of remaining jobs"),
}


RUNS = [(slip, dry) for slip in SLIPS for dry in ("", "-n") if not dry or SLIPS[slip][2] != 2]


@pytest.mark.parametrize(("slip", "dry"), RUNS)
def test_a_slip_ends_in_one_line_and_nothing_is_touched(world, proxy, tmp_path, slip, dry):
    """A refused real run leaves no manifest, and looks for 50 keys at most. A dry run shows its
    plan all the same."""
    prepare, options, code, says = SLIPS[slip]
    world.box.sql(*prepare.split("; "))
    before, path = everything(world.box), tmp_path / "manifest.csv"
    path.write_text("of an earlier run")
    result = purge(world, f"--manifest {path} {options} {dry}")
    assert everything(world.box) == before
    assert (result.code, says in result.error) == (code, True), result.err
    assert (proxy.count("delete"), proxy.count("list") <= 1 + 50) == (0, True)
    left = [(name.name, name.read_text()) for name in tmp_path.iterdir()]
    assert left == ([] if code == 3 and not dry else [(path.name, "of an earlier run")])
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
SPELLINGS = [("/lead", "lead"), ("UPPER", "upper"), ("per cent", "per%20cent"), ("a%2Bb", "a+b")]
SPELLINGS += [
    (COMPOSED, DECOMPOSED),
    (f"2{DECOMPOSED}", f"2{COMPOSED}"),
    ("Stra\u00dfe", "STRASSE"),
]
# Of 100 OFFICIAL jobs 66 name their object as it is called, and 34 otherwise. "in/gone" is of an
# expired job, another one names nothing. A console's folder is called like the prefix.
EXACT = [f"exact{n}" for n in range(66)]
OTHERWISE = [(f"{a}{n}", f"{b}{n}") for n in range(5) for a, b in SPELLINGS][:34]
GO = ["in/gone", "in/below/", "in/../x", "in/" + "x" * 64, f"in/{DECOMPOSED}x"]
DOUBTFUL = ["in/" + "x" * 65, *(f"in/{key}" for _, key in OTHERWISE)]
STAY = [*DOUBTFUL, *(f"in/{key}" for key in EXACT), "gone", "io", "in/"]


def test_objects_that_may_be_somebodys_are_kept_and_said(world):
    jobs: Any = [(name, OLD, "OFFICIAL", name) for name in [*EXACT, *(a for a, _ in OTHERWISE)]]
    world.box.load([*jobs, ("nameless", OLD, "TRIAL", ""), ("gone", OLD, "TRIAL", "gone")], [])
    for key in GO + STAY:
        world.box.put(key, age=timedelta(days=8))
    result = purge(world, "--prefix in/ --orphans --json")
    assert world.box.live_keys() == sorted(STAY)
    told = [result.summary[name] for name in ("doubtful", "dangling", "exit_code")]
    assert told == [len(DOUBTFUL), len(OTHERWISE), 0]
    assert "34 keys of remaining jobs have no object" in result.err
    assert f"{len(DOUBTFUL)} objects are kept as doubtful" in result.err


def test_names_that_are_no_utf_8_do_not_end_the_run(world):
    """MariaDB stores UTF-16's surrogates."""
    if world.box.database.kind == "mysql":
        pytest.skip("MySQL refuses them")
    odd = "CONCAT('{}', _utf8mb4 x'eda080')"
    for job, kind in {"1": "'TRIAL'", "2": odd.format(""), "3": odd.format("TRIAL")}.items():
        values = f"'{OLD}', {kind}, {odd.format('incoming')}"
        world.box.sql(f"INSERT INTO {TABLE} VALUES ('{job}', {values})")
    world.box.sql(f"UPDATE {TABLE} SET type = {odd.format('')} WHERE sourceData = '{EXPIRED[0]}'")
    ids = f"UPDATE {TABLE} SET jobId = {odd.format('x')} WHERE sourceData = '{EXPIRED[1]}' LIMIT 1"
    world.box.sql(ids)
    assert purge(world, f"-n --explain {EXPIRED[0]}").code == 0
    assert [purge(world, f"{ORPHANS} --delete-jobs {dry}").code for dry in ("-n", "")] == [0, 0]
    assert EXPIRED[0] in world.box.live_keys()
    assert not {*EXPIRED[1:]} & {*world.box.live_keys()}


# --- The manifest ---------------------------------------------------------------------------------


def test_the_manifest_is_its_owners_and_is_written_through_no_link(world, tmp_path):
    path, victim = tmp_path / "plan", tmp_path / "victim"
    victim.write_text("precious")
    for link in (path, tmp_path / "plan.part"):
        link.symlink_to(victim)
    assert purge(world, f"--manifest {path}").code == 0
    assert (victim.read_text(), path.is_symlink()) == ("precious", False)
    assert path.read_text().splitlines() == [f"{BUCKET},{key}" for key in EXPIRED]
    assert path.stat().st_mode & 0o777 == 0o600
    assert {*tmp_path.iterdir()} == {path, victim}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_leaves_the_earlier_manifest_and_no_part_of_a_new_one(
    world, tmp_path, signum
):
    path = tmp_path / "plan"
    path.write_text("of an earlier run")
    patch = f"rp.quote = lambda key: rp.signal.raise_signal({int(signum)})"
    result = world.purge(*AS_OF, "--manifest", str(path), patch=patch)
    assert (result.code, len(world.box.live_keys())) == (128 + signum, 48)
    assert [(name, name.read_text()) for name in tmp_path.iterdir()] == [
        (path, "of an earlier run")
    ]


# --- What it costs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "missing", "lists"),
    [("", 0, 1), ("--delete-jobs", 0, 1), ("", 1, 1), ("--delete-jobs", 1, 51), ("", 5, 51)],
)
def test_only_a_run_that_believes_in_absence_looks_for_50_keys(world, options, missing, lists):
    """And only if rows of missing keys may go, or all expired keys are missing."""
    kept = [f"kept{n:03}" for n in range(200)]
    jobs = [(key, OLD, "OFFICIAL", key) for key in kept]
    jobs += [(f"t{n}", OLD, "TRIAL", f"expired{n}") for n in range(5)]
    there = kept + [f"expired{n}" for n in range(missing, 5)]
    world.box.load(jobs, [(key, 1) for key in there])
    summary = purge(world, f"{options} --json").summary
    told = [summary[name] for name in ("exit_code", "missing", "requests")]
    assert told == [0, missing, {"list": lists, "delete": int(missing < 5)}]


HIDE = {"mariadb": "IGNORED", "mysql": "INVISIBLE"}


@pytest.mark.parametrize(
    ("index", "change", "asked"),
    [
        (None, None, 1),
        ("(sourceData)", None, 3),
        ("(sourceData, type)", None, 3),
        ("(type, sourceData)", None, 1),
        ("(sourceData)", "ALTER INDEX s {}", 1),
    ],
)
def test_an_index_that_the_server_does_not_use_is_none(world, index, change, asked):
    """Without one the table is asked once a round, not before each request."""
    if index:
        world.box.sql(f"CREATE INDEX s ON {TABLE} {index}")
    if change:
        hide = change.format(HIDE[world.box.database.kind])
        world.box.sql(f"ALTER TABLE {TABLE} {hide}")
    patch = "rp.DEAR_RECHECK, rp.BATCH, ask = -1, 6, rp.Gate.known\n"
    patch += "rp.Gate.known = lambda *a: (rp.log.info('asked'), ask(*a))[1]"
    result = world.purge(*AS_OF, "--json", patch=patch)
    assert result.summary["requests"]["delete"] == 3
    assert result.err.count("INFO asked") == asked
    assert result.err.count("make an index") == (asked == 1)


# --- Honest users ---------------------------------------------------------------------------------

CHILD = "CREATE TABLE child (jobId varchar(64) CHARSET utf8mb4 COLLATE utf8mb4_general_ci, "
CHILD += f"FOREIGN KEY (jobId) REFERENCES {TABLE} (jobId) ON DELETE CASCADE)"
# A statement before the run, its options, objects and rows that go, and what is said.
HONEST: dict[str, tuple[str, str, int, int, str]] = {
    "none expired": (f"UPDATE {TABLE} SET type = ''", "--delete-jobs", 0, 0, "0 keys are expired"),
    "new table": (f"DELETE FROM {TABLE}", "--delete-jobs", 0, 0, "0 stay"),
    "limits": ("DO 0", "--delete-jobs --max-objects 17 --max-percent 44", 17, 22, "17 objects"),
    "datetime": (f"{MODIFY} completedAt datetime", "", 17, 0, "its values are taken as UTC"),
    "child": (CHILD, "--delete-jobs", 17, 22, "17 objects"),
    "jobId integer": (f"{JOB_ID} int AUTO_INCREMENT UNIQUE", "--delete-jobs", 17, 22, "17 objects"),
    "jobId unique": (f"{KEYS}, ADD UNIQUE (jobId)", "--delete-jobs", 17, 22, "17 objects"),
}


@pytest.mark.parametrize("state", HONEST)
def test_honest_steady_states_are_exit_0(world, state):
    prepare, options, objects, rows, says = HONEST[state]
    world.box.sql(*prepare.split("; "))
    before = len(world.box.live_keys()), len(world.box.job_ids())
    result = purge(world, options)
    assert (result.code, says in result.err) == (0, True), result.err
    left = len(world.box.live_keys()), len(world.box.job_ids())
    assert left == (before[0] - objects, before[1] - rows)


def test_a_second_pass_with_delete_jobs_after_years_without_it_is_exit_0(world):
    assert purge(world, "").code == 0
    summary = purge(world, "--delete-jobs --json").summary
    told = [summary[name] for name in ("exit_code", "missing", "jobs_deleted")]
    assert told == [0, 17, 22]


@pytest.mark.parametrize("options", ["", "--orphans"])
def test_a_table_in_which_a_third_of_the_uploads_never_happened_is_exit_0(world, options):
    for key in world.box.live_keys()[::3]:
        world.box.s3().delete_object(Bucket=BUCKET, Key=key)
    summary = purge(world, f"--delete-jobs --json {options}").summary
    assert (summary["exit_code"], summary["jobs_deleted"]) == (0, 22)
    assert 0 < summary["missing"] < 17


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
    unknown |= {"recoverable", "max_recheck_age_seconds", "seen", "doubtful"}
    assert {name for name, fact in summary.items() if fact is None} == unknown
