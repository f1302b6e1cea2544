"""Random schedules: a table, a bucket, a policy, writers, faults, all drawn from one seed.

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
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

from faults import S3_FAULTS, Fault, Process, Run, Scene, as_seconds, at_random, late
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


# --- The model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """What may go, of jobs and of objects (key → days since its last modification)."""

    prefix: str
    orphans: bool
    grace_days: int

    @staticmethod
    def is_expired(job: Job) -> bool:
        _, completed, type_, _ = job
        return type_ == "TRIAL" and completed is not None and "1970" < completed < CUTOFF

    def remains(self, job: Job) -> bool:
        return not self.is_expired(job)

    def deletable(self, jobs: list[Job], objects: dict[str, int]) -> set[str]:
        named = {self.prefix + job[3] for job in jobs if job[3]}
        kept = {self.prefix + job[3] for job in jobs if not self.is_expired(job)}
        return {key for key in objects if key in named - kept} | {
            key for key in objects if key not in named and self.is_old_orphan(key, objects[key])
        }

    def is_old_orphan(self, key: str, days: int) -> bool:
        """An object called like the prefix is nobody's data: a console's "folder"."""
        inside = key.startswith(self.prefix) and key != self.prefix
        return self.orphans and inside and days >= self.grace_days

    def rows_left(self, jobs: list[Job]) -> set[str]:
        """Job ids after `--delete-jobs`, once all that may go is gone."""
        return {job[0] for job in jobs if not self.is_expired(job) or not job[3]}


# --- What happened --------------------------------------------------------------------------------


class State(NamedTuple):
    """A job as it was for certain from the moment `since` until `until` (Unix time), and perhaps
    from `born`, when that write began, until `died`, when the next one had returned."""

    job: Job
    since: float = -math.inf
    until: float = math.inf
    born: float = -math.inf
    died: float = math.inf


class History:
    """What the writers did, and when: after a write returned, before the next one began. A writer
    holds `writing` from before it looks until the write is noted."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = {job[0]: [State(job)] for job in jobs}
        self.deleted: set[str] = set()  # by a writer
        self.writing = threading.Lock()

    def note(self, job_id: str, began: float, job: Job | None) -> None:
        """A write of this job, begun then, has returned now; None deleted it."""
        now = time.time()
        states = self.jobs.setdefault(job_id, [])
        if states:
            last = states[-1]
            states[-1] = last._replace(until=min(last.until, began), died=min(last.died, now))
        self.deleted.discard(job_id)
        if job is None:
            self.deleted.add(job_id)
        else:
            states.append(State(job, since=now, born=began))

    def states(self) -> Iterator[State]:
        for states in self.jobs.values():
            yield from states

    def referred(self, name: str, start: float, end: float, counts: Callable[[Job], bool]) -> bool:
        """Whether at every moment from `start` to `end` a job that counts named it, for certain."""
        reached = start
        for state in sorted(self.states(), key=lambda state: state.since):
            if state.job[3] == name and counts(state.job) and state.since <= reached:
                reached = max(reached, state.until)
        return reached >= end

    def vanished(self, name: str, start: float, end: float) -> bool:
        """Whether at no moment from `start` to `end` any job can have named it."""
        named = [state for state in self.states() if state.job[3] == name]
        return all(state.died < start or state.born > end for state in named)


ROWS = f"SELECT jobId, CAST(completedAt AS CHAR), type, sourceData FROM {TABLE}"


