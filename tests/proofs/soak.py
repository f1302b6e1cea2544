"""Random schedules without end in sight: as many as you like, each from a seed of its own.

    .venv/bin/python tests/proofs/soak.py --schedules 1000 --seed 1 [--servers mariadb,mysql]

plays the schedules of seeds 1 to 1000, each on one of the servers in turn, at the same time. Each
failure is printed with its seed and how to play that one alone. Ends with a table of the faults
that took place (with --write it goes into MEASURED.md), and exit code 1 if a schedule failed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections import Counter
from multiprocessing import Pool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "world"))
import page
from sandbox import sandbox
from schedules import run_schedule

# In each process: its servers are stopped.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def play(server: str, seeds: range) -> Counter[tuple[str, str]]:
    """In a process of its own: these schedules in one sandbox; what broke, and which failed."""
    injected = Counter[tuple[str, str]]()
    with sandbox(server) as box:
        for count, seed in enumerate(seeds, 1):
            try:
                injected += run_schedule(box, seed)
            except Exception:
                alone = f"--schedules 1 --seed {seed} --servers {server}"
                injected["failed", alone] += 1
                print(f"\nFAILED; alone: {alone}\n{traceback.format_exc()}", flush=True)
            if count % 10 == 0:
                print(f"{server}: {count} of {len(seeds)} played", flush=True)
    return injected


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1, help="of the first schedule")
    parser.add_argument("--servers", default="mariadb,mysql")
    parser.add_argument("--write", action="store_true", help="put it into MEASURED.md")
    asked = parser.parse_args()
    seeds, servers = range(asked.seed, asked.seed + asked.schedules), asked.servers.split(",")
    shares = [(name, seeds[n :: len(servers)]) for n, name in enumerate(servers)]
    with Pool(len(servers)) as pool:
        injected = sum(pool.starmap(play, shares), Counter[tuple[str, str]]())
    failed = ", ".join(alone for place, alone in injected if place == "failed")
    told = ", ".join(f"{len(share):,} on {server}" for server, share in shares)
    lines = [f"{told}; seeds from {asked.seed}; failed: {failed or 'none'}.", ""]
    lines += ["| where | what broke | times |", "|---|---|---|"]
    lines += [f"| {place} | {kind} | {n:,} |" for (place, kind), n in sorted(injected.items())]
    print("", *lines, sep="\n")
    if asked.write:
        page.write("soak", "\n".join(lines))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
