"""Options, environment, exit codes."""

from __future__ import annotations

import re

import pytest
from conftest import AS_OF, Result, World


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--retention-days", "0"], "retention-days"),
        (["--retention-days", "ninety"], "retention-days"),
        (["--orphan-grace-days", "-1"], "orphan-grace-days"),
        (["--max-percent", "nan"], "--max-percent"),
        (["--workers", "0"], "workers"),
        (["--as-of", "yesterday"], "ISO 8601"),
        (["--bucket", "s3://bucket/prefix"], "--prefix"),
        (["--db-table", "a.b.c"], "SCHEMA.TABLE"),
        (["--db-table", ""], "SCHEMA.TABLE"),
        (["--db-port", "0"], "db-port"),
        (["--run-id", "1"], "--undo"),
        (["--no-such-option"], "--no-such-option"),
        (["surplus"], "surplus"),
        (["--profile", "no-such-profile"], "--profile"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(world: World, arguments, hint):
    result = world.purge(*arguments)
    assert result.code == 2
    assert hint in result.error
    assert result.out == ""


@pytest.mark.parametrize("name", ["DB_HOST", "DB_USER", "DB_NAME", "BUCKET"])
def test_a_required_option_is_required(world: World, name):
    result = world.purge(**{f"RETENTION_PURGE_{name}": None})
    assert result.code == 2
    assert "--" + name.lower().replace("_", "-") in result.error


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("DRYRUN", "1", "do you mean RETENTION_PURGE_DRY_RUN?"),
        ("MAX_OBJECT", "0", "do you mean RETENTION_PURGE_MAX_OBJECTS?"),
        ("DB_PASSWD", "secret", "do you mean RETENTION_PURGE_DB_PASSWORD?"),
        ("UNDO", "/no/such/log", "RETENTION_PURGE_UNDO is no option's variable"),
        ("RUN_ID", "1", "RETENTION_PURGE_RUN_ID is no option's variable"),
        ("DRY_RUN", "", "RETENTION_PURGE_DRY_RUN is empty"),
        ("RETENTION_DAYS", "", "RETENTION_PURGE_RETENTION_DAYS is empty"),
        ("DB_PASSWORD", "", "RETENTION_PURGE_DB_PASSWORD is empty"),
    ],
)
def test_an_unknown_or_empty_variable_ends_the_run_before_anything(world: World, name, value, hint):
    result = world.purge(*AS_OF, **{f"RETENTION_PURGE_{name}": value})
    assert (result.code, result.out) == (2, "")
    assert hint in result.error
    assert len(world.box.live_keys()) == 48


def test_options_come_from_the_environment_too(world: World):
    settings = {
        "RETENTION_PURGE_AS_OF": "2019-06-03T02:00:00+02:00",
        "RETENTION_PURGE_ORPHANS": "1",
        "RETENTION_PURGE_ORPHAN_GRACE_DAYS": "0",
        "RETENTION_PURGE_DRY_RUN": "yes",
        "RETENTION_PURGE_JSON": "true",
        "RETENTION_PURGE_QUIET": "1",
    }
    result = world.purge(**settings)
    assert result.summary["mode"] == "dry-run"
    assert result.summary["cutoff"] == "2019-03-05T00:00:00+00:00"
    assert result.summary["planned"] == {"expired": 17, "orphan": 3, "bytes": 523, "jobs": 0}
    assert result.err == ""


def test_a_time_without_offset_is_utc_and_other_retention_moves_the_cutoff(world: World):
    result = world.purge(
        "-n", "--json", "--as-of", "2019-06-03T00:00:00", "--retention-days", "30", TZ="Asia/Tokyo"
    )
    assert result.summary["cutoff"] == "2019-05-04T00:00:00+00:00"
    assert result.summary["planned"]["expired"] == 22


def test_as_of_after_the_database_clock_is_refused(world: World):
    result = world.purge("--as-of", "2999-01-01T00:00:00Z", "--json")
    assert result.code == 3
    assert "--as-of" in result.summary["error"]
    assert len(world.box.live_keys()) == 48


def test_failed_runs_print_one_json_object_too(world: World):
    result = world.purge("--json", "--db-host", "no-such-host.invalid")
    assert result.code == 1
    assert "no-such-host.invalid" in result.summary["error"]
    assert result.summary["error"] in result.err


def test_a_dry_run_with_json_prints_the_summary_alone(world: World):
    assert world.purge(*AS_OF, "-n", "--json").summary["planned"]["expired"] == 17


def test_verbose_shows_the_traceback_of_an_error(world: World):
    result = world.purge("-v", "--db-host", "no-such-host.invalid")
    assert "Traceback" in result.err
    assert result.code == 1


@pytest.mark.parametrize("dry", [[], ["-n"]])
def test_quiet_and_success_print_nothing(world: World, dry):
    result = world.purge(*AS_OF, "-q", *dry)
    assert (result.code, result.out, result.err) == (0, "", "")


def test_an_error_in_a_log_has_its_time_and_run(world: World):
    result = world.purge(*AS_OF, "-q", "--max-objects", "1", "--json")
    stamp, run_id = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", result.summary["run_id"]
    assert re.fullmatch(rf"{stamp} Error: Refused, .+ \(run {run_id}\)\n", result.err)


def test_manifest_and_audit_log_must_be_two_files(world: World, tmp_path):
    path = tmp_path / "file"
    result = world.purge(*AS_OF, "--manifest", str(path), "--audit-log", f"{tmp_path}/./file")
    assert result.code == 2
    assert "two files" in result.error


@pytest.mark.parametrize("options", [[], ["-n"], ["--json"]])
def test_a_full_or_closed_standard_output_is_one_line_and_loses_no_work(world: World, options):
    with open("/dev/full", "w") as full:
        process = world.start(*AS_OF, *options, stdout=full)
        result = Result(1, "", process.communicate(timeout=60)[1])
    assert process.returncode == 1
    assert result.error == "Cannot print the result: No space left on device."
    assert len(world.box.live_keys()) == (48 if "-n" in options else 31)


def test_a_full_standard_error_keeps_the_exit_code(world: World):
    with open("/dev/full", "w") as full:
        process = world.start(*AS_OF, "--max-objects", "1", stderr=full)
        process.communicate(timeout=60)
    assert process.returncode == 3


def test_a_reader_that_goes_away_ends_a_dry_run_in_one_line(world: World):
    process = world.start(*AS_OF, "-n")
    assert process.stdout is not None
    process.stdout.close()
    err = process.stderr.read() if process.stderr else ""
    assert process.wait(60) == 1
    assert Result(1, "", err).error == "Cannot print the result: Broken pipe."
