"""Versioned buckets: what a purge leaves there, and how --undo brings back what a run hid."""

from __future__ import annotations

import json
import signal
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import AS_OF, EVERYTHING, Held, World, events, expire, version
from proxies import DROP, Answer, Request, S3Proxy
from sandbox import BUCKET
from test_seed import EXPIRED

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


def markers(world: World) -> int:
    answer = world.box.s3().list_object_versions(Bucket=BUCKET)
    return len(answer.get("DeleteMarkers", []))


def versions_of(world: World, key: str) -> list[tuple[str, bool]]:
    """Version ids of a key, and whether each is a delete marker."""
    answer = world.box.s3().list_object_versions(Bucket=BUCKET, Prefix=key)
    kinds = [("Versions", False), ("DeleteMarkers", True)]
    return [(item["VersionId"], kind) for name, kind in kinds for item in answer.get(name, [])]


# --- What a purge leaves --------------------------------------------------------------------------


def test_a_purge_is_recoverable_with_an_audit_log_and_stacks_no_markers(versioned, path):
    world = versioned
    dry = world.purge(*AS_OF, "-n", "--json").summary
    assert (dry["versioning"], dry["recoverable"]) == ("enabled", False)
    summary = world.purge(*AS_OF, "--json", "--audit-log", str(path)).summary
    assert (summary["versioning"], summary["recoverable"]) == ("enabled", True)
    assert markers(world) == 17
    assert world.purge(*AS_OF, "--json").summary["missing"] == 17
    assert markers(world) == 17


def test_suspended_versioning_is_said_to_have_no_undo(versioned, path):
    version(versioned, "Suspended")
    result = versioned.purge(*AS_OF, "--audit-log", str(path))
    assert "Versioning is suspended" in result.out
    assert events(path)[-1]["recoverable"] is False
    assert len(versioned.box.live_keys()) == 31


def test_an_answer_lost_stacks_no_marker_and_is_undone(versioned, proxy, path):
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


def test_keys_are_not_looked_up_after_an_answer_that_did_nothing(versioned, proxy):
    slow = [Answer(503, b"<Error><Code>SlowDown</Code></Error>")]
    proxy.before = lambda r: slow.pop() if r.operation == "delete" and slow else None
    assert versioned.purge(*AS_OF).code == 0
    assert not [request for request in proxy.requests if "versions" in request.query]


# --- Undo brings back all that a run hid ----------------------------------------------------------


def test_it_brings_back_exactly_what_the_log_records_and_says_what_comes_next(versioned, path):
    world = versioned
    before = world.box.live_keys()
    world.box.s3().delete_object(Bucket=BUCKET, Key="incoming_000001")  # somebody else's
    purged(world, path, *EVERYTHING)
    assert len(world.box.live_keys()) == 27

    dry = world.purge("--undo", str(path), "-n")
    assert (dry.code, len(dry.listed), "restored" in dry.out) == (0, 20, False)
    assert len(world.box.live_keys()) == 27

    undone = world.purge("--undo", str(path))
    assert undone.code == 0
    assert "restored                17 expired, 3 orphan, 420 bytes" in undone.out
    assert "deleted" not in undone.out.replace("deletes", "")
    assert "The next purge deletes these keys again" in undone.out
    assert world.box.live_keys() == [key for key in before if key != "incoming_000001"]
    assert markers(world) == 1

    again = world.purge("--undo", str(path), "--json").summary
    assert (again["mode"], again["restored"]["expired"]) == ("undo", 0)
    assert (again["missing"], again["retained"], again["exit_code"]) == (20, 0, 0)
    assert again["recoverable"] is False


SMALL = "rp.BATCH = 30"


def killed(world: World, proxy: S3Proxy, path: Path) -> None:
    """kill -9, when S3 has carried out the second request, but not answered."""
    done = threading.Event()

    def after(request: Request, answer: Answer) -> Answer:
        if request.operation == "delete" and proxy.count("delete") == 2:
            done.set()
            time.sleep(2)
        return answer

    proxy.after = after
    process = world.start(*AS_OF, "--workers", "1", "--audit-log", str(path), patch=SMALL)
    assert done.wait(60)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert len(world.box.live_keys()) == 30


def hung_up(world: World, proxy: S3Proxy, path: Path) -> None:
    """SIGHUP, with a request in flight."""
    held = Held(proxy, "delete")
    process = world.start(*AS_OF, "--workers", "1", "--audit-log", str(path), patch=SMALL)
    held.wait()
    process.send_signal(signal.SIGHUP)
    held.release()
    assert process.wait(60) == 129
    assert len(world.box.live_keys()) == 60


def unheard(world: World, proxy: S3Proxy, path: Path) -> None:
    """Each try is carried out but not answered, and no look-up tells."""
    proxy.after = lambda request, answer: DROP if request.operation == "delete" else answer
    proxy.before = lambda request: DENIED if "versions" in request.query else None
    result = world.purge(*AS_OF, "--workers", "1", "--audit-log", str(path), patch=SMALL)
    assert result.code == 1
    assert not world.box.live_keys()
    assert not events(path, "deleted")


@pytest.mark.parametrize("crash", [killed, hung_up, unheard])
def test_after_a_crash_it_brings_back_all(world, proxy, path, crash):
    keys = expire(world, 90)
    version(world)
    crash(world, proxy, path)
    proxy.before, proxy.after = lambda request: None, lambda request, answer: answer
    undone = world.purge("--undo", str(path), "--json").summary
    assert world.box.live_keys() == keys
    assert markers(world) == 0
    hidden = undone["restored"]["expired"]
    assert hidden + undone["missing"] == len(events(path, "delete"))
    assert (undone["retained"], undone["failed"]) == (0, 0)


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_it_works_from_a_log_whose_last_line_is_cut(versioned, path, cut):
    world = versioned
    run_id = purged(world, path)
    whole = path.read_text().rindex('{"event": "end"')
    path.write_text(path.read_text()[: whole - cut])
    # The next run appends to such a log, and it is still good for an undo.
    assert world.purge(*AS_OF, "--audit-log", str(path)).code == 0
    result = world.purge("--undo", str(path), "--json", "--run-id", run_id)
    assert result.summary["restored"]["expired"] == 17
    assert ("is cut" in result.err) == (cut > 1)
    assert len(world.box.live_keys()) == 48


