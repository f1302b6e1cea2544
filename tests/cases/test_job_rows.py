"""--delete-jobs: which rows go, by primary key and after their objects, and which stay."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import AS_OF, OLD, World, ended, events, expire, sql, state, until, until_gone
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
    # A row goes because its object is absent: the 28 remaining keys are looked for first.
    assert (summary["deleted"]["expired"], summary["requests"]["list"]) == (17, 1 + 28)
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
    rows = [{"jobId": k, "completedAt": OLD, "type": "TRIAL", "sourceData": k} for k in keys]
    assert [(event["row"], event["key"]) for event in intents] == [*zip(rows, keys, strict=True)]
    assert all(event["time"] < begun[event["row"]["jobId"]].isoformat() for event in intents)


# Type of a column; a value in SQL; the same as it stands in the log.
EXACT: dict[str, tuple[str, str, Any]] = {
    "jobId": ("bigint unsigned PRIMARY KEY", "18446744073709551615", 18446744073709551615),
    "completedAt": ("timestamp(6) NULL", f"'{OLD}.000001'", f"{OLD}.000001"),
    "type": ("enum('OFFICIAL', 'TRIAL')", "'TRIAL'", "TRIAL"),
    "sourceData": ("varchar(64) NOT NULL", "'k'", "k"),
    "a text": ("text CHARSET latin1", "'é''\\\\'", "é'\\"),
    "odd `%s` name": ("varchar(9) CHARSET utf8mb4", r"'\0\n😀'", "\0\n😀"),
    "none": ("varchar(9) NOT NULL", "''", ""),
    "nothing": ("varchar(9) DEFAULT 'x'", "NULL", None),
    "small": ("tinyint", "-1", -1),
    "price": ("decimal(40, 10)", "-123456789012345678901234567890.0123456789",
              "-123456789012345678901234567890.0123456789"),
    "single": ("float", "0.1", 0.10000000149011612),
    "dual": ("double", "0.1e0 + 0.2e0", 0.30000000000000004),
    "large": ("double", "-1.7976931348623157e308", -1.7976931348623157e308),
    "bytes": ("varbinary(9)", "x'00ff27'", {"hex": "00ff27"}),
    "padded": ("binary(3)", "'a'", {"hex": "610000"}),
    "bits": ("bit(10)", "b'1000000001'", {"hex": "0201"}),
    "moment": ("datetime(3)", "'2019-01-02 03:04:05.678'", "2019-01-02 03:04:05.678"),
    "day": ("date", "'0000-00-00'", "0000-00-00"),
    "span": ("time(1)", "'-800:00:00.5'", "-800:00:00.5"),
    "some": ("set('a', 'b')", "'a,b'", "a,b"),
}  # fmt: skip


def test_all_columns_of_a_row_are_on_record_exactly_and_bring_it_back(world, tmp_path):
    path, now = tmp_path / "log", "SET time_zone = '+00:00', sql_mode = ''"
    names = [f"`{name.replace('`', '``')}`" for name in EXACT]
    columns = [f"{name} {kind}" for name, (kind, *_) in zip(names, EXACT.values(), strict=True)]
    columns.append("made varchar(9) AS (concat(small, 'x'))")
    values = ", ".join(value for _, value, _ in EXACT.values())
    insert = f"INSERT INTO {TABLE} ({', '.join(names)}) VALUES ({values})"
    world.box.load([], [("k", 1)])
    create = f"CREATE TABLE {TABLE} ({', '.join(columns)})"
    sql(world.box, now, f"DROP TABLE {TABLE}", create, insert)
    before = sql(world.box, now, f"SELECT *, single + 0E0 FROM {TABLE}")
    result = world.purge(*AS_OF, "--delete-jobs", "--json", "--audit-log", str(path))
    assert (result.code, result.summary["jobs_deleted"]) == (0, 1)
    (event,) = events(path, "delete-job")
    assert event["row"] == {name: logged for name, (_, _, logged) in EXACT.items()}
    back = world.purge("--undo-rows", str(path)).out
    statements = [part for part in re.split(r";\n", back) if not part.startswith("--")]
    sql(world.box, "SET sql_mode = 'ANSI_QUOTES,NO_BACKSLASH_ESCAPES'", *statements, *statements)
    assert sql(world.box, now, f"SELECT *, single + 0E0 FROM {TABLE}") == before


KEYS = {  # types of jobId, keys of the table, why these rows cannot be deleted
    "integer": ("int AUTO_INCREMENT", "PRIMARY KEY (jobId)", ""),
    "large": ("bigint unsigned NOT NULL", "UNIQUE (jobId), KEY (type)", ""),
    "text": ("char(36) CHARSET ascii NOT NULL", "UNIQUE (jobId)", ""),
    "nullable": ("varchar(64)", "UNIQUE (jobId)", "is not unique"),  # of NULLs there may be many
    "no key": ("varchar(64)", "KEY (jobId)", "is not unique"),
    "two columns": ("varchar(64)", "PRIMARY KEY (jobId, sourceData)", "is not unique"),
    "prefix": ("varchar(64)", "UNIQUE (jobId(14))", "is not unique"),
    "binary": ("binary(16)", "PRIMARY KEY (jobId)", "jobId is binary(16), neither"),
    "moment": ("datetime(6)", "PRIMARY KEY (jobId)", "jobId is datetime(6), neither"),
    "decimal": ("decimal(20, 0)", "PRIMARY KEY (jobId)", "jobId is decimal(20,0), neither"),
}


@pytest.mark.parametrize("case", KEYS)
def test_a_job_id_is_a_unique_text_or_integer_or_the_run_is_refused(world, case):
    kind, keys, refused = KEYS[case]
    columns = "completedAt timestamp NULL, type varchar(12), sourceData varchar(64) NOT NULL"
    world.box.load([], [(f"k{n}", 1) for n in range(30)])
    sql(world.box, f"DROP TABLE {TABLE}", f"CREATE TABLE {TABLE} (jobId {kind}, {columns}, {keys})")
    first = "20190101000000"  # a number, a text and a moment
    rows = [f"({first} + {n}, '{OLD}', 'TRIAL', 'k{n}')" for n in range(29)]
    rows = [row.replace(first, "1000") for row in rows] if case == "integer" else rows
    rows += [f"({1 if case == 'integer' else 20180101000000}, '{OLD}', 'OFFICIAL', 'k29')"]
    sql(world.box, f"INSERT INTO {TABLE} VALUES {', '.join(rows)}")
    left = state(world.box)
    result = world.purge(*AS_OF, "--delete-jobs", "--json")
    if refused:
        assert (result.code, state(world.box)) == (3, left)
        assert f"{TABLE}.jobId" in result.error
        assert refused in result.error
    else:
        assert (result.code, result.summary["jobs_deleted"], rows_of(world.box, "k29")) == (
            0,
            29,
            1,
        )
        assert [*map(len, state(world.box))] == [1, 1]


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


MOVED = """
def moved(gate, names, real=rp.Gate.known):
    if names == {'incoming_000001'}:
        gate._connection.cursor().execute("SET time_zone = '+05:00'")
    return real(gate, names)
