"""--delete-jobs: which rows go, by primary key and after their objects, and which stay."""

from __future__ import annotations

import json
import re
import time

import pytest
from conftest import AS_OF, OLD, events, expire, sql, state
from proxies import Request
from sandbox import BUCKET, DATABASE, TABLE, Sandbox
from test_seed import EXPIRED


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
    assert world.purge(*AS_OF, "--delete-jobs", "--json", "-n").summary["planned"]["jobs"] == 24
    summary = world.purge(*AS_OF, "--delete-jobs", "--json").summary
    assert (summary["deleted"]["expired"], summary["jobs_deleted"]) == (17, 24)
    assert summary["requests"]["list"] == 1
    assert rows_of(world.box, *EXPIRED) == 0
    assert {"shared", "missing"}.isdisjoint(world.box.job_ids())
    assert "nameless" in world.box.job_ids()
    assert len(world.box.job_ids()) == 50 - 22 + 1
    assert "incoming_000001" in world.box.live_keys()
    again = world.purge(*AS_OF, "--delete-jobs", "--json").summary
    assert (again["jobs_deleted"], again["missing"]) == (0, 0)


@pytest.mark.parametrize("index", [True, False], ids=["index", "scan"])
def test_keys_that_only_the_collation_equates_keep_their_rows(may_delete, index):
    world = may_delete
    jobs = [("1", OLD, "TRIAL", "abc"), ("2", OLD, "OFFICIAL", "ABC"), ("3", OLD, "TRIAL", "Abc ")]
    world.box.load(jobs, [("abc", 1), ("ABC", 1)])
    if index:
        sql(world.box, f"CREATE INDEX k ON {TABLE} (sourceData)")
    deny_delete(world.box, "Abc ")
    world.box.put("Abc ")
    assert world.purge(*AS_OF, "--delete-jobs").code == 4
    assert world.box.job_ids() == ["2", "3"]


def deny_delete(box: Sandbox, key: str) -> None:
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:DeleteObject"}
    deny["Resource"] = f"arn:aws:s3:::{BUCKET}/{key}"
    box.s3().put_bucket_policy(Bucket=BUCKET, Policy=json.dumps({"Statement": [deny]}))


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


# Run as root's own connection, just before the DELETE of the rows that were read.
MEANWHILE = """
import pymysql
delete = rp.JobTable.delete
def meanwhile(self, rows):
    with pymysql.connect(unix_socket={socket!r}, user="root", database={schema!r}) as connection:
        connection.cursor().execute({statement!r})
        connection.commit()
    return delete(self, rows)
rp.JobTable.delete = meanwhile
"""


@pytest.mark.parametrize(
    "change",
    ["type = 'OFFICIAL'", "completedAt = now()", "sourceData = 'elsewhere'", "jobId = 'other'"],
)
def test_a_row_that_changed_after_it_was_read_stays(may_delete, change):
    world = may_delete
    statement = f"UPDATE {TABLE} SET {change} WHERE sourceData = 'incoming_000036'"
    socket = str(world.box.database.home / "socket")
    patch = MEANWHILE.format(socket=socket, schema=DATABASE, statement=statement)
    summary = world.purge(*AS_OF, "--delete-jobs", "--json", patch=patch).summary
    assert (summary["deleted"]["expired"], summary["jobs_deleted"]) == (17, 21)
    assert rows_of(world.box, "incoming_000036", "elsewhere") == 1


def test_many_rows_go_in_small_commits_each_on_record_before(may_delete, tmp_path):
    world, path = may_delete, tmp_path / "log"
    expire(world, 1234)
    at_delete = (
        "delete, counts = rp.JobTable.delete, []\n"
        "def noted(self, rows):\n"
        f"    text = open({str(path)!r}).read()\n"
        '    assert all(f\'"job_id": "{row.job_id}"\' in text for row in rows)\n'
        "    print(len(rows), file=rp.sys.stderr)\n"
        "    return delete(self, rows)\n"
        "rp.JobTable.delete = noted"
    )
    result = world.purge(
        *AS_OF, "--delete-jobs", "--audit-log", str(path), "--json", patch=at_delete
    )
    assert result.summary["jobs_deleted"] == 1234
    assert re.findall(r"^\d+$", result.err, re.MULTILINE) == ["200"] * 6 + ["34"]
    first, *_ = intents = events(path, "delete-job")
    assert len(intents) == 1234
    assert (first["job_id"], first["completed_at"], first["key"]) == ("k000000", OLD, "k000000")


def test_a_row_that_another_transaction_holds_ends_the_run_and_stays(may_delete):
    world = may_delete
    with world.box.database.admin(database=DATABASE) as other:
        other.begin()
        other.cursor().execute(
            f"SELECT * FROM {TABLE} WHERE sourceData = 'incoming_000036' FOR UPDATE"
        )
        begun = time.monotonic()
        result = world.purge(*AS_OF, "--delete-jobs", "--json")
        seconds = time.monotonic() - begun
        other.rollback()
    assert (result.code, result.summary["deleted"]["expired"]) == (1, 17)
    assert "Another transaction held the rows for 8 seconds" in result.summary["error"]
    assert 8 <= seconds < 20
    time.sleep(1)
    assert result.summary["jobs_deleted"] == 0
    assert len(world.box.job_ids()) == 50, "what was given up must not take effect later"
    assert world.purge(*AS_OF, "--delete-jobs", "--json").summary["jobs_deleted"] == 22


def test_a_dry_run_changes_nothing(may_delete):
    before = state(may_delete.box)
    assert may_delete.purge(*AS_OF, "--delete-jobs", "-n").code == 0
    assert state(may_delete.box) == before


def test_without_the_option_they_stay(may_delete):
    before = may_delete.box.job_ids()
    assert may_delete.purge(*AS_OF).code == 0
    assert may_delete.box.job_ids() == before
