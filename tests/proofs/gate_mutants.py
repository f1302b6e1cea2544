"""Break the script around the gate, and the gate itself.

    .venv/bin/python tests/proofs/gate_mutants.py [--around N] [--seed N] [--within] [--write]

- Around: N random mutants of all code outside the gate. Each plans, re-checks and deletes against
  the fakes of `fakes.py`, in a process of its own. None may delete what must stay.
- Sabotage: each entry of SABOTAGE, in the same way.
- Within (slow): every condition, number and SQL clause of the gate is changed, one at a time. A
  fast test of test_gate.py must fail, or one on a real server.

Exit code 1: something went that must stay, or a mutant of the gate survived that is not in KNOWN.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import hypothesis.strategies  # noqa: F401
import page
import pymysql
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "world"))
import fakes
import sandbox  # noqa: F401  # here, so that no child has to
from fakes import OLD, Job

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "retention_purge.py"
SECONDS = 20  # that a mutant may take
LONG_AGO, LATELY = "2019-01-01 00:00:00", "2019-05-01 00:00:00"
LINES = SCRIPT.read_text().splitlines()
BANNERS = [n for n, line in enumerate(LINES, 1) if line.startswith("# --- ")]
(START,) = [n for n in BANNERS if "gate" in LINES[n - 1]]
GATE = range(START, min(n for n in BANNERS if n > START))


# --- The world ------------------------------------------------------------------------------------


class Scene(NamedTuple):
    """How a mutant is run. `undo`: the run is then taken back, in a versioned bucket."""

    name: str
    options: tuple[str, ...]
    indexed: bool
    undo: bool


SCENES = [
    Scene("all", ("--orphans", "--orphan-grace-days", "7", "--delete-jobs"), True, False),
    Scene("least", (), False, True),
]
FREE = [f"free{n}" for n in range(12)]  # of expired jobs alone
KEPT = [f"kept{n}" for n in range(30)]  # of OFFICIAL jobs
ODD = [Job("odd1", None, "TRIAL", "open"), Job("odd2", LONG_AGO, "trial", "lower"),
       Job("odd3", LONG_AGO, "TRIAL ", "padded"), Job("odd4", LONG_AGO, None, "typeless"),
       Job("odd5", LATELY, "TRIAL", "recent"), Job("odd6", "2019-03-05 00:00:00", "TRIAL", "edge"),
       Job("odd7", LONG_AGO, "OFFICIAL", "twin"),
       Job("odd8", LONG_AGO, "BETA", "free0 ")]  # fmt: skip
EXPIRED = [Job(f"e{n}", LONG_AGO, "TRIAL", name) for n, name in enumerate(FREE)]
EXPIRED += [Job("e97", LONG_AGO, "TRIAL", "TWIN"), Job("e98", LONG_AGO, "TRIAL", "gone"),
            Job("e99", LONG_AGO, "TRIAL", "kept1"), Job("e96", LONG_AGO, "TRIAL", "c\x01d"),
            Job("e95", LONG_AGO, "TRIAL", "taken"), Job("e94", LONG_AGO, "TRIAL", "vanished"),
            Job("e93", LONG_AGO, "TRIAL", "promoted")]  # fmt: skip
JOBS = [*(Job(f"k{n}", LONG_AGO, "OFFICIAL", name) for n, name in enumerate(KEPT)), *ODD, *EXPIRED]
ORPHANS = [f"orphan{n}" for n in range(6)]
YOUNG = ["young0", "young1", "young2"]
OUTSIDE = ["in", "in/", "inn/free0", "free0", "other/free1", "IN/free2", "i", "jn/x"]
# Between plan and re-check these jobs come, go and change.
CHANGE = [
    "INSERT INTO jobs VALUES ('n1', NULL, 'TRIAL', 'taken'), ('n2', NULL, 'BETA', 'adopted')",
    "DELETE FROM jobs WHERE jobId = 'e94'",
    "UPDATE jobs SET type = 'OFFICIAL' WHERE jobId = 'e93'",
]
INSIDE = [*(job.name for job in JOBS if job.name != "gone"), *ORPHANS, *YOUNG, "adopted"]
MAY_GO = {"all": {f"in/{name}" for name in (*FREE, "TWIN", *ORPHANS)}}
MAY_GO["least"] = {f"in/{name}" for name in (*FREE, "TWIN")}
GREY = {"all": {"in/vanished"}, "least": {*()}}  # an expired key by plan, an orphan by now
ROWS_MAY_GO = {"all": {job.job_id for job in EXPIRED} - {"e93", "e94"}, "least": {*()}}


def fill(bucket: fakes.Bucket) -> None:
    young = datetime.now(UTC) - timedelta(days=1)
    for key in [*OUTSIDE, *(f"in/{name}" for name in INSIDE)]:
        if bucket.versioned:
            bucket.put(key, OLD)  # an older version
        bucket.put(key, young if key.removeprefix("in/") in YOUNG else OLD)
    if bucket.versioned:
        bucket.put("in/hidden")
        bucket.hide("in/hidden")


class Outcome(NamedTuple):
    """What came of a mutant in a scene."""

    code: int | str  # exit code, or what it crashed with
    gone: list[str]
    rows: list[str]
    wrong: list[str]  # what went that must stay
    live: list[str]  # at the end, after the undo


def judge(
    code: Any, scene: Scene, bucket: fakes.Bucket, table: fakes.Table, gone: set[str]
) -> Outcome:
    """The oracle: it knows the world, not the script."""
    rows = {job.job_id for job in JOBS} - table.job_ids
    lost = {f"in/{name}" for name in INSIDE} | {*OUTSIDE}
    gone = gone | (lost - bucket.live if not scene.undo else set())
    wrong = sorted(gone - MAY_GO[scene.name] - GREY[scene.name])
    wrong += [f"version {key}" for key, _ in bucket.removed]
    wrong += [f"bucket {name}" for name, _ in bucket.asked if name != bucket.name]
    wrong += [f"row {row}" for row in sorted(rows - ROWS_MAY_GO[scene.name] - {"e94"})]
    return Outcome(code, sorted(gone), sorted(rows), wrong, sorted(bucket.live))


SESSION = boto3.Session("AKIA", "secret", region_name="eu-west-1")
SESSION.client("s3", endpoint_url="http://127.0.0.1:9")  # reads botocore's files, once
TIME = time.sleep
Patch = Callable[[Any], Any]


def play(code: types.CodeType, scene: Scene, patch: Patch, tell: Callable[[Outcome], None]) -> None:
    """Run the script, and tell what came of it, even if it takes too long. Never returns."""
    bucket = fakes.Bucket(versioned=scene.undo)
    table, gone = fakes.Table(JOBS, indexed=scene.indexed), set[str]()
    fill(bucket)
    before = {*bucket.live}

    def change() -> None:
        table.before_ask = lambda: None
        for sql in CHANGE:
            table.live.execute(sql)

    def end(code: Any) -> None:
        gone.update(before - bucket.live if not scene.undo or "undo" not in now else ())
        tell(judge(code, scene, bucket, table, gone))
        os._exit(0)

    now, table.before_ask = ["purge"], change
    signal.signal(signal.SIGALRM, lambda *_: end("too long"))
    signal.alarm(SECONDS)
    pymysql.connect = lambda **_: table  # type: ignore[assignment]
    boto3.Session = lambda **_: SESSION  # type: ignore[misc, assignment]
    time.sleep = lambda seconds: TIME(min(seconds, 0.01))
    home = tempfile.mkdtemp(prefix="mutant-")
    os.environ |= {"AWS_ENDPOINT_URL_S3": bucket.url, "RETENTION_PURGE_DB_PASSWORD": "x"}
    os.environ["TMPDIR"] = home
    audit, place = f"{home}/audit", ("--bucket", bucket.name)
    login = ("--db-host", "127.0.0.1", "--db-user", "u", "--db-name", "ndvr", "--db-table", "jobs")
    as_of = ("--as-of", "2019-06-03T00:00:00Z", "--max-percent", "100", "--retention-days", "90")
    purge = (*login, *place, "--prefix", "in/", *as_of, "--audit-log", audit, *scene.options)
    ended: Any = 0
    try:
        module = types.ModuleType("retention_purge")
        module.__file__ = str(SCRIPT)
        sys.modules["retention_purge"] = module
        exec(code, module.__dict__)
        patch(module)
        for arguments in (purge, ("--undo", audit, *place))[: 1 + scene.undo]:
            gc.collect()  # closes the audit log of the run before
            now.append("undo" if "--undo" in arguments else "")
            try:
                module.main.main([*arguments], "purge")
            except SystemExit as error:
                ended = ended or error.code
            gone.update(before - bucket.live if "undo" not in now else ())
    except BaseException as error:
        ended = f"crash: {type(error).__name__}"
    shutil.rmtree(home, ignore_errors=True)
    end(ended)


def outcome(code: types.CodeType, scene: Scene, patch: Patch = lambda module: None) -> Outcome:
    """What the script does in a child of this process."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_RDWR)
        if not os.environ.get("SHOW"):
            os.dup2(null, 1)
            os.dup2(null, 2)
        play(code, scene, patch, lambda told: os.write(send, json.dumps(told).encode()) and None)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return Outcome(*json.loads(told)) if told else Outcome("no word", [], [], ["no word"], [])


