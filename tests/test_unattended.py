"""What makes a nightly run safe: guards, lock, audit log, undo, job rows, signals, kill -9."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import AS_OF, World
from proxies import DROP, Answer, Request, S3Proxy
from sandbox import BUCKET, DATABASE, TABLE, USER, Sandbox
from test_seed import EXPIRED

OLD = "2019-01-01 00:00:00"
EVERYTHING = ("--orphans", "--orphan-grace-days", "0")


def sql(box: Sandbox, *statements: str) -> Any:
    """Run statements as the server's root; the rows of the last one."""
    with box.database.admin(database=DATABASE) as connection:
        cursor = connection.cursor()
        for statement in statements:
            cursor.execute(statement)
        return cursor.fetchall()


def expire(world: World, count: int) -> list[str]:
    """Make the world hold `count` expired jobs, each with its object."""
    keys = [f"k{n:06}" for n in range(count)]
    world.box.load([(key, OLD, "TRIAL", key) for key in keys], [(key, 1) for key in keys])
    return keys


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kinds(path: Path) -> list[str]:
    return [event["event"] for event in events(path)]


def state(box: Sandbox) -> tuple[list[str], list[str]]:
    return box.live_keys(), box.job_ids()


# --- Guards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["real", "dry"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-objects", "16"], ["17 objects", "--max-objects 16"]),
        (["--max-percent", "37"], ["17 of 45", "37.8 %", "--max-percent 37"]),
        ([*EVERYTHING, "--max-percent", "41"], ["20 of 48", "41.7 %", "--max-percent 41"]),
        (["--as-of", "2999-01-01"], ["--as-of", "later than the database clock"]),
        (["--max-percent", "nan"], ["--max-percent nan"]),
    ],
)
def test_a_guard_refuses_with_its_numbers_and_nothing_changes(world, options, says, dry):
    before = state(world.box)
    result = world.purge(*AS_OF, *options, *dry)
    assert result.code == 3
    for words in says:
        assert words in result.error
    assert state(world.box) == before


def test_a_dry_run_that_would_be_refused_still_lists_its_plan(world):
    result = world.purge(*AS_OF, "-n", "--max-objects", "3")
    assert (result.code, len(result.listed)) == (3, 17)


@pytest.mark.parametrize(
    "options", [["--max-objects", "17"], ["--max-percent", "37.8"], ["--max-percent", "100"]]
)
def test_a_run_within_its_limits_goes_ahead(world, options):
    assert world.purge(*AS_OF, *options, "--json").summary["deleted"]["expired"] == 17


def test_more_than_half_is_refused_by_default(world):
    sql(world.box, f"DELETE FROM {TABLE} WHERE type = 'OFFICIAL'")
    result = world.purge(*AS_OF, RETENTION_PURGE_MAX_PERCENT=None)
    assert result.code == 3
    assert "--max-percent 50" in result.error


def test_orphans_are_refused_where_no_remaining_key_is_listed(world):
    for options in (["--prefix", "test"], ["--db-table", f"{DATABASE}.strangers"]):
        sql(
            world.box,
            f"CREATE OR REPLACE TABLE strangers LIKE {TABLE}",
            "INSERT INTO strangers VALUES ('1', now(), 'OFFICIAL', 'not in this bucket')",
        )
        result = world.purge(*AS_OF, *EVERYTHING, *options)
        assert result.code == 3
        assert "none of the" in result.error
        assert "--prefix" in result.error
    assert len(world.box.live_keys()) == 48


@pytest.mark.parametrize("shift", [-400, 400])
def test_a_database_clock_that_is_off_is_refused(world, shift):
    sql(world.box, f"SET GLOBAL init_connect = 'SET timestamp = unix_timestamp() + {shift}'")
    try:
        result = world.purge(*AS_OF)
    finally:
        sql(world.box, "SET GLOBAL init_connect = ''")
    assert result.code == 3
    assert re.search(r"clock of .* is (399|40[01]) seconds ahead", result.error)
    assert "the database" in result.error
    assert len(world.box.live_keys()) == 48


