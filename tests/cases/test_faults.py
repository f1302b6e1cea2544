"""What a run does when S3, the database or the process breaks: one fault at a time.

After each the Invariants hold (`verify` in faults.py), and a run without faults does the rest. What
test_recheck, test_undo, test_signals and test_audit_log break is not broken here again.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator

import pytest
from conftest import AS_OF, EVERYTHING, OLD, version
from faults import S3_FAULTS, Scene, keys_of
from sandbox import BUCKET, TABLE, Sandbox
from script import World

import retention_purge as rp

# 30 expired keys, 10 kept ones, 5 orphans: in batches and pages of 7 keys, from either end.
EXPIRED = {f"e{n:02}" for n in range(30)}
KEPT = {f"e{n:02}-kept" for n in range(0, 30, 3)}
ORPHANS = {f"e{n:02}-orphan" for n in range(0, 30, 6)}


@pytest.fixture
def scene(box: Sandbox) -> Iterator[Scene]:
    jobs = [(f"j{key}", OLD if key in EXPIRED else None, "TRIAL", key) for key in EXPIRED | KEPT]
    box.load(jobs, [(key, 21) for key in EXPIRED | KEPT | ORPHANS])
    with Scene(box, "rp.BATCH = rp.ROWS_A_COMMIT = 7") as scene:
        scene.page = 7
        yield scene


def converges(scene: Scene, *options: str) -> None:
    """Without faults a run finishes the work, and the next finds nothing to do."""
    second = scene.converges(*AS_OF, *options)
    assert second.after == KEPT | (ORPHANS if "--orphans" not in options else set())
    if "--delete-jobs" in options:
        assert scene.box.job_ids() == sorted(f"j{key}" for key in KEPT)


# --- S3 -------------------------------------------------------------------------------------------

THERE = [(operation, kind) for kind, (places, *_) in S3_FAULTS.items() for operation in places]
# Of the gateways two are enough here; random schedules meet the others.
LIKE_OTHERS = re.compile("5..+no effect|4..+after|52.+gateway")
PASSING = [
    (operation, kind)
    for operation, kind in THERE
    if operation != "other" and not ("gateway" in kind and LIKE_OTHERS.match(kind))
]


@pytest.mark.parametrize(("operation", "kind"), PASSING, ids=lambda value: value)
def test_a_fault_that_passes_costs_at_most_what_was_denied(scene, operation, kind):
    met = (operation, 1 if operation == "versioning" else 2)
    scene.choose = lambda request: kind if (request.operation, request.number) == met else None
    run = scene.purge(*AS_OF, *EVERYTHING, "--delete-jobs")
    assert scene.injected.total() == 1
    denied = 3 if kind == "AccessDenied for some keys" else 0
    assert (run.code, run.summary["failed"]) == (4 if denied else 0, denied), run.summary
    assert denied or run.gone == EXPIRED | ORPHANS
    for name, count in run.summary["requests"].items():
        assert count == scene.s3.count(name), "retries count as well"
    converges(scene, *EVERYTHING, "--delete-jobs")


@pytest.mark.parametrize("kind", [kind for operation, kind in PASSING if operation == "delete"])
def test_a_fault_of_every_delete_is_told_and_no_job_row_of_a_live_object_goes(scene, kind):
    scene.patch = "rp.FIRST_PAUSE = 0.01"  # one request, tried five times
    scene.choose = lambda request: kind if request.operation == "delete" else None
    run = scene.purge(*AS_OF, "--delete-jobs")
    assert run.code in (1, 4)
    assert run.summary["failed"] + run.counted("deleted") == 30
    assert {f"j{key}" for key in run.after - ORPHANS} <= set(scene.box.job_ids())
    converges(scene, "--delete-jobs")


# Keys of a request of 7 that these leave in doubt; other faults leave all of them in doubt.
IN_DOUBT = {
    "503 SlowDown": 0, "SlowDown for some keys": 0, "AccessDenied for some keys": 0,
    "InternalError for some keys": 3, "InternalError for some keys, yet deleted": 3,
    "keys missing from the answer": 3, "keys missing from the answer, yet deleted": 3,
}  # fmt: skip


ALL_IN_DOUBT = [  # the random schedules meet the others
    "503 of a gateway after the request took effect", "429 of a gateway, no effect",
    "connection lost after the request took effect", "200 with truncated XML",
]  # fmt: skip


@pytest.mark.parametrize("kind", [*IN_DOUBT, *ALL_IN_DOUBT])
def test_in_a_versioned_bucket_what_is_in_doubt_has_failed_and_no_marker_is_stacked(scene, kind):
    """An undo brings all back. In other buckets the keys are tried again, see above."""
    version(scene)
    scene.choose = lambda r: kind if (r.operation, r.number) == ("delete", 2) else None
    run = scene.purge(*AS_OF)
    doubtful = IN_DOUBT.get(kind, 7)
    denied = 3 if "AccessDenied" in kind else 0
    assert (run.summary["failed"], run.code) == (doubtful + denied, 4 if doubtful + denied else 0)
    asked = Counter(key for request in run.requests for key in keys_of(request))
    told = {event["key"]: event["code"] for event in run.all("failed")}
    assert [key for key, code in told.items() if code != "AccessDenied" and asked[key] > 1] == []
    versions = scene.box.s3().list_object_versions(Bucket=BUCKET)
    markers = Counter(item["Key"] for item in versions["DeleteMarkers"])
    assert {*markers.values()} == {1}, "delete markers are stacked"
    late = {key for key, code in told.items() if not rp.is_certain(code)} & run.after
    undone = World.purge(scene, "--undo", str(scene.audit), "--json")
    assert (undone.code, scene.box.live_keys()) == (4 if late else 0, sorted(run.before))
    assert ("S3 may still be deleting" in undone.err) == bool(late)
    converges(scene)


# --- Database -------------------------------------------------------------------------------------


@pytest.mark.parametrize("breaks", ["cut", "KILL QUERY"])
def test_references_that_break_off_in_mid_stream_are_no_references(scene, breaks):
    """The stream is held after 100 kB of 10 MB, and broken there."""
    rows = "SELECT seq, NULL, 'OFFICIAL', concat(seq, repeat('x', 58)) FROM seq_1_to_100000"
    scene.box.sql(f"INSERT INTO {TABLE} {rows}")
    acts = [scene.cut if breaks == "cut" else lambda: scene.kill("QUERY")]
    scene.db.on_received = lambda total: acts.pop()() if total > 100_000 and acts else None
    run = scene.purge(*AS_OF, *EVERYTHING)
    assert (run.code, acts, run.gone, scene.s3.count("list")) == (1, [], set(), 0)
    assert "Cannot read" in run.summary["error"]
    assert scene.purge(*AS_OF, "-n").counted("planned") == 30


def test_a_database_lost_where_rows_are_read_stops_the_run(scene):
    """A round's rows come last. What is lost in a re-check is in test_lock."""
    met = ("delete", 2)
    scene.choose = lambda r: scene.kill() if (r.operation, r.number) == met else None
    run = scene.purge(*AS_OF, "--delete-jobs", patch="rp.ROUND_KEYS = 7")
    assert (run.code, "Cannot read jobs" in run.summary["error"]) == (1, True)
    assert (len(run.gone), run.summary["not_attempted"]) == (14, 16)
    assert len(scene.box.job_ids()) == 33
    converges(scene, "--delete-jobs")


