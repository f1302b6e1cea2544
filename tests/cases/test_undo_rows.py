"""--undo-rows: SQL that brings back the job rows of one run, whole, on MariaDB and on MySQL."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import AS_OF, OLD, World, events, expire, sql
from sandbox import DATABASE, TABLE, Sandbox

import retention_purge as rp

pytestmark = pytest.mark.usefixtures("may_delete")


@pytest.fixture(scope="session", params=["mariadb", "mysql"])
def box(request: pytest.FixtureRequest, box: Sandbox) -> Sandbox:
    return box if request.param == "mariadb" else request.getfixturevalue("mysql_box")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


# Column, its type, and values of which each row has one.
WIDE = [
    (
        "note",
        "text",
        ["'O''Hara \"\\\\\" \\n\\t\\0 %s {} `'", "'\U0001f600 e\u0301'", "''", "'NULL'"],
    ),
    ("latin", "varchar(20) CHARSET latin1", ["x'e9e4ff80'", "'a  '", "NULL"]),
    ("fixed", "binary(4)", ["x'00ff0a'", "x'27225c60'", "NULL"]),
    ("photo", "blob", ["x'00010203ff27'", "''", "NULL"]),
    ("price", "decimal(30,10)", ["12345678901234567890.0123456789", "-0.5", "NULL"]),
    ("small", "float", ["0.1", "16777217", "-3.4028234e38", "1e-45", "NULL"]),
    ("big", "double", ["0.1", "1e22", "1.7976931348623157e308", "2.2250738585072014e-308", "1/3"]),
    ("huge", "bigint unsigned", ["18446744073709551615", "0", "NULL"]),
    ("flags", "bit(9)", ["b'100000001'", "b'0'", "b'100111'", "NULL"]),
    ("doc", "json", ["""'{"a": [1, null, "\\\\"\u00e9\U0001f600"]}'""", "'[]'", "NULL"]),
    ("kind", "enum('a','it''s')", ["'it''s'", "'no such'", "NULL"]),
    ("tags", "set('x','y')", ["'x'", "''", "NULL"]),
    ("day", "date", ["'0000-00-00'", "'9999-12-31'", "'2019-00-00'", "NULL"]),
    ("made", "datetime(3)", ["'0000-00-00'", "'2019-03-31 02:30:00.123'", "NULL"]),
    ("span", "time(2)", ["'-838:59:58.25'", "'00:00:00.01'", "NULL"]),
    ("vintage", "year", ["'0000'", "2155", "NULL"]),
    ("place", "point", ["ST_GeomFromText('POINT(1.5 -2)')", "NULL"]),
    ('od`d "name\\', "varchar(9)", ["'; DROP -- '", "NULL"]),
    ("twice", "double AS (price * 2) STORED", []),
    ("length", "int AS (CHAR_LENGTH(note)) VIRTUAL", []),
    ("hidden", "int DEFAULT 5 INVISIBLE", ["7", "NULL"]),
    ("touched", "timestamp DEFAULT CURRENT_TIMESTAMP ON UPDATE CURRENT_TIMESTAMP", [f"'{OLD}'"]),
]
JOB_IDS = {"int AUTO_INCREMENT": "{}", "varchar(64)": "'job ''{}\\\\'"}
ROWS = 60
# The fourth transaction's intents are on disk, and nothing follows.
KILLED = """
import os, signal
calls, delete_rows = [], rp.Gate.delete_rows
def delete(gate, rows):
    calls.append(rows)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return delete_rows(gate, rows)
