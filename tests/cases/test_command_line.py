"""Options, environment, wrong usage. Slips in variables are in test_slips."""

from __future__ import annotations

import pytest
from conftest import AS_OF, World


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("--retention-days 0", "retention-days"),
        ("--retention-days ninety", "retention-days"),
        ("--orphan-grace-days -1", "orphan-grace-days"),
        ("--max-percent nan", "--max-percent"),
        ("--max-percent 101", "--max-percent"),
        ("--workers 0", "workers"),
        ("--as-of yesterday", "ISO 8601"),
        ("--bucket s3://bucket/prefix", "--prefix"),
        ("--db-table a.b.c", "SCHEMA.TABLE"),
        ("--db-table=", "SCHEMA.TABLE"),
        ("--db-port 0", "db-port"),
        ("--run-id 1", "--undo"),
        ("--no-such-option", "--no-such-option"),
        ("surplus", "surplus"),
        ("--profile no-such-profile", "--profile"),
        ("--manifest /no/where --audit-log /no/./where", "two files"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(world: World, arguments, hint):
    result = world.purge(*arguments.split())
    assert (result.code, result.out) == (2, "")
    assert hint in result.error


@pytest.mark.parametrize(
    ("variable", "value", "hint"),
    [
        ("DB_HOST", None, "--db-host"),
        ("DB_USER", None, "--db-user"),
        ("DB_NAME", None, "--db-name"),
        ("BUCKET", None, "--bucket"),
        ("DRYRUN", "1", "RETENTION_PURGE_DRYRUN is no option's variable"),
        ("DRY_RUN", "", "RETENTION_PURGE_DRY_RUN is empty"),
    ],
)
def test_a_variable_that_is_missing_unknown_or_empty_ends_the_run(world, variable, value, hint):
    result = world.purge(*AS_OF, **{f"RETENTION_PURGE_{variable}": value})
    assert (result.code, result.out) == (2, "")
    assert hint in result.error
    assert len(world.box.live_keys()) == 48


def test_options_come_from_the_environment_too(world: World):
    settings = {
        "AS_OF": "2019-06-03T02:00:00+02:00",
        "ORPHANS": "1",
        "ORPHAN_GRACE_DAYS": "0",
        "DRY_RUN": "yes",
        "JSON": "true",
        "QUIET": "1",
    }
    result = world.purge(**{f"RETENTION_PURGE_{name}": settings[name] for name in settings})
    assert result.summary["mode"] == "dry-run"
    assert result.summary["cutoff"] == "2019-03-05T00:00:00+00:00"
    assert result.summary["planned"] == {"expired": 17, "orphan": 3, "bytes": 523, "jobs": 0}
    assert result.err == ""


def test_a_time_without_offset_is_utc_and_other_retention_moves_the_cutoff(world: World):
    options = ("-n", "--json", "--as-of", "2019-06-03T00:00:00", "--retention-days", "30")
    summary = world.purge(*options, TZ="Asia/Tokyo").summary
    assert summary["cutoff"] == "2019-05-04T00:00:00+00:00"
    assert summary["planned"]["expired"] == 22
