"""Versioned buckets: what a purge leaves there, and how --undo brings back what a run hid."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from conftest import AS_OF, EVERYTHING, Held, World, events, expire, version
from proxies import DROP, Answer
from sandbox import BUCKET, seed
from test_seed import EXPIRED, ORPHANS

KEY = EXPIRED[0]


@pytest.fixture
def world(world):
    version(world)
    return world


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


def purged(world: World, path, *options: str) -> str:
    """Purge with this audit log; the run's id."""
    result = world.purge(*AS_OF, *options, "--audit-log", str(path), "--json")
    assert result.code == 0, result.err
    return str(result.summary["run_id"])


def versions(world: World, key: str = "", kind: str = "Versions") -> list[str]:
    """The ids of versions, or of DeleteMarkers."""
    found = world.box.s3().list_object_versions(Bucket=BUCKET, Prefix=key)
    return [item["VersionId"] for item in found.get(kind, [])]


def markers(world: World) -> int:
    return len(versions(world, kind="DeleteMarkers"))


# --- It brings back all that a run hid ------------------------------------------------------------


def test_it_brings_back_exactly_what_the_log_records_and_says_what_comes_next(world, path):
    options, before = ("--undo", str(path), "--audit-log", str(path)), world.box.live_keys()
    world.box.s3().delete_object(Bucket=BUCKET, Key="incoming_000001")  # somebody else's
    purged(world, path, *EVERYTHING)
    assert world.purge(*AS_OF, "--json").summary["missing"] == 17
    assert markers(world) == 21, "a second purge stacks no markers"
    log = path.read_bytes()

    dry = world.purge(*options, "-n")
    assert (dry.code, len(dry.listed), "restored" in dry.out) == (0, 20, False)
    assert (markers(world), path.read_bytes()) == (21, log)

    undone = world.purge(*options)
    assert (undone.code, "deleted" in undone.out.replace("deletes", "")) == (0, False)
    assert "restored                17 expired, 3 orphan, 420 bytes" in undone.out
    assert "The next purge deletes these keys again" in undone.out
    assert world.box.live_keys() == [key for key in before if key != "incoming_000001"]
    assert markers(world) == 1

    start, *keyed, end = events(path)[len(log.splitlines()) :]
    assert (start["mode"], end["mode"], end["recoverable"]) == ("undo", "undo", False)
    assert [event["event"] for event in keyed] == ["restore"] * 20 + ["restored"] * 20
    assert {event["key"] for event in keyed} == {*EXPIRED, *ORPHANS}
    assert all(event["version_id"] for event in keyed)

    again = world.purge(*options, "--json").summary
    told = again["exit_code"], again["restored"]["expired"], again["missing"], again["retained"]
    assert told == (0, 0, 20, 0)


@pytest.mark.parametrize("code", [0, 1], ids=["look-up", "no look-up"])
def test_a_lost_answer_stacks_no_marker_and_is_undone(world, proxy, path, code):
    before, lost = world.box.live_keys(), [DROP]
    proxy.before = lambda asked: Answer(403) if code and "versions" in asked.query else None
    proxy.after = lambda asked, kept: lost.pop() if asked.operation == "delete" and lost else kept
    assert world.purge(*AS_OF, "--audit-log", str(path)).code == code
    assert (len(world.box.live_keys()), markers(world)) == (31, 17)
    del world.settings["AWS_ENDPOINT_URL_S3"]  # the proxy
    assert world.purge("--undo", str(path)).code == 0
    assert (world.box.live_keys(), markers(world)) == (before, 0)


def test_after_a_crash_it_brings_back_all(world, proxy, path):
    """After kill -9, while S3 carries out what nobody waits for any more."""
    keys, held = expire(world, 90), Held(proxy, "delete")
    version(world)
    run = world.start(*AS_OF, "--workers", "1", "--audit-log", str(path), patch="rp.BATCH = 30")
    held.wait()
    run.kill()
    held.release()
    while markers(world) < 30:
        time.sleep(0.1)
    undone = world.purge("--undo", str(path), "--json").summary
    assert (world.box.live_keys(), markers(world)) == (keys, 0)
    assert undone["restored"]["expired"] + undone["missing"] == len(events(path, "delete"))
    assert (undone["retained"], undone["failed"]) == (0, 0)


@pytest.mark.parametrize("cut", [1, 40])
def test_it_works_from_a_log_whose_last_line_is_cut(world, path, cut):
    run_id, text = purged(world, path), path.read_text()
    path.write_text(text[: text.rindex('{"event": "end"') - cut])
    # The next run appends to such a log, and it is still good for an undo.
    assert world.purge(*AS_OF, "--audit-log", str(path)).code == 0
    result = world.purge("--undo", str(path), "--json", "--run-id", run_id)
    assert result.summary["restored"]["expired"] == 17
    assert (len(world.box.live_keys()), "is cut" in result.err) == (48, cut > 1)


# --- What it leaves alone -------------------------------------------------------------------------