# --- Mutants --------------------------------------------------------------------------------------

SWAPS: dict[type, list[type]] = {
    ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.Lt],
    ast.GtE: [ast.Gt, ast.Lt], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is],
}  # fmt: skip
# Outside the gate, and yet what the gate says that it trusts: what the command line was told, the
# constants above it, and a few helpers that it names. And text that nobody acts on.
TRUSTED = {"Wishes", "Reason", "query", "database_errors", "s3_config", "PurgeError", "Number",
           "moment", "option", "utf8"}  # fmt: skip
Mutant = tuple[int, str, Callable[[], None], Callable[[], None]]  # line, what, do, undo


Change = tuple[Callable[[], None], Callable[[], None]]  # do it, undo it


def sets(owner: Any, name: str, value: Any) -> Change:
    old = getattr(owner, name)
    return lambda: setattr(owner, name, value), lambda: setattr(owner, name, old)


def places(items: list[Any], place: int, value: Any) -> Change:
    old = items[place]
    return lambda: items.__setitem__(place, value), lambda: items.__setitem__(place, old)


def yes(value: Any) -> ast.Constant:
    return ast.Constant(value)


def mutants_of(node: ast.AST) -> Iterator[tuple[str, Any]]:
    """Every change of one node: what it is, and how to do and undo it."""
    if isinstance(node, ast.Compare):
        for new in SWAPS.get(type(node.ops[0]), []):
            yield f"{type(node.ops[0]).__name__} to {new.__name__}", places(node.ops, 0, new())
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        test = node.test
        for value in (True, False):
            yield f"condition is {value}", sets(node, "test", yes(value))
        yield "condition flipped", sets(node, "test", ast.UnaryOp(ast.Not(), test))
    if isinstance(node, ast.comprehension):
        for place, test in enumerate(node.ifs):
            yield "filter flipped", places(node.ifs, place, ast.UnaryOp(ast.Not(), test))
            yield "filter dropped", places(node.ifs, place, yes(True))
    if isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "and/or", sets(node, "op", other)
        for place in range(len(node.values)):
            left = [value for n, value in enumerate(node.values) if n != place]
            yield f"without part {place + 1}", sets(node, "values", left)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not dropped", sets(node, "op", ast.UAdd())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        yield "+/-", sets(node, "op", ast.Sub() if isinstance(node.op, ast.Add) else ast.Add())
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "bool flipped", sets(node, "value", not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        for change in (1, -1):
            yield f"{node.value} {change:+}", sets(node, "value", node.value + change)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield f"text {node.value[:20]!r} emptied", sets(node, "value", "" if node.value else "x")
    if isinstance(node, ast.Call) and len(node.args) > 1:
        yield "arguments swapped", sets(node, "args", [node.args[1], node.args[0], *node.args[2:]])
    if isinstance(node, ast.Return) and node.value is not None:
        yield "returns None", sets(node, "value", yes(None))
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        for place, each in enumerate(block if isinstance(block, list) else ()):
            kinds = ast.Expr | ast.Assign | ast.AugAssign | ast.Raise | ast.With | ast.For
            is_text = isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)
            if isinstance(each, kinds) and not is_text and not isinstance(node, ast.Module):
                gone = ast.copy_location(ast.Pass(), each)
                yield f"line {each.lineno} dropped", places(block, place, gone)