@pytest.mark.parametrize(("shift", "code"), [(-400, 3), (400, 3), (-200, 0), (200, 0)])
def test_an_s3_clock_that_is_off_is_refused(world, proxy, shift, code):
    def after(request: Request, answer: Answer) -> Answer:
        moment = datetime.now(UTC) + timedelta(seconds=shift)
        name = next(name for name in answer.headers if name.lower() == "date")
        answer.headers[name] = moment.strftime("%a, %d %b %Y %H:%M:%S GMT")
        return answer

    proxy.after = after
    result = world.purge(*AS_OF)
    assert result.code == code
    if code:
        assert "S3" in result.error


# --- Lock -----------------------------------------------------------------------------------------


def test_two_runs_started_together_one_purges_and_one_exits_75(world, proxy):
    entered, release = threading.Event(), threading.Event()

    def before(request: Request) -> None:
        if request.operation == "list":
            entered.set()
            release.wait(60)

    proxy.before = before
    first = world.start(*AS_OF, "--json")
    assert entered.wait(60)
    second = world.purge(*AS_OF, "--json")
    assert second.code == 75
    assert "Another run" in second.summary["error"]
    dry = threading.Timer(0.1, release.set)
    dry.start()
    assert world.purge(*AS_OF, "-n").code == 0, "a dry run needs no lock"
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 0
    assert json.loads(out)["deleted"]["expired"] == 17
    assert world.purge(*AS_OF).code == 0, "the lock is gone with its run"


def test_runs_on_another_prefix_do_not_wait_for_each_other(world, proxy):
    entered, release = threading.Event(), threading.Event()

    def before(request: Request) -> None:
        if request.operation == "list" and request.query["prefix"] == [""]:
            entered.set()
            release.wait(60)

    proxy.before = before
    first = world.start(*AS_OF)
    assert entered.wait(60)
    assert world.purge("--prefix", "incoming_", *AS_OF).code == 0
    release.set()
    first.communicate(timeout=60)
    assert first.returncode == 0


def test_a_lost_lock_stops_the_run(world, proxy):
    keys = expire(world, 5000)

    def before(request: Request) -> None:
        if request.operation == "delete" and proxy.count("delete") == 2:
            for (thread,) in sql(
                world.box, f"SELECT id FROM information_schema.processlist WHERE user = '{USER}'"
            ):
                sql(world.box, f"KILL {thread}")

    proxy.before = before
    result = world.purge(*AS_OF, "--json", "--workers", "1")
    assert result.code == 1
    summary = result.summary
    assert "re-check" in summary["error"]
    assert summary["deleted"]["expired"] + summary["failed"] == 5000
    assert summary["deleted"]["expired"] == 5000 - len(world.box.live_keys())
    assert 1000 <= summary["deleted"]["expired"] <= 2000
    assert set(world.box.live_keys()) < set(keys)


# --- Re-check -------------------------------------------------------------------------------------


def selects(box: Sandbox) -> int:
    return int(sql(box, "SHOW GLOBAL STATUS LIKE 'Com_select'")[0][1])


@pytest.mark.parametrize(
    ("rows", "index", "by_batch", "advice"),
    [
        (100_000, False, True, False),
        (1_500_000, False, False, True),
        (1_500_000, True, True, False),
    ],
)
def test_re_checks_are_by_batch_unless_they_are_dear(world, rows, index, by_batch, advice):
    expire(world, 12_000)
    sql(
        world.box,
        f"INSERT INTO {TABLE} SELECT concat('j', seq), now(), 'OFFICIAL', concat('o', seq) "
        f"FROM seq_1_to_{rows}",
        *([f"CREATE INDEX k ON {TABLE} (sourceData)"] if index else []),
    )
    before = selects(world.box)
    result = world.purge(*AS_OF, "--json", "--workers", "2")
    # Besides: two looks at the table and its indexes, clock, sort length, keys, read_only, lock.
    rechecks = selects(world.box) - before - 9
    assert result.summary["deleted"]["expired"] == 12_000
    assert 0 < result.summary["max_recheck_age_seconds"] < 60
    if by_batch:
        assert rechecks == 12
    else:
        assert 2 <= rechecks <= 8
    assert ("an index on sourceData would help" in result.err) == advice


