"""--delete-jobs: which rows go, by primary key and after their objects, and which stay."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from conftest import AS_OF, OLD, World, ended, events, expire, sql, until
from proxies import Request
from sandbox import BUCKET, DATABASE, TABLE, Sandbox
from test_seed import EXPIRED


def rows_of(box: Sandbox, *keys: str) -> int:
    names = ",".join(f"'{key}'" for key in keys)
    return int(sql(box, f"SELECT count(*) FROM {TABLE} WHERE sourceData IN ({names})")[0][0])


def deny_delete(box: Sandbox, key: str) -> None:
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:DeleteObject"}
    deny["Resource"] = f"arn:aws:s3:::{BUCKET}/{key}"
    box.s3().put_bucket_policy(Bucket=BUCKET, Policy=json.dumps({"Statement": [deny]}))


@contextmanager
def held_row(world: World, statement: str) -> Iterator[Callable[[], None]]:
    """Another transaction does this to a row, and commits it in the end. Yields what waits until
    the DELETE of the purge waits for that row."""
    with world.box.database.admin(database=DATABASE) as other:
        other.begin()
        other.cursor().execute(statement)
        waits = "SELECT 1 FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
        yield lambda: until(world.box, waits)
        other.commit()


# --- Which go -------------------------------------------------------------------------------------


def test_expired_rows_go_when_asked_for_and_others_stay(may_delete):
    world = may_delete
    sql(
        world.box,
        # An expired and a remaining job of one key; a key without object; one that names nothing.
        f"INSERT INTO {TABLE} VALUES ('shared', '{OLD}', 'TRIAL', 'incoming_000001'), "
        f"('missing', '{OLD}', 'TRIAL', 'no such object'), ('nameless', '{OLD}', 'TRIAL', '')",
    )
    summary = world.purge(*AS_OF, "--delete-jobs", "--json").summary
    assert (summary["deleted"]["expired"], summary["requests"]["list"]) == (17, 1)
    assert summary["planned"]["jobs"] == summary["jobs_deleted"] == 24
    assert rows_of(world.box, *EXPIRED) == 0
    assert {*world.box.job_ids()} & {"shared", "missing", "nameless"} == {"nameless"}
    assert len(world.box.job_ids()) == 50 - 22 + 1
    assert "incoming_000001" in world.box.live_keys()
    again = world.purge(*AS_OF, "--delete-jobs", "--json").summary
    assert (again["jobs_deleted"], again["missing"]) == (0, 0)


def test_many_rows_go_in_small_commits_each_on_record_before(may_delete, tmp_path):
    world, path = may_delete, tmp_path / "log"
    keys = expire(world, 434)
    # Within a statement now() is always the moment at which it began.
    trigger = f"CREATE TRIGGER t BEFORE DELETE ON {TABLE} FOR EACH ROW INSERT INTO gone VALUES "
    table = "CREATE TABLE gone (jobId varchar(64), began datetime(6))"
    sql(world.box, "DROP TABLE IF EXISTS gone", table, f"{trigger} (OLD.jobId, now(6))")
    options = (*AS_OF, "--delete-jobs", "--audit-log", str(path), "--json")
    assert world.purge(*options).summary["jobs_deleted"] == 434
    counts = sql(world.box, "SELECT count(*) FROM gone GROUP BY began ORDER BY began")
    assert [count for (count,) in counts] == [200, 200, 34]
    first, *_ = intents = events(path, "delete-job")
    assert (first["job_id"], first["completed_at"], first["key"]) == (keys[0], OLD, keys[0])
    begun = dict(sql(world.box, "SELECT jobId, began FROM gone"))
    assert [event["job_id"] for event in intents] == keys == sorted(begun)
    for event in intents:
        assert event["time"] < begun[event["job_id"]].isoformat()


# --- Which stay -----------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [True, False], ids=["index", "scan"])
def test_keys_that_only_the_collation_equates_keep_their_rows(may_delete, index):
    world = may_delete
    jobs = [("1", OLD, "TRIAL", "abc"), ("2", OLD, "OFFICIAL", "ABC"), ("3", OLD, "TRIAL", "Abc ")]
    world.box.load(jobs, [("abc", 1), ("ABC", 1), ("Abc ", 1)])
    if index:
        sql(world.box, f"CREATE INDEX k ON {TABLE} (sourceData)")
    deny_delete(world.box, "Abc ")
    assert world.purge(*AS_OF, "--delete-jobs").code == 4
    assert world.box.job_ids() == ["2", "3"]


def test_rows_of_failed_and_retained_keys_stay(may_delete, proxy):
    world = may_delete

    def before(request: Request) -> None:
        if request.operation == "list":
            sql(world.box, f"INSERT INTO {TABLE} VALUES ('x', NULL, 'TRIAL', 'incoming_000011')")

    deny_delete(world.box, "incoming_000045")
    proxy.before = before
    result = world.purge(*AS_OF, "--delete-jobs", "--json")
    summary = result.summary
    assert (result.code, summary["failed"], summary["retained"]) == (4, 1, 1)
    assert rows_of(world.box, "incoming_000045") == 6
    assert rows_of(world.box, "incoming_000011") == 2
    assert summary["jobs_deleted"] == 22 - 6 - 1


def test_a_shared_key_whose_remaining_job_has_gone_keeps_its_expired_row(may_delete, proxy):
    """Its object was not deleted in this run: without the row nobody would know of it."""
    world = may_delete
    sql(world.box, f"INSERT INTO {TABLE} VALUES ('e', '{OLD}', 'TRIAL', 'incoming_000001')")

    def before(request: Request) -> None:
        if request.operation == "delete":
            sql(world.box, f"DELETE FROM {TABLE} WHERE type = 'OFFICIAL'")

    proxy.before = before
    assert world.purge(*AS_OF, "--delete-jobs").code == 0
    assert "e" in world.box.job_ids()
    assert "incoming_000001" in world.box.live_keys()


@pytest.mark.parametrize(
    "change",
    ["type = 'OFFICIAL'", "completedAt = now()", "sourceData = 'elsewhere'", "jobId = 'other'"],
)
def test_a_row_that_changed_after_it_was_read_stays(may_delete, change):
    world = may_delete
    statement = f"UPDATE {TABLE} SET {change} WHERE sourceData = 'incoming_000036'"
    with held_row(world, statement) as wait:
        run = world.start(*AS_OF, "--delete-jobs", "--json")
        wait()
    summary = ended(run).summary
    assert (summary["deleted"]["expired"], summary["jobs_deleted"]) == (17, 21)
    assert rows_of(world.box, "incoming_000036", "elsewhere") == 1


def test_a_row_that_another_transaction_holds_ends_the_run_and_stays(may_delete):
    world = may_delete
    with held_row(world, f"SELECT * FROM {TABLE} WHERE sourceData = 'incoming_000036' FOR UPDATE"):
        result = world.purge(*AS_OF, "--delete-jobs", "--json")
    summary = result.summary
    assert (result.code, summary["deleted"]["expired"], summary["jobs_deleted"]) == (1, 17, 0)
    assert "Another transaction held the rows for 8 seconds" in summary["error"]
    assert 8 <= summary["seconds"] < 20
    time.sleep(0.5)
    assert len(world.box.job_ids()) == 50, "what was given up must not take effect later"
    assert world.purge(*AS_OF, "--delete-jobs", "--json").summary["jobs_deleted"] == 22
