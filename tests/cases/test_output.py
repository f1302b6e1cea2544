"""What a run prints, shows of its progress, and writes as a manifest; and where that fails.

A standard output that nobody takes is in test_faults.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import subprocess
from operator import length_hint
from urllib.parse import unquote

import pytest
from conftest import AS_OF, version
from sandbox import BUCKET
from test_deletes import ODD, PLAIN, expire

import retention_purge as rp

# --- Summary and errors ---------------------------------------------------------------------------


def test_the_text_summary_has_a_line_for_each_fact(world):
    """A dry run's is README's transcript."""
    version(world, "Suspended")
    shown = " ".join(world.purge(*AS_OF).out.split())
    facts = (
        "suspended planned 17 expired, 357 bytes deleted 17 expired, 357 bytes retained 0 planned"
    )
    assert facts in shown
    assert "failed 0 not attempted 0 planned, but the run stopped missing 0 expired keys" in shown
    assert "requests 1 list, 1 delete max recheck age seconds 0." in shown
    assert "exit code 0 Versioning is suspended: objects written since are gone once" in shown


def test_quiet_and_success_print_nothing(world):
    for options in ("-qn", "-q"):
        result = world.purge(*AS_OF, options)
        assert (result.code, result.out, result.err) == (0, "", "")


def test_an_error_is_one_line_with_its_time_and_run_and_stands_in_the_json_object(world):
    result = world.purge("-q", "--json", "--db-host", "no-such-host.invalid")
    stamp, summary = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", result.summary
    assert (result.code, "no-such-host.invalid" in summary["error"]) == (1, True)
    line = re.escape(f" Error: {summary['error']} (run {summary['run_id']})\n")
    assert re.fullmatch(stamp + line, result.err)
    assert "Traceback" in world.purge("-v", "--db-host", "no-such-host.invalid").err


# --- Progress -------------------------------------------------------------------------------------


def test_on_a_terminal_each_phase_has_a_progress_bar(world):
    command = ["script", "-qec", shlex.join(world.command(*AS_OF)), "/dev/null"]
    shown = subprocess.check_output(command, env=world.environment(TERM="xterm"), text=True)
    for pattern in ("reading references", "listing", "deleting", "17/17", r"[\d,]+/s"):
        assert re.search(pattern, shown)


def test_a_cron_log_gets_a_line_a_minute_at_most(monkeypatch, caplog):
    items = iter(range(100_000))  # 3 milliseconds each, 300 seconds in all
    monkeypatch.setattr(rp.time, "monotonic", lambda: -0.003 * length_hint(items))
    monkeypatch.setattr(rp.log, "propagate", True)
    with caplog.at_level("INFO", "retention_purge"):
        assert sum(1 for _ in rp.watched(items, "listing", 100_000)) == 100_000
    lines = [record.getMessage() for record in caplog.records]
    assert 4 <= len(lines) <= 5
    assert re.fullmatch(r"listing: [\d,]+ of 100,000, 240 s left, 333/s", lines[0])


# --- Manifest -------------------------------------------------------------------------------------


def test_a_c_locale_changes_what_is_printed_and_not_the_manifest_for_s3_batch_operations(
    world, tmp_path
):
    keys = sorted([*ODD, *PLAIN, "a,b", 'c"d'])
    expire(world, keys)
    options = (*AS_OF, "--manifest", str(tmp_path / "manifest.csv"))
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert world.purge(*options, "-n", **locale).out.count("expired\t") == len(keys)
    assert os.listdir(tmp_path) == ["manifest.csv"]
    with (tmp_path / "manifest.csv").open(encoding="ascii", newline="") as file:
        assert [(bucket, unquote(key)) for bucket, key in csv.reader(file)] == [
            (BUCKET, key) for key in keys
        ]
    assert world.purge(*options, **locale).code == 0
    assert world.box.live_keys() == []


@pytest.mark.parametrize(
    ("option", "path", "code"),
    [
        ("--manifest", "/no/such/folder/manifest", 1),
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