# --- Audit log ------------------------------------------------------------------------------------


def test_the_audit_log_tells_the_whole_run(world, tmp_path):
    path = tmp_path / "audit.jsonl"
    summary = world.purge(*AS_OF, *EVERYTHING, "--audit-log", str(path), "--json").summary
    start, *keyed, end = events(path)
    assert {event["run_id"] for event in events(path)} == {summary["run_id"]}
    assert (start["event"], start["bucket"], start["prefix"]) == ("start", BUCKET, "")
    assert start["table"] == f"{DATABASE}.{TABLE}"
    assert start["cutoff"] == summary["cutoff"]
    assert start["options"]["orphan_grace_days"] == 0
    assert end["event"] == "end"
    for name in ("planned", "deleted", "exit_code", "failed"):
        assert end[name] == summary[name]
    assert [event["event"] for event in keyed] == ["delete"] * 20 + ["deleted"] * 20
    assert {event["key"] for event in keyed} == set(EXPIRED) | {"test", "test_1.txt", "test_2.txt"}
    orphan = next(event for event in keyed if event["key"] == "test_1.txt")
    assert (orphan["reason"], orphan["size"]) == ("orphan", 60)
    assert datetime.fromisoformat(orphan["last_modified"]).tzinfo is not None


def test_the_intent_is_on_disk_before_the_request(world, proxy, tmp_path):
    path = tmp_path / "audit.jsonl"
    seen: list[bool] = []

    def before(request: Request) -> None:
        if request.operation == "delete":
            intended = {e["key"] for e in events(path) if e["event"] == "delete"}
            asked = set(re.findall("<Key>(.*?)</Key>", request.body.decode()))
            seen.append(asked <= intended)

    proxy.before = before
    expire(world, 2500)
    assert world.purge(*AS_OF, "--audit-log", str(path)).code == 0
    assert seen == [True] * 3


def test_failed_and_retained_keys_are_in_the_log_with_their_reason(world, proxy, tmp_path):
    path = tmp_path / "audit.jsonl"

    def before(request: Request) -> None:
        if request.operation == "list":
            sql(world.box, f"INSERT INTO {TABLE} VALUES ('x', NULL, 'TRIAL', 'incoming_000011')")

    def after(request: Request, answer: Answer) -> Answer:
        error = b"<Error><Key>incoming_000012</Key><Code>AccessDenied</Code></Error>"
        answer.body = re.sub(
            rb"<Deleted><Key>incoming_000012</Key>.*?</Deleted>", error, answer.body
        )
        return answer

    proxy.before, proxy.after = before, after
    result = world.purge(*AS_OF, "--audit-log", str(path))
    assert result.code == 4
    by_kind = {event["event"]: event for event in events(path)}
    assert by_kind["retained"]["key"] == "incoming_000011"
    assert by_kind["failed"]["key"] == "incoming_000012"
    assert by_kind["failed"]["code"] == "AccessDenied"


def test_a_dry_run_writes_no_audit_log(world, tmp_path):
    path = tmp_path / "audit.jsonl"
    assert world.purge(*AS_OF, "-n", "--audit-log", str(path)).code == 0
    assert not path.exists()


def test_runs_append_and_a_refused_run_is_on_record(world, tmp_path):
    path = tmp_path / "audit.jsonl"
    for limit in ("3", "100"):
        world.purge(*AS_OF, "--audit-log", str(path), "--max-objects", limit)
    assert kinds(path) == ["start", "end", "start", *["delete"] * 17, *["deleted"] * 17, "end"]


@pytest.mark.parametrize("path", ["/no/such/folder/log", "/"])
def test_an_audit_log_that_cannot_be_written_stops_the_run_at_once(world, path):
    result = world.purge(*AS_OF, "--audit-log", path)
    assert result.code == 2
    assert "audit log" in result.error
    assert len(world.box.live_keys()) == 48


