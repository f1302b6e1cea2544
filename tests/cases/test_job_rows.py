"""--delete-jobs: which rows go, by primary key and after their objects, and which stay."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import AS_OF, OLD, World, ended, events, expire, sql, until, until_gone
from proxies import Request, S3Proxy
from sandbox import BUCKET, DATABASE, TABLE, Sandbox
from test_seed import EXPIRED

pytestmark = pytest.mark.usefixtures("may_delete")


def rows_of(box: Sandbox, *keys: str) -> int:
    return sum(name in keys for (name,) in sql(box, f"SELECT sourceData FROM {TABLE}"))


def deny_delete(box: Sandbox, key: str) -> None:
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:DeleteObject"}
    deny["Resource"] = f"arn:aws:s3:::{BUCKET}/{key}"
    box.s3().put_bucket_policy(Bucket=BUCKET, Policy=json.dumps({"Statement": [deny]}))


def during(proxy: S3Proxy, operation: str, act: Callable[[], Any], number: int = 1) -> None:
    """Have it done when that request is there."""

    def before(request: Request) -> None:
        if (request.operation, request.number) == (operation, number):
            act()

    proxy.before = before


@contextmanager
def open_change(world: World, statement: str, rows: Any = (None,)) -> Iterator[Any]:
    """Another transaction does this, for each row, and commits it in the end."""
    with world.box.database.admin(database=DATABASE, autocommit=False) as other:
        other.cursor().executemany(statement, rows)
        yield other
        other.commit()


# --- Which go -------------------------------------------------------------------------------------


def test_expired_rows_go_when_asked_for_and_others_stay(world):
    """More: one of a key that a remaining job has, too; one without object; one naming nothing."""
    for job, key in {"shared": "incoming_000001", "missing": "no such", "nameless": ""}.items():
        sql(world.box, f"INSERT INTO {TABLE} VALUES ('{job}', '{OLD}', 'TRIAL', '{key}')")
    summary = world.purge(*AS_OF, "--delete-jobs", "--json").summary
    assert (summary["deleted"]["expired"], summary["requests"]["list"]) == (17, 1)
    assert summary["planned"]["jobs"] == summary["jobs_deleted"] == 24
    assert rows_of(world.box, *EXPIRED) == 0
    assert len(world.box.job_ids()) == 50 - 22 + 1
    assert "nameless" in world.box.job_ids()
    assert "incoming_000001" in world.box.live_keys()
    again = world.purge(*AS_OF, "--delete-jobs", "--json").summary
    assert (again["jobs_deleted"], again["missing"]) == (0, 0)


def test_many_rows_go_in_small_commits_each_on_record_before(world, tmp_path):
    keys, path = expire(world, 434), tmp_path / "log"
    # Within a statement now() is always the moment at which it began.
    trigger = f"CREATE TRIGGER t BEFORE DELETE ON {TABLE} FOR EACH ROW INSERT INTO gone VALUES "
    table = "CREATE TABLE gone (jobId varchar(64), began datetime(6))"
    sql(world.box, "DROP TABLE IF EXISTS gone", table, f"{trigger} (OLD.jobId, now(6))")
    result = world.purge(*AS_OF, "--delete-jobs", "--audit-log", str(path), "--json")
    assert result.summary["jobs_deleted"] == 434
    counts = sql(world.box, "SELECT count(*) FROM gone GROUP BY began ORDER BY began")
    assert [count for (count,) in counts] == [200, 200, 34]
    begun, intents = dict(sql(world.box, "SELECT * FROM gone")), events(path, "delete-job")
    told = [(event["job_id"], event["completed_at"], event["key"]) for event in intents]
    assert told == [(key, OLD, key) for key in keys]
    assert all(event["time"] < begun[event["job_id"]].isoformat() for event in intents)


# --- Which stay -----------------------------------------------------------------------------------


def test_keys_that_only_the_collation_equates_keep_their_rows(world):
    jobs = [("1", OLD, "TRIAL", "abc"), ("2", OLD, "OFFICIAL", "ABC"), ("3", OLD, "TRIAL", "Abc ")]
    world.box.load(jobs, [("abc", 1), ("ABC", 1), ("Abc ", 1)])
    deny_delete(world.box, "Abc ")
    assert world.purge(*AS_OF, "--delete-jobs").code == 4
    assert world.box.job_ids() == ["2", "3"]


def test_rows_of_failed_and_retained_keys_stay(world, proxy):
    deny_delete(world.box, "incoming_000045")
    in_use = f"INSERT INTO {TABLE} VALUES ('x', NULL, 'TRIAL', 'incoming_000011')"
    during(proxy, "list", lambda: sql(world.box, in_use))
    summary = world.purge(*AS_OF, "--delete-jobs", "--json").summary
    assert [summary[name] for name in ("exit_code", "failed", "retained")] == [4, 1, 1]
    assert [rows_of(world.box, f"incoming_{n:06}") for n in (45, 11)] == [6, 2]
    assert summary["jobs_deleted"] == 22 - 6 - 1


def test_a_shared_key_whose_remaining_job_has_gone_keeps_its_expired_row(world, proxy):
    """Its object was not deleted in this run: without the row nobody would know of it."""
    sql(world.box, f"INSERT INTO {TABLE} VALUES ('e', '{OLD}', 'TRIAL', 'incoming_000001')")
    during(proxy, "delete", lambda: sql(world.box, f"DELETE FROM {TABLE} WHERE type = 'OFFICIAL'"))
    assert world.purge(*AS_OF, "--delete-jobs").code == 0
    assert "e" in world.box.job_ids()
    assert "incoming_000001" in world.box.live_keys()


@pytest.mark.parametrize("column", ["type", "completedAt", "sourceData", "jobId"])
def test_a_row_that_changed_after_it_was_read_stays(world, column):
    change = f"SET {column} = '2020-01-01' WHERE sourceData = 'incoming_000036'"
    with open_change(world, f"UPDATE {TABLE} {change}"):
        run = world.start(*AS_OF, "--delete-jobs", "--json")
        until(world.box, "SELECT 1 FROM information_schema.innodb_trx WHERE trx_state LIKE 'LOCK%'")
    summary = ended(run).summary
    assert (summary["deleted"]["expired"], summary["jobs_deleted"]) == (17, 21)
    assert rows_of(world.box, "incoming_000036", "2020-01-01") == 1


LOCKS = [f"SELECT * FROM {TABLE} WHERE sourceData = 'incoming_000036' FOR UPDATE"]
LOCKS += [f"LOCK TABLES {TABLE} READ"]  # as a dump does


@pytest.mark.parametrize("lock", LOCKS, ids=["row", "table"])
def test_rows_that_another_transaction_holds_end_the_run_and_stay(world, proxy, lock):
    options = (*AS_OF, "--delete-jobs", "--json")
    with world.box.database.admin(database=DATABASE, autocommit=False) as other:
        during(proxy, "delete", lambda: other.cursor().execute(lock))
        summary = world.purge(*options).summary
    assert (summary["exit_code"], summary["deleted"]["expired"]) == (1, 17)
    assert "Another transaction held the rows for 5 seconds" in summary["error"]
    assert 5 <= summary["seconds"] < 60
    until_gone(world.box)
    assert len(world.box.job_ids()) == 50, "what was given up must not take effect later"
    assert world.purge(*options).summary["jobs_deleted"] == 22
