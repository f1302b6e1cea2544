"""Two runs at the same time: one works, the other exits with 75."""

from __future__ import annotations

import re

from conftest import AS_OF, Held, ended, expire, sql, until
from sandbox import DATABASE, PASSWORD, TABLE, USER, Sandbox, mariadb, seed
from script import World
from test_job_rows import during
from test_seed import EXPIRED

CONNECTIONS = f"SELECT id, host FROM information_schema.processlist WHERE user = '{USER}'"


def test_of_two_runs_started_together_one_purges_and_one_exits_75(world, proxy):
    held = Held(proxy, "list")
    first = world.start(*AS_OF, "--json")
    held.wait()
    second = world.purge(*AS_OF)
    assert second.code == 75
    # The server ends the second run's connection a little after that run has ended.
    until(world.box, f"SELECT COUNT(*) AS n FROM ({CONNECTIONS}) AS c HAVING n = 1")
    ((number, host),) = sql(world.box, CONNECTIONS)
    assert re.search(rf"connection {number} of {host} \(\w+ for \d+ s\)", second.error)
    proxy.before = lambda request: None
    assert world.purge(*AS_OF, "-n").code == 0, "a dry run needs no lock"
    world.box.put(f"in/{EXPIRED[0]}")
    assert world.purge(*AS_OF, "--prefix", "in/").code == 0, "another prefix, another lock"
    held.release()
    assert ended(first).summary["deleted"]["expired"] == 17
    assert world.purge(*AS_OF).code == 0, "the lock is gone with its run"


def test_two_spellings_of_a_table_have_one_lock_where_the_server_folds_them(world, proxy):
    box = world.box
    options = (*box.certificates.server_options, "--lower-case-table-names=1")
    with mariadb(box.home / "folds", *options) as server:
        folds = Sandbox(box.home, server, box.certificates, box.s3_url, PASSWORD)
        server.admin().cursor().execute(f"CREATE DATABASE {DATABASE}")
        user = f"{USER}@'%' IDENTIFIED BY '{PASSWORD}'"
        folds.sql(f"CREATE USER {user}", f"GRANT SELECT ON {DATABASE}.* TO {USER}@'%'")
        folds.load(*seed())
        held, other = Held(proxy, "list"), World(folds, settings=world.settings)
        first = other.start(*AS_OF, "--json")
        held.wait()
        for table in TABLE.upper(), f"{DATABASE.upper()}.{TABLE.title()}":
            second = other.purge(*AS_OF, "--db-table", table)
            assert (second.code, "holds the lock" in second.error) == (75, True)
        held.release()
        assert ended(first).summary["deleted"]["expired"] == 17


def test_a_lost_lock_stops_the_run(world, proxy):
    keys, box = expire(world, 500), world.box
    during(proxy, "delete", lambda: [sql(box, f"KILL {n}") for n, _ in sql(box, CONNECTIONS)], 2)
    result = world.purge(*AS_OF, "--json", "--workers", "1", patch="rp.BATCH = 100")
    assert "connection is lost" in result.error
    assert (result.code, result.summary["not_attempted"]) == (1, 300)
    assert world.box.live_keys() == keys[200:]