def test_an_audit_log_on_a_full_disk_stops_the_run_before_the_delete(world):
    result = world.purge(*AS_OF, "--audit-log", "/dev/full", "--json")
    assert result.code in (1, 2)
    assert "audit log" in result.summary["error"]
    assert len(world.box.live_keys()) == 48


# --- Versioned buckets ----------------------------------------------------------------------------


def version(world: World, status: str = "Enabled") -> None:
    world.box.s3().put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": status})


def reload_versioned(world: World) -> None:
    """The bucket's objects again, after versioning was turned on."""
    version(world)
    for key in world.box.live_keys():
        world.box.put(key)


def markers(world: World) -> int:
    answer = world.box.s3().list_object_versions(Bucket=BUCKET)
    return len(answer.get("DeleteMarkers", []))


def test_undo_brings_back_exactly_what_the_log_records(world, tmp_path):
    reload_versioned(world)
    before = world.box.live_keys()
    world.box.s3().delete_object(Bucket=BUCKET, Key="incoming_000001")  # somebody else's
    path = tmp_path / "audit.jsonl"
    result = world.purge(*AS_OF, *EVERYTHING, "--audit-log", str(path))
    assert result.code == 0
    assert "--undo" in result.out
    assert len(world.box.live_keys()) == 27

    dry = world.purge("--undo", str(path), "-n")
    assert (dry.code, len(dry.listed)) == (0, 20)
    assert len(world.box.live_keys()) == 27

    undone = world.purge("--undo", str(path), "--json").summary
    assert undone["mode"] == "undo"
    assert undone["planned"] == undone["deleted"] == {"expired": 17, "orphan": 3, "bytes": 420}
    assert world.box.live_keys() == [key for key in before if key != "incoming_000001"]
    assert markers(world) == 1

    again = world.purge("--undo", str(path), "--json").summary
    assert (again["planned"]["expired"], again["missing"], again["exit_code"]) == (0, 20, 0)
    assert markers(world) == 1


def test_a_purge_of_a_versioned_bucket_is_recoverable_and_stacks_no_markers(world):
    reload_versioned(world)
    summary = world.purge(*AS_OF, "--json").summary
    assert (summary["versioning"], summary["recoverable"]) == ("enabled", True)
    assert markers(world) == 17
    assert world.purge(*AS_OF, "--json").summary["missing"] == 17
    assert markers(world) == 17


def test_suspended_versioning_is_said_to_have_no_undo(world):
    version(world)
    version(world, "Suspended")
    result = world.purge(*AS_OF)
    assert "versioning suspended" in result.out
    assert "cannot be undone" in result.out
    assert len(world.box.live_keys()) == 31


def test_an_answer_lost_in_a_versioned_bucket_stacks_no_marker_and_is_undone(
    world, proxy, tmp_path
):
    reload_versioned(world)
    before, lost, path = world.box.live_keys(), [DROP], tmp_path / "audit.jsonl"

    def after(request: Request, answer: Answer) -> Answer:
        return lost.pop() if request.operation == "delete" and lost else answer

    proxy.after = after
    summary = world.purge(*AS_OF, "--audit-log", str(path), "--json").summary
    assert (summary["deleted"]["expired"], summary["failed"]) == (17, 0)
    assert markers(world) == 17
    assert world.purge("--undo", str(path)).code == 0
    assert world.box.live_keys() == before


def test_answers_lost_and_then_credentials_lost_count_no_key_twice(world, proxy, tmp_path):
    reload_versioned(world)
    lost, path = [DROP], tmp_path / "audit.jsonl"

    def before(request: Request) -> Answer | None:
        looked = sum("versions" in r.query for r in proxy.requests)
        expired = b"<Error><Code>ExpiredToken</Code><Message>no</Message></Error>"
        return Answer(400, expired) if "versions" in request.query and looked == 5 else None

    def after(request: Request, answer: Answer) -> Answer:
        return lost.pop() if request.operation == "delete" and lost else answer

    proxy.before, proxy.after = before, after
    result = world.purge(*AS_OF, "--audit-log", str(path), "--json")
    assert result.code == 1
    summary = result.summary
    assert summary["deleted"]["expired"] + summary["failed"] == 17
    ends = [e["key"] for e in events(path) if e["event"] in ("deleted", "failed")]
    assert len(ends) == len(set(ends)) == 17


