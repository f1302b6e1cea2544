"""Random schedules: a table, a bucket, a policy, a writer, faults, all drawn from one seed.

`run_schedule(box, seed)` plays one, and raises AssertionError if anything is wrong. What is right,
`Model` decides: a few lines that know nothing of streams, batches or SQL.
"""

from __future__ import annotations

import math
import random
import re
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM
from typing import Any, NamedTuple
from urllib.parse import unquote

from faults import Answer, Forward, Run, Scene
from proxies import Request
from sandbox import BUCKET, COLUMNS, DATABASE, TABLE, Job, Sandbox
from script import World

UNSURE = "NoAnswer", "InvalidAnswer", "InternalError", "RequestTimeout", "OperationAborted"
ANCHORS = [f"anchor{n:02}" for n in range(99)]  # jobs that remain, and their names
AS_OF = ("--as-of", "2019-06-03T00:00:00Z")
CUTOFF = "2019-03-05 00:00:00"
# (completedAt, type): one kind of expired job, and what only looks like it.
EXPIRED = [("2019-01-01 00:00:00", "TRIAL"), ("2019-03-04 23:59:59", "TRIAL")]
REMAINING = [
    ("2019-01-01 00:00:00", "OFFICIAL"), (None, "OFFICIAL"), (None, "TRIAL"), (CUTOFF, "TRIAL"),
    ("2019-05-05 00:00:00", "TRIAL"), ("0000-00-00 00:00:00", "TRIAL"), ("2019-01-01", None),
    ("2019-01-01", "trial"), ("2019-01-01", "TRIAL "), ("2019-01-01", "BETA"),
]  # fmt: skip
# What XML 1.0 cannot carry, and the carriage return.
NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
ODD = "\x00\x01\x08\t\n\x1f\x7f\x85\xa0\u2028\ufffe\uffff/+%&<>\"'?#=;: \\*$é\u0301ß\U0010ffffab"
# What a server may do to each new session, and what may become of one in the middle of a run, as
# behind a proxy that moves it to another server.
LOGINS = ["SET autocommit = 0", "SET time_zone = '+13:00'"]
LOGINS += ["START TRANSACTION WITH CONSISTENT SNAPSHOT", "SET sql_mode = 'PAD_CHAR_TO_FULL_LENGTH'"]
CHANGES = [*LOGINS[:2], "DO RELEASE_ALL_LOCKS()", "SET sql_select_limit = 1"]
CHANGED = """
def query(connection, doing, sql, real=rp.query):
    if "re-check" in doing and rp.random.random() < 0.2:
        real(connection, doing, {!r})
    return real(connection, doing, sql)
rp.query = query
"""
ROWS = f"SELECT jobId, CAST(completedAt AS CHAR), type, sourceData FROM {TABLE}"
LATE = "delete carried out after the client gave up"
# Such a share of the deletes takes so long to sign, as when AWS credentials are refreshed.
LIMIT = 0.6  # seconds: no request leaves with an older re-check then
SLOW_SIGNING = """
rp.MAX_RECHECK_AGE = {}
from botocore.signers import RequestSigner as Signer
def slow(signer, operation, *arguments, sign=Signer.sign, **named):
    rp.time.sleep(2.2 * (operation.startswith("Delete") and rp.random.random() < {}))
    return sign(signer, operation, *arguments, **named)
Signer.sign = slow
"""

# --- The model ------------------------------------------------------------------------------------


def is_expired(job: Job) -> bool:
    _, completed, type_, _ = job
    return type_ == "TRIAL" and completed is not None and "1970" < completed < CUTOFF


class Model(NamedTuple):
    """What may go, of jobs and of objects (key → days since its last modification)."""

    prefix: str
    orphans: bool
    grace_days: int

    def deletable(self, jobs: list[Job], objects: dict[str, int]) -> set[str]:
        named = {self.prefix + job[3] for job in jobs if job[3]}
        kept = {self.prefix + job[3] for job in jobs if not is_expired(job) and job[3]}
        lost = {self.folded(key) for key in kept if key not in objects}
        old = {key for key, days in objects.items() if self.is_old_orphan(key, days)} - named
        free = ({*objects} & (named - kept)) | {key for key in old if self.folded(key) not in lost}
        return {key for key in free if not NOT_XML.search(key)}

    def folded(self, key: str) -> str:
        """The name without what people confuse. A job whose object is lost may mean another."""
        name = unicodedata.normalize("NFC", unquote(key.removeprefix(self.prefix)))
        return unicodedata.normalize("NFC", name.casefold()).lstrip("/")

    def is_old_orphan(self, key: str, days: int) -> bool:
        """An object called like the prefix is nobody's data: a console's "folder"."""
        inside = key.startswith(self.prefix) and key != self.prefix
        return self.orphans and inside and days >= self.grace_days


