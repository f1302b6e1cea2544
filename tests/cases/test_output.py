"""What a run shows of its progress, and the manifest that it writes."""

from __future__ import annotations

import csv
import os
import pty
import re
import subprocess
import sys
from urllib.parse import unquote

import pytest
from conftest import AS_OF, SCRIPT, expire
from sandbox import BUCKET
from test_deletes import ODD, PLAIN
from test_deletes import expire as expire_keys

import retention_purge as rp

# --- Progress -------------------------------------------------------------------------------------


def test_on_a_terminal_each_phase_has_a_progress_bar(world):
    expire(world, 3000)
    ours, theirs = pty.openpty()
    environment = world.box.environment | world.settings | {"TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *AS_OF],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:
        pass  # the terminal is gone with the process
    assert process.wait(60) == 0
    text = shown.decode()
    for phase in ("reading references", "listing", "deleting"):
        assert phase in text
    assert "3000/3000" in text
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
    assert [row[0] for row in rows] == [BUCKET] * len(keys)
    assert [unquote(row[1]) for row in rows] == sorted(keys)
    assert all(len(row) == 2 and row[1].isascii() for row in rows)
    assert os.listdir(tmp_path) == ["manifest.csv"]


def test_a_refused_plan_gets_no_manifest(world, tmp_path):
    path = tmp_path / "manifest.csv"
    assert world.purge(*AS_OF, "-n", "--manifest", str(path), "--max-objects", "1").code == 3
    assert not path.exists()


def test_a_manifest_that_cannot_be_written_stops_the_run(world):
    result = world.purge(*AS_OF, "--manifest", "/no/such/folder/manifest")
    assert result.code == 1
    assert "manifest" in result.error
    assert len(world.box.live_keys()) == 48
