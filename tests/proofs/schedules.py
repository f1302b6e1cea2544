"""Random schedules: a table, a bucket, a policy, a writer, faults, all drawn from one seed.

`run_schedule(box, seed)` plays one, and raises AssertionError if anything is wrong. What is right,
`Model` decides: a few lines that know nothing of streams, batches or SQL.
"""

from __future__ import annotations

import math
import random
import re
import signal
import threading
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

from faults import S3_FAULTS, Fault, Run, Scene, as_seconds, at_random, late
from proxies import Request
from pymysql.constants import CLIENT
from sandbox import BUCKET, COLUMNS, DATABASE, TABLE, Job, Sandbox

AS_OF = ("--as-of", "2019-06-03T00:00:00Z")
CUTOFF = "2019-03-05 00:00:00"
# (type, completedAt): one kind of expired job, and what only looks like it.
EXPIRED = [("TRIAL", "2019-01-01 00:00:00"), ("TRIAL", "2019-03-04 23:59:59")]
REMAINING = [
    ("OFFICIAL", "2019-01-01 00:00:00"), ("OFFICIAL", None), ("TRIAL", None), ("TRIAL", CUTOFF),
    ("TRIAL", "2019-05-05 00:00:00"), ("TRIAL", "0000-00-00 00:00:00"), (None, "2019-01-01"),
    ("trial", "2019-01-01"), ("TRIAL ", "2019-01-01"), ("BETA", "2019-01-01"),
]  # fmt: skip
# What XML 1.0 cannot carry, and the carriage return.
NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
ODD = "\x00\x01\x08\t\n\x1f\x7f\x85\xa0\u2028\ufffe\uffff/+%&<>\"'?#=;: \\*$é\u0301ß\U0010ffff"
ROWS = f"SELECT jobId, CAST(completedAt AS CHAR), type, sourceData FROM {TABLE}"
LATE = "delete carried out after the client gave up"

# --- The model ------------------------------------------------------------------------------------


def is_expired(job: Job) -> bool:
    _, completed, type_, _ = job
    return type_ == "TRIAL" and completed is not None and "1970" < completed < CUTOFF


@dataclass(frozen=True)
class Model:
    """What may go, of jobs and of objects (key → days since its last modification)."""

    prefix: str
    orphans: bool
    grace_days: int

    def deletable(self, jobs: list[Job], objects: dict[str, int]) -> set[str]:
        named = {self.prefix + job[3] for job in jobs if job[3]}
        kept = {self.prefix + job[3] for job in jobs if not is_expired(job)}
        old = {key for key, days in objects.items() if self.is_old_orphan(key, days)}
        return ({*objects} & (named - kept)) | {key for key in old if not self.forms(key) & named}

    def forms(self, key: str) -> set[str]:
        """The key, and the same name in other Unicode normalisations: a job may mean it."""
        name = key.removeprefix(self.prefix)
        forms = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
        return {key, *(self.prefix + form for form in forms)}

    def is_old_orphan(self, key: str, days: int) -> bool:
        """An object called like the prefix is nobody's data: a console's "folder"."""
        inside = key.startswith(self.prefix) and key != self.prefix
        return self.orphans and inside and days >= self.grace_days

    def rows_left(self, jobs: list[Job]) -> set[str]:
        """Job ids after `--delete-jobs`, once all that may go is gone."""
        return {job[0] for job in jobs if not is_expired(job) or not job[3]}


# --- What the writer did --------------------------------------------------------------------------


class State(NamedTuple):
    """A job as it was for certain from the moment `since` until `until` (Unix time), and perhaps
    from `born`, when that write began, until `died`, when the next one had returned."""

    job: Job
    since: float = -math.inf
    until: float = math.inf
    born: float = -math.inf
    died: float = math.inf