class Writer(threading.Thread):
    """Inserts, changes and deletes jobs over a connection of its own, as `History` is told."""

    def __init__(self, scene: Scene, history: History, names: list[str], seed: str) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.error: Exception | None = None
        self.writes = 0
        self._scene, self._history, self._names = scene, history, names
        self._dice, self._seed = random.Random(seed), seed

    def run(self) -> None:
        try:
            with (
                self._scene.box.database.admin(
                    database=DATABASE,
                    client_flag=CLIENT.FOUND_ROWS,
                    init_command=f"SET {self._scene.db.patience(0)}",
                ) as connection,
                connection.cursor() as cursor,
            ):
                cursor.execute("SET time_zone = '+00:00', sql_mode = ''")
                while not self.stop.wait(self._pause()):
                    with self._history.writing:
                        self._write(cursor)
                    self.writes += 1
        except Exception as error:
            self.error = error

    def _pause(self) -> float:
        return self._dice.random() * 0.06

    def _write(self, cursor: Any) -> None:
        dice = self._dice
        began = time.time()
        if dice.random() < 0.6:
            type_, done = dice.choice(REMAINING if dice.random() < 0.7 else EXPIRED)
            job_id = f"w{self._seed}-{self.writes}"
            job = (job_id, done, type_, dice.choice(self._names))
            cursor.execute(f"INSERT INTO {TABLE} VALUES (%s, %s, %s, %s)", job)
            self._history.note(job_id, began, job)
            return
        mine = [key for key in self._history.jobs if key not in self._history.deleted]
        mine = [key for key in mine if key.startswith((f"w{self._seed}-", f"j{self._seed}-"))]
        if not mine:
            return
        job_id = dice.choice(mine)
        old = self._history.jobs[job_id][-1].job
        if dice.random() < 0.6:
            cursor.execute(f"DELETE FROM {TABLE} WHERE jobId = %s", (job_id,))
            self._history.note(job_id, began, None)
        else:
            job = (job_id, old[1], "OFFICIAL", old[3])
            found = cursor.execute(
                f"UPDATE {TABLE} SET type = 'OFFICIAL' WHERE jobId = %s", (job_id,)
            )
            self._history.note(job_id, began, job if found else None)
            if not found:  # the purge has deleted it
                self._history.deleted.discard(job_id)


class Reloader(Writer):
    """Takes rows away and puts the same rows back a moment later: the whole table by TRUNCATE or
    DELETE, as a reload does, or some of it, as an upgrade does."""

    def _pause(self) -> float:
        return self._dice.uniform(0, 0.3)

    def _write(self, cursor: Any) -> None:
        dice = self._dice
        cursor.execute(ROWS)
        rows: list[Job] = list(cursor.fetchall())
        some = dice.sample(rows, min(len(rows), dice.choice([1, 10])))
        away = dice.choice(["TRUNCATE", "DELETE FROM", ""])
        began = time.time()
        if away:
            some = rows
            cursor.execute(f"{away} {TABLE}")
        elif some:
            ids = [job[0] for job in some]
            cursor.execute(f"DELETE FROM {TABLE} WHERE jobId IN %s", (ids,))
        whose = list(self._history.jobs) if away else [job[0] for job in some]
        for job_id in whose:
            if job_id not in self._history.deleted:
                self._history.note(job_id, began, None)
                self._history.deleted.discard(job_id)  # if it is away at the end, the purge did it
        time.sleep(dice.choice([0, 0.02, 0.3]))
        for start in range(0, len(some), 500):
            began, chunk = time.time(), some[start : start + 500]
            cursor.executemany(f"INSERT INTO {TABLE} VALUES (%s, %s, %s, %s)", chunk)
            for job in chunk:
                self._history.note(job[0], began, job)


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


