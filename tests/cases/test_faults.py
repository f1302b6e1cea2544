"""One fault at a time, S3's, the database's and the process's; after each, the Invariants hold and
a run without faults does the rest. What test_bucket, test_unattended and test_scale break is not
broken here again."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from conftest import AS_OF
from faults import (
    S3_FAULTS,
    USER,
    FaultyDatabase,
    Forward,
    Process,
    Run,
    Scene,
    always,
    error,
    keys_of,
    late,
    scripted,
)
from proxies import Answer, Request
from sandbox import BUCKET, TABLE

OLD = "2019-01-01 00:00:00"
EVERYTHING = ("--orphans", "--orphan-grace-days", "0")
# 30 expired keys, 10 kept ones, 5 orphans: in batches and pages of 7 keys, from either end.
EXPIRED = {f"e{n:02}" for n in range(30)}
KEPT = {f"e{n:02}-kept" for n in range(0, 30, 3)}
ORPHANS = {f"e{n:02}-orphan" for n in range(0, 30, 6)}


def fill(scene: Scene, versioned: bool = False) -> None:
    jobs = [(f"j{key}", OLD, "TRIAL", key) for key in sorted(EXPIRED)]
    jobs += [(f"j{key}", None, "TRIAL", key) for key in sorted(KEPT)]
    scene.box.load(jobs, [])
    if versioned:
        status = {"Status": "Enabled"}
        scene.box.s3().put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration=status)
    for key in EXPIRED | KEPT | ORPHANS:
        scene.box.put(key)


SMALL = {"BATCH": 7, "ROWS_A_COMMIT": 7}


@pytest.fixture
def scene(box) -> Iterator[Scene]:
    with Scene(box, SMALL, fork=True) as scene:
        scene.s3.page = 7
        fill(scene)
        yield scene


def converges(scene: Scene, *options: str) -> None:
    """Without faults a run finishes the work, and the next finds nothing to do."""
    scene.calm()
    assert scene.purge(*AS_OF, *options).code == 0
    rest = KEPT | (set() if "--orphans" in options else ORPHANS)
    assert set(scene.box.live_keys()) == rest
    again = scene.purge(*AS_OF, *options)
    assert (again.code, again.counted("planned")) == (0, 0)
    if "--delete-jobs" in options:
        assert again.summary["jobs_deleted"] == 0
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
    if operation != "delete" and run.code != 0:
        assert not run.gone
    converges(scene, *EVERYTHING, "--delete-jobs")


@pytest.mark.parametrize("kind", [k for k, (places, _) in S3_FAULTS.items() if "delete" in places])
def test_a_fault_of_every_delete_is_told_and_no_job_row_of_a_live_object_goes(scene, kind):
    scene.patches = {}  # one request, tried five times: each further try waits longer
    scene.s3.choose = always("delete", kind)
    run = scene.purge(*AS_OF, "--delete-jobs")
    assert run.code in (1, 4)
    assert run.summary["failed"] + run.counted("deleted") == 30
    rows = set(scene.box.job_ids())
    assert {f"j{key}" for key in run.after - ORPHANS} <= rows
    converges(scene, "--delete-jobs")


def test_the_same_cause_on_many_keys_is_one_line(scene):
    scene.s3.choose = always("delete", "AccessDenied for some keys")
    run = scene.purge(*AS_OF)
    assert (run.code, len(run.keys("failed"))) == (4, 13)
    (line,) = [line for line in run.err.splitlines() if " keys failed: " in line]
    assert " 13 keys failed: AccessDenied: injected (e00, e03, e06, ...)" in line


@pytest.mark.parametrize(
    "kind", [k for k, (places, _) in S3_FAULTS.items() if "other" in places and "204" not in k]
)
def test_a_fault_while_lost_answers_are_looked_up_stacks_no_marker(scene, kind):
    fill(scene, versioned=True)
    lost = "connection reset after the request took effect"
    scene.s3.choose = scripted({"delete": [lost], "other": [kind, kind]})
    assert scene.purge(*AS_OF).code == 0
    assert scene.injected.total() == 3
    answer = scene.box.s3().list_object_versions(Bucket=BUCKET)
    assert sorted(item["Key"] for item in answer["DeleteMarkers"]) == sorted(EXPIRED)
    assert scene.undo()["restored"]["expired"] == 30
    assert set(scene.box.live_keys()) == EXPIRED | KEPT | ORPHANS


@pytest.mark.parametrize("ends", ["look-up refused", "SIGKILL"])
def test_what_no_answer_tells_of_is_undone_all_the_same(scene, ends):
    fill(scene, versioned=True)
    process: list[Process] = []
    if ends == "SIGKILL":
        once(scene, "delete", 3, lambda: scene.signal(process[0], signal.SIGKILL))
    else:
        ask, refused = scene.s3.ask, Answer(403, error("AccessDenied"))
        scene.s3.ask = lambda r: refused if r.operation == "other" else ask(r)
        scene.s3.choose = always("delete", "connection reset after the request took effect")
    before = set(scene.box.live_keys())
    process.append(scene.start(*AS_OF, "--workers", "1"))
    run = scene.finish(process[0], before, 0)
    assert run.code == (-signal.SIGKILL if ends == "SIGKILL" else 1)
    assert len(run.gone) > len(run.keys("deleted"))
    scene.calm()
    scene.s3.ask = ask if ends != "SIGKILL" else scene.s3.ask
    summary = scene.undo()
    assert (summary["restored"]["expired"], summary["retained"]) == (len(run.gone), 0)
    assert set(scene.box.live_keys()) == before


def test_a_page_may_be_shorter_than_asked_for(scene):
    scene.s3.page = 1
    assert scene.purge(*AS_OF, *EVERYTHING).gone == EXPIRED | ORPHANS


@pytest.mark.parametrize("when", ["before the next try", "after the run"])
def test_a_key_that_a_lost_request_deletes_is_not_said_to_be_kept(scene, when):
    """A job takes the key in before the next try."""

    def at_last(request: Request, forward: Forward) -> Answer:
        while "end" not in [event["event"] for event in scene.events()]:
            time.sleep(0.1)
        return forward(request)

    scene.patches["DELETE_TIMEOUT"] = 1
    scene.s3.faults["late"] = (("delete",), at_last)
    lost = "connection reset after the request took effect" if "next" in when else "late"
    scene.s3.choose = scripted({"delete": [lost]})
    job = f"INSERT INTO {TABLE} VALUES ('late', NULL, 'OFFICIAL', 'e00')"
    once(scene, "delete", 2, lambda: scene.db.sql(job))
    run = scene.purge(*AS_OF, "--workers", "1")
    assert (run.code, run.gone) == (4, EXPIRED)
    assert (run.keys("failed"), run.keys("retained")) == (["e00"], [])
    assert "may yet be deleted" in run.err


def test_a_delete_that_hangs_past_the_timeout_is_tried_again(scene):
    scene.patches["DELETE_TIMEOUT"] = 1
    scene.s3.faults["late"] = (("delete",), late(2))
    scene.s3.choose = scripted({"delete": ["late"]})
    run = scene.purge(*AS_OF)
    assert (run.code, run.gone) == (0, EXPIRED)
    assert run.summary["requests"]["delete"] == 6
    converges(scene)


def test_a_request_whose_re_check_grew_old_while_it_was_signed_is_not_sent(scene):
    """As AWS credentials that are refreshed for a minute have it."""
    scene.patches |= {"SIGN": (1, 1.5), "MAX_RECHECK_AGE": 0.5, "ATTEMPTS": 2}
    run = scene.purge(*AS_OF)
    assert (run.code, run.summary["failed"], len(run.keys("delete"))) == (4, 30, 60)
    assert run.summary["max_recheck_age_seconds"] is None
    assert run.requests == []
    converges(scene)


def test_the_folder_object_of_the_prefix_is_no_object_of_a_job_without_source_data(scene):
    jobs = [("1", None, "OFFICIAL", "kept"), ("2", OLD, "TRIAL", "")]
    scene.box.load(jobs, [("p/", 0), ("p/kept", 1)])
    time.sleep(1.1)  # with a grace of 0 days an orphan must be older than this second
    run = scene.purge(*AS_OF, *EVERYTHING, "--prefix", "p/")
    assert run.counted("planned") == run.counted("deleted")


@pytest.mark.parametrize("operation", ["list", "delete"])
def test_credentials_that_expire_in_mid_run_end_it_with_the_cause(scene, operation):
    body = Answer(400, error("ExpiredToken"))
    ask = scene.s3.ask
    scene.s3.ask = lambda r: body if scene.s3.count(operation) > 2 else ask(r)
    run = stopped(scene.purge(*AS_OF, *EVERYTHING, "--workers", "1"), "credentials ended")
    assert len(run.gone) == (0 if operation == "list" else 14)
    scene.s3.ask = ask
    converges(scene, *EVERYTHING)


# --- Database -------------------------------------------------------------------------------------


def more(scene: Scene, facts: str, rows: int) -> None:
    """So many jobs more, of 60 characters, all of names of their own."""
    tables = "abcd"
    job_id, name = (
        f"concat_ws('/', {', '.join(f'{each}.{column}' for each in tables)}"
        for column in ("jobId", "sourceData")
    )
    scene.db.sql(
        f"INSERT INTO {TABLE} SELECT {job_id}), {facts}, {name}, repeat('x', 25)) "
        f"FROM {', '.join(f'{TABLE} {each}' for each in tables)} LIMIT {rows}"
    )


def kill_query(db: FaultyDatabase) -> None:
    db.kill("QUERY")


def let_time_pass(_: FaultyDatabase) -> None:
    """The server's own patience ends."""
    time.sleep(3)