def test_it_is_on_record_and_may_be_in_the_log_that_it_undoes(versioned, path):
    purged(versioned, path)
    first = len(events(path))
    assert versioned.purge("--undo", str(path), "--audit-log", str(path)).code == 0
    start, *keyed, end = events(path)[first:]
    assert (start["mode"], end["mode"]) == ("undo", "undo")
    assert [event["event"] for event in keyed] == ["restore"] * 17 + ["restored"] * 17
    assert {event["key"] for event in keyed} == set(EXPIRED)
    assert all(event["version_id"] for event in keyed)
    assert end["restored"]["expired"] == 17
    again = versioned.purge("--undo", str(path), "--json").summary
    assert (again["exit_code"], again["missing"]) == (0, 17)


def test_a_dry_run_of_it_writes_nothing(versioned, path, tmp_path):
    purged(versioned, path)
    record = tmp_path / "undo.jsonl"
    assert versioned.purge("--undo", str(path), "-n", "--audit-log", str(record)).code == 0
    assert not record.exists()
    assert markers(versioned) == 17


# --- What it leaves alone -------------------------------------------------------------------------


def left_alone(world: World, path: Path, key: str) -> None:
    """An undo counts this key as retained and says so, and restores the other 16."""
    before = versions_of(world, key)
    result = world.purge("--undo", str(path), "--json")
    assert (result.code, result.summary["retained"]) == (0, 1)
    assert result.summary["restored"]["expired"] == 16
    assert "1 keys retained: " in result.err
    assert f"({key})" in result.err
    assert versions_of(world, key) == before


def test_a_marker_that_somebody_else_set_later_stays(versioned, path):
    purged(versioned, path)
    key, s3 = EXPIRED[0], versioned.box.s3()
    (marker,) = [name for name, is_marker in versions_of(versioned, key) if is_marker]
    s3.delete_object(Bucket=BUCKET, Key=key, VersionId=marker)
    s3.delete_object(Bucket=BUCKET, Key=key)
    left_alone(versioned, path, key)


def test_a_marker_older_than_an_intent_without_an_answer_stays(versioned, path):
    purged(versioned, path)
    later = (datetime.now(UTC) + timedelta(seconds=30)).isoformat()
    lines = []
    for event in events(path):
        if event.get("key") == EXPIRED[0]:
            if event["event"] == "deleted":
                continue
            event["time"] = later
        lines.append(json.dumps(event))
    path.write_text("\n".join(lines) + "\n")
    left_alone(versioned, path, EXPIRED[0])


def test_nothing_is_restored_without_a_version_below(versioned, path):
    purged(versioned, path)
    for name, is_marker in versions_of(versioned, EXPIRED[0]):
        if not is_marker:
            versioned.box.s3().delete_object(Bucket=BUCKET, Key=EXPIRED[0], VersionId=name)
    left_alone(versioned, path, EXPIRED[0])


def test_data_are_not_removed_though_the_log_names_their_version(versioned, path):
    purged(versioned, path)
    (data, _) = next(each for each in versions_of(versioned, EXPIRED[0]) if not each[1])
    forged = [
        json.dumps(event | {"version_id": data} if event.get("key") == EXPIRED[0] else event)
        for event in events(path)
    ]
    path.write_text("\n".join(forged) + "\n")
    left_alone(versioned, path, EXPIRED[0])


@pytest.mark.parametrize(
    "answer", [Answer(204, b""), Answer(200, b"<ListVersionsResult/>")], ids=["204", "empty"]
)
def test_silence_is_an_error(versioned, proxy, path, answer):
    purged(versioned, path)
    proxy.before = lambda request: answer if "versions" in request.query else None
    result = versioned.purge("--undo", str(path))
    assert result.code == 1
    assert "Cannot list the versions" in result.error


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
    ("content", "says"),
    [
        (b"", "audit log"),
        (b"not json\n", "audit log"),
        (b'{"some": "json"}\n', "not of an audit log"),
        (b"[1, 2]\n", "not of an audit log"),
    ],
)
def test_a_file_that_is_not_its_log_is_refused(versioned, path, content, says):
    path.write_bytes(content)
    result = versioned.purge("--undo", str(path))
    assert result.code == 3
    assert says in result.error


def test_the_log_of_another_bucket_is_refused(versioned, path):
    purged(versioned, path)
    path.write_text(path.read_text().replace(f'"bucket": "{BUCKET}"', '"bucket": "another"'))
    result = versioned.purge("--undo", str(path))
    assert result.code == 3
    assert "bucket another" in result.error
    assert markers(versioned) == 17


def test_an_unversioned_bucket_is_refused(world, path):
    purged(world, path)
    result = world.purge("--undo", str(path))
    assert result.code == 3
    assert "not versioned" in result.error


def test_it_needs_no_database_and_a_readable_log(versioned, path):
    settings = {f"RETENTION_PURGE_DB_{name}": None for name in ("HOST", "USER", "NAME", "PORT")}
    purged(versioned, path)
    assert versioned.purge("--undo", str(path), **settings).code == 0
    result = versioned.purge("--undo", "/no/such/log", **settings)
    assert result.code == 2
    assert "Cannot read the audit log" in result.error