@dataclass
class Draw:
    """All that a seed decides before the run starts."""

    seed: int
    dice: random.Random = field(init=False)
    model: Model = field(init=False)
    jobs: list[Job] = field(init=False)
    objects: dict[str, int] = field(init=False)
    names: list[str] = field(init=False)  # that writers use

    def __post_init__(self) -> None:
        dice = self.dice = random.Random(self.seed)
        prefix = dice.choice(["", "", "data/", "p é+%/", "a"])
        orphans = dice.random() < 0.5
        self.model = Model(prefix, orphans, dice.choice([0, 7]) if orphans else 7)
        self.versioned, self.delete_jobs = dice.random() < 0.2, dice.random() < 0.4
        self.dry = dice.random() < 0.08
        # Now and then the script as it is, with requests of 1,000 keys.
        many = dice.random() < 0.02 and not self.versioned  # an undo asks for every single key
        self.patches: dict[str, Any] = {}
        if not many and dice.random() < 0.8:
            self.patches = self._small(dice)
        count = 2200 if many else dice.choice([2, 10, 30, 60, 60])
        names: list[str] = []
        for _ in range(min(count, 60)):
            names.append(random_name(dice, names))
        if many:
            names += [f"m{n:05}" for n in range(count)]
        self._fill(dice, sorted({self._for_moto(name) for name in names}), prefix)

    def _small(self, dice: random.Random) -> dict[str, Any]:
        """Few keys and rows at a time, so that there are many batches and rounds; now and then
        little patience, with credentials that take longer, or deletes that are carried out late."""
        batch = dice.choice([2, 4, 10])
        patches = {"BATCH": batch, "ROWS_A_COMMIT": batch, "ROWS": dice.choice([3 * batch, 5000])}
        patches["ROUND_KEYS"] = batch * dice.choice([1, 3, 30])
        trouble = dice.random()
        if trouble < 0.15:
            patches |= {"MAX_RECHECK_AGE": 0.6, "SIGN": (dice.choice([0.1, 0.4]), 2.2)}
        elif trouble < 0.35:
            patches["DELETE_TIMEOUT"] = 1
        return patches

    def _for_moto(self, name: str) -> str:
        """moto can neither list the versions of a key that XML cannot carry, nor delete a key with
        a line feed singly."""
        if self.versioned or "\n" in name:
            name = NOT_XML.sub("", name)
        return name or "x"

    def _fill(self, dice: random.Random, names: list[str], prefix: str) -> None:
        """Most names get jobs, most of these are expired, most have an object."""
        self.jobs = [("j-anchor", None, "OFFICIAL", "anchor"), ("j-empty", *EXPIRED[0][::-1], "")]
        self.objects = {prefix + "anchor": 1}
        for name in names:
            for _ in range(dice.choice([0, 1, 1, 1, 2, 3])):
                type_, done = dice.choice(EXPIRED if dice.random() < 0.75 else REMAINING)
                # A writer may change only jobs of its own: there are two.
                job_id = f"j{dice.randrange(2)}-{len(self.jobs)}"
                self.jobs.append((job_id, done, type_, name))
            if dice.random() < 0.85:
                self.objects[prefix + name] = dice.choice([1, 1, 30])
        if prefix:
            for name in names[:5]:
                self.objects.setdefault(name, 30)
        self.names = names[:60]

    @property
    def options(self) -> list[str]:
        options = [*AS_OF, "--workers", str(self.dice.choice([1, 2, 4]))]
        options += [f"--prefix={self.model.prefix}"] if self.model.prefix else []
        if self.model.orphans:
            options += ["--orphans", "--orphan-grace-days", str(self.model.grace_days)]
        return options + ["--delete-jobs"] * self.delete_jobs

    def load(self, box: Sandbox) -> None:
        columns = COLUMNS.replace(
            "general_ci", self.dice.choice(["general_ci", "bin", "unicode_ci"])
        )
        if self.dice.random() < 0.5:  # the re-check then asks in another way
            columns = columns.replace("NOT NULL)", "NOT NULL, KEY (sourceData))")
        box.load(self.jobs, [], columns)
        if self.versioned:
            status = {"Status": "Enabled"}
            box.s3().put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration=status)
        for key, days in self.objects.items():
            box.put(key, age=timedelta(days=days))


def table(scene: Scene) -> list[Job]:
    """The job table as it is."""
    return list(
        scene.db.sql(
            "SET time_zone = '+00:00'",
            ROWS,
        )
    )