# --- The writer -----------------------------------------------------------------------------------


class State(NamedTuple):
    """The jobs that there may have been, between these moments (Unix time)."""

    jobs: dict[str, Job]
    start: float = -math.inf
    end: float = math.inf


class History:
    """The tables that there were, but for what the purge deleted: each from the beginning of the
    write that made it until the next one had returned."""

    def __init__(self, cursor: Any, jobs: list[Job]) -> None:
        self._cursor = cursor
        self.jobs = {job[0]: job for job in jobs}
        self.states, self.ever = [State(self.jobs)], {*jobs}

    def _write(self, jobs: dict[str, Job], sql: str, *arguments: Any) -> None:
        """One statement, after which there are these jobs."""
        start, cursor = time.time(), self._cursor
        (cursor.executemany if "REPLACE" in sql else cursor.execute)(sql, *arguments)
        self.states[-1] = self.states[-1]._replace(end=time.time())
        self.states.append(State(jobs, start))

    def put(self, jobs: Iterable[Job]) -> None:
        self.jobs = self.jobs | {job[0]: job for job in jobs}
        self.ever.update(jobs)
        self._write(self.jobs, f"REPLACE INTO {TABLE} VALUES (%s, %s, %s, %s)", jobs)

    def take(self, ids: Iterable[str]) -> None:
        left = {job_id: job for job_id, job in self.jobs.items() if job_id not in ids}
        self._write(left, f"DELETE FROM {TABLE} WHERE jobId IN %s", (list(ids),))

    def change(self, dice: random.Random, names: list[str]) -> None:
        """Insert a job, or upgrade or delete one."""
        job_id = dice.choice([*self.jobs])
        what = dice.choice(["insert", "insert", "upgrade", "delete"])
        _, done, _, name = self.jobs[job_id]
        if what == "insert" or job_id.startswith("anchor"):
            kind = dice.choice(REMAINING if dice.random() < 0.7 else EXPIRED)
            self.put([(f"w{len(self.ever)}", *kind, dice.choice(names))])
        elif what == "upgrade":
            self.put([(job_id, done, "OFFICIAL", name)])
        else:
            self.take([job_id])
            if self._cursor.rowcount:  # or the purge had deleted it
                self.jobs = self.states[-1].jobs

    def reload(self, dice: random.Random, _: list[str]) -> None:
        """Take rows away and put the same rows back a moment later: the whole table, as a reload
        does, or some of it, as an upgrade does."""
        self._cursor.execute(ROWS)
        rows = self._cursor.fetchall()
        if dice.random() < 0.3:
            rows = dice.sample(rows, min(len(rows), dice.choice([1, 10])))
            self.take([job[0] for job in rows])
        else:
            self._write({}, dice.choice([f"TRUNCATE {TABLE}", f"DELETE FROM {TABLE}"]))
        time.sleep(dice.choice([0, 0.02, 0.3]))
        self.put(rows)

    def between(self, name: str, start: float, end: float, orphan: bool) -> list[list[Job]]:
        """The jobs of that name, in each table that there may have been between these moments."""
        states = [state for state in self.states if state.start <= end and state.end >= start]
        if orphan:  # none goes by a table whose remaining jobs are away
            states = [state for state in states if sum(job in state.jobs for job in ANCHORS) > 1]
        return [[job for job in state.jobs.values() if job[3] == name] for state in states]


# --- The schedule ---------------------------------------------------------------------------------