def rewritten(world, path, kind: str, hours: int = 0, **facts: str | None) -> None:
    """Change the events of KEY in a log that are of this kind, leave out its answer if it is of
    another, and let all have been so many hours ago."""
    lines = []
    for event in events(path):
        is_its, moment = event.get("key") == KEY, datetime.fromisoformat(event["time"])
        new = {"time": (moment - timedelta(hours=hours)).isoformat()}
        new |= facts if is_its and event["event"] == kind else {}
        if not is_its or event["event"] in ("delete", kind):
            lines.append(json.dumps(event | new) + "\n")
    path.write_text("".join(lines))


def set_by_somebody_else(world, path):
    (marker,) = versions(world, KEY, "DeleteMarkers")
    world.box.s3().delete_object(Bucket=BUCKET, Key=KEY, VersionId=marker)
    world.box.s3().delete_object(Bucket=BUCKET, Key=KEY)


def set_while_suspended(world, path):
    """Its id is that of an object written since, which would go for ever."""
    world.box.backend.buckets[BUCKET].keys[KEY]._version_id = "null"
    rewritten(world, path, "deleted", version_id="null")


def without_a_version_below(world, path):
    for name in versions(world, KEY):
        world.box.s3().delete_object(Bucket=BUCKET, Key=KEY, VersionId=name)


def named_but_no_marker(world, path):
    rewritten(world, path, "deleted", version_id=versions(world, KEY)[0])


LATER = (datetime.now(UTC) + timedelta(days=1)).isoformat()
WITHOUT = partial(rewritten, kind="deleted", version_id=None)
CASES = {
    "set_by_somebody_else": set_by_somebody_else,
    "set_while_suspended": set_while_suspended,
    "set_long_after_the_run": partial(rewritten, kind="delete", hours=1),
    "older_than_the_intent": partial(rewritten, kind="delete", time=LATER),
    "without_a_version_below": without_a_version_below,
    "named_but_no_marker": named_but_no_marker,
    "refused_by_s3": partial(WITHOUT, event="failed", code="AccessDenied"),
    "kept_at_a_later_try": partial(WITHOUT, event="retained"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_version_that_the_run_did_not_surely_set_stays_and_is_counted(world, path, case):
    purged(world, path)
    CASES[case](world, path)
    before = [versions(world, KEY, kind) for kind in ("Versions", "DeleteMarkers")]
    result = world.purge("--undo", str(path), "--json")
    told = result.code, result.summary["retained"], result.summary["restored"]["expired"]
    assert told == (0, 1, 16)
    assert re.search(rf"1 keys retained: .* \({KEY}\)", result.err)
    assert [versions(world, KEY, kind) for kind in ("Versions", "DeleteMarkers")] == before


# --- Which run, which log -------------------------------------------------------------------------


def test_several_runs_in_one_log_are_refused_with_their_list_and_run_id_picks_one(world, path):
    first, second = purged(world, path), purged(world, path, *EVERYTHING)
    purged(world, path, *EVERYTHING)  # it deleted nothing, and is no choice
    said = ["2 runs", "--run-id", f"{first} 17", f"{second} 3", events(path)[0]["time"][:10]]
    for run_id in ([], ["--run-id", ""]):
        result = world.purge("--undo", str(path), *run_id)
        assert (result.code, markers(world)) == (3, 20)
        assert [words for words in said if words not in result.error] == []
    assert world.purge("--undo", str(path), "--run-id", "another").code == 3
    undone = world.purge("--undo", str(path), "--run-id", first, "--json").summary
    assert undone["restored"] == {"expired": 17, "orphan": 0, "bytes": 357}
    assert markers(world) == 3


NO_LOGS = {
    None: "Cannot read the audit log",
    "x\n": "not of an audit log",
    "[1]\n": "not of an audit log",
}


@pytest.mark.parametrize("text", NO_LOGS)
def test_a_file_that_is_no_log_is_refused(world, path, text):
    if text is not None:
        path.write_text(text)
    result = world.purge("--undo", str(path))
    assert (result.code, NO_LOGS[text] in result.error) == (3 if text else 2, True)


def test_the_log_of_another_bucket_is_refused_and_no_database_is_needed(world, path):
    purged(world, path)
    log = path.read_text()
    path.write_text(log.replace(f'"bucket": "{BUCKET}"', '"bucket": "another"'))
    unset = dict.fromkeys(f"RETENTION_PURGE_DB_{name}" for name in ("HOST", "USER", "NAME", "PORT"))
    result = world.purge("--undo", str(path), **unset)
    assert (result.code, markers(world), "bucket another" in result.error) == (3, 17, True)
    path.write_text(log)
    assert (world.purge("--undo", str(path), **unset).code, markers(world)) == (0, 0)


def test_a_refused_undo_leaves_the_manifest_and_takes_no_log_for_one(world, path, tmp_path):
    world.box.load(*seed())  # a bucket that is not versioned
    manifest = tmp_path / "plan.csv"
    purged(world, path, "--manifest", str(manifest))
    for target, code in {str(manifest): 3, str(path): 2, "m" * 300: 2}.items():
        result = world.purge("--undo", str(path), "-n", "--manifest", target)
        assert (result.code, "is not versioned" in result.error) == (code, code == 3)
    assert (manifest.exists(), path.exists()) == (True, True)