rp.Gate.delete_rows, rp.ROWS_A_COMMIT = delete, 10
"""
MODES = ["", "ANSI_QUOTES,NO_BACKSLASH_ESCAPES", "TRADITIONAL", "ANSI,NO_ZERO_DATE"]


def quoted(name: str) -> str:
    return f"`{name.replace('`', '``')}`"


def load(box: Sandbox, job_id: str) -> None:
    """A table in which each row is expired, and its key has an object."""
    columns = f"jobId {job_id} PRIMARY KEY, completedAt timestamp(6) NULL, type enum('TRIAL'), "
    columns += "sourceData varchar(64) CHARSET utf8mb4 COLLATE utf8mb4_bin NOT NULL, "
    columns += ", ".join(f"{quoted(name)} {kind}" for name, kind, _ in WIDE)
    names = [f"it's {n}\U0001f600" for n in range(ROWS)]
    box.load([], [(name, 1) for name in names], f"({columns}) CHARSET utf8mb4")
    stored = [(name, values) for name, _, values in WIDE if values]
    own = ", ".join(["jobId", "completedAt", "type", "sourceData", *(quoted(n) for n, _ in stored)])
    rows = [
        [JOB_IDS[job_id].format(n), f"'{OLD}.{n:06}'", "'TRIAL'", f"'{name.replace(*APOSTROPHE)}'"]
        + [values[n % len(values)] for _, values in stored]
        for n, name in enumerate(names)
    ]
    values = ", ".join(f"({', '.join(row)})" for row in rows)
    session = "SET NAMES utf8mb4, sql_mode = 'NO_AUTO_VALUE_ON_ZERO', time_zone = '+00:00'"
    box.sql(session, f"INSERT INTO {TABLE} ({own}) VALUES {values}")


APOSTROPHE = "'", "''"


def whole(box: Sandbox) -> Any:
    """All rows, and the server's own sum of the stored bytes of all columns."""
    rows = sql(box, f"SELECT *, hidden, small + 0E0 FROM {TABLE} ORDER BY jobId")
    return rows, sql(box, f"CHECKSUM TABLE {TABLE} EXTENDED")


def undo_rows(world: World, path: Path, *options: str, code: int = 0) -> str:
    """What it prints, or its error. It needs no database, no AWS, and no setting."""
    unset = {name: None for name in world.environment() if re.match("RETENTION|AWS", name)}
    patch = "rp.boto3 = None"
    result = world.purge("--undo-rows", str(path), *options, patch=patch, **unset)
    assert (result.code, result.out == "") == (code, code > 0), result.err
    return result.error if code else result.out


def execute(box: Sandbox, script: str, mode: str) -> None:
    with box.database.admin(database=DATABASE, sql_mode=mode) as connection:
        for statement in script.split(";\n"):
            connection.cursor().execute(statement)


@pytest.mark.parametrize("job_id", JOB_IDS)
def test_after_a_kill_the_table_is_byte_identical_under_any_sql_mode(world, path, job_id):
    load(world.box, job_id)
    before, options = whole(world.box), (*AS_OF, "--delete-jobs", "--audit-log", str(path))
    assert world.purge(*options, patch=KILLED).code == -9
    after, intents = whole(world.box), events(path, "delete-job")
    assert (len(after[0]), len(intents)) == (ROWS - 30, 40)
    text = path.read_text()
    path.write_text(text[: text.rindex("\n", 0, -1) + 30])  # in the middle of the last line
    script = undo_rows(world, path)
    assert re.fullmatch(r"-- 39 rows.* 1 cut lines?.*", script.splitlines()[-1])
    gone = ", ".join(repr(row[0]) for row in before[0] if row not in after[0])
    for mode in MODES:
        sql(world.box, f"DELETE FROM {TABLE} WHERE jobId IN ({gone})")
        assert whole(world.box) == after
        for _ in range(2):
            execute(world.box, script, mode)
            assert whole(world.box) == before, mode


def test_a_row_that_is_there_again_keeps_its_new_values(world, path):
    expire(world, 3)
    options = (*AS_OF, "--delete-jobs", "--audit-log", str(path))
    assert world.purge(*options, "--json").summary["jobs_deleted"] == 3
    sql(world.box, f"INSERT INTO {TABLE} VALUES ('k000001', NULL, 'OFFICIAL', 'new')")
    execute(world.box, undo_rows(world, path), "")
    kept = sql(world.box, f"SELECT type, sourceData FROM {TABLE} ORDER BY jobId")
    assert kept == (("TRIAL", "k000000"), ("OFFICIAL", "new"), ("TRIAL", "k000002"))