BREAKS = {
    "cut": ("", FaultyDatabase.break_connections),
    "KILL QUERY": ("", kill_query),
    "KILL CONNECTION": ("", FaultyDatabase.kill),
    "a limit of statements": ("patience", let_time_pass),
    "net_write_timeout": ("net_write_timeout = 1", let_time_pass),
}


@pytest.mark.parametrize(("setting", "breaks"), BREAKS.values(), ids=BREAKS)
def test_references_that_break_off_in_mid_stream_are_no_references(scene, setting, breaks):
    """The stream is held after 100 kB of 10 MB, and broken there."""
    more(scene, "NULL, 'OFFICIAL'", 100_000)
    breaking = iter([breaks])

    def on_received(total: int) -> None:
        if total > 100_000:
            next(breaking, lambda db: None)(scene.db)

    scene.db.on_received = on_received
    if setting == "patience":
        setting = scene.db.patience(2)
    with scene.db.setting(*[setting] * bool(setting)):
        run = stopped(scene.purge(*AS_OF, *EVERYTHING), "Cannot read")
    assert scene.db.received > 100_000
    assert not run.gone
    assert scene.s3.count("list") == 0
    scene.calm()
    assert scene.purge(*AS_OF, "-n").counted("planned") == 30


def test_a_login_that_fails_leaves_a_trace(scene):
    run = stopped(scene.purge(*AS_OF, RETENTION_PURGE_DB_PASSWORD="wrong"), "Cannot log in")
    assert [event["event"] for event in run.events] == ["start", "end"]
    assert [run.summary[name] for name in ("planned", "not_attempted", "cutoff")] == [None] * 3


