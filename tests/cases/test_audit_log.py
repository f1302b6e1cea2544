"""What is on record: in the audit log, and of failures on standard error."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import pytest
from conftest import AS_OF, EVERYTHING, events, expire
from proxies import Answer, Request
from sandbox import BUCKET, DATABASE, TABLE
from test_seed import EXPIRED, ORPHANS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def test_it_tells_the_whole_run_after_those_that_were_refused(world, path):
    options = (*AS_OF, *EVERYTHING, "--audit-log", str(path), "--json")
    assert world.purge(*options, "--max-objects", "3").code == 3
    refused = events(path)
    assert [event["event"] for event in refused] == ["start", "plan", "end"]
    assert refused[-1]["exit_code"] == 3
    summary = world.purge(*options).summary
    start, plan, *keyed, end = events(path)[3:]
    assert {event["run_id"] for event in events(path)[3:]} == {summary["run_id"]}
    assert (start["event"], plan["event"], end["event"]) == ("start", "plan", "end")
    assert (start["mode"], start["bucket"], start["prefix"]) == ("purge", BUCKET, "")
    assert (start["table"], start["version"]) == (f"{DATABASE}.{TABLE}", summary["version"])
    assert start["options"]["orphans"] is True
    assert plan["cutoff"] == summary["cutoff"]
    assert plan["planned"] == {"expired": 17, "orphan": 3, "bytes": 523, "jobs": 0}
    for name in ("planned", "deleted", "exit_code", "failed"):
        assert end[name] == summary[name]
    assert [event["event"] for event in keyed] == ["delete"] * 20 + ["deleted"] * 20
    assert {event["key"] for event in keyed} == {*EXPIRED, *ORPHANS}
    orphan = next(event for event in keyed if event["key"] == "test_1.txt")
    assert (orphan["reason"], orphan["size"]) == ("orphan", 60)
    assert datetime.fromisoformat(orphan["last_modified"]).tzinfo is not None
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_start_is_on_record_before_the_login(world, path):
    assert world.purge(*AS_OF, "--audit-log", str(path), "--db-user", "nobody").code == 1
    assert [event["event"] for event in events(path)] == ["start", "end"]
    assert events(path)[-1]["exit_code"] == 1


def test_each_intent_is_on_disk_before_its_request(world, proxy, path):
    seen: list[bool] = []

    def before(request: Request) -> None:
        if request.operation == "delete":
            asked = set(re.findall("<Key>(.*?)</Key>", request.body.decode()))
            seen.append(asked <= {event["key"] for event in events(path, "delete")})

    proxy.before = before
    expire(world, 250)
    options = (*AS_OF, "--audit-log", str(path), "--workers", "1")
    assert world.purge(*options, patch="rp.BATCH = 100").code == 0
    assert seen == [True] * 3


def test_the_same_cause_on_many_keys_is_one_line_with_a_count(world, proxy, path):
    refused = rb"<Error><Key>\1</Key><Code>Nope</Code><Message>not\n today</Message></Error>"

    def after(request: Request, answer: Answer) -> Answer:
        answer.body = re.sub(rb"<Deleted><Key>(.*?)</Key>.*?</Deleted>", refused, answer.body)
        return answer

    proxy.after = after
    result = world.purge(*AS_OF, "-q", "--json", "--audit-log", str(path))
    assert (result.code, result.summary["failed"]) == (4, 17)
    keys = ", ".join(EXPIRED[:3])
    (line,) = result.err.splitlines()
    assert line.endswith(f" ERROR 17 keys failed: Nope: not today ({keys}, ...)")
    failed = [(event["key"], event["code"]) for event in events(path, "failed")]
    assert failed == [(key, "Nope") for key in EXPIRED]


def test_one_that_breaks_in_mid_run_stops_it_and_the_summary_still_adds_up(world, path):
    expire(world, 600)
    patch = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (100_000, 100_000)); rp.BATCH = 100"
    options = (*AS_OF, "--json", "--audit-log", str(path), "--workers", "1")
    result = world.purge(*options, patch=patch)
    summary, gone = result.summary, 600 - len(world.box.live_keys())
    assert result.code == 1
    assert "Cannot write the audit log: File too large" in summary["error"]
    assert 100 <= gone < 600
    assert (summary["deleted"]["expired"], summary["not_attempted"]) == (gone, 600 - gone)
    intents = re.findall('"event": "delete",.*"key": "(.*?)"', path.read_text())
    assert gone <= len(intents)
