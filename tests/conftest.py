"""Fixtures: one sandbox for the whole session, and the purge as a real process in it.

`mysql_box` is a sandbox with a real MySQL. A module whose own `box` returns it runs all that is
built on `box` there (see test_mysql.py).
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from threading import Event
from typing import Any

import pytest
from proxies import Request, S3Proxy
from sandbox import BUCKET, DATABASE, USER, Sandbox, mysql_sandbox, sandbox, seed

# A parent that ignores them (nohup, a background job) would pass that on to every run.
for each in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(each) is signal.SIG_IGN:
        signal.signal(each, signal.SIG_DFL)

SCRIPT = Path(__file__).resolve().parent.parent / "retention_purge.py"
# The day of the original system's last run.
AS_OF = ("--as-of", "2019-06-03T00:00:00Z")
EVERYTHING = ("--orphans", "--orphan-grace-days", "0")
OLD = "2019-01-01 00:00:00"
ERROR = re.compile(r"^(?:\S+Z )?Error: (.*?)(?: \(run [0-9a-f-]{36}\))?$", re.MULTILINE)


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
        """The one line that tells what went wrong; in a log it has a time and the run's id."""
        assert "Traceback" not in self.err
        (message,) = ERROR.findall(self.err)
        assert isinstance(message, str)
        return message


class World:
    """The sandbox, and the purge in it."""

    def __init__(self, box: Sandbox) -> None:
        self.box = box
        # Laid over the sandbox's environment. The tests' tables and buckets are small: the guard on
        # percentages has tests of its own.
        self.settings: dict[str, str] = {"RETENTION_PURGE_MAX_PERCENT": "100"}
        self.processes: list[subprocess.Popen[str]] = []

    def start(
        self,
        *arguments: str,
        stdout: Any = PIPE,
        stderr: Any = PIPE,
        patch: str = "",
        **settings: str | None,
    ) -> subprocess.Popen[str]:
        """Start the script; `settings` change its environment, None removes a variable. `patch` is
        Python that changes the script, `rp`, before it runs."""
        environment = self.box.environment | self.settings
        for name, value in settings.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        command = [str(SCRIPT)]
        if patch:
            path = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})"
            command = ["-c", f"{path}\nimport retention_purge as rp\n{patch}\nrp.main()"]
        process = subprocess.Popen(
            [sys.executable, *command, *arguments],
            env=environment,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )
        self.processes.append(process)
        return process

    def purge(self, *arguments: str, patch: str = "", **settings: str | None) -> Result:
        return ended(self.start(*arguments, patch=patch, **settings))


def ended(process: subprocess.Popen[str], seconds: float = 120) -> Result:
    """Wait for a run."""
    out, err = process.communicate(timeout=seconds)
    return Result(process.returncode, out, err)


def sql(box: Sandbox, *statements: str) -> Any:
    """Run statements as the server's root; the rows of the last one."""
    with box.database.admin(database=DATABASE) as connection:
        cursor = connection.cursor()
        for statement in statements:
            cursor.execute(statement)
        return cursor.fetchall()


def expire(world: World, count: int) -> list[str]:
    """Make the world hold `count` expired jobs, each with its object."""
    keys = [f"k{n:06}" for n in range(count)]
    world.box.load([(key, OLD, "TRIAL", key) for key in keys], [(key, 1) for key in keys])
    return keys


def version(world: World, status: str = "Enabled") -> None:
    """Turn versioning on; what lies in the bucket is there again, as versions."""
    world.box.s3().put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": status})
    for key in world.box.live_keys():
        world.box.put(key)


def state(box: Sandbox) -> tuple[list[str], list[str]]:
    return box.live_keys(), box.job_ids()


def events(path: Path, *kinds: str) -> list[dict[str, Any]]:
    """The events in an audit log, or those of some kinds."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [event for event in found if not kinds or event["event"] in kinds]


class Held:
    """Keeps S3 from answering the first request of an operation, until it is released."""

    def __init__(self, proxy: S3Proxy, operation: str) -> None:
        self._operation, self._entered, self._release = operation, Event(), Event()
        proxy.before = self._hold
        self.release = self._release.set

    def _hold(self, request: Request) -> None:
        if request.operation == self._operation:
            self._entered.set()
            self._release.wait(60)

    def wait(self) -> None:
        """Until the request is there."""
        assert self._entered.wait(60)


@pytest.fixture(scope="session")
def box() -> Iterator[Sandbox]:
    with sandbox() as running:
        yield running


@pytest.fixture(scope="session")
def mysql_box() -> Iterator[Sandbox]:
    with ExitStack() as stack:
        try:
            running = stack.enter_context(mysql_sandbox())
        except LookupError as reason:
            pytest.skip(str(reason))
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


@pytest.fixture
def may_delete(world: World) -> Iterator[World]:
    """The world, whose user may delete job rows."""
    sql(world.box, f"GRANT DELETE ON {DATABASE}.* TO {USER}@'%'")
    yield world
    sql(world.box, f"REVOKE DELETE ON {DATABASE}.* FROM {USER}@'%'")
