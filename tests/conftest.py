"""Fixtures: one sandbox for the whole session, and the purge as a real process in it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from proxies import S3Proxy
from sandbox import Sandbox, sandbox, seed

SCRIPT = Path(__file__).resolve().parent.parent / "retention_purge.py"
# The day of the original system's last run.
AS_OF = ("--as-of", "2019-06-03T00:00:00Z")


@dataclass
class Result:
    """How a run of the script ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        """The one JSON object of `--json`."""
        (line,) = self.out.splitlines()
        summary: dict[str, Any] = json.loads(line)
        assert summary["exit_code"] == self.code
        return summary

    @property
    def listed(self) -> list[tuple[str, str]]:
        """Reason and key of each line of a dry run."""
        rows = [line.split("\t") for line in self.out.splitlines() if "\t" in line]
        return [(row[0], json.loads(row[3]) if row[3].startswith('"') else row[3]) for row in rows]

    @property
    def error(self) -> str:
        """The one line that tells what went wrong."""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


class World:
    """The sandbox, and the purge in it."""

    def __init__(self, box: Sandbox) -> None:
        self.box = box
        # Laid over the sandbox's environment. The tests' tables and buckets are small: the guard on
        # percentages has tests of its own.
        self.settings: dict[str, str] = {"RETENTION_PURGE_MAX_PERCENT": "100"}
        self.processes: list[subprocess.Popen[str]] = []

    def start(
        self, *arguments: str, stdout: Any = PIPE, stderr: Any = PIPE, **settings: str | None
    ) -> subprocess.Popen[str]:
        """Start the script; `settings` change its environment, None removes a variable."""
        environment = self.box.environment | self.settings
        for name, value in settings.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            env=environment,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )
        self.processes.append(process)
        return process

    def purge(self, *arguments: str, **settings: str | None) -> Result:
        process = self.start(*arguments, **settings)
        out, err = process.communicate(timeout=120)
        return Result(process.returncode, out, err)


@pytest.fixture(scope="session")
def box() -> Iterator[Sandbox]:
    with sandbox() as running:
        yield running


@pytest.fixture
def world(box: Sandbox) -> Iterator[World]:
    """The sandbox with the original system's jobs and objects."""
    box.load(*seed())
    world = World(box)
    yield world
    for process in world.processes:
        process.kill()
        process.wait()


@pytest.fixture
def proxy(world: World) -> Iterator[S3Proxy]:
    """A proxy that the world's purge reaches S3 through."""
    with S3Proxy(world.box.s3_url) as running:
        world.settings["AWS_ENDPOINT_URL_S3"] = running.url
        yield running