def skipped(node: ast.AST) -> bool:
    """Annotations and docstrings change nothing; TRUSTED is trusted."""
    name = getattr(node, "name", "")
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("grace", "wishes"):
        return True  # in carry_out: what the command line was told
    return name in TRUSTED or isinstance(node, ast.Import | ast.ImportFrom)


def sites(tree: ast.Module, inside: bool) -> Iterator[Mutant]:
    """All mutants inside the gate, or all outside of it, in the order of the file."""
    first = min(n for n in BANNERS)

    def visit(node: ast.AST) -> Iterator[Mutant]:
        if skipped(node):
            return
        at = node.target if isinstance(node, ast.comprehension) else node
        line = getattr(at, "lineno", 0)
        for what, (do, undo) in mutants_of(node):
            if (line in GATE) == inside and (inside or line > first):
                yield line, what, do, undo
        for name, child in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_comment"):
                continue
            for each in child if isinstance(child, list) else [child]:
                is_text = isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)
                if isinstance(each, ast.AST) and not is_text:
                    yield from visit(each)

    for node in tree.body:
        options = isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "OPTIONS"
        if not options:
            yield from visit(node)


def compiled(tree: ast.Module) -> types.CodeType:
    return compile(ast.fix_missing_locations(tree), str(SCRIPT), "exec")


