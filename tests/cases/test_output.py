"""What a run prints, shows of its progress, and writes as a manifest; and where that fails.
A standard output that nobody takes is in test_faults."""

from __future__ import annotations

import csv
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

FACTS = """
suspended planned 17 expired, 357 bytes deleted 17 expired, 357 bytes retained 0 planned
failed 0 not attempted 0 planned, but the run stopped missing 0 expired keys
requests 1 list, 1 delete max recheck age seconds
exit code 0 Versioning is suspended: objects written since are gone once
"""


def test_the_text_summary_has_a_line_for_each_fact_and_quiet_prints_nothing(world):
    """A dry run's is README's transcript. That -q prints nothing is shown by its cron line."""
    version(world, "Suspended")
    quiet = world.purge(*AS_OF, "-qn")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    shown = " ".join(world.purge(*AS_OF).out.split())
    assert [fact for fact in FACTS.strip().splitlines() if fact not in shown] == []


def test_an_error_is_one_line_with_its_time_and_run_and_stands_in_the_json_object(world):
    result = world.purge("-q", "--json", "--db-host", "no-such-host.invalid")
    stamp, summary = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", result.summary
    assert (result.code, "no-such-host.invalid" in summary["error"]) == (1, True)
    line = re.escape(f" Error: {summary['error']} (run {summary['run_id']})\n")
    assert re.fullmatch(stamp + line, result.err)
    assert "Traceback" in world.purge("-v", "--db-host", "no-such-host.invalid").err


def test_on_a_terminal_each_phase_has_a_progress_bar(world):
    command = ["script", "-qec", shlex.join(world.command(*AS_OF)), "/dev/null"]
    shown = subprocess.check_output(command, env=world.environment(TERM="xterm"), text=True)
    for pattern in ("reading references", "listing", "deleting", "17/17", r"[\d,]+/s"):
        assert re.search(pattern, shown)
    assert "None" not in shown


def test_a_cron_log_gets_a_line_a_minute_at_most(monkeypatch, caplog):
    items = iter(range(100_000))  # 3 milliseconds each, 300 seconds in all
    monkeypatch.setattr(rp.time, "monotonic", lambda: -0.003 * length_hint(items))
    monkeypatch.setattr(rp.log, "propagate", True)
    with caplog.at_level("INFO", "retention_purge"):
        assert sum(1 for _ in rp.watched(items, "listing", 100_000)) == 100_000
    lines = [record.getMessage() for record in caplog.records]
    assert 4 <= len(lines) <= 5
    assert re.fullmatch(r"listing: [\d,]+ of 100,000, 240 s left, 333/s", lines[0])


def test_a_c_locale_changes_what_is_printed_and_not_the_batch_manifest(world, tmp_path):
    """As S3 Batch Operations reads it."""
    keys, manifest = sorted([*ODD, *PLAIN, "a,b", 'c"d']), tmp_path / "manifest.csv"
    expire(world, keys)
    options = (*AS_OF, "--manifest", str(manifest))
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert world.purge(*options, "-n", **locale).out.count("expired\t") == len(keys)
    assert [*tmp_path.iterdir()] == [manifest]
    rows = csv.reader(manifest.read_text(encoding="ascii").splitlines())
    assert [(bucket, unquote(key)) for bucket, key in rows] == [(BUCKET, key) for key in keys]
    assert (world.purge(*options, **locale).code, world.box.live_keys()) == (0, [])


@pytest.mark.parametrize("case", ["manifest /no/x/y 1", "audit-log / 2", "audit-log /dev/full 1"])
def test_a_file_that_cannot_be_written_stops_the_run_with_nothing_deleted(world, case):
    option, path, code = case.split()
    result = world.purge(*AS_OF, f"--{option}", path)
    assert (result.code, len(world.box.live_keys())) == (int(code), 48)
    assert f"Cannot write the {option.replace('-', ' ')}" in result.error
