"""Random schedules (of schedules.py; soak.py plays them by the thousand), and memory."""

from __future__ import annotations

import re

import pytest
from conftest import AS_OF, OLD, ended
from sandbox import TABLE
from schedules import run_schedule


@pytest.mark.parametrize("seed", range(1, 13))
def test_no_schedule_of_faults_makes_the_purge_delete_too_much_or_lie(box, seed):
    run_schedule(box, seed)


def test_memory_does_not_grow_with_the_number_of_rows(world):
    told = "rp.sys.stderr.write(open('/proc/self/status').read())"
    patch, peaks = f"import atexit; atexit.register(lambda: {told})", []
    for rows in (10_000, 120_000):
        world.box.load([], [])
        numbers = f"SELECT seq, '{OLD}', 'TRIAL', CONCAT('key-', seq) FROM seq_1_to_{rows}"
        world.box.sql(f"INSERT INTO {TABLE} {numbers}")
        result = ended(world.start(*AS_OF, "-n", "--json", patch=patch))
        assert result.summary["missing"] == rows
        peaks.append(int(re.findall(r"VmHWM:\s+(\d+) kB", result.err)[0]))
    assert peaks[1] - peaks[0] < 8_000, "kB"
