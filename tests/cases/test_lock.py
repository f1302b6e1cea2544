"""Two runs at the same time: one works, the other exits with 75."""

from __future__ import annotations

import json
import re

import pytest
from conftest import AS_OF, Held, ended, expire, sql
from proxies import Request
from sandbox import TABLE, USER
from test_seed import EXPIRED


def test_two_runs_started_together_one_purges_and_one_exits_75(world, proxy):
    held = Held(proxy, "list")
    first = world.start(*AS_OF, "--json")
    held.wait()
    second = world.purge(*AS_OF)
    assert second.code == 75
    holder = sql(
        world.box, f"SELECT id, host FROM information_schema.processlist WHERE user = '{USER}'"
    )
    ((number, host),) = holder
    assert re.search(rf"connection {number} of {host} \(\w+ for \d+ s\)", second.error)
    proxy.before = lambda request: None
    assert world.purge(*AS_OF, "-n").code == 0, "a dry run needs no lock"
    held.release()
    out, _ = first.communicate(timeout=60)
    assert json.loads(out)["deleted"]["expired"] == 17
    assert world.purge(*AS_OF).code == 0, "the lock is gone with its run"


def test_runs_on_another_prefix_do_not_wait_for_each_other(world, proxy):
    for key in EXPIRED:
        world.box.put(f"in/{key}")
    held = Held(proxy, "list")
    first = world.start(*AS_OF)
    held.wait()
    proxy.before = lambda request: None
    assert world.purge("--prefix", "in/", *AS_OF).code == 0
    held.release()
    assert ended(first).code == 0


@pytest.mark.parametrize("index", [True, False])
def test_a_lost_lock_stops_the_run(world, proxy, index):
    keys = expire(world, 5000)
    if index:
        sql(world.box, f"CREATE INDEX k ON {TABLE} (sourceData)")

    def before(request: Request) -> None:
        if request.operation == "delete" and proxy.count("delete") == 2:
            for (thread,) in sql(
                world.box, f"SELECT id FROM information_schema.processlist WHERE user = '{USER}'"
            ):
                sql(world.box, f"KILL {thread}")

    proxy.before = before
    result = world.purge(*AS_OF, "--json", "--workers", "1")
    assert result.code == 1
    summary = result.summary
    assert ("re-check" if index else "connection is lost") in summary["error"]
    assert (summary["deleted"]["expired"], summary["not_attempted"]) == (2000, 3000)
    assert len(world.box.live_keys()) == 3000
    assert set(world.box.live_keys()) < set(keys)