class History:
    """The jobs that there were, and when: after a write returned, before the next one began."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = {job[0]: [State(job)] for job in jobs}
        self.deleted: set[str] = set()  # by the writer
        self.writes: Counter[str] = Counter()

    def note(self, job_id: str, began: float, job: Job | None) -> None:
        """A write of this job, begun then, has returned now; None deleted it."""
        now, states = time.time(), self.jobs.setdefault(job_id, [])
        if states:
            last = states[-1]
            states[-1] = last._replace(until=min(last.until, began), died=min(last.died, now))
        if job is not None:
            states.append(State(job, since=now, born=began))

    def of(self, name: str) -> list[State]:
        states = [state for states in self.jobs.values() for state in states]
        return [state for state in states if state.job[3] == name]

    def referred(self, name: str, start: float, end: float, counts: Callable[[Job], bool]) -> bool:
        """Whether at every moment from `start` to `end` a job that counts named it, for certain."""
        reached = start
        for state in sorted(self.of(name), key=lambda state: state.since):
            if counts(state.job) and state.since <= reached:
                reached = max(reached, state.until)
        return reached >= end

    def vanished(self, name: str, start: float, end: float) -> bool:
        """Whether at no moment from `start` to `end` any job can have named it."""
        return all(state.died < start or state.born > end for state in self.of(name))

    def kept(self, name: str) -> bool:
        return any(not is_expired(state.job) for state in self.of(name))

    # The writes, over the writer's own connection.

    def change(self, cursor: Any, dice: random.Random, names: list[str]) -> None:
        """Insert a job, or delete or upgrade one."""
        self.writes["jobs written during the run"] += 1
        there, began = sorted({*self.jobs} - self.deleted - {"anchor"}), time.time()
        if dice.random() < 0.6 or not there:
            type_, done = dice.choice(REMAINING if dice.random() < 0.7 else EXPIRED)
            job = (f"w{len(self.jobs)}", done, type_, dice.choice(names))
            cursor.execute(f"INSERT INTO {TABLE} VALUES (%s, %s, %s, %s)", job)
            self.note(job[0], began, job)
            return
        job_id = dice.choice(there)
        if dice.random() < 0.6:
            if cursor.execute(f"DELETE FROM {TABLE} WHERE jobId = %s", (job_id,)):
                self.deleted.add(job_id)  # and not the purge
            self.note(job_id, began, None)
            return
        _, done, _, name = self.jobs[job_id][-1].job
        upgrade = f"UPDATE {TABLE} SET type = 'OFFICIAL' WHERE jobId = %s"
        found = cursor.execute(upgrade, (job_id,))  # or the purge has deleted it
        self.note(job_id, began, (job_id, done, "OFFICIAL", name) if found else None)

    def reload(self, cursor: Any, dice: random.Random) -> None:
        """Take rows away and put the same rows back a moment later: the whole table by TRUNCATE or
        DELETE, as a reload does, or some of it, as an upgrade does."""
        self.writes["rows taken away and put back during the run"] += 1
        cursor.execute(ROWS)
        rows: list[Job] = list(cursor.fetchall())
        began, away = time.time(), dice.choice(["TRUNCATE", "DELETE FROM", ""])
        if away:
            cursor.execute(f"{away} {TABLE}")
        else:
            rows = dice.sample(rows, min(len(rows), dice.choice([1, 10])))
            ids = [job[0] for job in rows] or [""]
            cursor.execute(f"DELETE FROM {TABLE} WHERE jobId IN %s", (ids,))
        for job_id in {*self.jobs} - self.deleted if away else [job[0] for job in rows]:
            self.note(job_id, began, None)  # if it is away at the end, the purge did it
        time.sleep(dice.choice([0, 0.02, 0.3]))
        for start in range(0, len(rows), 500):
            began, chunk = time.time(), rows[start : start + 500]
            cursor.executemany(f"INSERT INTO {TABLE} VALUES (%s, %s, %s, %s)", chunk)
            for job in chunk:
                self.note(job[0], began, job)


@contextmanager
def writing(scene: Scene, history: History, draw: Draw) -> Iterator[None]:
    """Within, jobs are written all the time, by a thread of its own."""
    done, dice = threading.Event(), random.Random(draw.seed)

    def write() -> None:
        limit = f"SET {scene.db.patience(0)}"
        with scene.box.database.admin(
            database=DATABASE, client_flag=CLIENT.FOUND_ROWS, init_command=limit
        ) as connection:
            cursor = connection.cursor()
            cursor.execute("SET time_zone = '+00:00', sql_mode = ''")
            while not done.wait(dice.random() * draw.pause):
                if dice.random() < draw.reloads:
                    history.reload(cursor, dice)
                else:
                    history.change(cursor, dice, draw.names)

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write) if draw.pause else None
        try:
            yield
        finally:
            done.set()
        if writer:
            writer.result()
    scene.injected.update({("writers", kind): count for kind, count in history.writes.items()})


# --- The schedule ---------------------------------------------------------------------------------


def random_name(dice: random.Random, names: list[str]) -> str:
    """A `sourceData`: up to 64 characters, of all that S3 allows in a key."""
    kind = dice.randrange(9)
    if kind == 0:
        return "".join(chr(dice.randrange(0x10000, 0x110000)) for _ in range(64))
    if kind <= 2:
        return "".join(dice.choice(ODD + "ab") for _ in range(dice.randrange(1, 9)))
    if kind == 3:
        points = (dice.randrange(0x10FFFF) for _ in range(dice.randrange(1, 12)))
        return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000 and p != 13) or "x"
    if kind == 4:
        return "return\rhere"[dice.randrange(6) :]
    if kind <= 6 and names:
        old = dice.choice(names)[:60]
        forms = old.upper(), old.lower(), old + " ", " " + old, unicodedata.normalize("NFD", old)
        return dice.choice([*forms, old + "\x00", old.replace("/", "//"), f"{old}%20"])[:64]
    return f"{'k/' * dice.randrange(3)}{dice.randrange(10_000):05}"


class Draw:
    """All that a seed decides before the run starts."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        dice = self.dice = random.Random(seed)
        prefix = dice.choice(["", "", "data/", "p é+%/", "a"])
        orphans = dice.random() < 0.5
        self.model = Model(prefix, orphans, dice.choice([0, 7]) if orphans else 7)
        self.versioned, self.delete_jobs = dice.random() < 0.2, dice.random() < 0.4
        self.dry = dice.random() < 0.08
        # The writer's longest pause (seconds), 0 for none; the share of reloads among its writes.
        self.pause, self.reloads = dice.choice([0, 0.03, 0.06]), dice.choice([0, 0, 0, 0.2])
        # Now and then the script as it is, with requests of 1,000 keys.
        many = dice.random() < 0.02 and not self.versioned  # an undo asks for every single key
        self.patches = {} if many or dice.random() < 0.2 else self._small(dice)
        names: list[str] = []
        for _ in range(60 if many else dice.choice([2, 10, 30, 60, 60])):
            names.append(random_name(dice, names))
        self.names = sorted({self._for_moto(name) for name in names})
        self._fill(dice, self.names + [f"m{n:05}" for n in range(2200 * many)], prefix)
        self.options = [*AS_OF, "--workers", str(dice.choice([1, 2, 4]))]
        self.options += [f"--prefix={prefix}"] if prefix else []
        grace = ["--orphans", "--orphan-grace-days", str(self.model.grace_days)]
        self.options += grace * orphans + ["--delete-jobs"] * self.delete_jobs

    def _small(self, dice: random.Random) -> dict[str, Any]:
        """Few keys and rows at a time, so that there are many batches and rounds; now and then
        little patience, with credentials that take longer, or deletes that are carried out late."""
        batch = dice.choice([2, 4, 10])
        patches = {"BATCH": batch, "ROWS_A_COMMIT": batch, "ROWS": dice.choice([3 * batch, 5000])}
        patches["ROUND_KEYS"] = batch * dice.choice([1, 3, 30])
        trouble = dice.random()
        if trouble < 0.15:
            return patches | {"MAX_RECHECK_AGE": 0.6, "SIGN": (dice.choice([0.1, 0.4]), 2.2)}
        return patches | ({"DELETE_TIMEOUT": 1} if trouble < 0.35 else {})

    def _for_moto(self, name: str) -> str:
        """moto can neither list the versions of a key that XML cannot carry, nor delete a key with
        a line feed singly."""
        return (NOT_XML.sub("", name) if self.versioned or "\n" in name else name) or "x"

    def _fill(self, dice: random.Random, names: list[str], prefix: str) -> None:
        """Most names get jobs, most of these are expired, most have an object."""
        self.jobs: list[Job] = [("anchor", None, "OFFICIAL", "anchor")]
        self.jobs.append(("empty", *EXPIRED[0][::-1], ""))
        self.objects = {prefix + "anchor": 1}
        for name in names:
            for _ in range(dice.choice([0, 1, 1, 1, 2, 3])):
                type_, done = dice.choice(EXPIRED if dice.random() < 0.75 else REMAINING)
                self.jobs.append((f"j{len(self.jobs)}", done, type_, name))
            if dice.random() < 0.85:
                self.objects[prefix + name] = dice.choice([1, 1, 30])
        for name in names[:5]:
            self.objects.setdefault(name, 30)

    def load(self, box: Sandbox) -> None:
        collation = self.dice.choice(["general_ci", "bin", "unicode_ci"])
        columns = COLUMNS.replace("general_ci", collation)
        if self.dice.random() < 0.5:  # the re-check then asks in another way
            columns = columns.replace("NOT NULL)", "NOT NULL, KEY (sourceData))")
        box.load(self.jobs, [], columns)
        if self.versioned:
            status = {"Status": "Enabled"}
            box.s3().put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration=status)
        for key, days in self.objects.items():
            box.put(key, age=timedelta(days=days))


