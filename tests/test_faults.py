"""One fault at a time, S3's, the database's and the process's; after each, the Invariants hold and
a run without faults does the rest. What test_bucket, test_unattended and test_scale break is not
broken here again."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
from conftest import AS_OF
from faults import S3_FAULTS, USER, FaultyDatabase, Run, Scene, always, error, keys_of, scripted
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


@pytest.fixture
def scene(box) -> Iterator[Scene]:
    with Scene(box, batch=7) as scene:
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
    assert sum(line.startswith("Error: ") for line in run.err.splitlines()) == 1
    return run


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
    scene.batch = None  # one request, tried five times: each further try waits longer
    scene.s3.choose = always("delete", kind)
    run = scene.purge(*AS_OF, "--delete-jobs")
    assert run.code in (1, 4)
    assert run.summary["failed"] + run.counted("deleted") == 30
    rows = set(scene.box.job_ids())
    assert {f"j{key}" for key in run.after - ORPHANS} <= rows
    converges(scene, "--delete-jobs")


@pytest.mark.parametrize("kind", ["500 InternalError", "200 without a body", "200 with HTML"])
def test_a_fault_of_the_second_listing_deletes_no_job_row(scene, kind):
    deleting = threading.Event()
    scene.s3.watch = lambda request: deleting.set() if request.operation == "delete" else None
    scene.s3.choose = lambda r: kind if deleting.is_set() and r.operation == "list" else None
    run = stopped(scene.purge(*AS_OF, "--delete-jobs"), "Cannot list bucket")
    assert run.gone == EXPIRED
    assert (run.summary["jobs_deleted"], len(scene.box.job_ids())) == (0, 40)
    converges(scene, "--delete-jobs")


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
    undone = subprocess.run(
        scene.command("--undo", str(scene.audit)), env=scene.environment(), check=False
    )
    assert undone.returncode == 0
    assert set(scene.box.live_keys()) == EXPIRED | KEPT | ORPHANS


def test_a_page_may_be_shorter_than_asked_for(scene):
    scene.s3.page = 1
    assert scene.purge(*AS_OF, *EVERYTHING).gone == EXPIRED | ORPHANS


def test_a_key_deleted_by_a_lost_request_is_not_said_to_be_kept(scene):
    """Its answer is lost, and a job takes the key in before the next try."""

    def watch(request: Request) -> None:
        if request.operation == "delete" and scene.s3.count("delete") == 2:
            scene.db.sql(f"INSERT INTO {TABLE} VALUES ('late', NULL, 'OFFICIAL', 'e00')")

    lost = "connection reset after the request took effect"
    scene.s3.choose, scene.s3.watch = scripted({"delete": [lost, "503 SlowDown"]}), watch
    run = scene.purge(*AS_OF, "--workers", "1", check=False)
    assert "e00" in run.gone
    assert "e00" not in run.keys("retained")


def test_the_folder_object_of_the_prefix_is_no_object_of_a_job_without_source_data(scene):
    jobs = [("1", None, "OFFICIAL", "kept"), ("2", OLD, "TRIAL", "")]
    scene.box.load(jobs, [("p/", 0), ("p/kept", 1)])
    time.sleep(1.1)  # with a grace of 0 days an orphan must be older than this second
    run = scene.purge(*AS_OF, *EVERYTHING, "--prefix", "p/")
    assert run.counted("planned") == run.counted("deleted")


def test_a_hang_past_the_timeout_is_an_answer_that_never_came(scene):
    """The script waits 30 seconds for S3: slow."""
    hanging = iter([34.0])

    def watch(request: Request) -> None:
        if request.operation == "delete":
            time.sleep(next(hanging, 0))

    scene.s3.watch = watch
    run = scene.purge(*AS_OF)
    assert 30 < run.summary["seconds"] < 60
    assert (run.code, run.gone) == (0, EXPIRED)
    assert run.summary["requests"]["delete"] == 6
    converges(scene)


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


def kill_query(db: FaultyDatabase) -> None:
    db.kill("QUERY")


def let_time_pass(_: FaultyDatabase) -> None:
    """The server's own patience ends."""
    time.sleep(3)