@pytest.mark.parametrize("answer", [Answer(204, b""), Answer(200, b"<ListVersionsResult/>")])
def test_undo_takes_silence_for_an_error(world, proxy, tmp_path, answer):
    reload_versioned(world)
    path = tmp_path / "audit.jsonl"
    world.purge(*AS_OF, "--audit-log", str(path))
    proxy.before = lambda request: answer if "versions" in request.query else None
    result = world.purge("--undo", str(path))
    assert result.code == 1
    assert "Cannot list the versions" in result.error


def test_undo_counts_a_marker_once_however_often_the_log_names_it(world, tmp_path):
    reload_versioned(world)
    path = tmp_path / "audit.jsonl"
    world.purge(*AS_OF, "--audit-log", str(path))
    path.write_text(path.read_text() * 2)
    summary = world.purge("--undo", str(path), "--json").summary
    assert summary["deleted"]["expired"] == 17
    assert summary["recoverable"] is False


def test_undo_leaves_a_version_that_is_no_delete_marker_alone(world, tmp_path):
    reload_versioned(world)
    path = tmp_path / "audit.jsonl"
    world.purge(*AS_OF, "--audit-log", str(path))
    held = world.box.s3().list_object_versions(Bucket=BUCKET, Prefix="incoming_000001")
    data = next(v["VersionId"] for v in held["Versions"] if v["VersionId"] != "null")
    first = events(path)
    forged = {**first[-2], "key": "incoming_000001", "version_id": data}
    path.write_text("\n".join(json.dumps(event) for event in [first[0], forged]))
    summary = world.purge("--undo", str(path), "--json").summary
    assert (summary["planned"]["expired"], summary["missing"]) == (0, 1)
    assert "incoming_000001" in world.box.live_keys()


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_undo_works_from_a_log_with_a_cut_last_line(world, tmp_path, cut):
    reload_versioned(world)
    path = tmp_path / "audit.jsonl"
    world.purge(*AS_OF, "--audit-log", str(path))
    whole = path.read_text().rindex('{"event": "end"')
    path.write_text(path.read_text()[: whole - cut])
    result = world.purge("--undo", str(path), "--json")
    assert result.summary["deleted"]["expired"] in (16, 17)
    assert ("is cut" in result.err) == (cut > 1)
    # The next run appends to such a log, and it is still good for an undo.
    world.purge(*AS_OF, "--audit-log", str(path))
    assert world.purge("--undo", str(path), "--json").code == 0
    assert len(world.box.live_keys()) in (47, 48)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no start event"),
        (b"not json\n", "no start event"),
        (b'{"some": "json"}\n', "not of an audit log"),
        (b"[1, 2]\n", "not of an audit log"),
        (b'{"event": "start", "bucket": "another"}\n', "the log of bucket another"),
    ],
)
def test_undo_refuses_a_file_that_is_not_its_log(world, tmp_path, content, says):
    reload_versioned(world)
    path = tmp_path / "log"
    path.write_bytes(content)
    result = world.purge("--undo", str(path))
    assert result.code == 3
    assert says in result.error


def test_undo_on_an_unversioned_bucket_is_refused(world, tmp_path):
    path = tmp_path / "log"
    world.purge(*AS_OF, "--audit-log", str(path))
    result = world.purge("--undo", str(path))
    assert result.code == 3
    assert "not versioned" in result.error


def test_undo_needs_no_database_and_a_readable_log(world):
    settings = {f"RETENTION_PURGE_DB_{name}": None for name in ("HOST", "USER", "NAME", "PORT")}
    reload_versioned(world)
    result = world.purge("--undo", "/no/such/log", **settings)
    assert result.code == 2
    assert "Cannot read the audit log" in result.error


