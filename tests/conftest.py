"""Fixtures: one sandbox for the whole session, and the purge as a real process in it. A module
whose own `box` returns `mysql_box` runs all that is built on `box` there (see test_mysql.py)."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from proxies import Request, S3Proxy
from sandbox import BUCKET, DATABASE, USER, Sandbox, mysql_sandbox, mysqld, sandbox, seed
from script import SCRIPT, Result, World, ended  # noqa: F401

AS_OF = ("--as-of", "2019-06-03T00:00:00Z")  # the original system's last run
EVERYTHING = ("--orphans", "--orphan-grace-days", "0")
OLD = "2019-01-01 00:00:00"
sql = Sandbox.sql
# By default an example that takes 0.2 seconds fails, and so do examples that are made slowly.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Which servers the tests ran on."""
    for command in (lambda: ["mariadbd"], mysqld):
        try:
            told = subprocess.check_output([*command(), "--version"], text=True)
        except LookupError as reason:
            told = str(reason)
        terminalreporter.write_line(told.strip())


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


def until(box: Sandbox, statement: str) -> None:
    """Wait for the statement to find a row.

    Do not ask more often: InnoDB keeps what innodb_trx shows in a cache, and reads it anew only if
    nobody has asked for 0.1 seconds. Whoever asks all the time sees the same old rows for ever.
    """
    for _ in range(400):
        if box.sql(statement):
            return
        time.sleep(0.3)
    raise AssertionError(f"nothing in two minutes: {statement}")


@contextmanager
def setting(box: Sandbox, name: str, value: Any) -> Iterator[None]:
    """The server has this setting for a while."""
    box.sql(f"SET GLOBAL {name} = {value!r}")
    try:
        yield
    finally:
        box.sql(f"SET GLOBAL {name} = DEFAULT")


def until_gone(box: Sandbox) -> None:
    """Wait until the server has ended all connections of the purge. It does so a little after the
    process has ended, and after the statement that it works on."""
    ours = f"SELECT COUNT(*) AS n FROM information_schema.processlist WHERE user = '{USER}'"
    until(box, f"{ours} HAVING n = 0")


class Held:
    """Keeps S3 from answering the first request of an operation, until it is released."""

    def __init__(self, proxy: S3Proxy, operation: str) -> None:
        self.operation, self.entered, self.released = operation, Event(), Event()
        self.release = self.released.set
        proxy.before = self.hold

    def hold(self, request: Request) -> None:
        if request.operation == self.operation:
            self.entered.set()
            self.released.wait(60)

    def wait(self) -> None:
        """Until the request is there."""
        assert self.entered.wait(60)


@pytest.fixture(scope="session")
def box() -> Iterator[Sandbox]:
    with sandbox() as running:
        yield running


@pytest.fixture(scope="session")
def mysql_box() -> Iterator[Sandbox]:
    try:
        with mysql_sandbox() as running:
            yield running
    except LookupError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def world(box: Sandbox) -> Iterator[World]:
    """The sandbox with the original system's jobs and objects."""
    box.load(*seed())
    world = World(box)
    yield world
    world.stop()


@pytest.fixture
def proxy(world: World) -> Iterator[S3Proxy]:
    """A proxy that the world's purge reaches S3 through."""
    with S3Proxy(world.box.s3_url) as running:
        world.settings["AWS_ENDPOINT_URL_S3"] = running.url
        yield running


@pytest.fixture
def may_delete(world: World) -> Iterator[World]:
    """The world, whose user may delete job rows."""
    world.box.sql(f"GRANT DELETE ON {DATABASE}.* TO {USER}@'%'")
    yield world
    world.box.sql(f"REVOKE DELETE ON {DATABASE}.* FROM {USER}@'%'")
