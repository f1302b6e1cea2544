"""What a run prints, shows of its progress, and writes as a manifest; and where that fails."""

from __future__ import annotations

import csv
import os
import pty
import re
from contextlib import suppress
from urllib.parse import unquote

import pytest
from conftest import AS_OF, Result, events, expire, version
from sandbox import BUCKET
from test_deletes import ODD, PLAIN
from test_deletes import expire as expire_keys

import retention_purge as rp

# --- Summary and errors ---------------------------------------------------------------------------


def test_the_text_summary_has_a_line_for_each_fact(world):
    version(world, "Suspended")
    shown = " ".join(world.purge(*AS_OF).out.split())
    for fact in (
        "mode purge bucket s3://incoming-data/ table ndvr.ndvr_job_status cutoff 2019-03-05T00:00",
        "versioning suspended planned 17 expired, 357 bytes deleted 17 expired, 357 bytes retained",
        "failed 0 not attempted 0 planned, but the run stopped missing 0 expired keys have no obj",
        "requests 1 list, 1 delete max recheck age seconds 0.",
        "exit code 0 Versioning is suspended: objects written since are gone once deleted",
    ):
        assert fact in shown


@pytest.mark.parametrize("dry", [[], ["-n"]], ids=["real", "dry"])
def test_quiet_and_success_print_nothing(world, dry):
    result = world.purge(*AS_OF, "-q", *dry)
    assert (result.code, result.out, result.err) == (0, "", "")


def test_an_error_is_one_line_with_its_time_and_run_and_stands_in_the_json_object(world):
    result = world.purge("-q", "--json", "--db-host", "no-such-host.invalid")
    stamp, summary = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", result.summary
    assert (result.code, "no-such-host.invalid" in summary["error"]) == (1, True)
    line = re.escape(f" Error: {summary['error']} (run {summary['run_id']})\n")
    assert re.fullmatch(stamp + line, result.err)
    assert "Traceback" in world.purge("-v", "--db-host", "no-such-host.invalid").err


@pytest.mark.parametrize("options", [[], ["-n"], ["--json"]], ids=["text", "dry", "json"])
def test_a_full_standard_output_is_one_line_on_record_and_loses_no_work(world, tmp_path, options):
    path = tmp_path / "log"
    with open("/dev/full", "w") as full:
        process = world.start(*AS_OF, *options, "--audit-log", str(path), stdout=full)
        result = Result(1, "", process.communicate(timeout=60)[1])
    assert process.returncode == 1
    assert result.error == "Cannot print the result: No space left on device."
    assert len(world.box.live_keys()) == (48 if "-n" in options else 31)
    if "-n" not in options:
        end = events(path)[-1]
        assert (end["event"], end["exit_code"], end["error"]) == ("end", 1, result.error)


# --- Progress -------------------------------------------------------------------------------------


def test_on_a_terminal_each_phase_has_a_progress_bar(world):
    expire(world, 300)
    ours, theirs = pty.openpty()
    process = world.start(*AS_OF, stderr=theirs, TERM="xterm")
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # the terminal is gone with the process
        while chunk := os.read(ours, 65536):
            shown += chunk
    assert process.wait(60) == 0
    text = shown.decode()
    for phase in ("reading references", "listing", "deleting"):
        assert phase in text
    assert "300/300" in text
    assert re.search(r"[\d,]+/s", text)


def test_a_cron_log_gets_a_line_a_minute_at_most(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(rp.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(rp.log, "propagate", True)

    def items():
        for n in range(100_000):
            now[0] += 0.003  # 300 seconds in all
            yield n

    with caplog.at_level("INFO", "retention_purge"):
        assert sum(1 for _ in rp.watched(items(), "listing", 100_000)) == 100_000
    lines = [record.getMessage() for record in caplog.records]
    assert 4 <= len(lines) <= 5
    assert re.fullmatch(r"listing: [\d,]+ of 100,000, 240 s left, 333/s", lines[0])


# --- Manifest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dry", [[], ["-n"]], ids=["real", "dry"])
def test_the_manifest_is_the_plan_for_s3_batch_operations(world, tmp_path, dry):
    keys = [*ODD, *PLAIN, "a,b", 'c"d']
    expire_keys(world, keys)
    path = tmp_path / "manifest.csv"
    assert world.purge(*AS_OF, "--manifest", str(path), *dry).code == 0
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert [(bucket, unquote(key)) for bucket, key in rows] == [
        (BUCKET, key) for key in sorted(keys)
    ]
    assert all(key.isascii() for _, key in rows)
    assert os.listdir(tmp_path) == ["manifest.csv"]


@pytest.mark.parametrize(
    ("option", "path", "code"),
    [
        ("--manifest", "/no/such/folder/manifest", 1),
        ("--audit-log", "/no/such/folder/log", 2),
        ("--audit-log", "/", 2),
        ("--audit-log", "/dev/full", 1),
    ],
)
def test_a_file_that_cannot_be_written_stops_the_run_with_nothing_deleted(
    world, option, path, code
):
    result = world.purge(*AS_OF, option, path)
    assert (result.code, len(world.box.live_keys())) == (code, 48)
    assert f"Cannot write the {option.strip('-').replace('-', ' ')}" in result.error