def test_undo_is_no_environment_variable(world):
    result = world.purge(*AS_OF, "-n", RETENTION_PURGE_UNDO="/no/such/log")
    assert (result.code, len(result.listed)) == (0, 17)


# --- Job rows -------------------------------------------------------------------------------------


@pytest.fixture
def may_delete(world: World):
    sql(world.box, f"GRANT DELETE ON {DATABASE}.* TO {USER}@'%'")
    yield world
    sql(world.box, f"REVOKE DELETE ON {DATABASE}.* FROM {USER}@'%'")


def rows_of(box: Sandbox, *keys: str) -> int:
    names = ",".join(f"'{key}'" for key in keys)
    return int(sql(box, f"SELECT count(*) FROM {TABLE} WHERE sourceData IN ({names})")[0][0])


def test_expired_rows_go_when_asked_for_and_others_stay(may_delete):
    world = may_delete
    sql(
        world.box,
        # An expired and a remaining job of one key; a key without object; one that names nothing.
        f"INSERT INTO {TABLE} VALUES ('shared', '{OLD}', 'TRIAL', 'incoming_000001'), "
        f"('missing', '{OLD}', 'TRIAL', 'no such object'), ('nameless', '{OLD}', 'TRIAL', '')",
    )
    summary = world.purge(*AS_OF, "--delete-jobs", "--json").summary
    assert summary["deleted"]["expired"] == 17
    assert summary["jobs_deleted"] == 22 + 2
    assert rows_of(world.box, *EXPIRED) == 0
    assert {"shared", "missing"}.isdisjoint(world.box.job_ids())
    assert "nameless" in world.box.job_ids()
    assert len(world.box.job_ids()) == 50 - 22 + 1
    assert "incoming_000001" in world.box.live_keys()
    again = world.purge(*AS_OF, "--delete-jobs", "--json").summary
    assert (again["jobs_deleted"], again["missing"]) == (0, 0)


def test_rows_of_failed_and_retained_keys_stay(may_delete, proxy):
    world = may_delete

    def before(request: Request) -> None:
        if request.operation == "list" and proxy.count("delete") == 0:
            sql(world.box, f"INSERT INTO {TABLE} VALUES ('x', NULL, 'TRIAL', 'incoming_000011')")

    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:DeleteObject"}
    deny["Resource"] = f"arn:aws:s3:::{BUCKET}/incoming_000045"
    world.box.s3().put_bucket_policy(Bucket=BUCKET, Policy=json.dumps({"Statement": [deny]}))
    proxy.before = before
    result = world.purge(*AS_OF, "--delete-jobs", "--json")
    summary = result.summary
    assert (result.code, summary["failed"], summary["retained"]) == (4, 1, 1)
    assert rows_of(world.box, "incoming_000045") == 6
    assert rows_of(world.box, "incoming_000011") == 2
    assert summary["jobs_deleted"] == 22 - 6 - 1


def test_a_row_that_changed_after_it_was_read_stays(may_delete, proxy):
    world = may_delete

    def before(request: Request) -> None:
        if request.operation == "list" and proxy.count("delete"):
            sql(
                world.box,
                f"UPDATE {TABLE} SET type = 'OFFICIAL' WHERE sourceData = 'incoming_000036'",
                f"UPDATE {TABLE} SET sourceData = 'elsewhere' WHERE sourceData = 'incoming_000037'",
            )

    proxy.before = before
    summary = world.purge(*AS_OF, "--delete-jobs", "--json").summary
    assert rows_of(world.box, "incoming_000036", "elsewhere") == 2
    assert summary["jobs_deleted"] == 20


def test_many_rows_go_in_small_commits(may_delete):
    world = may_delete
    expire(world, 1234)
    before = int(sql(world.box, "SHOW GLOBAL STATUS LIKE 'Com_delete'")[0][1])
    assert world.purge(*AS_OF, "--delete-jobs", "--json").summary["jobs_deleted"] == 1234
    assert int(sql(world.box, "SHOW GLOBAL STATUS LIKE 'Com_delete'")[0][1]) - before == 7


