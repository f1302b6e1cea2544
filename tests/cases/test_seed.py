"""The original system's 50 jobs and 48 objects, from end to end: what goes, what stays."""

from __future__ import annotations

from conftest import AS_OF, EVERYTHING, state

EXPIRED = [f"incoming_{n:06}" for n in (*range(11, 16), 17, 18, *range(36, 46))]
ORPHANS = ["test", "test_1.txt", "test_2.txt"]
ALL = [f"incoming_{n:06}" for n in range(1, 46)] + ORPHANS


def test_expired_keys_go_everything_else_stays_and_a_second_run_finds_nothing_to_do(world):
    left = sorted({*ALL} - {*EXPIRED}), world.box.job_ids()
    summary = world.purge(*AS_OF, "--json").summary
    assert state(world.box) == left
    gone = {"expired": 17, "orphan": 0, "bytes": 357}
    told = {"mode": "purge", "versioning": "off", "cutoff": "2019-03-05T00:00:00+00:00"}
    told |= {"planned": gone | {"jobs": 0}, "deleted": gone, "requests": {"list": 1, "delete": 1}}
    told["seen"] = {"jobs": 50, "expired_jobs": 22, "expired_keys": 17, "remaining_keys": 28}
    told["seen"]["objects"] = None  # they are not all listed
    zeros = ["retained", "failed", "not_attempted", "missing", "doubtful", "jobs_deleted"]
    told |= dict.fromkeys(zeros, 0) | {"dangling": None, "recoverable": False}
    assert summary | told | {"exit_code": 0, "error": None} == summary
    again = world.purge(*AS_OF, "--json").summary
    assert (again["exit_code"], again["planned"]["expired"], again["missing"]) == (0, 0, 17)
    assert state(world.box) == left


def test_a_dry_run_lists_what_the_real_run_deletes_and_writes_nothing(may_delete, tmp_path):
    world, path = may_delete, tmp_path / "log"
    options = (*AS_OF, *EVERYTHING, "--delete-jobs", "--audit-log", str(path))
    before = state(world.box)
    dry = world.purge(*options, "--dry-run")
    assert (dry.code, state(world.box), path.exists()) == (0, before, False)
    planned = [("expired", key) for key in EXPIRED] + [("orphan", key) for key in ORPHANS]
    assert dry.listed == planned
    summary = world.purge(*options, "--json").summary
    assert summary["deleted"] == {"expired": 17, "orphan": 3, "bytes": 17 * 21 + 166}
    assert (summary["seen"]["objects"], summary["dangling"]) == (48, 0)
    assert world.box.live_keys() == sorted({*ALL} - {*EXPIRED, *ORPHANS})
    assert (summary["jobs_deleted"], len(world.box.job_ids())) == (22, 50 - 22)


def test_by_the_clock_of_the_database_all_trials_are_expired_and_new_orphans_have_a_grace(world):
    deleted = world.purge("--orphans", "--json").summary["deleted"]
    assert (deleted["expired"], deleted["orphan"]) == (17 + 5, 0)
