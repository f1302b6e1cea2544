"""--explain KEY: what a run would do with one key, and why. Each verdict is held to a real run.

All on MariaDB and on MySQL.
"""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import AS_OF, OLD, Held, World, ended, expire, state
from sandbox import COLUMNS, TABLE, USER, Sandbox

INSIDE, ORPHANS = (*AS_OF, "--prefix", "in/"), ("--orphans", "--orphan-grace-days", "7")
ODD = "in/\u00fc'\"`;--\\ \U0001f600\n%00.ts"
CUTOFF = "2019-03-05 00:00:00"
# Name, and of each job type and completion.
JOBS = {
    "gone": [("TRIAL", "2018-01-01 00:00:00"), ("TRIAL", OLD), ("TRIAL", "2018-02-01")],
    "official": [("TRIAL", OLD), ("OFFICIAL", OLD)],
    "small": [("trial", OLD)],
    "padded": [("TRIAL ", OLD)],
    "no type": [(None, OLD)],
    "running": [("TRIAL", None)],
    "zero": [("TRIAL", "0000-00-00 00:00:00")],
    "at the cutoff": [("TRIAL", CUTOFF)],
    "absent": [("TRIAL", OLD)],
    "a\x01b": [("TRIAL", OLD)],
    ODD.removeprefix("in/"): [("TRIAL", OLD)],
    "caf\u00e9": [("OFFICIAL", OLD)],
}
EXPIRED = "expired on 2019-04-01"
# Key, further options, how the verdict begins, whether its object goes.
VERDICTS = [
    ("in/gone", (), f"would be deleted: the last of its jobs {EXPIRED}", True),
    (ODD, (), f"would be deleted: the last of its jobs {EXPIRED}", True),
    ("in/official", (), "kept: job official1 is OFFICIAL", False),
    ("in/small", (), "kept: job small0 is trial", False),
    ("in/padded", (), "kept: job padded0 is TRIAL ", False),
    ("in/no type", (), "kept: job no type0 is of no type", False),
    ("in/running", (), "kept: job running0 is not completed", False),
    ("in/zero", (), "kept: job zero0 is not completed", False),
    ("in/at the cutoff", (), "kept: job at the cutoff0 will expire on 2019-06-03", False),
    ("in/absent", (), "nothing to delete: the bucket has no such object", False),
    ("in/a\x01b", (), "kept: doubtful, because no request can spell its name", False),
    ("gone", (), "kept: it lies outside the prefix", False),
    ("in/", ORPHANS, "kept: it lies outside the prefix", False),
    ("in/old", (), "kept: no job refers to it, and --orphans was not given", False),
    ("in/old", ORPHANS, "would be deleted: no job refers to it", True),
    ("in/new", ORPHANS, "kept: younger than the grace period of 7 days", False),
    (f"in/{'x' * 65}", ORPHANS, "kept: doubtful", False),
    ("in/Cafe%CC%81", ORPHANS, "kept: doubtful", False),
]


@pytest.fixture(scope="session", params=["mariadb", "mysql"])
def box(request: pytest.FixtureRequest, box: Sandbox) -> Sandbox:
    return box if request.param == "mariadb" else request.getfixturevalue("mysql_box")


def load(box: Sandbox) -> None:
    jobs = [(name, n, job) for name, found in JOBS.items() for n, job in enumerate(found)]
    rows = [(f"{name}{n}", moment, kind, name) for name, n, (kind, moment) in jobs]
    box.load(rows, [])
    for key in {key for key, *_ in VERDICTS} - {"in/absent", "in/new"}:
        box.put(key, age=timedelta(days=8))
    box.put("in/new")


def explained(world: World, key: str, *options: str) -> dict[str, Any]:
    """The one JSON object that explains this key."""
    told = world.purge("--explain", key, "--json", *options)
    assert told.code == 0, told.err
    facts: dict[str, Any] = json.loads(told.out)
    assert facts["key"] == key
    return facts


@pytest.mark.parametrize("options", [(), ORPHANS], ids=["plain", "orphans"])
def test_each_verdict_is_what_a_real_run_then_does(world, options):
    load(world.box)
    before, there = state(world.box), {*world.box.live_keys()}
    cases = [case for case in VERDICTS if case[1] == options]
    for key, _, verdict, goes in cases:
        facts = explained(world, key, *INSIDE, *options)
        assert facts["verdict"].startswith(verdict), (key, facts)
        assert goes == facts["verdict"].startswith("would be deleted")
        inside = key in there and "outside" not in verdict
        assert (facts["object"] or {}).get("size") == (21 if inside else None)
    assert state(world.box) == before
    assert world.purge(*INSIDE, *options).code == 0
    gone = there - {*world.box.live_keys()}
    assert {key for key, _, _, goes in cases if goes} == gone & {key for key, *_ in cases}


