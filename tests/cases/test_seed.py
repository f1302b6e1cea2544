"""The original system's 50 jobs and 48 objects, from end to end."""

from __future__ import annotations

from conftest import AS_OF, EVERYTHING

EXPIRED = [f"incoming_{n:06}" for n in (*range(11, 16), 17, 18, *range(36, 46))]
ORPHANS = ["test", "test_1.txt", "test_2.txt"]
ALL = [f"incoming_{n:06}" for n in range(1, 46)] + ORPHANS


def test_expired_keys_go_and_everything_else_stays(world):
    result = world.purge(*AS_OF, "--json")
    assert result.code == 0
    assert world.box.live_keys() == sorted(set(ALL) - set(EXPIRED))
    summary = result.summary
    assert summary["deleted"] == {"expired": 17, "orphan": 0, "bytes": 357}
    assert summary["planned"] == summary["deleted"] | {"jobs": 0}
    assert summary["cutoff"] == "2019-03-05T00:00:00+00:00"
    for name in ("retained", "failed", "not_attempted", "missing", "jobs_deleted"):
        assert summary[name] == 0
    assert summary["requests"] == {"list": 1, "delete": 1}
    assert (summary["mode"], summary["versioning"], summary["error"]) == ("purge", "off", None)


def test_orphans_go_when_asked_for(world):
    result = world.purge(*AS_OF, *EVERYTHING, "--json")
    assert result.summary["deleted"] == {"expired": 17, "orphan": 3, "bytes": 17 * 21 + 166}
    assert world.box.live_keys() == sorted(set(ALL) - set(EXPIRED) - set(ORPHANS))
    assert len(world.box.live_keys()) == 28


def test_new_orphans_stay_within_the_grace_period_of_the_real_clock(world):
    assert world.purge(*AS_OF, "--orphans", "--json").summary["deleted"]["orphan"] == 0
    assert set(ORPHANS) <= set(world.box.live_keys())


def test_a_dry_run_lists_what_the_real_run_deletes_and_changes_nothing(world):
    options = (*AS_OF, *EVERYTHING)
    before = world.box.live_keys(), world.box.job_ids()
    dry = world.purge(*options, "--dry-run")
    assert dry.code == 0
    assert (world.box.live_keys(), world.box.job_ids()) == before
    assert dry.listed == sorted(
        [("expired", key) for key in EXPIRED] + [("orphan", key) for key in ORPHANS],
        key=lambda row: row[1],
    )
    world.purge(*options)
    assert set(before[0]) - set(world.box.live_keys()) == {key for _, key in dry.listed}
    assert world.box.job_ids() == before[1]


def test_a_second_run_finds_nothing_to_do(world):
    assert world.purge(*AS_OF).code == 0
    left = world.box.live_keys()
    again = world.purge(*AS_OF, "--json")
    assert again.code == 0
    assert again.summary["planned"]["expired"] == 0
    assert again.summary["missing"] == 17
    assert world.box.live_keys() == left


def test_without_as_of_the_database_clock_decides(world):
    # All completed TRIAL jobs of 2019 are long expired.
    deleted = world.purge("--json").summary["deleted"]
    assert deleted["expired"] == len(EXPIRED) + 5


def test_the_text_summary_has_a_line_for_each_fact(world):
    shown = [" ".join(line.split()) for line in world.purge(*AS_OF).out.splitlines()]
    for line in (
        "mode purge",
        "bucket s3://incoming-data/",
        "versioning off",
        "planned 17 expired, 357 bytes",
        "deleted 17 expired, 357 bytes",
        "failed 0",
        "requests 1 list, 1 delete",
        "exit code 0",
    ):
        assert any(each.startswith(line) for each in shown), line
