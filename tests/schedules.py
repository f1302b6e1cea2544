"""Random schedules: a table, a bucket, a policy, writers, faults, all drawn from one seed.

`run_schedule(box, seed)` plays one, and raises AssertionError if anything is wrong. What is right,
`Model` decides: a few lines that know nothing of streams, batches or SQL.
"""

from __future__ import annotations

import math
import random
import re
import signal
import subprocess
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from faults import Process, Run, Scene, at_random, keys_of
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
        return self.orphans and key.startswith(self.prefix) and days >= self.grace_days

    def rows_left(self, jobs: list[Job]) -> set[str]:
        """Job ids after `--delete-jobs`, once all that may go is gone."""
        return {job[0] for job in jobs if not self.is_expired(job) or not job[3]}


# --- What happened --------------------------------------------------------------------------------


class State(NamedTuple):
    """A job as it was for certain from the moment `since` until `until` (Unix time)."""

    job: Job
    since: float
    until: float


class History:
    """What the writers did, and when: after a write returned, before the next one began."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = {job[0]: [State(job, -math.inf, math.inf)] for job in jobs}
        self.deleted: set[str] = set()  # by a writer
        self._lock = threading.Lock()

    def note(self, job_id: str, began: float, job: Job | None) -> None:
        """A write of this job, begun then, has returned now; None deleted it."""
        with self._lock:
            states = self.jobs.setdefault(job_id, [])
            if states:
                states[-1] = states[-1]._replace(until=min(states[-1].until, began))
            if job is None:
                self.deleted.add(job_id)
            else:
                states.append(State(job, time.time(), math.inf))

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


class Writer(threading.Thread):
    """Inserts, changes and deletes jobs over a connection of its own, as `History` is told."""

    def __init__(self, box: Sandbox, history: History, names: list[str], seed: str) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.error: Exception | None = None
        self.writes = 0
        self._box, self._history, self._names = box, history, names
        self._dice, self._seed = random.Random(seed), seed

    def run(self) -> None:
        try:
            with (
                self._box.database.admin(
                    database=DATABASE,
                    client_flag=CLIENT.FOUND_ROWS,
                    init_command="SET max_statement_time = 0",
                ) as connection,
                connection.cursor() as cursor,
            ):
                cursor.execute("SET time_zone = '+00:00', sql_mode = ''")
                while not self.stop.wait(self._dice.random() * 0.06):
                    self._write(cursor)
        except Exception as error:
            self.error = error

    def _write(self, cursor: Any) -> None:
        dice = self._dice
        began = time.time()
        if dice.random() < 0.6:
            type_, done = dice.choice(REMAINING if dice.random() < 0.7 else EXPIRED)
            job_id = f"w{self._seed}-{self.writes}"
            job = (job_id, done, type_, dice.choice(self._names))
            cursor.execute(f"INSERT INTO {TABLE} VALUES (%s, %s, %s, %s)", job)
            self._history.note(job_id, began, job)
        else:
            mine = [key for key in list(self._history.jobs) if key not in self._history.deleted]
            mine = [key for key in mine if key.startswith((f"w{self._seed}-", f"j{self._seed}-"))]
            if not mine:
                return
            job_id = dice.choice(mine)
            old = self._history.jobs[job_id][-1].job
            if dice.random() < 0.6:
                found = cursor.execute(f"DELETE FROM {TABLE} WHERE jobId = %s", (job_id,))
                self._history.note(job_id, began, None)
            else:
                job = (job_id, old[1], "OFFICIAL", old[3])
                found = cursor.execute(
                    f"UPDATE {TABLE} SET type = 'OFFICIAL' WHERE jobId = %s", (job_id,)
                )
                self._history.note(job_id, began, job if found else None)
                if not found:  # the purge has deleted it
                    self._history.deleted.discard(job_id)
        self.writes += 1


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
        self.batch = None if many or dice.random() < 0.2 else dice.choice([2, 4, 10])
        count = 2200 if many else dice.choice([1, 5, 20, 60])
        names: list[str] = []
        for _ in range(min(count, 60)):
            names.append(random_name(dice, names))
        if many:
            names += [f"m{n:05}" for n in range(count)]
        self._fill(dice, sorted({self._for_moto(name) for name in names}), prefix)

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
            f"SELECT jobId, CAST(completedAt AS CHAR), type, sourceData FROM {TABLE}",
        )
    )


class Chaos:
    """What breaks during the run, at which request to S3 or after how long."""

    def __init__(self, scene: Scene, dice: random.Random) -> None:
        self._scene, self._dice = scene, dice
        self.process: Process | None = None
        self._timers: list[threading.Thread] = []
        self._at: dict[int, Callable[[], None]] = {}
        actions: list[Callable[[], None]] = [
            scene.db.break_connections,
            scene.db.kill,
            lambda: scene.db.kill("QUERY"),
            lambda: scene.db.freeze(0.4),
            lambda: self._signal(signal.SIGTERM),
            lambda: self._signal(signal.SIGKILL),
            lambda: self._signal(signal.SIGINT),
        ]
        for _ in range(dice.choice([0, 0, 1, 1, 2])):
            action = dice.choice(actions)
            if dice.random() < 0.6:
                self._at[dice.randrange(1, 12)] = action
            else:
                timer = threading.Timer(dice.uniform(0.3, 1.0), action)
                timer.daemon = True
                self._timers.append(timer)

    def _signal(self, signum: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signum)
            self._scene.injected["process", signal.Signals(signum).name] += 1

    def watch(self, _: Request) -> None:
        action = self._at.pop(len(self._scene.s3.requests), None)
        if action is not None:
            action()

    @contextmanager
    def settings(self) -> Iterator[None]:
        """A server that is not as it should be, now and then."""
        sick: list[dict[str, float]] = [
            {"wait_timeout": 1}, {"max_statement_time": 0.001}, {"read_only": 1},
        ]  # fmt: skip
        with ExitStack() as stack:
            if self._dice.random() < 0.15:
                stack.enter_context(self._scene.db.setting(**self._dice.choice(sick)))
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
    with Scene(box, draw.batch, fork=True) as scene:
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
        never_too_much(scene, draw, history, run)
        if draw.delete_jobs:
            rows_in_order(scene, draw, history, run)
        scene.calm()
        converges(scene, draw, options)
        return scene.injected


def disturbed(scene: Scene, draw: Draw, history: History, options: list[str]) -> Run:
    """The run that meets the faults and the writers."""
    dice = draw.dice
    writers = [
        Writer(scene.box, history, draw.names, str(n)) for n in range(dice.choice([0, 1, 2]))
    ]
    chaos = Chaos(scene, dice)
    scene.s3.choose = at_random(dice, dice.choice([0, 0.2, 0.5]), most=5)
    scene.s3.latency, scene.s3.watch = dice.choice([0, 0.05]), chaos.watch
    before = set(scene.box.live_keys())
    for writer in writers:
        writer.start()
    with chaos.settings(), chaos:
        chaos.process = scene.start(*options, *["-n"] * draw.dry)
        try:
            run = scene.finish(chaos.process, before, 0)
        finally:
            for writer in writers:
                writer.stop.set()
                writer.join()
    assert not [writer.error for writer in writers if writer.error]
    scene.injected["writers", "jobs written during the run"] += sum(w.writes for w in writers)
    return run


def never_too_much(scene: Scene, draw: Draw, history: History, run: Run) -> None:
    """No key was asked to be deleted that a job held on to at its re-check.

    The re-check took place before the intent was logged, no longer ago than the run admits; of a
    run that was killed, within 5 seconds (no re-check of so small a table takes long).
    """
    age = run.summary["max_recheck_age_seconds"] + 0.01 if run.out else 5.0
    for event in run.events:
        if event["event"] != "delete":
            continue
        end = as_seconds(event["time"])
        name = event["key"].removeprefix(draw.model.prefix)
        orphan = event["reason"] == "orphan"
        counts = (lambda job: True) if orphan else draw.model.remains
        held = history.referred(name, end - age, end, counts)
        assert not held, f"{event['key']!r} was deleted though a job referred to it"
        if orphan:
            days = draw.objects[event["key"]]
            assert draw.model.is_old_orphan(event["key"], days), event
        else:
            was = [s.job for s in history.states() if s.job[3] == name]
            assert any(draw.model.is_expired(job) for job in was), event
        assert event["key"].startswith(draw.model.prefix)
    deletes = [r for r in scene.s3.requests if r.operation in ("delete", "delete-one")]
    asked = {key for request in deletes for key in keys_of(request)}
    assert asked <= set(run.keys("delete")), "asked for without an intent"


def as_seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def rows_in_order(scene: Scene, draw: Draw, history: History, run: Run) -> None:
    """The purge deleted rows only of expired jobs, whose object is gone or kept by another job."""
    left = {job[0] for job in table(scene)}
    for job_id, states in history.jobs.items():
        if job_id in left or job_id in history.deleted:
            continue
        job = states[-1].job
        assert draw.model.is_expired(job), f"row {job} is gone"
        key = draw.model.prefix + job[3]
        users = [s for s in history.states() if s.job[3] == job[3]]
        kept = any(not draw.model.is_expired(state.job) for state in users)
        assert key not in run.after or kept, f"row {job} is gone, its object is there"


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
    """No key has two markers; the log, whatever broke it off, brings back all that it confirms."""
    versions = scene.box.s3().list_object_versions(Bucket=BUCKET, EncodingType="url")
    stacked = Counter(item["Key"] for item in versions.get("DeleteMarkers", []))
    assert not [key for key, count in stacked.items() if count > 1], "delete markers are stacked"
    recorded = {event["key"] for event in scene.events() if event["event"] == "deleted"}
    prefix = [f"--prefix={draw.model.prefix}"] if draw.model.prefix else []
    if recorded:
        command = scene.command("--undo", str(scene.audit), *prefix)
        subprocess.run(command, env=scene.environment(), check=True, capture_output=True)
        assert recorded <= set(scene.box.live_keys())