def test_several_runs_are_refused_with_their_list_and_run_id_picks_one(world, path):
    ids = []
    for count in (3, 2):
        expire(world, count)
        options = (*AS_OF, "--delete-jobs", "--audit-log", str(path), "--json")
        ids.append(world.purge(*options).summary["run_id"])
    world.purge(*AS_OF, "--audit-log", str(path))  # it deletes no row, and is no choice
    said = undo_rows(world, path, code=3)
    assert [words for words in ("2 runs", f"{ids[0]} 3", f"{ids[1]} 2") if words not in said] == []
    assert "another is not in" in undo_rows(world, path, "--run-id", "another", code=3)
    script = undo_rows(world, path, "--run-id", ids[0])
    assert script.splitlines()[-1].startswith(f"-- 3 rows of run {ids[0]}")
    execute(world.box, script, "")
    assert world.box.job_ids() == ["k000000", "k000001", "k000002"]


def test_a_table_with_an_odd_name_comes_back_under_it(world, path):
    expire(world, 1)
    name = "or`der.s"  # the schema may have dots, a table may not
    sql(world.box, f"CREATE TABLE `or``ders` LIKE {TABLE}")
    sql(world.box, f"INSERT INTO `or``ders` SELECT * FROM {TABLE}")
    options = (*AS_OF, "--delete-jobs", "--audit-log", str(path), "--db-table", "or`ders")
    try:
        assert world.purge(*options, "--json").summary["jobs_deleted"] == 1, name
        execute(world.box, undo_rows(world, path), "")
        assert sql(world.box, "SELECT jobId FROM `or``ders`") == (("k000000",),)
    finally:
        sql(world.box, "DROP TABLE `or``ders`")


def test_what_cannot_be_undone_is_refused_in_one_line(world, path):
    """A log without rows; one of an older version, which kept four columns; none."""
    expire(world, 1)
    world.purge(*AS_OF, "--audit-log", str(path))
    assert "no run that deleted job rows" in undo_rows(world, path, code=3)
    old = {"event": "delete-job", "run_id": "1", "time": f"{OLD}+00:00", "key": "k", "job_id": "k"}
    start = {"event": "start", "run_id": "1", "time": old["time"], "table": f"{DATABASE}.{TABLE}"}
    path.write_text(f"{json.dumps(start)}\n{json.dumps(old)}\n")
    assert "no whole rows" in ended_with(world, path)
    assert "--bucket does not go with" in undo_rows(world, path, "--bucket", "b", code=2)
    path.unlink()
    assert "does not exist" in undo_rows(world, path, code=2)


def ended_with(world: World, path: Path) -> str:
    """The error of a run that may have printed a part by then."""
    result = world.purge("--undo-rows", str(path))
    assert result.code == 3
    assert "INSERT" not in result.out
    return result.error


def test_a_json_setting_leaves_the_sql_alone(world, path):
    expire(world, 1)
    world.purge(*AS_OF, "--delete-jobs", "--audit-log", str(path))
    out = world.purge("--undo-rows", str(path), RETENTION_PURGE_JSON="1").out
    assert out == undo_rows(world, path)


def test_a_refused_undo_of_rows_leaves_the_manifest(world, path, tmp_path):
    world.purge(*AS_OF, "--audit-log", str(path))
    manifest = tmp_path / "plan.csv"
    manifest.touch()
    result = world.purge("--undo-rows", str(path), RETENTION_PURGE_MANIFEST=str(manifest))
    assert (result.code, manifest.exists()) == (3, True)


def test_a_log_from_a_pipe_is_refused(world, path, tmp_path):
    """It is read twice."""
    path.touch()
    os.mkfifo(tmp_path / "pipe")
    for option in ("--undo", "--undo-rows"):
        result = world.purge(option, str(tmp_path / "pipe"))
        assert (result.code, "unpack the log" in result.error) == (2, True)


def test_no_insert_is_larger_than_the_smallest_default_of_max_allowed_packet(tmp_path):
    head = {"run_id": "r", "time": "2026-01-01T00:00:00+00:00"}
    lines = [head | {"event": "start", "table": "a.b"}]
    row = {"jobId": 1, "sourceData": "x", "note": "y" * 100_000}
    lines += [head | {"event": "delete-job", "key": "x", "row": row}] * 60
    log = tmp_path / "log"
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    told = [*rp.rows_sql(log, None)]
    assert max(map(len, told)) < 4 * 2**20
    assert sum(text.count("\n(") for text in told) == 60
    assert told[-1].startswith("-- 60 rows")