def is_of_undo(line: int) -> bool:
    return "Undo" in LINES[max(n for n in BANNERS if n <= line) - 1]


def around(count: int, seed: int) -> tuple[str, bool]:
    """Play random mutants outside the gate; the figures, and whether something went wrong."""
    tree, figures, wrong = ast.parse(SCRIPT.read_text()), Counter[str](), list[str]()
    usual = [outcome(compiled(tree), scene) for scene in SCENES]
    for right, scene in zip(usual, SCENES, strict=True):
        assert {*right.gone} == MAY_GO[scene.name], (right.code, right)
        assert (right.code, right.wrong) == (0, []), right
        assert bool({*right.rows} - {"e94"}) == ("--delete-jobs" in scene.options), right.rows
    every = [*sites(tree, False)]
    random.Random(seed).shuffle(every)
    for number, (line, what, do, undo) in enumerate(every):
        if figures["mutants"] == count:
            break
        do()
        try:
            code = compiled(tree)
        except (SyntaxError, ValueError, TypeError):
            continue  # not valid Python
        finally:
            undo()
        if figures["mutants"] and figures["mutants"] % 25 == 0:
            print(dict(figures), flush=True)
        which = 1 if is_of_undo(line) else number % 2
        told, right = outcome(code, SCENES[which]), usual[which]
        figures["mutants"] += 1
        changed = (told.gone, told.rows, told.live) != (right.gone, right.rows, right.live)
        figures["changed what went or was brought back"] += changed
        figures["ended with an error (exit code 1, 2, 3, 4)"] += told.code in (1, 2, 3, 4)
        figures["crashed"] += isinstance(told.code, str) and told.code.startswith("crash")
        figures[f"took longer than {SECONDS} s"] += told.code == "too long"
        figures["deleted what must stay"] += bool(told.wrong)
        if told.wrong:
            wrong.append(f"line {line}: {what}: {told.wrong[:5]}")
            print(wrong[-1], LINES[line - 1].strip(), sep="\n    ", flush=True)
    lines = [f"{number:>6}  {name}" for name, number in figures.items()]
    return "\n".join([f"{len(every)} possible, seed {seed}", *lines, *wrong]), bool(wrong)


# --- Sabotage -------------------------------------------------------------------------------------

KEEP = "in/kept0"  # the object of an OFFICIAL job, which all of these are after


def around_call(owner: str, name: str, new: Callable[..., Any]) -> Patch:
    """Replace a function of the script; `new` gets the script and the function first."""

    def patch(rp: Any) -> None:
        where = getattr(rp, owner) if owner else rp
        old = getattr(where, name)
        setattr(where, name, lambda *args, **more: new(rp, old, *args, **more))

    return patch


def every_pair(reason: str, key: Callable[[str], str] = str) -> Patch:
    """A plan that plans all that it meets."""

    def plan(rp: Any, old: Any, pairs: Any, terms: Any, totals: Any, *_: Any) -> Any:
        for reference, item in pairs:
            found = item or reference
            totals.remaining += 1
            modified = getattr(item, "last_modified", OLD.isoformat())
            yield rp.Candidate(key(found.key), reason, 1, modified)

    return around_call("", "plan", plan)


