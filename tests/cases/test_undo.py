"""Versioned buckets: what a purge leaves there, and how --undo brings back what a run hid."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import AS_OF, EVERYTHING, World, ended, events, expire, version
from proxies import DROP, Answer, Request
from sandbox import BUCKET
from test_seed import EXPIRED, ORPHANS

import retention_purge as rp

DENIED = Answer(403, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>")


@pytest.fixture
def versioned(world: World) -> World:
    version(world)
    return world


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def purged(world: World, path: Path, *options: str) -> str:
    """Purge with this audit log; the run's id."""
    result = world.purge(*AS_OF, *options, "--audit-log", str(path), "--json")
    assert result.code == 0, result.err
    return str(result.summary["run_id"])


def versions_of(world: World, key: str = "", markers: bool = False) -> list[str]:
    """Version ids of data, or of delete markers."""
    answer = world.box.s3().list_object_versions(Bucket=BUCKET, Prefix=key)
    found = answer.get("DeleteMarkers" if markers else "Versions", [])
    return [item["VersionId"] for item in found]


def markers(world: World) -> int:
    return len(versions_of(world, markers=True))


# --- It brings back all that a run hid ------------------------------------------------------------


def test_it_brings_back_exactly_what_the_log_records_and_says_what_comes_next(versioned, path):
    world, options = versioned, ("--undo", str(path), "--audit-log", str(path))
    before = world.box.live_keys()
    world.box.s3().delete_object(Bucket=BUCKET, Key="incoming_000001")  # somebody else's
    purged(world, path, *EVERYTHING)
    assert world.purge(*AS_OF, "--json").summary["missing"] == 17
    assert markers(world) == 21, "a second purge stacks no markers"
    log = path.read_bytes()

    dry = world.purge(*options, "-n")
    assert (dry.code, len(dry.listed), "restored" in dry.out) == (0, 20, False)
    assert (markers(world), path.read_bytes()) == (21, log)

    undone = world.purge(*options)
    assert undone.code == 0
    assert "restored                17 expired, 3 orphan, 420 bytes" in undone.out
    assert "deleted" not in undone.out.replace("deletes", "")
    assert "The next purge deletes these keys again" in undone.out
    assert world.box.live_keys() == [key for key in before if key != "incoming_000001"]
    assert markers(world) == 1

    start, *keyed, end = events(path)[len(log.splitlines()) :]
    assert (start["mode"], end["mode"], end["recoverable"]) == ("undo", "undo", False)
    assert [event["event"] for event in keyed] == ["restore"] * 20 + ["restored"] * 20
    assert {event["key"] for event in keyed} == {*EXPIRED, *ORPHANS}
    assert all(event["version_id"] for event in keyed)

    again = world.purge(*options, "--json").summary
    assert (again["restored"]["expired"], again["missing"], again["retained"]) == (0, 20, 0)
    assert again["exit_code"] == 0


def test_a_lost_answer_stacks_no_marker_and_is_undone(versioned, proxy, path):
    world = versioned
    before, lost = world.box.live_keys(), [DROP]

    def after(request: Request, answer: Answer) -> Answer:
        return lost.pop() if request.operation == "delete" and lost else answer

    proxy.after = after
    summary = world.purge(*AS_OF, "--audit-log", str(path), "--json").summary
    assert (summary["deleted"]["expired"], summary["failed"]) == (17, 0)
    assert markers(world) == 17
    assert world.purge("--undo", str(path)).code == 0
    assert world.box.live_keys() == before


@pytest.mark.parametrize(
    ("signum", "code", "left"),
    [(signal.SIGKILL, -signal.SIGKILL, 60), (signal.SIGHUP, 129, 60), (None, 1, 0)],
    ids=["kill -9", "hang-up", "no answers"],
)
def test_after_a_crash_it_brings_back_all(world, proxy, path, signum, code, left):
    """A signal comes when S3 has carried out a request, but not answered; or no request has an
    answer, and no look-up tells what became of it."""
    keys = expire(world, 90)
    version(world)
    carried_out, release = threading.Event(), threading.Event()

    def before(request: Request) -> Answer | None:
        return DENIED if signum is None and "versions" in request.query else None

    def after(request: Request, answer: Answer) -> Answer:
        if request.operation == "delete":
            carried_out.set()
            release.wait(60)
        return DROP if request.operation == "delete" and signum is None else answer

    proxy.before, proxy.after = before, after
    options = (*AS_OF, "--workers", "1", "--audit-log", str(path))
    run = world.start(*options, patch="rp.BATCH = 30")
    assert carried_out.wait(60)
    if signum is not None:
        run.send_signal(signum)
    time.sleep(0.3)
    release.set()
    assert ended(run).code == code
    assert len(world.box.live_keys()) == left
    proxy.before, proxy.after = lambda request: None, lambda request, answer: answer
    undone = world.purge("--undo", str(path), "--json").summary
    assert (world.box.live_keys(), markers(world)) == (keys, 0)
    intended = len(events(path, "delete"))
    assert undone["restored"]["expired"] + undone["missing"] == intended
    assert (undone["retained"], undone["failed"]) == (0, 0)


@pytest.mark.parametrize("cut", [1, 40])
def test_it_works_from_a_log_whose_last_line_is_cut(versioned, path, cut):
    world = versioned
    run_id = purged(world, path)
    text = path.read_text()
    path.write_text(text[: text.rindex('{"event": "end"') - cut])
    # The next run appends to such a log, and it is still good for an undo.
    assert world.purge(*AS_OF, "--audit-log", str(path)).code == 0
    result = world.purge("--undo", str(path), "--json", "--run-id", run_id)
    assert result.summary["restored"]["expired"] == 17
    assert ("is cut" in result.err) == (cut > 1)
    assert len(world.box.live_keys()) == 48