@pytest.mark.parametrize("column", ["varchar(64)", "int", "decimal(9)", "binary(16)", "datetime"])
def test_the_jobs_of_a_key_are_listed_up_to_20_and_the_rest_counted(world, column):
    """The text tells what the JSON tells. Those that keep the object come first."""
    date = column == "datetime"
    jobs: Any = [(f"2019-01-{n:02}" if date else str(n), OLD, "TRIAL", "k") for n in range(1, 26)]
    jobs += [("2020-01-01" if date else "1000", OLD, "OFFICIAL", "k")]
    world.box.load(jobs, [("k", 7)], COLUMNS.replace("varchar(64)", column, 1))
    told, text = explained(world, "k"), world.purge("--explain", "k").out
    first, *more = told["jobs"]
    assert (len(more), told["more_jobs"]) == (19, 6)
    assert (first["type"], first["state"]) == ("OFFICIAL", "is OFFICIAL")
    told_of = {(job["type"], job["completed_at"], job["state"]) for job in more}
    assert told_of == {("TRIAL", OLD, EXPIRED)}
    lines = text.splitlines()
    assert lines[0].split() == ["key", "k"]
    assert lines[1].split()[:3] == ["object", "7", "bytes,"]
    assert len([line for line in lines if line.startswith("job ")]) == 20
    assert lines[-2].split() == ["jobs", "6", "more"]
    assert lines[-1] == f"verdict  {told['verdict']}"
    assert re.fullmatch("kept: job .*(1000|2020-01-01).* is OFFICIAL", told["verdict"])


@pytest.mark.parametrize("key", [ODD, "in/a\x01b", "in/\u202e\u00a0 "])
def test_an_odd_key_stands_on_one_line_of_the_text(world, key):
    load(world.box)
    lines = world.purge("--explain", key, *INSIDE).out.splitlines()
    assert json.loads(lines[0].removeprefix("key      ")) == key
    assert lines[-1].startswith("verdict  ")


def test_it_tells_what_earlier_runs_did(world, tmp_path):
    """A killed run's cut line is no obstacle, nor a log that is not there yet."""
    world.box.load([("1", OLD, "TRIAL", "k"), ("2", OLD, "TRIAL", "other")], [("k", 1)])
    path = tmp_path / "log"
    options = ("--audit-log", str(path))
    assert not explained(world, "k", *options).get("history")
    run_id = world.purge(*AS_OF, *options, "--json").summary["run_id"]
    path.write_text(path.read_text() + '{"event": "st')
    told = explained(world, "k", *options)
    assert [(it["run_id"], it["event"]) for it in told["history"]] == [
        (run_id, "delete"),
        (run_id, "deleted"),
    ]
    assert [it["time"] for it in told["history"]] == [
        event["time"] for event in events_of(path) if event.get("key") == "k"
    ]
    lines = world.purge("--explain", "k", *options).out.splitlines()
    assert [line.split()[-1] for line in lines if run_id in line] == ["delete", "deleted"]
    assert "no such object" in lines[-1]


def events_of(path: Path) -> list[dict[str, Any]]:
    """Of a log whose last line is cut."""
    return [json.loads(line) for line in path.read_text().splitlines()[:-1]]


def test_it_takes_no_lock_and_writes_nothing_while_a_run_holds_it(world, proxy, tmp_path):
    """Its user has SELECT alone, and S3 sees nothing but GET from it."""
    expire(world, 3)
    path, held = tmp_path / "log", Held(proxy, "delete")
    run = world.start(*AS_OF, "--audit-log", str(path))
    held.wait()
    ((before, _), log) = state(world.box), path.read_bytes()
    asked, grants = len(proxy.requests), str(world.box.sql(f"SHOW GRANTS FOR {USER}@'%'"))
    patch = "rp.take_lock = rp.write_manifest = rp.Gate.delete = rp.Wire._post = None"
    plan = tmp_path / "plan"
    run_2 = world.start(
        "--explain",
        "k000000",
        "--audit-log",
        str(path),
        "-v",
        patch=patch,
        RETENTION_PURGE_MANIFEST=str(plan),
        RETENTION_PURGE_DELETE_JOBS="1",
    )
    told = ended(run_2)
    assert (told.code, "would be deleted" in told.out) == (0, True), told.err
    assert "DELETE" not in grants
    assert {request.method for request in proxy.requests[asked:]} == {"GET"}
    assert (world.box.live_keys(), path.read_bytes(), plan.exists()) == (before, log, False)
    held.release()
    assert (ended(run).code, world.box.live_keys()) == (0, [])


@pytest.mark.parametrize("key", ["common", "nobody's"])
def test_a_million_rows_without_an_index_are_read_twice_at_most(world, key):
    """The server's own count, out of its log of slow statements."""
    if world.box.database.kind == "mysql":
        pytest.skip("only MariaDB counts the rows of each statement in a table")
    world.box.load([], [("common", 1), ("nobody's", 1)])
    million = "SELECT seq, '2019-01-01', 'TRIAL', IF(seq % 2, 'common', seq)"
    world.box.sql(f"INSERT INTO {TABLE} {million} FROM seq_1_to_1000000")
    logs = "SET GLOBAL slow_query_log = {}, GLOBAL long_query_time = {}, GLOBAL log_output = {}"
    world.box.sql("TRUNCATE mysql.slow_log", logs.format(1, 0, "'TABLE'"))
    try:
        told = explained(world, key, "--orphans", "--orphan-grace-days", "0")
    finally:
        world.box.sql(logs.format(0, 10, "'FILE'"))
    assert told["more_jobs"] == (499_980 if key == "common" else 0)
    scans = f"user_host LIKE '{USER}%' AND rows_examined >= 1000000"
    ((count,),) = world.box.sql(f"SELECT COUNT(*) FROM mysql.slow_log WHERE {scans}")
    assert 1 <= count <= 2
