"""Random schedules of tables, buckets, policies, a writer and faults; see schedules.py.

Seeds 1 to 40, or SCHEDULES from SEED on; `tests/proofs/soak.py` plays them by the thousand.
"""

from __future__ import annotations

import os
import re

import pytest
from conftest import AS_OF, OLD
from sandbox import TABLE
from schedules import run_schedule

FIRST, COUNT = int(os.environ.get("SEED", "1")), int(os.environ.get("SCHEDULES", "40"))


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_no_schedule_of_faults_makes_the_purge_delete_too_much_or_lie(box, seed):
    run_schedule(box, seed)


def test_memory_does_not_grow_with_the_number_of_rows(world):
    told = "rp.sys.stderr.write(open('/proc/self/status').read())"
    patch, peaks = f"import atexit; atexit.register(lambda: {told})", []
    for rows in (10_000, 120_000):
        world.box.load([], [])
        numbers = f"SELECT seq, '{OLD}', 'TRIAL', CONCAT('key-', seq) FROM seq_1_to_{rows}"
        world.box.sql(f"INSERT INTO {TABLE} {numbers}")
        result = world.purge(*AS_OF, "-n", "--json", patch=patch)
        assert result.summary["missing"] == rows
        peaks.append(int(re.findall(r"VmHWM:\s+(\d+) kB", result.err)[0]))
    assert peaks[1] - peaks[0] < 8_000, "kB"