@contextmanager
def chaos(scene: Scene, draw: Draw, running: list[Any]) -> Iterator[None]:
    """Database, server and process break: at some request to S3, or after some time."""
    dice, db, asked = draw.dice, scene.db, scene.s3
    freeze = partial(db.freeze, 0.4)
    actions: list[Any] = [db.break_connections, db.kill, partial(db.kill, "QUERY"), freeze]
    actions += [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
    at: dict[tuple[str, int], Any] = {}
    timers: list[threading.Timer] = []

    def act(action: Any) -> None:
        if callable(action):
            action()
        elif running:
            scene.signal(running[0], action)

    def watch(request: Request) -> None:
        for place in (("", len(asked.requests)), ("delete", asked.count("delete"))):
            act(at.pop(place, lambda: None))

    for action in dice.choices(actions, k=dice.choice([0, 0, 1, 1, 2])):
        if dice.random() < 0.7:
            what = dice.choice(["", "delete"])  # any request, or the deletes alone
            at[what, dice.randrange(1, 7 if what else 20)] = action
        else:
            timers.append(threading.Timer(dice.uniform(0.5, 1.5), act, [action]))
    asked.watch = watch
    sick = dice.choice(["wait_timeout = 1", db.patience(0.001), "read_only = 1"])
    with db.setting(sick) if dice.random() < 0.15 else nullcontext():
        for timer in timers:
            timer.start()
        yield
        for timer in timers:
            timer.cancel()
            timer.join()


def run_schedule(box: Sandbox, seed: int) -> Counter[tuple[str, str]]:
    """Play a schedule; how often which fault took place. Raises AssertionError."""
    draw = Draw(seed)
    with Scene(box, draw.patches) as scene:
        draw.load(box)
        if len(draw.objects) < 100:
            few = 1 if len(draw.objects) < 12 else 10
            scene.s3.page = draw.dice.choice([None, few, 10, 25])
        history = History(draw.jobs)
        run = disturbed(scene, draw, history)
        assert not (draw.dry and (run.gone or run.events))
        never_too_much(draw, history, run)
        if draw.delete_jobs:
            rows_in_order(scene, draw, history, run)
        scene.calm()
        converges(scene, draw)
        return scene.injected


def disturbed(scene: Scene, draw: Draw, history: History) -> Run:
    """The run that meets the faults and the writer."""
    dice, share = draw.dice, draw.dice.choice([0, 0.2, 0.5])
    of_deletes: dict[str, Fault] = {  # listings and the like meet none: runs get further
        kind: (tuple(place for place in where if place.startswith("delete")), act)
        for kind, (where, act) in S3_FAULTS.items()
    }
    faults = dice.choice([S3_FAULTS, of_deletes])
    if "DELETE_TIMEOUT" in draw.patches:
        lately = {LATE: (("delete", "delete-one"), late(dice.choice([1.2, 2.5, 5])))}
        scene.s3.faults |= lately
        faults, share = dice.choice([lately, faults | lately]), max(share, 0.2)
    scene.s3.choose = at_random(dice, share, 5, faults)
    scene.s3.latency = dice.choice([0, 0.05, 0.2])
    before, running = set(scene.box.live_keys()), list[Any]()
    with chaos(scene, draw, running), writing(scene, history, draw):
        running.append(scene.start(*draw.options, *["-n"] * draw.dry))
        run = scene.finish(running[0], before, 0)
    if "SIGN" in draw.patches:
        scene.injected["process", "credentials that took long"] += 1
    scene.injected["runs", f"ended with exit code {run.code}"] += 1
    return run


# --- What must hold -------------------------------------------------------------------------------


def never_too_much(draw: Draw, history: History, run: Run) -> None:
    """No key was to be deleted that a job held on to at its re-check, and none of an expired job
    whose rows were all away.

    The re-check took place before the intent was logged, no longer ago than the run admits; where
    requests may be too old to be sent after their intent, no longer ago than they may be.
    """
    age = run.limit if "SIGN" in draw.patches else run.age
    for event in run.events:
        if event["event"] != "delete":
            continue
        key, end, orphan = event["key"], as_seconds(event["time"]), event["reason"] == "orphan"
        start, name = end - age - 0.01, key.removeprefix(draw.model.prefix)
        held = history.referred(
            name, start, end, lambda job, any_=orphan: any_ or not is_expired(job)
        )
        assert not held, f"{key!r} was to be deleted though a job referred to it"
        assert key.startswith(draw.model.prefix)
        if orphan:
            assert draw.model.is_old_orphan(key, draw.objects[key]), event
        else:
            assert any(is_expired(state.job) for state in history.of(name)), event
            away = history.vanished(name, start, end)
            assert not away, f"{key!r} was to be deleted though all its rows were away"


def rows_in_order(scene: Scene, draw: Draw, history: History, run: Run) -> None:
    """The purge deleted rows only of expired jobs, whose object is gone or kept by another job; and
    said so in the log before."""
    left = {job_id for job_id, *_ in scene.db.sql(ROWS)}
    intents = [event for event in run.events if event["event"] == "delete-job"]
    for job_id in {*history.jobs} - left - history.deleted:
        job = history.jobs[job_id][-1].job
        assert is_expired(job), f"row {job} is gone"
        assert job_id in {event["job_id"] for event in intents}, f"{job} is gone without an intent"
        away = draw.model.prefix + job[3] not in run.after
        assert away or history.kept(job[3]), f"row {job} is gone, its object is there"
    done = {event["key"]: event["ends_at"] for event in run.events if event["event"] == "deleted"}
    for event in intents:
        key, name = event["key"], event["key"].removeprefix(draw.model.prefix)
        gone = key not in run.before or done.get(key, math.inf) < event["ends_at"]
        assert gone or history.kept(name), f"{event} before its object was gone"
        assert event["job_id"] in {state.job[0] for state in history.of(name)}
    assert run.was_killed or run.summary["jobs_deleted"] <= len(intents)


def converges(scene: Scene, draw: Draw) -> None:
    """A run without faults leaves what the model says; the next one finds nothing to do."""
    jobs = list(scene.db.sql("SET time_zone = '+00:00'", ROWS))
    objects = {key: draw.objects[key] for key in scene.box.live_keys()}
    second = scene.purge(*draw.options)
    right = {*objects} - draw.model.deletable(jobs, objects)
    assert (second.code, second.after) == (0, right), second
    assert not draw.delete_jobs or {*scene.box.job_ids()} == draw.model.rows_left(jobs)
    # Rows that --delete-jobs removed were the only thing that told an orphan.
    third = scene.purge(*draw.options)
    assert (third.code, third.counted("planned"), third.summary["jobs_deleted"]) == (0, 0, 0)
    if draw.versioned:
        undo(scene, draw)


def undo(scene: Scene, draw: Draw) -> None:
    """Run by run, newest first, the log brings back all that was hidden, whatever broke it off.

    Only where a delete was carried out late can a key have two markers, the second of which no
    answer named: such a key is left alone, and counted.
    """
    versions = scene.box.s3().list_object_versions(Bucket=BUCKET, EncodingType="url")
    stacked = Counter(item["Key"] for item in versions.get("DeleteMarkers", []))
    twice = [key for key, count in stacked.items() if count > 1]
    assert not twice or scene.injected["S3 delete", LATE], "delete markers are stacked"
    intents: dict[str, set[str]] = defaultdict(set)
    for event in scene.events():
        if event["event"] == "delete":
            intents[event["run_id"]].add(event["key"])
    prefix = [f"--prefix={draw.model.prefix}"] * bool(draw.model.prefix)
    for run_id, keys in reversed(intents.items()):
        hidden = keys - set(scene.box.live_keys())
        summary = scene.undo("--run-id", run_id, *prefix)
        live, told = set(scene.box.live_keys()), summary["restored"]
        assert told["expired"] + told["orphan"] == len(hidden & live)
        assert summary["retained"] == len(keys - live), "not restored, and not said so"
        assert summary["retained"] <= len(twice), "a run's own delete marker was left alone"