@pytest.mark.parametrize("takes_away", ["TRUNCATE", "DELETE FROM"])
def test_a_key_whose_rows_vanished_after_the_plan_is_retained(scene, takes_away):
    """As a reload has it; an orphan is one still."""
    once(scene, "list", 1, lambda: scene.db.sql(f"{takes_away} {TABLE}"))
    run = scene.purge(*AS_OF, *EVERYTHING, "--delete-jobs")
    assert (run.code, run.gone, run.summary["retained"]) == (0, ORPHANS, 30)
    assert "30 keys retained: its jobs have vanished (e00, e01, e02, ...)" in run.err
    fill(scene)
    converges(scene, *EVERYTHING, "--delete-jobs")


@pytest.mark.parametrize(
    ("breaks", "says", "options", "rows"),
    [
        (FaultyDatabase.break_connections, "re-check", [], 40),
        (FaultyDatabase.kill, "expired jobs", ["--delete-jobs"], 33),
    ],
)
def test_a_database_lost_after_a_re_check_stops_the_run(scene, breaks, says, options, rows):
    """What was checked is deleted; a round's rows come last."""
    scene.patches["ROUND_KEYS"] = 7
    once(scene, "delete", 2, lambda: breaks(scene.db))
    run = stopped(scene.purge(*AS_OF, *options), says)
    assert (len(run.gone), run.summary["not_attempted"]) == (14, 16)
    assert len(scene.box.job_ids()) == rows
    converges(scene, "--delete-jobs")