def all_pages(rp: Any) -> None:
    """Whatever is listed comes from the whole bucket, every object of it, as if it were wanted."""

    def objects(bucket: Any, references: Any, whole: bool) -> Any:
        bucket.prefix = ""
        return iter(bucket.page().objects)

    rp.Bucket.objects = objects


def together(*patches: Patch) -> Patch:
    return lambda rp: [patch(rp) for patch in patches] and None


def with_permits(change: Callable[[Any, Any, Any], list[Any]]) -> Patch:
    """Change the permits that `ask` gave; `change` gets the script, the gate and the permits."""

    def ask(rp: Any, old: Any, gate: Any, *args: Any) -> Any:
        permits, _ = old(gate, *args)
        return change(rp, gate, permits), {}

    def send(rp: Any, old: Any, rounds: Any, permit: Any) -> None:
        rounds._gate.delete(permit)

    lost = around_call("Rounds", "_send", send)
    return together(around_call("Gate", "ask", ask), lost)


def add_key(rp: Any, gate: Any, permits: Any) -> list[Any]:
    for permit in permits:
        object.__setattr__(permit, "keys", (*permit.keys, KEEP))
    return list(permits)


def again(rp: Any, gate: Any, permits: Any) -> list[Any]:
    for permit in permits:
        gate.delete(permit)
    return add_key(rp, gate, permits)


def run_sql(statement: str) -> Patch:
    """Somebody says this on the gate's connection, after the plan."""

    def rounds(rp: Any, old: Any, self: Any, gate: Any, *args: Any) -> None:
        gate._connection.cursor().execute(statement)
        old(self, gate, *args)

    return around_call("Rounds", "__init__", rounds)


def open_snapshot(rp: Any, old: Any, self: Any, gate: Any, *args: Any) -> None:
    gate._connection.leave_open()
    old(self, gate, *args)


def other_gate(rp: Any, old: Any, self: Any, gate: Any, *args: Any) -> None:
    """Whatever of the gate is public is another by now."""
    late = datetime(2200, 1, 1, tzinfo=UTC)
    with contextlib.suppress(AttributeError):
        object.__setattr__(gate.terms, "orphans_before", late)
    gate.terms = rp.Terms("", late, late, late, True)
    gate.expired, gate.counts = "1", gate.counts.replace(gate.expired, "1")
    old(self, gate, *args)


def by_hand(rp: Any, old: Any, rounds: Any, plan: Any) -> Any:
    """Delete through whatever client the outside can get hold of."""
    for client in (rounds._gate._wire.reader, rounds._gate._wire._writer):
        with contextlib.suppress(Exception):
            client.delete_object(Bucket="incoming-data", Key=KEEP)
        with contextlib.suppress(Exception):
            objects = {"Objects": [{"Key": KEEP}]}
            client.delete_objects(Bucket="incoming-data", Delete=objects)
    return old(rounds, plan)


def hooked(event: str, change: Callable[..., Any]) -> Patch:
    """A hook on the events of the session and of both clients."""

    def wire(rp: Any, old: Any, self: Any, session: Any, *args: Any) -> None:
        session.events.register_last(event, change)
        old(self, session, *args)
        for client in (self.reader, self._writer):
            client.meta.events.register_last(event, change)

    return around_call("Wire", "__init__", wire)


def slip_in(request: Any, **_: Any) -> None:
    extra = f"<Object><Key>{KEEP}</Key></Object></Delete>".encode()
    if request.method == "POST":
        request.body = (request.body or b"").replace(b"</Delete>", extra)


def slip_in_early(params: Any, **_: Any) -> None:
    params["body"] = f"<Delete><Object><Key>{KEEP}</Key></Object></Delete>".encode()


def elsewhere(request: Any, **_: Any) -> None:
    if request.method == "POST":
        request.url = request.url.replace("incoming-data", "incoming-data2")


def all_rows(rp: Any, old: Any, jobs: Any, names: Any) -> Any:
    return [rp.Row(job.job_id, job.name, {}) for job in JOBS]


def lying_versions(rp: Any, old: Any, response_dict: Any, **more: Any) -> None:
    body = response_dict["body"].replace(b"<Version>", b"<DeleteMarker>")
    response_dict["body"] = body.replace(b"</Version>", b"</DeleteMarker>")
    old(response_dict=response_dict, **more)


