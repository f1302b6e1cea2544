"""What is on record: in the audit log, and of failures on standard error."""

from __future__ import annotations

import re
from datetime import datetime

import pytest
from conftest import AS_OF, EVERYTHING, events, expire, sql
from proxies import Answer, Request
from sandbox import BUCKET, DATABASE, TABLE
from test_seed import EXPIRED


def test_it_tells_the_whole_run(world, tmp_path):
    path = tmp_path / "audit.jsonl"
    summary = world.purge(*AS_OF, *EVERYTHING, "--audit-log", str(path), "--json").summary
    start, plan, *keyed, end = events(path)
    assert {event["run_id"] for event in events(path)} == {summary["run_id"]}
    assert (start["event"], plan["event"], end["event"]) == ("start", "plan", "end")
    assert (start["mode"], start["bucket"], start["prefix"]) == ("purge", BUCKET, "")
    assert (start["table"], start["version"]) == (f"{DATABASE}.{TABLE}", summary["version"])
    assert start["options"]["orphans"] is True
    assert plan["cutoff"] == summary["cutoff"]
    assert plan["planned"] == {"expired": 17, "orphan": 3, "bytes": 523}
    for name in ("planned", "deleted", "exit_code", "failed"):
        assert end[name] == summary[name]
    assert [event["event"] for event in keyed] == ["delete"] * 20 + ["deleted"] * 20
    assert {event["key"] for event in keyed} == set(EXPIRED) | {"test", "test_1.txt", "test_2.txt"}
    orphan = next(event for event in keyed if event["key"] == "test_1.txt")
    assert (orphan["reason"], orphan["size"]) == ("orphan", 60)
    assert datetime.fromisoformat(orphan["last_modified"]).tzinfo is not None
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_intent_is_on_disk_before_the_request(world, proxy, tmp_path):
    path = tmp_path / "audit.jsonl"
    seen: list[bool] = []

    def before(request: Request) -> None:
        if request.operation == "delete":
            intended = {event["key"] for event in events(path, "delete")}
            asked = set(re.findall("<Key>(.*?)</Key>", request.body.decode()))
            seen.append(asked <= intended)

    proxy.before = before
    expire(world, 2500)
    assert world.purge(*AS_OF, "--audit-log", str(path), "--workers", "1").code == 0
    assert seen == [True] * 3


def test_the_start_is_on_record_before_the_login(world, tmp_path):
    path = tmp_path / "audit.jsonl"
    assert world.purge(*AS_OF, "--audit-log", str(path), "--db-user", "nobody").code == 1
    assert [event["event"] for event in events(path)] == ["start", "end"]
    assert events(path)[-1]["exit_code"] == 1


def test_the_key_itself_is_on_record_if_it_failed_or_was_retained(world, proxy, tmp_path):
    path = tmp_path / "audit.jsonl"

    def before(request: Request) -> None:
        if request.operation == "list":
            sql(world.box, f"INSERT INTO {TABLE} VALUES ('x', NULL, 'TRIAL', 'incoming_000011')")

    def after(request: Request, answer: Answer) -> Answer:
        error = b"<Error><Key>incoming_000012</Key><Code>AccessDenied</Code></Error>"
        answer.body = re.sub(
            rb"<Deleted><Key>incoming_000012</Key>.*?</Deleted>", error, answer.body
        )
        return answer

    proxy.before, proxy.after = before, after
    assert world.purge(*AS_OF, "--audit-log", str(path)).code == 4
    (retained,), (failed,) = events(path, "retained"), events(path, "failed")
    assert (retained["key"], failed["key"]) == ("incoming_000011", "incoming_000012")
    assert failed["code"] == "AccessDenied"


def test_the_same_cause_on_many_keys_is_one_line_with_a_count(world, proxy, tmp_path):
    path = tmp_path / "audit.jsonl"

    def after(request: Request, answer: Answer) -> Answer:
        if request.operation == "delete":
            refused = (
                rb"<Error><Key>\1</Key><Code>Nope</Code><Message>not\n today</Message></Error>"
            )
            answer.body = re.sub(rb"<Deleted><Key>(.*?)</Key>.*?</Deleted>", refused, answer.body)
        return answer

    proxy.after = after
    result = world.purge(*AS_OF, "-q", "--json", "--audit-log", str(path))
    assert (result.code, result.summary["failed"]) == (4, 17)
    told = (
        "17 keys failed: Nope: not today (incoming_000011, incoming_000012, incoming_000013, ...)"
    )
    assert [line.split(" ERROR ")[-1] for line in result.err.splitlines()] == [told]
    assert [event["key"] for event in events(path, "failed")] == EXPIRED


def test_a_dry_run_writes_none(world, tmp_path):
    path = tmp_path / "audit.jsonl"
    assert world.purge(*AS_OF, "-n", "--audit-log", str(path)).code == 0
    assert not path.exists()


def test_runs_append_and_a_refused_run_is_on_record(world, tmp_path):
    path = tmp_path / "audit.jsonl"
    for limit in ("3", "100"):
        world.purge(*AS_OF, "--audit-log", str(path), "--max-objects", limit)
    done = ["start", "plan", *["delete"] * 17, *["deleted"] * 17, "end"]
    assert [event["event"] for event in events(path)] == ["start", "plan", "end", *done]
    assert [event["exit_code"] for event in events(path, "end")] == [3, 0]


def test_its_last_line_agrees_with_the_exit_code_though_the_output_is_lost(world, tmp_path):
    path = tmp_path / "audit.jsonl"
    with open("/dev/full", "w") as full:
        run = world.start(*AS_OF, "--json", "--audit-log", str(path), stdout=full)
        run.communicate(timeout=60)
    end = events(path)[-1]
    assert (run.returncode, end["event"], end["exit_code"]) == (1, "end", 1)
    assert "Cannot print the result" in end["error"]


@pytest.mark.parametrize("path", ["/no/such/folder/log", "/", "/dev/full"])
def test_one_that_cannot_be_written_stops_the_run_at_once(world, path):
    result = world.purge(*AS_OF, "--audit-log", path)
    assert result.code == (1 if path == "/dev/full" else 2)
    assert "audit log" in result.error
    assert len(world.box.live_keys()) == 48


def test_one_that_breaks_in_mid_run_stops_it_and_the_summary_still_adds_up(world, tmp_path):
    expire(world, 3000)
    patch = (
        "write, rp.ROUND_KEYS = rp.Ledger.intend, 1000\n"
        "def intend(self, items):\n"
        "    if self.report.deleted.objects: self._broken = OSError(28, 'no space')\n"
        "    write(self, items)\n"
        "rp.Ledger.intend = intend"
    )
    path = tmp_path / "audit.jsonl"
    result = world.purge(*AS_OF, "--json", "--audit-log", str(path), "--workers", "1", patch=patch)
    assert result.code == 1
    assert "Cannot write the audit log: no space" in result.summary["error"]
    assert result.summary["deleted"]["expired"] == 3000 - len(world.box.live_keys())
    assert result.summary["deleted"]["expired"] + result.summary["not_attempted"] == 3000
    assert len(events(path, "delete")) == result.summary["deleted"]["expired"]
