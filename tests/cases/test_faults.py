"""What a run does when S3, the database or the process breaks: one fault at a time.

After each the Invariants hold (`verify` in faults.py), and a run without faults does the rest. What
test_recheck, test_undo, test_signals and test_audit_log break is not broken here again.
"""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from conftest import AS_OF, EVERYTHING, OLD
from faults import S3_FAULTS, Process, Run, Scene, always, scripted
from proxies import Request
from sandbox import TABLE, Sandbox

# 30 expired keys, 10 kept ones, 5 orphans: in batches and pages of 7 keys, from either end.
EXPIRED = {f"e{n:02}" for n in range(30)}
KEPT = {f"e{n:02}-kept" for n in range(0, 30, 3)}
ORPHANS = {f"e{n:02}-orphan" for n in range(0, 30, 6)}
SMALL = {"BATCH": 7, "ROWS_A_COMMIT": 7}


def fill(scene: Scene) -> None:
    jobs = [(f"j{key}", OLD, "TRIAL", key) for key in sorted(EXPIRED)]
    jobs += [(f"j{key}", None, "TRIAL", key) for key in sorted(KEPT)]
    scene.box.load(jobs, [])
    for key in EXPIRED | KEPT | ORPHANS:
        scene.box.put(key)


@pytest.fixture
def scene(box: Sandbox) -> Iterator[Scene]:
    with Scene(box, SMALL) as scene:
        scene.s3.page = 7
        fill(scene)
        yield scene


def converges(scene: Scene, *options: str) -> None:
    """Without faults a run finishes the work, and the next finds nothing to do."""
    scene.calm()
    assert scene.purge(*AS_OF, *options).code == 0
    assert set(scene.box.live_keys()) == KEPT | (ORPHANS if "--orphans" not in options else set())
    again = scene.purge(*AS_OF, *options)
    assert (again.code, again.counted("planned"), again.summary["jobs_deleted"]) == (0, 0, 0)
    if "--delete-jobs" in options:
        assert scene.box.job_ids() == sorted(f"j{key}" for key in KEPT)


def stopped(run: Run, says: str) -> Run:
    """The run ended with exit code 1 and one line that says this."""
    assert run.code == 1
    assert says in run.summary["error"]
    return run


def once(scene: Scene, operation: str, number: int, act: Callable[[], object]) -> None:
    """Do this when that request of this operation comes, before it is answered."""

    def watch(request: Request) -> None:
        if request.operation == operation and scene.s3.count(operation) == number and not done:
            done.append(request)
            act()

    done: list[Request] = []
    scene.s3.watch = watch


# --- S3 -------------------------------------------------------------------------------------------

PASSING = [
    (operation, kind)
    for kind, (operations, _) in S3_FAULTS.items()
    for operation in operations
    if operation in ("versioning", "list", "delete")
]


@pytest.mark.parametrize(("operation", "kind"), PASSING, ids=lambda value: value)
def test_a_fault_that_passes_costs_at_most_the_run(scene, operation, kind):
    calm = [""] * (operation != "versioning")  # the second request meets it, of a listing or delete
    scene.s3.choose = scripted({operation: [*calm, kind]})
    run = scene.purge(*AS_OF, *EVERYTHING, "--delete-jobs")
    assert scene.injected.total() == 1
    if kind == "AccessDenied for some keys":
        assert (run.code, run.summary["failed"]) == (4, 3)
    elif "204" in kind or kind.startswith("listing"):
        assert run.code in (0, 1)
    else:
        assert run.code == 0, run.summary
    if run.code == 0:
        assert run.gone == EXPIRED | ORPHANS
    elif operation != "delete":
        assert not run.gone
    sent = {name: scene.s3.count(name) for name in ("list", "delete")}
    assert run.summary["requests"] == sent, "retries count as well"
    converges(scene, *EVERYTHING, "--delete-jobs")


@pytest.mark.parametrize("kind", [k for k, (places, _) in S3_FAULTS.items() if "delete" in places])
def test_a_fault_of_every_delete_is_told_and_no_job_row_of_a_live_object_goes(scene, kind):
    scene.patches = {"FIRST_PAUSE": 0.01}  # one request, tried five times
    scene.s3.choose = always("delete", kind)
    run = scene.purge(*AS_OF, "--delete-jobs")
    assert run.code in (1, 4)
    assert run.summary["failed"] + run.counted("deleted") == 30
    assert {f"j{key}" for key in run.after - ORPHANS} <= set(scene.box.job_ids())
    converges(scene, "--delete-jobs")