@pytest.mark.parametrize("breaks", ["KILL QUERY", "a limit of statements", "nothing"])
def test_a_re_check_that_is_cut_off_or_takes_too_long_stops_the_run(scene, breaks):
    """The re-check waits for a locked table; the lock is there once the first page is listed."""
    locked, done = threading.Event(), threading.Event()

    def lock_table() -> None:
        with scene.box.database.admin(database="ndvr") as holder:
            holder.cursor().execute(f"LOCK TABLES {TABLE} WRITE")
            locked.set()
            for _ in range(200 if breaks != "nothing" else 20):
                if done.wait(0.05):
                    return
                if breaks == "KILL QUERY":
                    scene.db.kill("QUERY")

    def lock() -> None:
        threading.Thread(target=lock_table).start()
        locked.wait(10)

    scene.patches["MAX_RECHECK_AGE"] = 30 if breaks != "nothing" else 0.5
    once(scene, "list", 1, lock)
    with scene.db.setting(scene.db.patience(0.5 if breaks == "a limit of statements" else 0)):
        says = "make an index" if breaks == "nothing" else "Cannot re-check references"
        run = stopped(scene.purge(*AS_OF), says)
    done.set()
    assert not run.gone
    assert [run.summary[name] for name in ("failed", "not_attempted")] == [0, 30]
    assert run.summary["max_recheck_age_seconds"] is None
    converges(scene)


def test_a_read_only_server_is_refused_before_the_first_delete(scene):
    with scene.db.setting("read_only = 1"):
        run = scene.purge(*AS_OF, "--delete-jobs")
    assert run.code == 3
    assert "read-only" in run.summary["error"]
    assert not run.gone
    converges(scene, "--delete-jobs")


def test_a_server_that_turns_read_only_loses_no_row_and_the_objects_are_told(scene):
    once(scene, "delete", 1, lambda: scene.db.sql("SET GLOBAL read_only = 1"))
    with scene.db.setting("read_only = 0"):
        run = stopped(scene.purge(*AS_OF, "--delete-jobs"), "Cannot delete from")
    assert run.gone == EXPIRED
    assert (run.summary["jobs_deleted"], len(scene.box.job_ids())) == (0, 40)
    converges(scene, "--delete-jobs")


def test_a_short_wait_timeout_outlasts_a_slow_listing(scene):
    once(scene, "list", 1, lambda: time.sleep(2.5))
    with scene.db.setting("wait_timeout = 1", "interactive_timeout = 1"):
        assert scene.purge(*AS_OF).gone == EXPIRED


def freeze(scene: Scene, seconds: float) -> None:
    threading.Thread(target=scene.db.freeze, args=(seconds,)).start()
    time.sleep(0.3)


def test_a_server_that_pauses_is_waited_for(scene):
    once(scene, "delete", 1, lambda: freeze(scene, 2))
    assert scene.purge(*AS_OF, "--workers", "1", "--delete-jobs").gone == EXPIRED
    assert scene.injected.total() == 1
    converges(scene, "--delete-jobs")


def test_a_server_that_stops_answering_ends_the_run(scene):
    scene.patches |= {"RECHECK_TIMEOUT": 2, "ROUND_KEYS": 7}
    once(scene, "delete", 1, lambda: freeze(scene, 6))
    run = stopped(scene.purge(*AS_OF, "--workers", "1"), "re-check")
    assert 2 < run.summary["seconds"] < 6
    assert (len(run.gone), run.summary["not_attempted"]) == (7, 23)
    scene.box.database.wait()
    converges(scene)


def test_job_rows_are_in_the_log_before_they_go(scene):
    """One of them is locked by somebody else for so long."""
    with scene.box.database.admin(database="ndvr") as holder:
        holder.begin()
        holder.cursor().execute(f"SELECT * FROM {TABLE} WHERE jobId = 'je00' FOR UPDATE")
        before = set(scene.box.live_keys())
        process = scene.start(*AS_OF, "--delete-jobs")
        for _ in range(100):
            intents = [e for e in scene.events() if e["event"] == "delete-job"]
            if "je00" in [event["job_id"] for event in intents]:
                break
            time.sleep(0.05)
        assert "je00" in scene.box.job_ids()
        holder.commit()
    run = scene.finish(process, before, 0)
    assert (run.code, run.summary["jobs_deleted"]) == (0, 30)
    intents = [e for e in run.events if e["event"] == "delete-job"]
    assert {(e["job_id"], e["completed_at"], e["key"]) for e in intents} == {
        (f"j{key}", OLD, key) for key in EXPIRED
    }
    converges(scene, "--delete-jobs")


# --- Process --------------------------------------------------------------------------------------


