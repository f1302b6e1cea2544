"""Versioned buckets: what a purge leaves there, and how --undo brings back what a run hid."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from subprocess import DEVNULL, Popen

import pytest
from conftest import AS_OF, EVERYTHING, OLD, Held, World, ended, events, expire, version
from proxies import DROP, Answer, Request
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
    assert (undone.code, "\ndeleted" in undone.out) == (0, False)
    assert "restored                expired 17, orphan 3, bytes 420" in undone.out
    assert "The next run deletes these keys again" in undone.out
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


@pytest.mark.parametrize("status", [DROP.status, 408, 429, 503, 520, 524])
def test_a_deed_whose_answer_is_lost_stacks_no_marker_and_is_undone(world, proxy, path, status):
    """The connection breaks, or a gateway answers in words of its own."""
    gateway = Answer(status, b"<html>upstream error</html>" if status else b"")
    before, lost = world.box.live_keys(), [gateway]

    def after(request: Request, answer: Answer) -> Answer:
        return lost.pop() if request.operation == "delete" and lost else answer

    proxy.after = after
    summary = world.purge(*AS_OF, "--audit-log", str(path), "--json").summary
    told = [summary[name] for name in ("exit_code", "failed", "retained", "not_attempted")]
    assert (told, len(world.box.live_keys()), markers(world)) == ([4, 17, 0, 0], 31, 17)
    again = world.purge(*AS_OF, "--audit-log", str(path), "--json").summary
    assert (again["exit_code"], again["missing"], markers(world)) == (0, 17, 17)
    undone = world.purge("--undo", str(path), "--run-id", summary["run_id"])
    assert (undone.code, world.box.live_keys(), markers(world)) == (0, before, 0)


@pytest.mark.parametrize(("batch", "intents"), [(30, 30), (90, 90)], ids=["some", "all"])
def test_after_a_crash_it_brings_back_all_and_names_the_time_to_run_again(
    world, proxy, path, batch, intents
):
    """After kill -9, while S3 carries out what nobody waits for any more."""
    keys, held = expire(world, 90), Held(proxy, "delete")
    version(world)
    patch = f"rp.BATCH = {batch}"
    run = world.start(*AS_OF, "--workers", "1", "--audit-log", str(path), patch=patch)
    held.wait()
    run.kill()
    run.wait()
    held.release()
    proxy.settle()
    last = datetime.fromisoformat(events(path)[-1]["time"])
    assert (markers(world), len(events(path, "delete"))) == (intents, intents)
    result = world.purge("--undo", str(path), "--json")
    told = [result.summary[name] for name in ("exit_code", "retained", "failed")]
    assert (told, world.box.live_keys(), markers(world)) == ([4, 0, 0], keys, 0)
    assert result.summary["restored"]["expired"] == intents
    again = (last + timedelta(minutes=5)).isoformat(timespec="seconds")
    assert f"run the undo again after {again}" in result.err
    assert (f"it planned 90 objects, and tried {intents}" in result.err) == (intents < 90)
    assert ("tried" in result.err) == (intents < 90)

    rewritten(world, path, "", hours=1)
    later = world.purge("--undo", str(path), "--json")
    assert (later.code, later.summary["missing"], "after" in later.err) == (0, intents, False)


@pytest.mark.parametrize("cut", [1, 40])
def test_it_works_from_a_log_whose_last_line_is_cut(world, path, cut):
    run_id, text = purged(world, path), path.read_text()
    path.write_text(text[: text.rindex('{"event": "end"') - cut])
    # The next run appends to such a log, and it is still good for an undo.
    assert world.purge(*AS_OF, "--audit-log", str(path)).code == 0
    result = world.purge("--undo", str(path), "--json", "--run-id", run_id)
    assert (result.code, result.summary["restored"]["expired"]) == (4, 17), "it has no end"
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
    assert told == (4, 1, 16)
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


HEAD = {"event": "start", "run_id": "1", "time": f"{OLD}+00:00", "bucket": BUCKET}
INTENT = {"event": "delete", "run_id": "1", "time": HEAD["time"], "key": KEY, "size": 1}
# The lines of a file; which one is not ours.
NO_LOGS: dict[str, tuple[list[object], int]] = {
    "text": (["x"], 1),
    "list": ([[1]], 1),
    "garbled start": ([json.dumps(HEAD)[:40], INTENT], 1),
    "no start": ([json.dumps(HEAD)[40:], INTENT], 1),
    "number as key": ([HEAD, INTENT | {"key": 5}], 2),
    "no key": ([HEAD, {name: text for name, text in INTENT.items() if name != "key"}], 2),
    "text as number": ([HEAD, INTENT | {"size": "1"}], 2),
    "huge number": ([HEAD, INTENT | {"size": 10**30}], 2),
    "surrogate": ([HEAD, INTENT | {"key": "\ud800"}], 2),
    "no run": ([HEAD, INTENT | {"run_id": None}], 2),
    "number as run": ([HEAD, INTENT | {"run_id": 1}], 2),
    "no zone": ([HEAD, INTENT | {"time": OLD}], 2),
    "no time": ([HEAD, INTENT | {"time": "today"}], 2),
    "text in a plan": ([HEAD, INTENT, HEAD | {"event": "plan", "planned": {"expired": "1"}}], 3),
    "endless lead": ([HEAD, INTENT, HEAD | {"event": "plan", "s3_lead_seconds": 1e999}], 3),
}


@pytest.mark.parametrize("case", NO_LOGS)
def test_a_file_that_is_no_log_is_refused_in_a_line_and_nothing_is_restored(world, path, case):
    lines, number = NO_LOGS[case]
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    world.box.s3().delete_object(Bucket=BUCKET, Key=KEY)
    result = world.purge("--undo", str(path))
    assert (result.code, markers(world)) == (3, 1), result.err
    assert f"line {number}" in result.err


def test_no_log_is_a_mistake_in_the_command(world, path):
    result = world.purge("--undo", str(path))
    assert (result.code, "does not exist" in result.error) == (2, True)


def test_a_log_in_use_is_refused_with_75_and_gets_no_line(world, proxy, path):
    """By an undo, or by a purge that has another lock. The same log takes what an undo did."""
    held = Held(proxy, "delete")
    run = world.start(*AS_OF, "--audit-log", str(path))
    held.wait()
    log, direct = path.read_bytes(), {"AWS_ENDPOINT_URL_S3": world.box.s3_url}
    for options in (["--undo", str(path)], ["--undo", str(path), "-n"], ["--prefix", "in/"]):
        more = [] if "-n" in options else ["--audit-log", str(path)]
        result = world.purge(*options, *more, **direct)
        assert (result.code, path.read_bytes() == log) == (75, True), result.err
        assert f"uses the audit log {path}" in result.error
    assert world.purge("--undo", str(path), **direct).code == 75
    held.release()
    assert ended(run).code == 0
    assert world.purge("--undo", str(path), "--audit-log", str(path)).code == 0
    assert (len(world.box.live_keys()), markers(world)) == (48, 0)


def test_a_terminal_shows_progress_before_the_first_answer(world, proxy, path):
    purged(world, path)
    held, (ours, theirs) = Held(proxy, "other"), pty.openpty()
    command, settings = world.command("--undo", str(path)), world.environment()
    run = Popen(command, env=settings, stdin=DEVNULL, stdout=DEVNULL, stderr=theirs)
    world.processes.append(run)
    os.close(theirs)
    held.wait()
    said = b""
    while b"looking for delete markers" not in said:
        said += os.read(ours, 1000)
    held.release()
    assert run.wait(60) == 0
    os.close(ours)


def test_a_key_that_no_request_can_spell_is_kept_and_no_marker_is_set(world, path):
    world.box.load([("1", OLD, "TRIAL", "a\x01b"), ("2", OLD, "TRIAL", "c")], [])
    version(world)
    for key in ("a\x01b", "c"):
        world.box.put(key)
    result = world.purge(*AS_OF, "--audit-log", str(path), "--json")
    told = result.code, result.summary["doubtful"], world.box.live_keys()
    assert told == (0, 1, ["a\x01b"]), "moto can list the key, but not its versions"
    assert world.purge("--undo", str(path)).code == 0
    assert world.box.live_keys() == ["a\x01b", "c"]


def test_the_log_of_another_bucket_is_refused_and_no_database_is_needed(world, path):
    purged(world, path)
    log = path.read_text()
    path.write_text(log.replace(f'"bucket": "{BUCKET}"', '"bucket": "another"'))
    unset = dict.fromkeys(f"RETENTION_PURGE_DB_{name}" for name in ("HOST", "USER", "NAME", "PORT"))
    result = world.purge("--undo", str(path), **unset)
    assert (result.code, markers(world), "bucket another" in result.error) == (3, 17, True)
    path.write_text(log)
    assert (world.purge("--undo", str(path), **unset).code, markers(world)) == (0, 0)


@pytest.mark.parametrize("dry", [[], ["-n"]], ids=["real", "dry"])
def test_a_refused_undo_leaves_the_manifest(world, path, tmp_path, dry):
    world.box.load(*seed())  # a bucket that is not versioned
    manifest = tmp_path / "plan.csv"
    purged(world, path, "--manifest", str(manifest))
    result = world.purge("--undo", str(path), *dry, RETENTION_PURGE_MANIFEST=str(manifest))
    assert (result.code, "is not versioned" in result.error) == (3, True)
    assert manifest.exists()
    assert world.purge("--undo", str(path), "--manifest", str(manifest)).code == 2


HEARD = """
receive = rp.Stop._receive
def heard(stop, *more):
    receive(stop, *more)
    open({!r}, "w").close()
rp.Stop._receive = heard
"""


def test_after_a_stop_signal_no_request_leaves_any_more(world, proxy, path, tmp_path):
    """The versions of ten keys are listed one by one, before one request for all of them."""
    purged(world, path)
    listed, deletes, heard = proxy.count("other"), proxy.count("delete"), tmp_path / "heard"
    patch = HEARD.format(str(heard))
    run = world.start("--undo", str(path), "--json", "--workers", "1", patch=patch)

    def before(request: Request) -> None:
        if proxy.count("other") == listed + 17 + 3:  # 17 to plan the undo
            run.send_signal(signal.SIGTERM)
            while not heard.exists() and run.poll() is None:
                time.sleep(0.1)

    proxy.before = before
    result = ended(run)
    assert (result.code, proxy.count("other"), proxy.count("delete")) == (143, listed + 20, deletes)
    told = result.summary
    assert (told["restored"]["expired"], told["failed"] + told["not_attempted"]) == (0, 17)
    proxy.before = lambda request: None
    assert (world.purge("--undo", str(path)).code, len(world.box.live_keys())) == (0, 48)