BREAKS = {
    "cut": ({}, FaultyDatabase.break_connections),
    "KILL QUERY": ({}, kill_query),
    "KILL CONNECTION": ({}, FaultyDatabase.kill),
    "max_statement_time": ({"max_statement_time": 2}, let_time_pass),
    "net_write_timeout": ({"net_write_timeout": 1}, let_time_pass),
}


@pytest.mark.parametrize(("settings", "breaks"), BREAKS.values(), ids=BREAKS)
def test_references_that_break_off_in_mid_stream_are_no_references(scene, settings, breaks):
    """The stream is held after 100 kB of 10 MB, and broken there."""
    scene.db.sql(
        f"INSERT INTO {TABLE} SELECT concat('x', seq), NULL, 'OFFICIAL', "
        "concat(repeat('x', 57), seq) FROM seq_1000001_to_1150000"
    )
    breaking = iter([breaks])

    def on_received(total: int) -> None:
        if total > 100_000:
            next(breaking, lambda db: None)(scene.db)

    scene.db.on_received = on_received
    with scene.db.setting(**settings):
        run = stopped(scene.purge(*AS_OF, *EVERYTHING), "Cannot read")
    assert scene.db.received > 100_000
    assert not run.gone
    assert scene.s3.count("list") == 0
    scene.calm()
    assert scene.purge(*AS_OF, "-n").counted("planned") == 30


@pytest.mark.parametrize("breaks", [FaultyDatabase.break_connections, FaultyDatabase.kill])
def test_a_database_lost_between_re_check_and_delete_stops_the_run(scene, breaks):
    def watch(request: Request) -> None:
        if request.operation == "delete" and scene.s3.count("delete") == 2:
            breaks(scene.db)

    scene.s3.watch = watch
    run = stopped(scene.purge(*AS_OF, "--workers", "1", "--delete-jobs"), "re-check")
    assert len(run.gone) == 14
    assert len(scene.box.job_ids()) == 40
    converges(scene, "--delete-jobs")


@pytest.mark.parametrize("breaks", ["KILL QUERY", "max_statement_time"])
def test_a_re_check_that_is_cut_off_stops_the_run(scene, breaks):
    """The re-check waits for a locked table; the lock is there once the first page is listed."""
    locked, done = threading.Event(), threading.Event()

    def lock_table() -> None:
        with scene.box.database.admin(database="ndvr") as holder:
            holder.cursor().execute(f"LOCK TABLES {TABLE} WRITE")
            locked.set()
            for _ in range(200):
                if done.wait(0.05):
                    return
                if breaks == "KILL QUERY":
                    scene.db.kill("QUERY")

    def watch(request: Request) -> None:
        if request.operation == "list" and not locked.is_set():
            threading.Thread(target=lock_table).start()
            locked.wait(10)

    scene.s3.watch = watch
    seconds = 0.5 if breaks == "max_statement_time" else 0
    with scene.db.setting(max_statement_time=seconds):
        run = stopped(scene.purge(*AS_OF), "Cannot re-check references")
    done.set()
    assert locked.is_set()
    assert not run.gone
    assert run.summary["failed"] == 30
    converges(scene)


def test_a_read_only_server_is_refused_before_the_first_delete(scene):
    with scene.db.setting(read_only=1):
        run = scene.purge(*AS_OF, "--delete-jobs")
    assert run.code == 3
    assert "read-only" in run.summary["error"]
    assert not run.gone
    converges(scene, "--delete-jobs")


def test_a_server_that_turns_read_only_loses_no_row_and_the_objects_are_told(scene):
    turned = threading.Event()

    def watch(request: Request) -> None:
        if request.operation == "delete" and not turned.is_set():
            turned.set()
            scene.db.sql("SET GLOBAL read_only = 1")

    scene.s3.watch = watch
    with scene.db.setting(read_only=0):
        run = stopped(scene.purge(*AS_OF, "--delete-jobs"), "Cannot delete from")
    assert run.gone == EXPIRED
    assert (run.summary["jobs_deleted"], len(scene.box.job_ids())) == (0, 40)
    converges(scene, "--delete-jobs")


def test_a_short_wait_timeout_outlasts_a_slow_listing(scene):
    slow = iter([2.5])
    scene.s3.watch = lambda r: time.sleep(next(slow, 0)) if r.operation == "list" else None
    with scene.db.setting(wait_timeout=1, interactive_timeout=1):
        assert scene.purge(*AS_OF).gone == EXPIRED