def all_versions(rp: Any, old: Any, found: Any, totals: Any, ledger: Any) -> Any:
    for intent, versions in found:
        for version in versions:
            yield intent.item._replace(version_id=version.version_id)


def other_terms(rp: Any, old: Any, run: Any, bucket: Any, terms: Any, *args: Any) -> Any:
    late = datetime(2200, 1, 1, tzinfo=UTC)
    forged = rp.Terms("", late, late, late, True)
    return old(run, bucket, forged, *args)


def other_sql(rp: Any, old: Any, jobs: Any, connection: Any, gate: Any) -> None:
    """Another cutoff, and another collation, wherever JobTable looks."""
    late = {"expired": "1", "counts": gate.counts.replace(gate.expired, "1")}
    facts = {name: getattr(gate, name) for name in ("terms", "table", "source", "columns", "among")}
    old(jobs, connection, types.SimpleNamespace(**facts | late))
    jobs._columns["sourcedata"] = ("sourceData", "varchar(9)", "latin1_swedish_ci")


def more_expired(rp: Any, old: Any, *args: Any) -> Any:
    return (reference._replace(expired=reference.jobs) for reference in old(*args))


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("sabotage")


def constant(value: Any) -> Callable[..., Any]:
    return lambda rp, old, *args, **more: value


def mixed_up(rp: Any, old: Any, spool: Any, start: int, end: int) -> Any:
    """A spool that gives every record the key of another one."""
    found = [*old(spool, start, end)]
    return (a._replace(key=b.key) for a, b in zip(found, found[1:] + found[:1], strict=True))


LOOSE = together(all_pages, around_call("", "ascending", lambda rp, old, items, *_: iter(items)))
REFUSE = together(
    around_call("", "refusals", constant([])), around_call("", "wrong_place", constant([]))
)
SABOTAGE: dict[str, Patch] = {
    "all that is met is planned as expired": together(REFUSE, every_pair("expired")),
    "all that is met is planned as an orphan": together(REFUSE, every_pair("orphan")),
    "the whole bucket is listed and planned as expired": together(
        LOOSE, REFUSE, every_pair("expired")
    ),
    "the whole bucket is listed and planned as orphans": together(
        LOOSE, REFUSE, every_pair("orphan")
    ),
    "each candidate has another key": together(
        REFUSE, every_pair("expired", lambda key: f"in/{key[-5:]}")
    ),
    "each candidate is the object of an OFFICIAL job": together(
        REFUSE, every_pair("orphan", lambda key: KEEP)
    ),
    "a key is added to a permit": with_permits(add_key),
    "permits are used, changed, used again": with_permits(again),
    "permits are forged": with_permits(
        lambda rp, gate, permits: [rp.Permit((KEEP,), rp.boot_seconds())]
    ),
    "both clients are asked to delete by hand": around_call("Rounds", "run", by_hand),
    "a hook puts a key into the body before it leaves": hooked("before-send.s3", slip_in),
    "a hook puts a key into the body before it is signed": hooked("before-call.s3", slip_in_early),
    "a hook sends to another bucket": hooked("before-send.s3", elsewhere),
    "a snapshot is left open on the connection": around_call("Rounds", "__init__", open_snapshot),
    "autocommit is switched off": run_sql("SET autocommit = 0"),
    "a row limit is set": run_sql("SET sql_select_limit = 2"),
    "JobTable has another cutoff and another collation": together(
        REFUSE, around_call("JobTable", "__init__", other_sql)
    ),
    "the gate's public attributes are replaced": together(
        all_pages, REFUSE, every_pair("expired"), around_call("Rounds", "__init__", other_gate)
    ),
    "they are, and all is planned as orphans": together(
        all_pages, REFUSE, every_pair("orphan"), around_call("Rounds", "__init__", other_gate)
    ),
    "the plan is made of other terms": together(
        LOOSE, REFUSE, around_call("", "make_plan", other_terms)
    ),
    "reason_of says expired of all": together(
        REFUSE, around_call("", "reason_of", lambda rp, *_: rp.Reason.EXPIRED)
    ),
    "reason_of is upside down": together(
        REFUSE,
        around_call(
            "", "reason_of", lambda rp, old, *args: None if old(*args) else rp.Reason.EXPIRED
        ),
    ),
    "outer_join forgets the references": together(
        REFUSE,
        around_call(
            "",
            "outer_join",
            lambda rp, old, references, objects: ((None, item) for item in objects),
        ),
    ),
    "a spool mixes its records up": together(REFUSE, around_call("Spool", "slice", mixed_up)),
    "the rounds send everything twice": around_call(
        "Rounds", "_cut", lambda rp, old, rounds, plan: [[*plan], [*plan]]
    ),
    "the witnesses are forged": around_call(
        "Rounds", "__init__", lambda rp, old, *args: old(*args[:-1], KEPT[:1])
    ),
    "there are no witnesses": around_call(
        "Rounds", "__init__", lambda rp, old, *args: old(*args[:-1], [])
    ),
    "every name fits into the column": around_call("JobTable", "can_hold", constant(True)),
    "no limit holds": REFUSE,
    "all jobs are taken for expired": together(
        REFUSE, around_call("", "read_references", more_expired)
    ),
    "S3 is said to have deleted all": around_call(
        "", "read_verdicts", lambda rp, old, answer, keys, fault: [rp.Verdict()] * len(keys)
    ),
    "nobody looks at the order of anything": together(LOOSE, REFUSE),
    "the ledger fails": around_call("Ledger", "intend", fail),
    "stop signals are ignored": around_call("Stop", "check", constant(None)),
    "all rows are handed over for deletion": around_call("JobTable", "expired_rows", all_rows),
    "an undo removes all versions": around_call("", "plan_undo", all_versions),
    "an undo is told that versions are markers": together(
        around_call("", "check_answer", lying_versions), around_call("", "plan_undo", all_versions)
    ),
}


