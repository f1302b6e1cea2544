"""Random schedules of tables, buckets, policies, a writer and faults; see schedules.py.

Seeds 1 to 40; SCHEDULES and SEED in the environment choose others, as in

    SEED=1234 SCHEDULES=1 .venv/bin/python -m pytest tests/cases/test_properties.py

and `tests/proofs/soak.py` plays them by the thousand.
"""

from __future__ import annotations

import os
import re
from functools import partial

import pytest
from conftest import AS_OF
from sandbox import TABLE
from schedules import History, Model, run_schedule

FIRST, COUNT = int(os.environ.get("SEED", "1")), int(os.environ.get("SCHEDULES", "40"))
OLD, NEW = "2019-01-01 00:00:00", "2019-05-01 00:00:00"


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_no_schedule_of_faults_makes_the_purge_delete_too_much_or_lie(box, seed):
    run_schedule(box, seed)


def test_memory_does_not_grow_with_the_number_of_rows(world):
    peak = "rp.sys.stderr.write(open('/proc/self/status').read())"
    peak = f"import atexit; atexit.register(lambda: {peak})"
    peaks = []
    for rows in (10_000, 120_000):
        world.box.load([], [])
        numbers = f"SELECT seq, '{OLD}', 'TRIAL', CONCAT('key-', seq) FROM seq_1_to_{rows}"
        world.box.sql(f"INSERT INTO {TABLE} {numbers}")
        result = world.purge(*AS_OF, "-n", "--json", patch=peak)
        assert result.summary["missing"] == rows
        peaks.append(int(re.findall(r"VmHWM:\s+(\d+) kB", result.err)[0]))
    assert peaks[1] - peaks[0] < 8_000, "kB"


def test_the_model_is_the_policy():
    model = Model("p/", orphans=True, grace_days=7)
    jobs = [
        ("1", OLD, "TRIAL", "gone"), ("2", OLD, "TRIAL", "shared"), ("3", NEW, "TRIAL", "shared"),
        ("4", OLD, "OFFICIAL", "official"), ("5", None, "TRIAL", "open"), ("6", OLD, "TRIAL", ""),
        ("7", OLD, "TRIAL", "missing"),
    ]  # fmt: skip
    young, old = dict.fromkeys(["p/young"], 1), dict.fromkeys(["p/orphan", "p/", "outside"], 7)
    objects = dict.fromkeys(["p/gone", "p/shared", "p/official", "p/open", "gone"], 30)
    assert model.deletable(jobs, objects | young | old) == {"p/gone", "p/orphan"}
    assert model.rows_left(jobs) == {"3", "4", "5", "6"}


def test_a_key_is_held_only_if_some_job_named_it_at_every_moment():
    history = History([("1", OLD, "OFFICIAL", "k")])
    held = partial(history.referred, "k", 0, 10)
    assert held(lambda job: True)
    assert not held(lambda job: False)
    assert not history.referred("other", 0, 10, lambda job: True)
    (first,) = history.jobs["1"]
    history.jobs["1"] = [first._replace(until=5)]
    assert not held(lambda job: True)
    for since, is_held in {6: False, 4: True}.items():
        history.jobs["2"] = [first._replace(since=since)]
        assert held(lambda job: True) is is_held
