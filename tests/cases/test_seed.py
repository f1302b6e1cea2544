"""The original system's 50 jobs and 48 objects, from end to end: what goes, what stays."""

from __future__ import annotations

import pytest
from conftest import AS_OF, EVERYTHING, state

EXPIRED = [f"incoming_{n:06}" for n in (*range(11, 16), 17, 18, *range(36, 46))]
ORPHANS = ["test", "test_1.txt", "test_2.txt"]
ALL = [f"incoming_{n:06}" for n in range(1, 46)] + ORPHANS


def test_expired_keys_go_everything_else_stays_and_a_second_run_finds_nothing_to_do(world):
    jobs = world.box.job_ids()
    summary = world.purge(*AS_OF, "--json").summary
    left = sorted({*ALL} - {*EXPIRED}), jobs
    assert state(world.box) == left
    assert summary["deleted"] == {"expired": 17, "orphan": 0, "bytes": 357}
    assert summary["planned"] == summary["deleted"] | {"jobs": 0}
    assert summary["cutoff"] == "2019-03-05T00:00:00+00:00"
    for name in ("retained", "failed", "not_attempted", "missing", "jobs_deleted", "exit_code"):
        assert summary[name] == 0
    assert summary["requests"] == {"list": 1, "delete": 1}
    assert (summary["mode"], summary["versioning"], summary["error"]) == ("purge", "off", None)
    again = world.purge(*AS_OF, "--json").summary
    assert (again["exit_code"], again["planned"]["expired"], again["missing"]) == (0, 0, 17)
    assert state(world.box) == left


def test_a_dry_run_lists_what_the_real_run_deletes_and_writes_nothing(may_delete, tmp_path):
    world, path = may_delete, tmp_path / "log"
    options = (*AS_OF, *EVERYTHING, "--delete-jobs", "--audit-log", str(path))
    before = state(world.box)
    dry = world.purge(*options, "--dry-run")
    assert (dry.code, state(world.box), path.exists()) == (0, before, False)
    expected = [("expired", key) for key in EXPIRED] + [("orphan", key) for key in ORPHANS]
    assert dry.listed == expected
    summary = world.purge(*options, "--json").summary
    assert summary["deleted"] == {"expired": 17, "orphan": 3, "bytes": 17 * 21 + 166}
    assert world.box.live_keys() == sorted({*ALL} - {*EXPIRED, *ORPHANS})
    assert (summary["jobs_deleted"], len(world.box.job_ids())) == (22, 50 - 22)


@pytest.mark.parametrize(
    ("options", "expired"), [([*AS_OF, "--orphans"], 17), ([], 17 + 5)], ids=["as of", "now"]
)
def test_the_clock_of_the_database_decides_and_new_orphans_have_a_grace(world, options, expired):
    """By it all completed TRIAL jobs of 2019 are long expired; the grace is of the real clock."""
    summary = world.purge(*options, "--json").summary
    assert (summary["deleted"]["expired"], summary["deleted"]["orphan"]) == (expired, 0)