def random_name(dice: random.Random, names: list[str]) -> str:
    """A `sourceData`: up to 64 characters, of all that S3 allows in a key."""
    plain = f"{'k/' * dice.randrange(3)}{dice.randrange(10_000):05}"
    odd = "".join(dice.choices(ODD, k=dice.randrange(1, 9)))
    high = "".join(chr(dice.randrange(0x10000, 0x110000)) for _ in range(64))
    old = dice.choice(names or [plain])[:60]
    near = [old.upper(), old.lower(), old + " ", " " + old, unicodedata.normalize("NFD", old)]
    near += [old + "\x00", old.replace("/", "//"), f"{old}%20"]
    like = dice.choice(near)
    return dice.choice([plain, plain, odd, odd, high, like, like, "return\rhere"])[:64]


class Draw:
    """All that a seed decides before the run starts."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        dice = self.dice = random.Random(seed)
        prefix = dice.choice(["", "", "data/", "p é+%/", "a"])
        orphans = dice.random() < 0.5
        self.model = Model(prefix, orphans, dice.choice([0, 7]) if orphans else 7)
        self.versioned, self.delete_jobs = dice.random() < 0.2, dice.random() < 0.4
        # The writer's longest pause (seconds), 0 for none; the share of reloads among its writes.
        self.pause, self.reloads = dice.choice([0, 0.03, 0.06]), dice.choice([0, 0, 0, 0.2])
        # Few keys and rows at a time, so that there are many batches and rounds, or the script as
        # it is; now and then deletes that are carried out so late (seconds).
        batch, rounds = dice.choice([2, 4, 10]), dice.choice([1, 3, 30])
        small = f"rp.BATCH = rp.ROWS_A_COMMIT = {batch}; rp.ROUND_KEYS = {batch * rounds}"
        rows = dice.choice([3 * batch, 5000])
        self.patch = dice.choice(["", *4 * [f"{small}; rp.ROWS = {rows}"]])
        self.late = dice.choice([1.2, 2.5, 5]) if dice.random() < 0.2 else 0
        self.slow = not self.late and dice.random() < 0.2
        self.ailing = "rp.DELETE_TIMEOUT = 1" if self.late else ""
        if self.slow:
            self.ailing = SLOW_SIGNING.format(LIMIT, dice.choice([0.1, 0.4]))
        self.login = dice.choice(LOGINS) if dice.random() < 0.3 else ""
        self.change = dice.choice(CHANGES) if dice.random() < 0.15 else ""
        if self.change:
            self.ailing += CHANGED.format(self.change)
        names: list[str] = []
        for _ in range(dice.choice([2, 10, 30, 60, 60])):
            names.append(random_name(dice, names))
        self.names = sorted({self._for_moto(name) for name in names})
        # Most remaining jobs have an object, always: else the guards refuse the run.
        anchors = ANCHORS[: len(names) * 3 // 2 + 2]
        self.jobs: list[Job] = [(name, None, "OFFICIAL", name) for name in anchors]
        self.jobs.append(("empty", *EXPIRED[0], ""))
        self.objects = dict.fromkeys([prefix + name for name in anchors], 1)
        self.objects |= dict.fromkeys(self.names[:5], 30)
        for name in self.names:  # most get jobs, most of these are expired, most have an object
            for _ in range(dice.choice([0, 1, 1, 1, 2, 3])):
                kind = dice.choice(EXPIRED if dice.random() < 0.75 else REMAINING)
                self.jobs.append((f"j{len(self.jobs)}", *kind, name))
            if dice.random() < 0.85:
                self.objects[prefix + name] = dice.choice([1, 1, 30])
        self.page = dice.choice([1000, 1 if len(names) < 12 else 10, 10, 25])
        self.prefix = [f"--prefix={prefix}"] if prefix else []
        self.options = [*AS_OF, "--workers", dice.choice("124"), *self.prefix]
        grace = ["--orphans", "--orphan-grace-days", str(self.model.grace_days)]
        self.options += grace * orphans + ["--delete-jobs"] * self.delete_jobs

    def _for_moto(self, name: str) -> str:
        """moto cannot list the versions of a key that XML cannot carry."""
        return (NOT_XML.sub("", name) if self.versioned else name) or "x"

    def load(self, box: Sandbox) -> None:
        index = self.dice.choice(["", ", KEY (sourceData)"])  # with it the re-check asks otherwise
        columns = COLUMNS.replace("NOT NULL)", f"NOT NULL{index})")
        collation = self.dice.choice(["general_ci", "bin", "unicode_ci"])
        box.load(self.jobs, [], columns.replace("general_ci", collation))
        if self.versioned:
            box.backend.put_bucket_versioning(BUCKET, "Enabled")
        for key, days in self.objects.items():
            box.put(key, age=timedelta(days=days))


def break_things(scene: Scene, draw: Draw, timers: list[threading.Timer]) -> None:
    """S3 breaks; database, server and process do at some request to S3, or a little later."""
    dice, left, where = draw.dice, iter(range(5)), draw.dice.choice(["", "delete"])
    share = dice.choice([0.2, 0.5] if draw.late else [0, 0.2, 0.5])
    actions = [scene.cut, scene.kill, partial(scene.kill, "QUERY"), partial(scene.freeze, 0.4)]
    actions.append(partial(scene.switch_over, 0.4))
    actions += [partial(scene.signal, signum) for signum in (SIGHUP, SIGINT, SIGTERM, SIGKILL)]
    at: dict[tuple[str, int], Callable[[], None]] = {}
    for action in dice.choices(actions, k=dice.choice([0, 0, 1, 1, 2])):
        what, most = dice.choice([("versioning", 1), ("list", 9), ("delete", 6)])
        at[what, dice.randint(1, most)] = action

    def late(request: Request, forward: Forward) -> Answer:
        time.sleep(draw.late)
        return forward(request)

    def choose(request: Request) -> str | None:
        if action := at.pop((request.operation, request.number), None):
            timers.append(threading.Timer(dice.choice([0, 0.02, 0.2]), action))
            timers[-1].start()
        kinds = [kind for kind, (places, *_) in scene.faults.items() if request.operation in places]
        meets = request.operation.startswith(where) and dice.random() < share
        if not meets or next(left, None) is None:
            return None
        return LATE if LATE in kinds and dice.random() < 0.5 else dice.choice(kinds)

    if draw.late:
        scene.faults[LATE] = ("delete",), late
    scene.choose, scene.latency = choose, dice.choice([0, 0.05, 0.2])


def disturbed(scene: Scene, draw: Draw) -> tuple[History, Run]:
    """The run that meets the faults, while jobs are written all the time."""
    dice, timers, end = random.Random(draw.seed), list[threading.Timer](), time.monotonic() + 60
    break_things(scene, draw, timers)
    with scene.box.database.admin(database=DATABASE) as connection:
        cursor = connection.cursor()
        cursor.execute("SET time_zone = '+00:00', sql_mode = '', wait_timeout = 60")
        history = History(cursor, draw.jobs)
        process = scene.start(*draw.options, patch=draw.ailing)
        while draw.pause and process.poll() is None and time.monotonic() < end:
            time.sleep(dice.random() * draw.pause)
            act = history.reload if dice.random() < draw.reloads else history.change
            act(dice, draw.names)
            scene.injected["jobs", f"{act.__name__} during the run"] += 1
    run = scene.finish()
    for timer in timers:
        timer.join()
    return history, run


def run_schedule(box: Sandbox, seed: int) -> Counter[tuple[str, str]]:
    """Play a schedule; how often which fault took place. Raises AssertionError."""
    draw = Draw(seed)
    with Scene(box, draw.patch, draw.login) as scene:
        draw.load(box)
        scene.page, scene.limit = draw.page, LIMIT if draw.slow else scene.limit
        scene.injected["process", "credentials that took long"] += draw.slow
        for what, statement in ("at login", draw.login), ("before a re-check", draw.change):
            if statement:
                scene.injected["database", f"{statement} {what}"] += 1
        history, run = disturbed(scene, draw)
        scene.injected["runs", f"ended with exit code {run.code}"] += 1
        never_too_much(draw, history, run)
        rows_in_order(scene, draw, history, run)
        converges(scene, draw)
        return scene.injected


# --- What must hold -------------------------------------------------------------------------------


def never_too_much(draw: Draw, history: History, run: Run) -> None:
    """No key was to be deleted that a job kept at its re-check, and none of an expired job whose
    rows were all away.

    The re-check took place before the intent was logged, no longer ago than the run admits; where
    requests grow too old after their intent, no longer ago than they may, and a second, in which
    the machine may let the run wait between re-check and intent.
    """
    age = run.limit + 1 if draw.slow else run.age
    for event in run.all("delete"):
        key, orphan = event["key"], event["reason"] == "orphan"
        assert key.startswith(draw.model.prefix)
        assert not orphan or draw.model.is_old_orphan(key, draw.objects[key]), event
        name = key.removeprefix(draw.model.prefix)
        assert not NOT_XML.search(key), "no request can spell it"
        tables = history.between(name, event["at"] - age - 0.01, event["at"], orphan)
        free = [not jobs if orphan else jobs and all(map(is_expired, jobs)) for jobs in tables]
        assert any(free), f"{key!r} was to be deleted though kept by a job, or without its rows"


def rows_in_order(scene: Scene, draw: Draw, history: History, run: Run) -> None:
    """The purge deleted rows only if asked to, of expired jobs whose object was gone or kept by
    another job; and said so in the log before."""
    intents = run.all("delete-job")
    told = {event["row"]["jobId"] for event in intents}
    for job_id in {*history.jobs} - {*scene.box.job_ids()}:
        job = history.jobs[job_id]
        assert is_expired(job), f"row {job} is gone"
        assert job_id in told, f"{job} is gone without an intent"
    done = {event["key"]: event["line"] for event in run.all("deleted")}
    for event in intents:
        key, name = event["key"], event["key"].removeprefix(draw.model.prefix)
        gone = key not in run.before or done.get(key, math.inf) < event["line"]
        kept = any(job[3] == name and not is_expired(job) for job in history.ever)
        assert gone or kept, f"{event} before its object was gone"
        row = tuple(event["row"][n] for n in ("jobId", "completedAt", "type", "sourceData"))
        assert (row in history.ever, row[3]) == (True, name)
    if not run.was_killed:
        gone = len({job[0] for job in draw.jobs} - {*scene.box.job_ids()})
        count = run.summary["jobs_deleted"]
        # A writer brings a row back, too. What a COMMIT without an answer did, nobody knows.
        assert count <= (len(intents) if draw.pause else gone)
        assert run.code == 1 or draw.pause or count == gone


def converges(scene: Scene, draw: Draw) -> None:
    """A run without faults leaves what the model says; the next one finds nothing to do."""
    jobs = list(scene.box.sql("SET time_zone = '+00:00'", ROWS))
    objects = {key: draw.objects[key] for key in scene.box.live_keys()}
    right = {*objects} - draw.model.deletable(jobs, objects)
    second = scene.converges(*draw.options)
    assert second.after == right, second
    odd = {key for key in right if NOT_XML.search(key)}  # their rows stay, to tell of them
    kept = {job[3] for job in jobs if not is_expired(job)}
    left = {
        job[0]
        for job in jobs
        if not is_expired(job)
        or not job[3]
        or (draw.model.prefix + job[3] in odd and job[3] not in kept)
    }
    assert not draw.delete_jobs or {*scene.box.job_ids()} == left
    if draw.versioned:
        undo(scene, draw)


def undo(scene: Scene, draw: Draw) -> None:
    """Run by run, newest first, the log brings back all that was hidden, whatever broke it off. Of
    a run that was killed, and of keys without an answer that are there, S3 may still have requests:
    the undo ends with 4."""
    versions = scene.box.s3().list_object_versions(Bucket=BUCKET, EncodingType="url")
    stacked = Counter(item["Key"] for item in versions.get("DeleteMarkers", []))
    assert [key for key, count in stacked.items() if count > 1] == [], "delete markers are stacked"
    ended_runs = {event["run_id"] for event in scene.events() if event["event"] == "end"}
    intents = [event for event in scene.events() if event["event"] == "delete"]
    ends = [event for event in scene.events() if event["event"] == "failed"]
    for run_id in reversed(dict.fromkeys(event["run_id"] for event in intents)):
        keys = {event["key"] for event in intents if event["run_id"] == run_id}
        before = set(scene.box.live_keys())
        hidden, failed = keys - before, [e for e in ends if e["run_id"] == run_id]
        late = {event["key"] for event in failed if event["code"] in UNSURE} & before
        options = ("--json", "--undo", str(scene.audit), "--run-id", run_id)
        summary = World.purge(scene, *options).summary
        live, told = set(scene.box.live_keys()), summary["restored"]
        assert keys <= live, "not restored"
        assert (told["expired"] + told["orphan"], summary["retained"]) == (len(hidden), 0)
        assert summary["exit_code"] == (0 if run_id in ended_runs and not late else 4)