def test_without_the_grant_the_objects_go_and_the_error_names_it(world):
    result = world.purge(*AS_OF, "--delete-jobs", "--json")
    assert result.code == 1
    assert "DELETE" in result.summary["error"]
    assert result.summary["deleted"]["expired"] == 17
    assert len(world.box.job_ids()) == 50


def test_a_dry_run_with_delete_jobs_changes_nothing(may_delete):
    before = state(may_delete.box)
    assert may_delete.purge(*AS_OF, "--delete-jobs", "-n").code == 0
    assert state(may_delete.box) == before


def test_a_signal_while_rows_are_looked_for_is_heeded(may_delete, proxy):
    world = may_delete
    entered, release = threading.Event(), threading.Event()

    def before(request: Request) -> None:
        if request.operation == "list" and proxy.count("delete"):
            entered.set()
            release.wait(60)

    proxy.before = before
    process = world.start(*AS_OF, "--delete-jobs", "--json")
    assert entered.wait(60)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    release.set()
    out, _ = process.communicate(timeout=60)
    summary = json.loads(out)
    assert process.returncode == summary["exit_code"] == 143
    assert (summary["deleted"]["expired"], summary["jobs_deleted"]) == (17, 0)


# --- Signals and kill -9 --------------------------------------------------------------------------


def held_run(world: World, proxy: S3Proxy, at: str, *options: str):
    """Start a run that stands still at its first request of this kind; the run, and a release."""
    entered, release = threading.Event(), threading.Event()

    def before(request: Request) -> None:
        if request.operation == at:
            entered.set()
            release.wait(60)

    proxy.before = before
    process = world.start(*AS_OF, "--json", *options)
    assert entered.wait(60)
    return process, release


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_what_is_in_flight_finish(world, proxy, tmp_path, signum, code):
    expire(world, 6000)
    path = tmp_path / "audit.jsonl"
    process, release = held_run(world, proxy, "delete", "--workers", "2", "--audit-log", str(path))
    process.send_signal(signum)
    time.sleep(0.3)
    release.set()
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    summary = json.loads(out)
    assert summary["deleted"]["expired"] == 6000 - len(world.box.live_keys())
    assert 1000 <= summary["deleted"]["expired"] <= 2000
    assert summary["deleted"]["expired"] + summary["failed"] == 6000
    assert signal.Signals(signum).name in summary["error"]
    assert "Traceback" not in err
    assert kinds(path)[-1] == "end"
    assert kinds(path).count("failed") == summary["failed"]
    assert world.purge(*AS_OF).code == 0
    assert world.box.live_keys() == []


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_planning_ends_the_run_with_nothing_deleted(world, proxy, signum, code):
    process, release = held_run(world, proxy, "list")
    process.send_signal(signum)
    time.sleep(0.3)
    release.set()
    out, _ = process.communicate(timeout=20)
    assert process.returncode == code == json.loads(out)["exit_code"]
    assert len(world.box.live_keys()) == 48


def test_a_second_signal_stops_at_once(world, proxy):
    process, release = held_run(world, proxy, "delete")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None, "the first signal waits for what is in flight"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM
    release.set()


def test_after_kill_9_the_log_names_every_key_that_may_be_gone(world, proxy, tmp_path):
    """Twenty runs on one bucket, each killed at a random moment of its delete phase."""
    dice = random.Random(20261123)
    keys = set(expire(world, 3000))
    path = tmp_path / "audit.jsonl"
    slow = lambda request: time.sleep(dice.random() / 20)  # noqa: E731
    killed = 0
    for _ in range(20):
        if len(world.box.live_keys()) < 1000:
            for key in keys:
                world.box.put(key)
        begun = threading.Event()

        def before(request: Request, begun: threading.Event = begun) -> None:
            if request.operation == "delete":
                begun.set()
                slow(request)

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
    assert killed >= 10
    assert world.purge(*AS_OF, "--audit-log", str(path)).code == 0
    assert world.box.live_keys() == []
    assert not [name for name in os.listdir("/tmp") if name.startswith("retention_purge-")]


def is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
