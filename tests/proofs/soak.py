"""Random schedules without end in sight: as many as you like, each from a seed of its own.

    .venv/bin/python tests/proofs/soak.py --schedules 1000 --seed 1 [--jobs 2] [--mysql]

plays the schedules of seeds 1 to 1000, in two sandboxes at the same time, of MariaDB or MySQL. Each
failure is printed with its seed; `--schedules 1 --seed N` plays that one alone. Ends with a table
of the faults that took place (with --write it goes into MEASURED.md), and exit code 1 if a
schedule failed.
"""

from __future__ import annotations

import argparse
import faulthandler
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
from sandbox import mysql_sandbox, sandbox
from schedules import run_schedule

Outcome = tuple[int, Counter[tuple[str, str]], str]


def play(seeds: list[int], mysql: bool, outcomes: multiprocessing.Queue[Outcome]) -> None:
    """In a process of its own: these schedules in one sandbox."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    faulthandler.register(signal.SIGUSR1)
    with mysql_sandbox() if mysql else sandbox() as box:
        for seed in seeds:
            try:
                outcomes.put((seed, run_schedule(box, seed), ""))
            except Exception:
                outcomes.put((seed, Counter(), traceback.format_exc()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1, help="of the first schedule")
    parser.add_argument("--jobs", type=int, default=2, help="sandboxes at the same time")
    parser.add_argument("--write", action="store_true", help="put it into MEASURED.md")
    parser.add_argument("--mysql", action="store_true", help="instead of MariaDB")
    asked = parser.parse_args()
    seeds = range(asked.seed, asked.seed + asked.schedules)
    outcomes: multiprocessing.Queue[Outcome] = multiprocessing.Queue()
    jobs = min(asked.jobs, asked.schedules)
    players = [
        multiprocessing.Process(target=play, args=(list(seeds[n::jobs]), asked.mysql, outcomes))
        for n in range(jobs)
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started, injected, failed = time.monotonic(), Counter[tuple[str, str]](), []
    try:
        for player in players:
            player.start()
        for number in range(1, len(seeds) + 1):
            seed, counts, trouble = outcomes.get(timeout=600)
            injected += counts
            if trouble:
                failed.append(seed)
                print(
                    f"\nSEED {seed} FAILED; alone: tests/proofs/soak.py --schedules 1 --seed {seed}"
                )
                print(trouble, flush=True)
            if number % 50 == 0:
                spent = time.monotonic() - started
                print(f"{number} schedules, {len(failed)} failed, {spent:.0f} s", flush=True)
    finally:
        for player in players:
            player.terminate()
            player.join()
    server = "MySQL" if asked.mysql else "MariaDB"
    told = f"On {server}, seeds from {asked.seed}; failed: {sorted(failed) or 'none'}."
    print(f"\n{table_of(injected, len(seeds))}\n\n{told} {time.monotonic() - started:.0f} s")
    if asked.write:
        page.write("soak", f"{told}\n\n{table_of(injected, len(seeds))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