def sabotage() -> tuple[str, bool]:
    code, lines, wrong = compiled(ast.parse(SCRIPT.read_text())), list[str](), False
    for name, patch in SABOTAGE.items():
        told = [outcome(code, scene, patch) for scene in SCENES]
        faults = [fault for one in told for fault in one.wrong]
        counts = ", ".join(f"{len(one.gone)} went, exit {one.code}" for one in told)
        lines.append(f"{name}: {faults[:5] or 'nothing that must stay'} ({counts})")
        print(lines[-1], flush=True)
        wrong |= bool(faults)
    return "\n".join([f"{len(SABOTAGE)} kinds, in both scenes:", *lines]), wrong


# --- Inside the gate ------------------------------------------------------------------------------

FAST = ("-k", "not mariadb and not mysql and not read_alone and not outside and not stations")
# Changes that change no decision, by a part of their text; why.
KNOWN: dict[str, str] = {
    ": 50 +1": "one version more is listed",
    ": 50 -1": "one version less is listed",
    "SQL 'max_sort_length": "the plan alone sorts, and checks the order",
    "SQL 'sql_safe_updates": "the DELETE would fail",
    "SQL 'sql_big_selects": "the question would fail",
    "SQL 'wait_timeout": "the connection would be cut",
    "SQL 'lock_wait_timeout": "waits longer, and decides nothing",
    "SQL 'in_predicate": "slower",
    'response_dict["status_code"] == 200': "botocore parses the answer, for nothing",
}
SQL = [  # in each text of the gate: a clause is dropped, or a comparison is another one
    (r" AND [^']*?('[^']*')?(?= AND |$|\"|\))", ""),
    (r" AND ", " OR "),
    (r"(?<![<>]) < ", " <= "),
    (r" >= ", " > "),
    (r" IS TRUE", " IS NOT FALSE"),
    (r" = '", " <> '"),
    (r" IN \(", " NOT IN ("),
    (r"<=>", "<>"),
    (r"COUNT\(\*\)", "1"),
    (r" OR NULL", ""),
    (r"GROUP BY 1", "GROUP BY `sourceData`"),
    (r"(\w+ = [^,' ]+|\w+ = '[^']*')(, )?", ""),
    (r"/\*M!.*?\*/", ""),
    (r"USING utf8mb4", "USING latin1"),
    (r"AS BINARY", "AS CHAR"),
    (r"ROLLBACK", "DO 0"),
    (r"START TRANSACTION", "DO 0"),
    (r"REPEATABLE READ", "READ UNCOMMITTED"),
    (r"COMMIT", "DO 0"),
    (r"UTC_TIMESTAMP", "LOCALTIMESTAMP"),
    (r"< TIMESTAMP", "< "),
]


