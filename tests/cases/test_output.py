"""What a run prints, shows of its progress, and writes as a manifest; and where that fails.
A standard output that nobody takes is in test_faults."""

from __future__ import annotations

import csv
import fcntl
import os
import re
import struct
import subprocess
import termios
import time
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import unquote

import pytest
from conftest import AS_OF, OLD, Held, World, ended, version
from proxies import Request
from sandbox import BUCKET, DATABASE, TABLE
from test_deletes import PLAIN, UNSPELT, expire

SUMMARY = f"""
mode                    purge
bucket                  s3://{BUCKET}/
table                   {DATABASE}.{TABLE}
cutoff                  2019-03-05T00:00:00+00:00
versioning              suspended
seen                    jobs 50, expired_jobs 22, expired_keys 17, remaining_keys 28
planned                 expired 17, orphan 0, bytes 357, jobs 0
deleted                 expired 17, orphan 0, bytes 357
retained                0
failed                  0
not_attempted           0
missing                 0
doubtful                0
jobs_deleted            0
requests                list 1, delete 1
exit_code               0
"""


def test_the_summary_has_a_line_for_each_fact_that_is_known_and_quiet_prints_nothing(world):
    version(world, "Suspended")
    quiet = world.purge(*AS_OF, "-qn")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    lines = world.purge(*AS_OF).out.splitlines()
    assert [line for line in SUMMARY.strip().splitlines() if line not in lines] == []
    names = [line.split()[0] for line in lines]
    extra = {"run_id", "recoverable", "max_recheck_age_seconds", "seconds"}
    assert {*names} == extra | {line.split()[0] for line in SUMMARY.strip().splitlines()}
    assert ("dangling" in names, "undo" in names, len(names)) == (False, False, len({*names}))


def test_a_run_that_can_be_undone_says_with_which_command(world, tmp_path):
    version(world)
    path = tmp_path / "audit log"
    shown = world.purge(*AS_OF, "--audit-log", str(path)).out
    assert re.search(r"^recoverable +true$", shown, re.IGNORECASE | re.MULTILINE)
    (command,) = re.findall(r"^undo +\S+ \S*retention_purge.py (.*)$", shown, re.MULTILINE)
    before = len(world.box.live_keys())
    line = ["bash", "-c", f"{subprocess.list2cmdline(world.command())} {command}"]
    subprocess.run(line, env=world.environment(), check=True, capture_output=True)
    assert (before, len(world.box.live_keys())) == (48 - 17, 48)
    assert "undo " not in world.purge(*AS_OF).out, "nothing tells what it hid"
    assert "undo " not in world.purge(*AS_OF, "--audit-log", str(path)).out, "nothing went"


def test_an_error_is_one_line_with_its_time_and_run_and_stands_in_the_json_object(world):
    result = world.purge("-q", "--json", "--db-host", "no-such-host.invalid")
    stamp, summary = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", result.summary
    assert (result.code, "no-such-host.invalid" in summary["error"]) == (1, True)
    line = re.escape(f" Error: {summary['error']} (run {summary['run_id']})\n")
    assert re.fullmatch(stamp + line, result.err)
    assert "Traceback" in world.purge("-v", "--db-host", "no-such-host.invalid").err


# --- On a terminal --------------------------------------------------------------------------------


def on_terminal(world: World, columns: int, *arguments: str, out: Any = None) -> str:
    """What a run shows on a terminal of that width; `out` is its standard output, if another."""
    reader, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    command, environment = world.command(*arguments), world.environment(TERM="xterm")
    environment = {k: v for k, v in environment.items() if k not in ("COLUMNS", "LINES")}
    streams = {"stdin": terminal, "stdout": out or terminal, "stderr": terminal}
    with subprocess.Popen(command, env=environment, **streams) as process:
        world.processes.append(process)
        os.close(terminal)
        shown = b""
        try:
            while data := os.read(reader, 65536):
                shown += data
        except OSError:  # the other end is closed
            pass
    os.close(reader)
    assert process.returncode == 0, shown
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(("columns", "place"), [(24, None), (80, None), (24, os.devnull)])
def test_on_a_terminal_each_phase_shows_its_progress_in_one_line(world, proxy, columns, place):
    """Also if standard output is a file."""

    def slow(request: Request) -> None:
        if request.operation in ("list", "delete"):
            time.sleep(1.6)

    proxy.before = slow
    with open(place, "w") if place else nullcontext() as out:
        shown = on_terminal(world, columns, *AS_OF, out=out)
    drawn = shown.split("\r\x1b[K")
    progress = [
        text for text in drawn if re.match(r"(reading references|listing|deleting): ", text)
    ]
    for phase in "listing: 0", "deleting: 0 of 17 (0 %), 0/s":
        assert any(text.startswith(phase[: columns - 1]) for text in progress), drawn
    assert max(map(len, progress)) < columns, "it wraps, and each redraw takes a new line"
    assert not [text for text in progress if "\n" in text]
    assert not re.search(r"None| left|\bETA\b", shown)