class Chaos:
    """What breaks during the run, at which request to S3 or after how long."""

    def __init__(self, scene: Scene, dice: random.Random) -> None:
        self._scene, self._dice = scene, dice
        self.process: Process | None = None
        self.writers: list[Writer] = []  # that begin with the listing
        self._timers: list[threading.Thread] = []
        self._at: dict[tuple[str, int], Callable[[], None]] = {}
        actions: list[Callable[[], None]] = [
            scene.db.break_connections,
            scene.db.kill,
            lambda: scene.db.kill("QUERY"),
            lambda: scene.db.freeze(0.4),
        ]
        for each in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            actions.append(lambda signum=each: self._signal(signum))
        for _ in range(dice.choice([0, 0, 1, 1, 2])):
            action = dice.choice(actions)
            if dice.random() < 0.7:
                what = dice.choice(["", "delete"])  # any request, or the deletes alone
                self._at[what, dice.randrange(1, 7 if what else 20)] = action
            else:
                timer = threading.Timer(dice.uniform(0.3, 1.0), action)
                timer.daemon = True
                self._timers.append(timer)

    def _signal(self, signum: int) -> None:
        if self.process is not None:
            self._scene.signal(self.process, signum)

    def watch(self, request: Request) -> None:
        s3 = self._scene.s3
        for place in (("", len(s3.requests)), ("delete", s3.count("delete"))):
            action = self._at.pop(place, None)
            if action is not None:
                action()
        if request.operation == "list":
            self._start(self.writers)

    def _start(self, writers: list[Writer]) -> None:
        """The writers begin now; the references are read by then."""
        while writers:
            with suppress(IndexError):  # another request was quicker
                writers.pop().start()

    @contextmanager
    def settings(self) -> Iterator[None]:
        """A server that is not as it should be, now and then."""
        sick = ["wait_timeout = 1", self._scene.db.patience(0.001), "read_only = 1"]
        with ExitStack() as stack:
            if self._dice.random() < 0.15:
                stack.enter_context(self._scene.db.setting(self._dice.choice(sick)))
            yield

    def __enter__(self) -> Chaos:
        for timer in self._timers:
            timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self._timers:
            timer.cancel()  # type: ignore[attr-defined]
            timer.join()


def run_schedule(box: Sandbox, seed: int) -> Counter[tuple[str, str]]:
    """Play a schedule; how often which fault took place. Raises AssertionError."""
    draw = Draw(seed)
    with Scene(box, draw.patches, fork=True) as scene:
        draw.load(box)
        scene.s3.page = (
            draw.dice.choice([None, 1 if len(draw.objects) < 12 else 10, 10, 25])
            if len(draw.objects) < 100
            else None
        )
        options = draw.options
        history = History(draw.jobs)
        run = disturbed(scene, draw, history, options)
        if draw.dry:
            assert not run.gone
            assert not run.events
        never_too_much(draw, history, run)
        if draw.delete_jobs:
            rows_in_order(scene, draw, history, run)
        scene.calm()
        converges(scene, draw, options)
        return scene.injected


def disturbed(scene: Scene, draw: Draw, history: History, options: list[str]) -> Run:
    """The run that meets the faults and the writers."""
    dice, share = draw.dice, draw.dice.choice([0, 0.2, 0.5])
    writers = [Writer(scene, history, draw.names, str(n)) for n in range(dice.choice([0, 1, 2]))]
    if dice.random() < 0.25:
        writers.append(Reloader(scene, history, draw.names, f"reload {draw.seed}"))
    chaos = Chaos(scene, dice)
    if draw.patches.get("SIGN"):
        scene.injected["process", "credentials that took long"] += 1
    faults = dice.choice([S3_FAULTS, of_deletes(S3_FAULTS)])
    if "DELETE_TIMEOUT" in draw.patches:
        lately = {LATE: (("delete", "delete-one"), late(dice.choice([1.2, 2.5, 5])))}
        scene.s3.faults |= lately
        faults = dice.choice([lately, faults | lately])
        share = max(share, 0.2)
    scene.s3.choose = at_random(dice, share, 5, faults)
    scene.s3.latency, scene.s3.watch = dice.choice([0, 0.05, 0.2]), chaos.watch
    before = set(scene.box.live_keys())
    if dice.random() < 0.5:
        chaos.writers = writers[:]
    else:
        for writer in writers:
            writer.start()
    with chaos.settings(), chaos:
        chaos.process = scene.start(*options, *["-n"] * draw.dry)
        try:
            run = scene.finish(chaos.process, before, 0)
        finally:
            chaos.writers.clear()
            for writer in writers:
                writer.stop.set()
                if writer.ident:
                    writer.join()
    assert not [writer.error for writer in writers if writer.error]
    scene.injected["runs", f"ended with exit code {run.code}"] += 1
    for writer in writers:
        kind = "jobs written during the run"
        if isinstance(writer, Reloader):
            kind = "rows taken away and put back during the run"
        scene.injected["writers", kind] += writer.writes
    return run


LATE = "delete carried out after the client gave up"