def sql_sites(tree: ast.Module) -> Iterator[Mutant]:
    """A change of each place in a text of the gate that one of SQL fits."""
    for node in ast.walk(tree):
        text = getattr(node, "value", None) if isinstance(node, ast.Constant) else None
        if not isinstance(text, str) or node.lineno not in GATE or "\n" in text:
            continue
        for pattern, new in SQL:
            for found in re.finditer(pattern, text):
                changed = text[: found.start()] + found.expand(new) + text[found.end() :]
                what = f"SQL {found[0].strip()!r} to {new!r}"
                yield node.lineno, what, *sets(node, "value", changed)


def inside_sites(tree: ast.Module) -> list[Mutant]:
    """Texts that people read decide nothing."""
    dull = ("emptied", "swapped", "returns None")
    plain = [each for each in sites(tree, True) if not any(word in each[1] for word in dull)]
    return sorted([*plain, *sql_sites(tree)], key=lambda each: each[0])


def caught(code: types.CodeType) -> bool:
    """Whether a fast test fails, in a child that takes the mutant for the script."""
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        signal.alarm(180)
        boto3.Session = lambda *_, **__: SESSION  # type: ignore[misc, assignment]
        result: Any = 1
        with contextlib.suppress(BaseException):
            module = types.ModuleType("retention_purge")
            module.__file__ = str(SCRIPT)
            sys.modules["retention_purge"] = module
            exec(code, module.__dict__)
            os.chdir(ROOT)
            options = ("-p", "no:cacheprovider", "-c", "tests/pytest.ini", "-x", "-q", *FAST)
            result = int(pytest.main([*options, "tests/cases/test_gate.py"]))
        os._exit(result)
    return os.waitpid(child, 0)[1] != 0


def caught_on_servers(tree: ast.Module) -> bool:
    """Whether a test on a real server fails, in a copy of the tests and of the mutant."""
    with tempfile.TemporaryDirectory() as home:
        shutil.copytree(ROOT / "tests", f"{home}/tests")
        for name in (".mysql", "README.md"):
            (Path(home) / name).symlink_to(ROOT / name)
        (Path(home) / "retention_purge.py").write_text(ast.unparse(tree))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-c",
            "tests/pytest.ini",
        ]
        command += ["-x", "-q", "-k", "mariadb or mysql", "tests/cases/test_gate.py"]
        return bool(subprocess.run(command, cwd=home, capture_output=True, check=False).returncode)


def within(servers: bool, every: int, first: int) -> tuple[str, bool]:
    """Change the gate, place by place; the figures, and whether an unknown mutant survived."""
    tree, figures, left = ast.parse(SCRIPT.read_text()), Counter[str](), list[str]()
    assert not caught(compiled(tree)), "the fast tests fail with the script as it is"
    for line, what, do, undo in inside_sites(tree)[first::every]:
        do()
        try:
            code = compiled(tree)
            figures["mutants"] += 1
            if caught(code):
                figures["caught by a fast test"] += 1
                continue
            text = f"{LINES[line - 1].strip()[:60]}: {what}"
            why = next((why for part, why in KNOWN.items() if part in text), "")
            if not why and servers and caught_on_servers(tree):
                figures["caught on a real server"] += 1
                continue
            figures["survived: no decision changes" if why else "survived"] += 1
            left.append(f"line {line}: {text}{why and f' ({why})'}")
            print(left[-1], flush=True)
        except (SyntaxError, ValueError, TypeError):
            continue  # not valid Python
        finally:
            undo()
    lines = [f"{number:>6}  {name}" for name, number in figures.items()]
    return "\n".join([*lines, *left]), bool(figures["survived"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--around", type=int, default=300, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--within", action="store_true")
    parser.add_argument("--every", type=int, default=1, help="of the mutants within only each Nth")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--servers", action="store_true", help="survivors of --within meet these")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    parts = {"gate-around": lambda: around(given.around, given.seed), "gate-sabotage": sabotage}
    if given.within:
        parts = {"gate-within": lambda: within(given.servers, given.every, given.first)}
    failed = False
    for name, play_part in parts.items():
        text, wrong = play_part()
        failed |= wrong
        print(text, flush=True)
        if given.write:
            page.write(name, f"```\n{text}\n```")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
