"""What is on record: in the audit log, and of failures on standard error."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime

from conftest import AS_OF, EVERYTHING, Held, ended, events, expire
from sandbox import BUCKET, DATABASE, TABLE
from test_seed import EXPIRED, ORPHANS


def test_it_tells_the_whole_run_after_those_that_were_refused(world, tmp_path):
    path = tmp_path / "log"
    options = (*AS_OF, *EVERYTHING, "--audit-log", str(path), "--json")
    assert world.purge(*options, "--db-user", "nobody").code == 1  # on record before the login
    assert world.purge(*options, "--max-objects", "3").code == 3
    assert [event["event"] for event in events(path)] == ["start", "end", "start", "plan", "end"]
    assert [event["exit_code"] for event in events(path, "end")] == [1, 3]
    summary = world.purge(*options).summary
    start, plan, *keyed, end = events(path)[5:]
    assert {event["run_id"] for event in events(path)[5:]} == {summary["run_id"]}
    told = {"event": "start", "mode": "purge", "bucket": BUCKET, "prefix": ""}
    told |= {"table": f"{DATABASE}.{TABLE}", "version": summary["version"]}
    assert start | told == start
    assert start["options"]["orphans"] is True
    assert (plan["event"], plan["cutoff"]) == ("plan", summary["cutoff"])
    assert plan["planned"] == {"expired": 17, "orphan": 3, "bytes": 523, "jobs": 0}
    assert end | summary | {"event": "end", "seconds": end["seconds"]} == end
    assert [event["event"] for event in keyed] == ["delete"] * 20 + ["deleted"] * 20
    assert {event["key"] for event in keyed} == {*EXPIRED, *ORPHANS}
    orphan = next(event for event in keyed if event["key"] == "test_1.txt")
    assert (orphan["reason"], orphan["size"]) == ("orphan", 60)
    assert datetime.fromisoformat(orphan["last_modified"]).tzinfo is not None
    assert path.stat().st_mode & 0o777 == 0o600


def test_each_intent_is_on_disk_before_its_request(world, proxy, tmp_path):
    seen, path = [], tmp_path / "log"

    def before(request):
        if request.operation == "delete":
            asked = set(re.findall("<Key>(.*?)</Key>", request.body.decode()))
            seen.append(asked <= {event["key"] for event in events(path, "delete")})

    proxy.before = before
    assert world.purge(*AS_OF, "--audit-log", str(path), patch="rp.BATCH = 6").code == 0
    assert seen == [True] * 3


def test_the_same_cause_on_many_keys_is_one_line_with_a_count(world, proxy, tmp_path):
    deleted, path = rb"<Deleted><Key>(.*?)</Key>.*?</Deleted>", tmp_path / "log"
    refused = rb"<Error><Key>\1</Key><Code>Nope</Code><Message>not\n today</Message></Error>"
    proxy.after = lambda _, answer: replace(answer, body=re.sub(deleted, refused, answer.body))
    result = world.purge(*AS_OF, "-q", "--json", "--audit-log", str(path))
    assert (result.code, result.summary["failed"]) == (4, 17)
    line = f" ERROR 17 keys failed: Nope: not today ({', '.join(EXPIRED[:3])}, ...)"
    assert [told[20:] for told in result.err.splitlines()] == [line]
    failed = [(event["key"], event["code"]) for event in events(path, "failed")]
    assert failed == [(key, "Nope") for key in EXPIRED]


def test_one_that_breaks_in_mid_run_stops_it_and_the_summary_still_adds_up(world, tmp_path):
    expire(world, 600)
    path = tmp_path / "log"
    patch = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (100_000, 100_000)); rp.BATCH = 100"
    options = (*AS_OF, "--json", "--audit-log", str(path), "--workers", "1")
    result = world.purge(*options, patch=patch)
    summary, gone = result.summary, 600 - len(world.box.live_keys())
    assert (result.code, 100 <= gone < 600) == (1, True)
    assert f"Cannot write the audit log {path}: File too large" in summary["error"]
    assert (summary["deleted"]["expired"], summary["not_attempted"]) == (gone, 600 - gone)
    intents = re.findall('"event": "delete",.*"key": "(.*?)"', path.read_text())
    assert gone <= len(intents)


def test_a_second_run_or_undo_with_the_same_log_exits_75_and_writes_nothing(world, proxy, tmp_path):
    """Another prefix is another lock in the database."""
    path, held = tmp_path / "log", Held(proxy, "list")
    first = world.start(*AS_OF, "--json", "--audit-log", str(path))
    held.wait()
    proxy.before = lambda request: None
    world.box.put(f"x/{EXPIRED[0]}")
    before = path.read_bytes()
    own = ("--audit-log", str(path), "--prefix", "x/")
    for options in (*AS_OF, *own), ("--undo", str(path)), ("--undo", str(path), "--dry-run"):
        second = world.purge(*options)
        assert (second.code, f"uses the audit log {path}" in second.error) == (75, True)
    assert world.purge(*AS_OF, *own, "--dry-run").code == 0, "it writes nothing"
    assert path.read_bytes() == before
    held.release()
    assert ended(first).summary["deleted"]["expired"] == 17
    assert world.purge(*AS_OF, *own).code == 0, "the lock is gone with its run"


def test_one_that_others_can_write_is_warned_about(world, tmp_path):
    path = tmp_path / "log"
    for mode, warned in (0o640, 0), (0o660, 1), (0o602, 1):
        path.touch()
        path.chmod(mode)
        told = world.purge(*AS_OF, "-q", "--audit-log", str(path)).err
        assert told.count(f"WARNING {path} can be written by others") == warned