def load_months(world: World) -> None:
    """Objects of three months, of 10, 20 and 30 expired jobs; rows without object, and others."""
    jobs = [(f"k{n:02}", OLD, "TRIAL", f"k{n:02}") for n in range(60)]
    jobs += [(f"m{n:03}", OLD, "TRIAL", f"m{n:03}") for n in range(300)]
    world.box.load([*jobs, *((f"r{n}", OLD, "OFFICIAL", f"r{n}") for n in range(60))], [])
    for n in range(60):
        month = 1 + (n >= 10) + (n >= 30)
        world.box.put(f"k{n:02}", 512, datetime.now(UTC) - datetime(2019, month, 2, 3, tzinfo=UTC))
        world.box.put(f"r{n}", 1, timedelta(days=1))


DIGEST = [r"2019-01 +10 #{6} .*5\.0 KiB", r"2019-02 +20 #{13} .*10\.0 KiB"]
DIGEST += [
    r"2019-03 +30 #{20} .*15\.0 KiB",
    r"oldest +2019-01-02T0[23]:\S+ +k0",
    "newest +2019-03-02T",
]
DIGEST += [r"share +50\.0 % of 120 keys .*limit 100 %", r"share +85\.7 % of 420 job rows"]


def digest_in(shown: str) -> list[str]:
    """The lines of the digest and the summary that are there."""
    shown = shown.replace("\r\x1b[K", "")
    parts = [*DIGEST, r"planned +expired 60,", "exit_code +0"]
    return [part for part in parts if re.search(f"(?m)^{part}", shown)]


LINE = re.compile(r"(?m)^(?:\r\x1b\[K)*expired\t512\t\S+\t(k\d+)$")


@pytest.mark.parametrize("options", [["--delete-jobs"], []])
def test_on_a_terminal_a_dry_run_shows_ten_lines_spread_over_the_plan_and_a_digest(
    may_delete, options
):
    load_months(may_delete)
    shown = on_terminal(may_delete, 80, *AS_OF, "-n", *options)
    assert LINE.findall(shown) == [f"k{n:02}" for n in range(0, 60, 6)]
    assert len(digest_in(shown)) == 9 - (not options), shown


def test_into_a_file_all_lines_go_and_digest_and_summary_to_the_terminal_too(may_delete, tmp_path):
    load_months(may_delete)
    options = (*AS_OF, "-n", "--delete-jobs")
    with (tmp_path / "plan").open("w+") as file:
        shown = on_terminal(may_delete, 80, *options, out=file)
        file.seek(0)
        written = file.read()
    assert LINE.findall(written) == [f"k{n:02}" for n in range(60)]
    assert [len(digest_in(text)) for text in (written, shown)] == [9, 9]
    assert (LINE.findall(shown), "\x1b" in written) == ([], False)
    piped = may_delete.purge(*options)
    assert (len(digest_in(piped.out)), digest_in(piped.err)) == (9, []), "a log is no terminal"


# --- In a log -------------------------------------------------------------------------------------

# A minute takes 0.6 seconds.
FAST = "clock = rp.time.monotonic; rp.time.monotonic = lambda: 100 * clock()"


def test_a_cron_log_gets_a_line_a_minute_and_is_told_of_silence_even_when_quiet(world, proxy):
    held, started = Held(proxy, "list"), time.monotonic()
    run = world.start(*AS_OF, patch=FAST)
    assert run.stderr
    lines = list[str]()
    while sum("INFO listing: 0" in line for line in lines) < 3:
        lines.append(run.stderr.readline())
        assert lines[-1], lines
    assert time.monotonic() - started > 3 * 0.6
    quiet = world.start(*AS_OF, "-qn", patch=FAST)
    assert quiet.stderr
    warning = quiet.stderr.readline()
    held.release()
    assert "WARNING listing: no answer for 60 seconds, still waiting" in warning
    assert (ended(quiet).err, ended(run).code) == ("", 0)


def test_a_c_locale_changes_what_is_printed_and_not_the_batch_manifest(world, tmp_path):
    """As S3 Batch Operations reads it."""
    keys, manifest = sorted([*PLAIN, "a,b", 'c"d']), tmp_path / "manifest.csv"
    expire(world, keys + UNSPELT)
    options = (*AS_OF, "--manifest", str(manifest))
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert world.purge(*options, "-n", **locale).out.count("expired\t") == len(keys)
    assert [*tmp_path.iterdir()] == [manifest]
    rows = csv.reader(manifest.read_text(encoding="ascii").splitlines())
    assert [(bucket, unquote(key)) for bucket, key in rows] == [(BUCKET, key) for key in keys]
    assert (world.purge(*options, **locale).code, world.box.live_keys()) == (0, sorted(UNSPELT))


@pytest.mark.parametrize("case", ["manifest /no/x/y 1", "audit-log / 2", "audit-log /dev/full 1"])
def test_a_file_that_cannot_be_written_stops_the_run_with_nothing_deleted(world, case):
    option, path, code = case.split()
    result = world.purge(*AS_OF, f"--{option}", path)
    assert (result.code, len(world.box.live_keys())) == (int(code), 48)
    assert f"Cannot write the {option.replace('-', ' ')}" in result.error