def test_a_server_that_pauses_is_waited_for(scene):
    frozen = threading.Event()

    def watch(request: Request) -> None:
        if request.operation == "delete" and not frozen.is_set():
            frozen.set()
            threading.Thread(target=scene.db.freeze, args=(2,)).start()

    scene.s3.watch = watch
    assert scene.purge(*AS_OF, "--workers", "1", "--delete-jobs").gone == EXPIRED
    assert scene.injected.total() == 1
    converges(scene, "--delete-jobs")


def test_a_server_that_stops_answering_ends_the_run(scene):
    """The script waits 40 seconds for a re-check: slow."""
    frozen = threading.Event()

    def watch(request: Request) -> None:
        if request.operation == "delete" and not frozen.is_set():
            frozen.set()
            threading.Thread(target=scene.db.freeze, args=(46,)).start()
            time.sleep(0.3)

    scene.s3.watch = watch
    run = stopped(scene.purge(*AS_OF, "--workers", "1"), "re-check")
    assert 40 < run.summary["seconds"] < 46
    assert len(run.gone) == 7
    scene.box.database.wait()
    converges(scene)


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


def many(scene: Scene) -> None:
    """So many expired keys that a dry run prints more than a pipe holds."""
    names = [f"{'m' * 50}{n:06}" for n in range(3000)]
    scene.box.load([(key, OLD, "TRIAL", key) for key in names], [(key, 1) for key in names])
    scene.s3.page = None


def test_a_dry_run_into_a_closed_pipe_ends_quietly(scene):
    many(scene)
    run = shell(scene, '"$@" | head -1; exit ${PIPESTATUS[0]}', *AS_OF, "-n")
    assert run.out.startswith("expired\t")
    assert run.code == 1
    assert not run.gone


@pytest.mark.parametrize("json_option", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize(
    "closed",
    [
        "| true",
        ">&-",
        ">/dev/full",
        "2>&-",
        "2>/dev/full",
    ],
)
def test_a_purge_whose_output_nobody_takes_does_its_work(scene, closed, json_option):
    line = f'"$@" {closed}; exit ${{PIPESTATUS[0]}}'
    run = shell(scene, line, *AS_OF, "--audit-log", str(scene.audit), *json_option)
    assert run.gone == EXPIRED
    assert (run.events[-1]["event"], run.events[-1]["exit_code"]) == ("end", 0)
    assert set(run.keys("deleted")) == EXPIRED
    assert run.code in (0, 1)
    converges(scene)


@pytest.mark.parametrize(
    ("limit", "says"),
    [("-f 0", "temporary directory"), ("-f 40", "spool file"), ("-n 5", "Error: ")],
    ids=["no file may grow", "no file may grow large", "no file can be opened"],
)
def test_limits_of_the_process_end_it_in_one_line_with_nothing_deleted(scene, limit, says):
    many(scene)
    run = shell(scene, f'ulimit {limit}; exec "$@"', *AS_OF)
    assert run.code in (1, 2)
    assert says in run.err
    assert sum(line.startswith("Error: ") for line in run.err.splitlines()) == 1
    assert not run.gone


def test_a_manifest_on_a_full_disk_stops_the_run(scene):
    run = scene.purge(*AS_OF, "--manifest", "/dev/full/manifest.csv")
    stopped(run, "Cannot write the manifest")
    assert not run.gone


def test_a_signal_in_each_moment_of_a_small_run_is_accounted_for(scene):
    """SIGTERM at the first, second, … request to S3, until a run gets through."""
    for moment in range(1, 40):
        fill(scene)
        del scene.s3.requests[:]
        running: list[subprocess.Popen[str]] = []

        def watch(
            _: Request, moment: int = moment, running: list[subprocess.Popen[str]] = running
        ) -> None:
            if len(scene.s3.requests) == moment:
                while not running:
                    time.sleep(0.01)
                running[0].send_signal(signal.SIGTERM)

        scene.s3.watch = watch
        before, logged = set(scene.box.live_keys()), scene.logged()
        running.append(scene.start(*AS_OF, "--delete-jobs"))
        run = scene.finish(running[0], before, logged)
        if len(scene.s3.requests) < moment:
            assert run.code == 0
            break
        assert run.code in (0, 143)
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