def shell(scene: Scene, line: str, *arguments: str) -> Run:
    """Run `line` in bash, where "$@" is the purge; its exit code is that of the purge alone."""
    before, logged = set(scene.box.live_keys()), scene.logged()
    done = subprocess.run(
        ["bash", "-c", line, "bash", *scene.command(*arguments)],
        env=scene.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    after, events = set(scene.box.live_keys()), scene.events(logged)
    assert "Traceback" not in done.stderr, done.stderr
    return Run(done.returncode, done.stdout, done.stderr, before, after, events)


def test_a_dry_run_into_a_closed_pipe_ends_quietly(scene):
    names = [f"{'m' * 50}{n:06}" for n in range(3000)]  # more than a pipe holds
    scene.box.load([(key, OLD, "TRIAL", key) for key in names], [(key, 1) for key in names])
    scene.s3.page = None
    run = shell(scene, '"$@" | head -1; exit ${PIPESTATUS[0]}', *AS_OF, "-n")
    assert run.out.startswith("expired\t")
    assert run.code == 1
    assert not run.gone


@pytest.mark.parametrize(
    ("closed", "options"),
    [
        ("| true", []), (">&-", []), (">/dev/full", []), (">/dev/full", ["--json"]),
        ("2>&-", []), ("2>/dev/full", ["--json"]),
    ],
)  # fmt: skip
def test_a_purge_whose_output_nobody_takes_does_its_work(scene, closed, options):
    line = f'"$@" {closed}; exit ${{PIPESTATUS[0]}}'
    run = shell(scene, line, *AS_OF, "--audit-log", str(scene.audit), *options)
    assert run.gone == EXPIRED
    assert (run.events[-1]["event"], run.events[-1]["exit_code"]) == ("end", run.code)
    assert set(run.keys("deleted")) == EXPIRED
    assert run.code in (0, 1)
    converges(scene)


@pytest.mark.parametrize(
    ("limit", "says"),
    [("-f 0", "spool file"), ("-f 40", "spool file"), ("-n 5", "Error: ")],
    ids=["no file may grow", "no file may grow large", "no file can be opened"],
)
def test_limits_of_the_process_end_it_in_one_line_with_nothing_deleted(scene, limit, says):
    more(scene, f"'{OLD}', 'TRIAL'", 50_000)  # more than a spool keeps in memory
    run = shell(scene, f'ulimit {limit}; exec "$@"', *AS_OF)
    assert run.code in (1, 2)
    assert says in run.err
    assert sum("Error: " in line for line in run.err.splitlines()) == 1
    assert not run.gone


def test_a_manifest_on_a_full_disk_stops_the_run(scene):
    run = scene.purge(*AS_OF, "--manifest", "/dev/full/manifest.csv")
    stopped(run, "Cannot write the manifest")
    assert not run.gone


def test_a_signal_in_each_moment_of_a_small_run_is_accounted_for(scene):
    """One of the three at the first, second, … request to S3, until a run gets through."""
    for moment in range(1, 40):
        fill(scene)
        del scene.s3.requests[:]
        signum = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)[moment % 3]
        running: list[Process] = []

        def watch(
            _: Request, moment: int = moment, running: list[Process] = running, signum: int = signum
        ) -> None:
            if len(scene.s3.requests) == moment:
                while not running:
                    time.sleep(0.01)
                scene.signal(running[0], signum)

        scene.s3.watch = watch
        before, logged = set(scene.box.live_keys()), scene.logged()
        running.append(scene.start(*AS_OF, "--delete-jobs"))
        run = scene.finish(running[0], before, logged)
        if len(scene.s3.requests) < moment:
            assert run.code == 0
            break
        assert run.code in (0, 128 + signum)
    else:
        pytest.fail("no run got through")
    assert moment > 5
    converges(scene, "--delete-jobs")


def test_the_fault_layer_does_what_it_says(scene):
    """Faults that never happened would prove nothing: what the wire saw, for one of each sort."""
    asked = "connection reset before the request took effect", "AccessDenied for some keys"
    scene.s3.choose = scripted({"delete": asked})
    run = scene.purge(*AS_OF, "--workers", "1")
    assert scene.injected == {("S3 delete", kind): 1 for kind in asked}
    deletes = [keys_of(r) for r in scene.s3.requests if r.operation == "delete"]
    refused = deletes[1][::3]
    assert set(refused) <= run.after
    assert run.keys("failed") == refused
    assert json.dumps(run.summary).count(USER) == 0