def test_a_server_that_stops_answering_ends_the_run(scene):
    """The server stands still until the run has ended."""

    def halt(request: object) -> None:
        if scene.s3.count("delete") == 1 and not scene.injected:
            scene.halt()

    scene.choose = halt
    patch = "rp.RECHECK_TIMEOUT, rp.ROUND_KEYS = 3, 7"
    try:
        scene.start(*AS_OF, "--workers", "1", patch=patch).wait(120)
    finally:
        scene.wake()
    run = scene.finish()
    assert (run.code, "re-check" in run.summary["error"]) == (1, True)
    assert 3 < run.summary["seconds"] < 60
    assert (len(run.gone), run.summary["not_attempted"]) == (7, 23)
    scene.box.database.wait()
    converges(scene)


# --- Process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["| true", ">&-", "2>&-", ">/dev/full --json", "2>/dev/full"])
def test_a_purge_whose_output_nobody_takes_does_its_work(scene, where):
    # With a pipe the run begins when nobody reads it any more.
    alone = """{ trap '' PIPE; while echo; do :; done 2>/dev/null; "$@"; }"""
    start = alone if where == "| true" else '"$@"'
    line = f"{start} {where}; exit ${{PIPESTATUS[0]}}"
    command = scene.command(*AS_OF, "--audit-log", str(scene.audit))
    code = subprocess.call(["bash", "-c", line, "bash", *command], env=scene.environment())
    assert set(scene.box.live_keys()) == KEPT | ORPHANS
    log = scene.events()
    assert {event["key"] for event in log if event["event"] == "deleted"} == EXPIRED
    assert (log[-1]["event"], log[-1]["exit_code"]) == ("end", code)
    assert code == (1 if where.startswith(("| true", ">/dev/full")) else 0)