# --- Database -------------------------------------------------------------------------------------


@pytest.mark.parametrize("breaks", ["cut", "KILL QUERY"])
def test_references_that_break_off_in_mid_stream_are_no_references(scene, breaks):
    """The stream is held after 100 kB of 10 MB, and broken there."""
    rows = "SELECT seq, NULL, 'OFFICIAL', concat(seq, repeat('x', 58)) FROM seq_1_to_100000"
    scene.db.sql(f"INSERT INTO {TABLE} {rows}")
    acts = {"cut": scene.db.break_connections, "KILL QUERY": lambda: scene.db.kill("QUERY")}
    act = iter([acts[breaks]])

    def on_received(total: int) -> None:
        if total > 100_000:
            next(act, lambda: None)()

    scene.db.on_received = on_received
    run = stopped(scene.purge(*AS_OF, *EVERYTHING), "Cannot read")
    assert scene.db.received > 100_000
    assert not run.gone
    assert scene.s3.count("list") == 0
    scene.calm()
    assert scene.purge(*AS_OF, "-n").counted("planned") == 30


@pytest.mark.parametrize("rows", [False, True], ids=["in the re-check", "where rows are read"])
def test_a_database_lost_after_a_re_check_stops_the_run(scene, rows):
    """What was checked is deleted; a round's rows come last."""
    scene.patches["ROUND_KEYS"] = 7
    once(scene, "delete", 2, scene.db.kill if rows else scene.db.break_connections)
    run = scene.purge(*AS_OF, *["--delete-jobs"] * rows)
    stopped(run, "expired jobs" if rows else "re-check")
    assert (len(run.gone), run.summary["not_attempted"]) == (14, 16)
    assert len(scene.box.job_ids()) == (33 if rows else 40)
    converges(scene, "--delete-jobs")


def test_a_server_that_stops_answering_ends_the_run(scene):
    def freeze() -> None:
        threading.Thread(target=scene.db.freeze, args=(6,)).start()
        time.sleep(0.2)

    scene.patches |= {"RECHECK_TIMEOUT": 1, "ROUND_KEYS": 7}
    once(scene, "delete", 1, freeze)
    run = stopped(scene.purge(*AS_OF, "--workers", "1"), "re-check")
    assert 1 < run.summary["seconds"] < 6
    assert (len(run.gone), run.summary["not_attempted"]) == (7, 23)
    scene.box.database.wait()
    converges(scene)


# --- Process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["| true", ">&-", "2>&-", ">/dev/full --json", "2>/dev/full"])
def test_a_purge_whose_output_nobody_takes_does_its_work(scene, where):
    line = f'"$@" {where}; exit ${{PIPESTATUS[0]}}'
    command = scene.command(*AS_OF, "--audit-log", str(scene.audit))
    code = subprocess.call(["bash", "-c", line, "bash", *command], env=scene.environment())
    assert set(scene.box.live_keys()) == KEPT | ORPHANS
    log = scene.events()
    assert {event["key"] for event in log if event["event"] == "deleted"} == EXPIRED
    assert (log[-1]["event"], log[-1]["exit_code"]) == ("end", code)
    assert code == (1 if where.startswith(("| true", ">/dev/full")) else 0)


def test_a_signal_in_each_moment_of_a_small_run_is_accounted_for(scene):
    """One of the three at the first, second, … request to S3, until a run gets through."""
    running: list[Process] = []

    def watch(_: Request) -> None:
        if len(scene.s3.requests) == moment:
            while len(running) < moment:
                time.sleep(0.01)
            scene.signal(running[-1], signum)

    for moment in range(1, 40):
        fill(scene)
        del scene.s3.requests[:]
        scene.s3.watch, signum = watch, (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)[moment % 3]
        before, logged = set(scene.box.live_keys()), scene.logged()
        running.append(scene.start(*AS_OF, "--delete-jobs"))
        run = scene.finish(running[-1], before, logged)
        if len(scene.s3.requests) < moment:
            break
        assert run.code in (0, 128 + signum)
    assert (run.code, 5 < moment < 39) == (0, True), "no run got through"
    converges(scene, "--delete-jobs")