rp.Gate.known = moved
"""


def test_no_row_is_read_by_a_session_that_is_not_ours(world, tmp_path):
    """A proxy changes it before the question about a shared key. Under another time zone the log
    would not have the moments of the rows."""
    sql(world.box, f"INSERT INTO {TABLE} VALUES ('e', '{OLD}', 'TRIAL', 'incoming_000001')")
    path, before = tmp_path / "log", world.box.job_ids()
    result = world.purge(*AS_OF, "--delete-jobs", "--audit-log", str(path), patch=MOVED)
    assert result.code == 1, result.err
    assert events(path, "delete-job") == []
    assert "is not as it was set" in result.error
    assert world.box.job_ids() == before


@pytest.mark.parametrize("column", ["type", "completedAt", "sourceData", "jobId"])
def test_a_row_that_changed_after_it_was_read_stays(world, column):
    change = f"SET {column} = '2020-01-01' WHERE sourceData = 'incoming_000036'"
    with open_change(world, f"UPDATE {TABLE} {change}"):
        run = world.start(*AS_OF, "--delete-jobs", "--json")
        until(world.box, "SELECT 1 FROM information_schema.innodb_trx WHERE trx_state LIKE 'LOCK%'")
    summary = ended(run).summary
    assert (summary["deleted"]["expired"], summary["jobs_deleted"]) == (17, 21)
    assert rows_of(world.box, "incoming_000036", "2020-01-01") == 1


def first_job(key: str) -> str:
    return f"SELECT MIN(jobId) FROM {TABLE} WHERE sourceData = '{key}'"


ROW = f"SELECT 1 FROM {TABLE} WHERE jobId = '{{}}' FOR UPDATE"
# Statement of another transaction, job rows in a commit, and how many rows then go.
LOCKS = {"row": (ROW, 5, 22 - 5), "table": (f"LOCK TABLES {TABLE} READ", 200, 0)}


@pytest.mark.parametrize("case", LOCKS)
def test_rows_that_another_transaction_holds_leave_their_batch_for_the_next_run(world, proxy, case):
    lock, batch, gone = LOCKS[case]
    ((job,),) = sql(world.box, first_job("incoming_000036"))
    options, patch = (*AS_OF, "--delete-jobs", "--json"), f"rp.ROWS_A_COMMIT = {batch}"
    with world.box.database.admin(database=DATABASE, autocommit=False) as other:
        during(proxy, "delete", lambda: other.cursor().execute(lock.format(job)))
        result = world.purge(*options, patch=patch)
    summary = result.summary
    told = [summary[name] for name in ("exit_code", "jobs_deleted", "failed", "error")]
    assert [*told, summary["deleted"]["expired"]] == [4, gone, 0, None, 17]
    assert f"{min(batch, 22)} job rows stay for the next run" in result.err
    assert 5 <= summary["seconds"] < 60
    until_gone(world.box)
    assert len(world.box.job_ids()) == 50 - gone, "what was given up must not take effect later"
    assert world.purge(*options).summary["jobs_deleted"] == 22 - gone


def test_a_deadlock_is_tried_again(world):
    """The other transaction has done more, so that the server breaks the purge's."""
    world.box.load([(job, OLD, "TRIAL", "k") for job in "ab"], [("k", 1)])
    sql(world.box, "DROP TABLE IF EXISTS work", "CREATE TABLE work (n int)")
    work = f"INSERT INTO work VALUES {', '.join(['(1)'] * 500)}"
    with open_change(world, work) as other:
        other.cursor().execute(ROW.format("b"))
        run = world.start(*AS_OF, "--delete-jobs", "--json")
        until(world.box, "SELECT 1 FROM information_schema.innodb_trx WHERE trx_state LIKE 'LOCK%'")
        other.cursor().execute(ROW.format("a"))  # raises if this is the one that is broken
    result = ended(run)
    assert (result.code, result.summary["jobs_deleted"], world.box.job_ids()) == (0, 2, [])


@pytest.mark.parametrize("case", ["no answer", "cut before COMMIT"])
def test_rows_whose_delete_was_given_up_stay_and_are_not_counted(world, case):
    """The client waits 2 seconds for an answer. Then the row is free, and the server goes on."""
    cut = "if sql == 'COMMIT': gate._connection._sock.shutdown(2)"
    patch = f"""
def run(gate, sql, *doing, real=rp.Gate._run):
    {"" if case == "no answer" else cut}
    return real(gate, sql, *doing)
rp.Gate._run, rp.RECHECK_TIMEOUT = run, 2
"""
    job = sql(world.box, first_job("incoming_000036"))[0][0] if case == "no answer" else ""
    with open_change(world, ROW.format(job)):
        summary = world.purge(*AS_OF, "--delete-jobs", "--json", patch=patch).summary
    until_gone(world.box)
    assert (summary["exit_code"], summary["deleted"]["expired"]) == (1, 17)
    assert (summary["jobs_deleted"], len(world.box.job_ids())) == (0, 50)