def of_deletes(faults: dict[str, Fault]) -> dict[str, Fault]:
    """The same faults, but listings and the like meet none: runs get further."""
    return {
        kind: (tuple(place for place in where if place.startswith("delete")), act)
        for kind, (where, act) in faults.items()
    }


def never_too_much(draw: Draw, history: History, run: Run) -> None:
    """No key was to be deleted that a job held on to at its re-check, and none of an expired job
    whose rows were all away.

    The re-check took place before the intent was logged, no longer ago than the run admits; where
    requests may be too old to be sent after their intent, no longer ago than they may be.
    """
    age = run.limit if draw.patches.get("SIGN") else run.age
    for event in run.events:
        if event["event"] != "delete":
            continue
        end = as_seconds(event["time"])
        start = end - age - 0.01
        name = event["key"].removeprefix(draw.model.prefix)
        orphan = event["reason"] == "orphan"
        counts = (lambda job: True) if orphan else draw.model.remains
        held = history.referred(name, start, end, counts)
        assert not held, f"{event['key']!r} was to be deleted though a job referred to it"
        if orphan:
            days = draw.objects[event["key"]]
            assert draw.model.is_old_orphan(event["key"], days), event
        else:
            was = [s.job for s in history.states() if s.job[3] == name]
            assert any(draw.model.is_expired(job) for job in was), event
            away = history.vanished(name, start, end)
            assert not away, f"{event['key']!r} was to be deleted though all its rows were away"
        assert event["key"].startswith(draw.model.prefix)


def rows_in_order(scene: Scene, draw: Draw, history: History, run: Run) -> None:
    """The purge deleted rows only of expired jobs, whose object is gone or kept by another job; and
    said so in the log before."""
    left = {job[0] for job in table(scene)}
    intents = [event for event in run.events if event["event"] == "delete-job"]
    intended = {event["job_id"] for event in intents}
    for job_id, states in history.jobs.items():
        if job_id in left or job_id in history.deleted:
            continue
        job = states[-1].job
        assert draw.model.is_expired(job), f"row {job} is gone"
        assert job_id in intended, f"row {job} is gone without an intent in the log"
        key = draw.model.prefix + job[3]
        users = [s for s in history.states() if s.job[3] == job[3]]
        kept = any(not draw.model.is_expired(state.job) for state in users)
        assert key not in run.after or kept, f"row {job} is gone, its object is there"
    done = {event["key"]: event["ends_at"] for event in run.events if event["event"] == "deleted"}
    for event in intents:
        key = event["key"]
        users = [s.job for s in history.states() if draw.model.prefix + s.job[3] == key]
        kept = any(not draw.model.is_expired(job) for job in users)
        gone = key not in run.before or done.get(key, math.inf) < event["ends_at"]
        assert kept or gone, f"{event} before its object was gone"
        assert event["job_id"] in {job[0] for job in users}
    if not run.was_killed:
        assert run.summary["jobs_deleted"] <= len(intents)


def converges(scene: Scene, draw: Draw, options: list[str]) -> None:
    """A run without faults leaves what the model says; the next one finds nothing to do."""
    jobs = table(scene)
    objects = {key: draw.objects[key] for key in scene.box.live_keys()}
    right = set(objects) - draw.model.deletable(jobs, objects)
    second = scene.purge(*options)
    assert (second.code, second.after) == (0, right), second
    if draw.delete_jobs:
        assert set(scene.box.job_ids()) == draw.model.rows_left(jobs)
    # Rows that --delete-jobs removed were the only thing that told an orphan.
    third = scene.purge(*options)
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
    intents: dict[str, set[str]] = {}
    for event in scene.events():
        if event["event"] == "delete":
            intents.setdefault(event["run_id"], set()).add(event["key"])
    prefix = [f"--prefix={draw.model.prefix}"] if draw.model.prefix else []
    for run_id, keys in reversed(intents.items()):
        hidden = keys - set(scene.box.live_keys())
        summary = scene.undo("--run-id", run_id, *prefix)
        live = set(scene.box.live_keys())
        assert summary["restored"]["expired"] + summary["restored"]["orphan"] == len(hidden & live)
        assert summary["retained"] == len(keys - live), "not restored, and not said so"
        assert summary["retained"] <= len(twice), "a run's own delete marker was left alone"
