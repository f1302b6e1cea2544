"""Random schedules without end in sight: as many as you like, each from a seed of its own.

    .venv/bin/python tests/proofs/soak.py --schedules 1000 --seed 1 [--servers mariadb,mysql]

plays the schedules of seeds 1 to 1000, each on one of the servers in turn, at the same time. Each
failure is printed with its seed and how to play that one alone. Ends with a table of the faults
that took place (with --write it goes into MEASURED.md), and exit code 1 if a schedule failed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "world"))
import page
from faults import table_of
from sandbox import mysql_sandbox, mysqld, sandbox
from schedules import run_schedule

SERVERS = {"mariadb": sandbox, "mysql": mysql_sandbox}
Outcome = tuple[str, int, Counter[tuple[str, str]], str]


def play(server: str, seeds: list[int], outcomes: multiprocessing.Queue[Outcome]) -> None:
    """In a process of its own: these schedules in one sandbox."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with SERVERS[server]() as box:
        for seed in seeds:
            try:
                outcomes.put((server, seed, run_schedule(box, seed), ""))
            except Exception:
                outcomes.put((server, seed, Counter(), traceback.format_exc()))


def at_hand() -> str:
    """Both servers, if MySQL is there."""
    try:
        mysqld()
    except LookupError:
        return "mariadb"
    return "mariadb,mysql"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1, help="of the first schedule")
    parser.add_argument("--jobs", type=int, default=2, help="sandboxes at the same time")
    parser.add_argument("--servers", default=at_hand(), help="mariadb, mysql, or both")
    parser.add_argument("--write", action="store_true", help="put it into MEASURED.md")
    asked = parser.parse_args()
    seeds, servers = range(asked.seed, asked.seed + asked.schedules), asked.servers.split(",")
    players = len(servers) * max(1, asked.jobs // len(servers))
    outcomes: multiprocessing.Queue[Outcome] = multiprocessing.Queue()
    processes = [
        multiprocessing.Process(
            target=play, args=(servers[n % len(servers)], list(seeds[n::players]), outcomes)
        )
        for n in range(players)
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started, injected = time.monotonic(), Counter[tuple[str, str]]()
    played, failed = Counter[str](), list[str]()
    try:
        for process in processes:
            process.start()
        for number in range(1, len(seeds) + 1):
            server, seed, counts, trouble = outcomes.get(timeout=600)
            injected += counts
            played[server] += 1
            if trouble:
                failed.append(f"{seed} on {server}")
                alone = f"soak.py --schedules 1 --seed {seed} --servers {server}"
                print(f"\nSEED {seed} FAILED; alone: {alone}\n{trouble}", flush=True)
            if number % 50 == 0:
                spent = time.monotonic() - started
                print(f"{number} schedules, {len(failed)} failed, {spent:.0f} s", flush=True)
    finally:
        for process in processes:
            process.terminate()
            process.join()
    shares = ", ".join(f"{count:,} on {server}" for server, count in sorted(played.items()))
    told = f"{shares}; seeds from {asked.seed}; failed: {', '.join(failed) or 'none'}."
    print(f"\n{told}\n\n{table_of(injected, len(seeds))}\n\n{time.monotonic() - started:.0f} s")
    if asked.write:
        page.write("soak", f"{told}\n\n{table_of(injected, len(seeds))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