# --- What it leaves alone -------------------------------------------------------------------------


KEY = EXPIRED[0]


def rewritten(path: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Change the events of KEY in a log, or leave them out."""
    found = [change(event) if event.get("key") == KEY else event for event in events(path)]
    path.write_text("".join(json.dumps(event) + "\n" for event in found if event))


def set_by_somebody_else(world: World, path: Path) -> None:
    s3, (marker,) = world.box.s3(), versions_of(world, KEY, markers=True)
    s3.delete_object(Bucket=BUCKET, Key=KEY, VersionId=marker)
    s3.delete_object(Bucket=BUCKET, Key=KEY)


def older_than_an_intent_without_an_answer(world: World, path: Path) -> None:
    later = (datetime.now(UTC) + timedelta(seconds=30)).isoformat()
    rewritten(path, lambda event: event | {"time": later} if event["event"] == "delete" else None)


def without_a_version_below(world: World, path: Path) -> None:
    for name in versions_of(world, KEY):
        world.box.s3().delete_object(Bucket=BUCKET, Key=KEY, VersionId=name)


def named_in_the_log_but_no_marker(world: World, path: Path) -> None:
    data = versions_of(world, KEY)[0]
    rewritten(path, lambda event: event | {"version_id": data})


@pytest.mark.parametrize(
    "case",
    [
        set_by_somebody_else,
        older_than_an_intent_without_an_answer,
        without_a_version_below,
        named_in_the_log_but_no_marker,
    ],
)
def test_a_version_that_the_run_did_not_surely_set_stays_and_is_counted(versioned, path, case):
    purged(versioned, path)
    case(versioned, path)
    before = [versions_of(versioned, KEY, markers) for markers in (False, True)]
    result = versioned.purge("--undo", str(path), "--json")
    assert (result.code, result.summary["retained"]) == (0, 1)
    assert result.summary["restored"]["expired"] == 16
    assert "1 keys retained: " in result.err
    assert f"({KEY})" in result.err
    assert [versions_of(versioned, KEY, markers) for markers in (False, True)] == before


# --- Which run, which log -------------------------------------------------------------------------


def test_several_runs_in_one_log_are_refused_with_their_list_and_run_id_picks_one(versioned, path):
    world = versioned
    first, second = purged(world, path), purged(world, path, *EVERYTHING)
    purged(world, path, *EVERYTHING)  # it deleted nothing, and is no choice
    result = world.purge("--undo", str(path))
    assert result.code == 3
    for words in ("2 runs", "--run-id", f"{first} 17", f"{second} 3", events(path)[0]["time"][:10]):
        assert words in result.error
    assert markers(world) == 20
    assert world.purge("--undo", str(path), "--run-id", "another").code == 3
    undone = world.purge("--undo", str(path), "--run-id", first, "--json").summary
    assert undone["restored"] == {"expired": 17, "orphan": 0, "bytes": 357}
    assert markers(world) == 3


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (None, 2, "Cannot read the audit log"),
        (b"", 3, "audit log"),
        (b"not json\n", 3, "audit log"),
        (b'{"some": "json"}\n', 3, "not of an audit log"),
        (b"[1, 2]\n", 3, "not of an audit log"),
    ],
    ids=["no file", "empty", "no json", "other json", "a list"],
)
def test_a_file_that_is_not_its_log_is_refused(versioned, path, content, code, says):
    if content is not None:
        path.write_bytes(content)
    result = versioned.purge("--undo", str(path))
    assert result.code == code
    assert says in result.error


def test_the_log_of_another_bucket_is_refused_and_no_database_is_needed(versioned, path):
    purged(versioned, path)
    log = path.read_text()
    path.write_text(log.replace(f'"bucket": "{BUCKET}"', '"bucket": "another"'))
    names = ("HOST", "USER", "NAME", "PORT")
    settings = {f"RETENTION_PURGE_DB_{name}": None for name in names}
    result = versioned.purge("--undo", str(path), **settings)
    assert result.code == 3
    assert "bucket another" in result.error
    assert markers(versioned) == 17
    path.write_text(log)
    assert versioned.purge("--undo", str(path), **settings).code == 0
    assert markers(versioned) == 0


def test_an_unversioned_bucket_is_refused(world, path):
    result = world.purge("--undo", str(path))
    assert (result.code, "not versioned" in result.error) == (3, True)


def test_a_marker_set_while_versioning_was_suspended_is_left_alone():
    """Its version id is that of an object written since, which would go for ever."""
    now, report = datetime.now(UTC), rp.Report(mode="undo")
    found = [rp.Version("null", now, True, True), rp.Version("v1", now, False, False)]
    bucket: Any = SimpleNamespace(each=map, versions=lambda key: found)
    known = [(rp.Candidate("k", "expired"), now, "null")]
    assert list(rp.plan_undo(known, bucket, rp.Totals(), rp.Ledger(report))) == []
    assert report.retained == 1


def test_a_refused_undo_leaves_the_manifest_and_takes_no_log_for_one(world, path, tmp_path):
    manifest = tmp_path / "plan.csv"
    assert world.purge(*AS_OF, "--manifest", str(manifest), "--audit-log", str(path)).code == 0
    options = ("--undo", str(path), "-n", "--manifest")
    assert world.purge(*options, str(manifest)).code == 3
    assert manifest.exists()
    for other in (str(path), "m" * 300):
        assert world.purge(*options, other).code == 2
    assert path.exists()
