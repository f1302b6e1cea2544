"""The gate alone, and wrong plans: whatever comes to it, nothing goes that must stay."""

from __future__ import annotations

import ast
import copy
import os
import re
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import fakes
import pytest
from conftest import AS_OF, EVERYTHING, Held, World, ended, state, until, until_gone
from fakes import OLD, YOUNG, Job
from hypothesis import example, given, settings
from hypothesis import strategies as st
from proxies import DROP, Answer, Request, S3Proxy
from sandbox import BUCKET, DATABASE, TABLE, USER, Sandbox, seed
from script import SCRIPT, Result
from test_seed import EXPIRED

import retention_purge as rp

LONG_AGO, LATELY, ZERO = "2019-01-01 00:00:00", "2019-05-01 00:00:00", "0000-00-00 00:00:00"
CUTOFF = datetime(2019, 3, 5, tzinfo=UTC)  # of --as-of 2019-06-03
WISHES = rp.Wishes("incoming-data", "in/", 90, datetime(2019, 6, 3, tzinfo=UTC), 7, True)
KEEPERS = [Job(f"w{n}", LONG_AGO, "OFFICIAL", f"keeper{n}") for n in range(20)]
WITNESSES = [job.name for job in KEEPERS]


@pytest.fixture(scope="module")
def bucket() -> Iterator[fakes.Bucket]:
    bucket = fakes.Bucket()
    yield bucket
    bucket.close()


@pytest.fixture(scope="module")
def session(bucket) -> Iterator[boto3.Session]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", bucket.url)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        yield boto3.Session("AKIA", "secret", region_name="eu-west-1")


@pytest.fixture(scope="module")
def wire_of_module(bucket, session) -> rp.Wire:
    """For tests that draw many examples."""
    return rp.Wire(session, "incoming-data", 1, lambda ages: None)


@pytest.fixture
def wire(bucket, wire_of_module) -> rp.Wire:
    """For tests that leave it as it is. The bucket is empty."""
    bucket.clear()
    bucket.before_answer = lambda method, query: None
    return wire_of_module


@pytest.fixture
def own_wire(wire, session) -> rp.Wire:
    """For tests that change it, or count its connections."""
    return rp.Wire(session, "incoming-data", 1, lambda ages: None)


def gate_on(wire: rp.Wire, jobs: Any, wishes: rp.Wishes = WISHES, **more: Any) -> Any:
    """The gate, and the fake table that it asks."""
    table = fakes.Table([*KEEPERS, *jobs], **more)
    table.locked = True
    return rp.Gate(wire, table, "ndvr.jobs", "lock", wishes), table


def free(*names: str, kind: str = "TRIAL") -> list[Job]:
    return [Job(f"free-{name}", LONG_AGO, kind, name) for name in names]


def expired(*names: str) -> list[rp.Candidate]:
    return [rp.Candidate(f"in/{name}", "expired", 1, OLD.isoformat()) for name in names]


# --- Wrong plans ----------------------------------------------------------------------------------

NAMES = ["a", "A", "a ", "é", "a/b", "&<", "", "\x01", "a\r", "never named"]
KINDS = ["TRIAL"] * 9 + ["OFFICIAL", "trial", "TRIAL ", None]
MOMENTS = [LONG_AGO] * 9 + ["2019-03-04 23:59:59", "2019-03-05 00:00:00", LATELY, ZERO, None]
EDGE = "2019-05-27T00:00:00+00:00"  # seven days before --as-of: the grace period is of real days
OFTEN = ["a", "b", "é", "a/b"] * 5 + NAMES  # so that many jobs have a key, and the key may go
jobs_drawn = st.lists(st.tuples(*map(st.sampled_from, (MOMENTS, KINDS, OFTEN))), max_size=8)
keys_drawn = st.sampled_from(
    [f"in/{name}" for name in OFTEN] + ["in", "in/", "inn/a", "a", "", "other/a", "IN/a"]
)
items_drawn = st.builds(
    rp.Candidate,
    keys_drawn,
    st.sampled_from(["expired", "orphan"] * 8 + ["missing", "shared", "", "Expired"]),
    st.just(1),
    st.sampled_from([moment.isoformat() for moment in (OLD, YOUNG)]),
)


def is_expired(completed: str | None, kind: str | None) -> bool:
    in_time = completed is not None and completed > "1970" and completed < "2019-03-05 00:00:00"
    return kind == "TRIAL" and in_time


def may_go(item: rp.Candidate, jobs: Any, wishes: rp.Wishes) -> bool:
    """The oracle: what the Contract says of one key."""
    name = item.key[len("in/") :]
    if item.key[:3] != "in/" or name in ("", "\x01", "a\r"):
        return False
    mine = [is_expired(completed, kind) for completed, kind, named in jobs if named == name]
    if item.reason == "orphan":
        old = item.last_modified == OLD.isoformat()
        return wishes.orphan_grace_days is not None and old and not mine
    return item.reason == "expired" and bool(mine) and all(mine)


some_of_20 = st.sampled_from([20] * 40 + [*range(20)])


@settings(max_examples=200)
@given(jobs_drawn, st.lists(items_drawn, max_size=8), st.sampled_from([None, 7, 0]),
       some_of_20, some_of_20, st.booleans())  # fmt: skip
@example(
    [(LONG_AGO, "TRIAL", "a"), (LONG_AGO, "OFFICIAL", "A")], expired("a", "A"), 7, 20, 20, False
)
@example([], [rp.Candidate("in/a", "orphan", 1, OLD.isoformat())], 7, 20, 11, True)
@example([], [rp.Candidate("in/a", "orphan", 1, OLD.isoformat())], 7, 20, 10, True)
@example([(LATELY, "TRIAL", "b"), (LONG_AGO, "TRIAL", "a")], expired("a"), 7, 20, 11, True)
@example([(LATELY, "TRIAL", "b"), (LONG_AGO, "TRIAL", "a")], expired("a"), 7, 20, 10, True)
@example([(LATELY, "TRIAL", "b"), (LONG_AGO, "TRIAL", "a")], expired("a"), 7, 0, 0, True)
def test_of_any_plan_exactly_that_goes_which_may(
    wire_of_module, bucket, jobs, items, grace, few, seen, old
):
    """The oracle knows the table and the bucket. `seen` of `few` witnesses are still there, or all
    are expired by now (`old`): they vouch for nothing then, and nothing goes. Without a witness
    orphans stay."""
    wishes, bucket.asked = WISHES._replace(orphan_grace_days=grace), []
    items = [*items, *expired(*(job[2] for job in jobs))]  # a plan that plans everything
    rows = [Job(f"j{n}", *job) for n, job in enumerate(jobs)]
    keepers = KEEPERS[: min(seen, few)]
    lost = [job._replace(kind="TRIAL") for job in KEEPERS[seen:few]] if old else []
    table = fakes.Table([*rows, *keepers, *lost], read_only=0)
    table.locked = True
    table.leave_open()  # by whoever had the connection before
    gate = rp.Gate(wire_of_module, table, "ndvr.jobs", "lock", wishes)
    table.leave_open()
    table.live.execute("UPDATE jobs SET type = 'OFFICIAL' WHERE jobId = 'j0'")  # after the plan
    jobs = [(job[0], "OFFICIAL" if n == 0 else job[1], job[2]) for n, job in enumerate(jobs)]
    permits, stay = gate.ask(items, WITNESSES[:few], 3)
    for permit in permits:
        assert not [verdict for verdict in gate.delete(permit) if verdict.code]
    gone = {pair for _, pairs in bucket.asked for pair in pairs}
    last = {item.key: item for item in items}.values()
    orphans = {item.key for item in items if item.reason == "orphan"}
    right = {item.key for item in last if may_go(item, jobs, wishes)}
    if 2 * min(seen, few) <= few:
        right = set() if few else right - orphans
    assert gone == {(key, "") for key in right}
    assert {*stay} == {item.key for item in items} - right
    assert all(len(pairs) <= 3 for _, pairs in bucket.asked)


@pytest.mark.parametrize(("microseconds", "goes"), [(-1, True), (0, False), (1, False)])
def test_an_orphan_goes_only_if_it_is_older_than_the_grace_period(wire, microseconds, goes):
    gate, _ = gate_on(wire, [])
    moment = gate.terms.orphans_before + timedelta(microseconds=microseconds)
    item = rp.Candidate("in/a", "orphan", 1, moment.isoformat())
    assert bool(gate.ask([item], WITNESSES)[0]) == goes


def test_no_request_names_more_keys_than_s3_takes(wire, bucket):
    names = [f"k{n:04}" for n in range(1001)]
    gate, _ = gate_on(wire, free(*names))
    permits, _ = gate.ask(expired(*names), WITNESSES, 5000)
    assert [len(permit.keys) for permit in permits] == [1000, 1]


ROWS = [Job("1", LONG_AGO, "TRIAL", "a"), Job("2", LONG_AGO, "OFFICIAL", "a"),
        Job("3", "2019-03-05 00:00:00", "TRIAL", "a"), Job("4", None, "TRIAL", "a"),
        Job("5", ZERO, "TRIAL", "a"), Job("6", LONG_AGO, "trial", "a"),
        Job("7", LONG_AGO, "TRIAL", "A"), Job("8", "2019-03-04 23:59:59", "TRIAL", "a"),
        Job("9", LONG_AGO, None, "a")]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from([*"123456789", "none"]), st.sampled_from(["a", "b"])),
                min_size=1))  # fmt: skip
def test_only_rows_of_expired_jobs_with_one_of_the_names_go(wire_of_module, pairs):
    gate, table = gate_on(wire_of_module, ROWS)
    before = table.job_ids
    count = gate.delete_rows([rp.Row(job, name, {}) for job, name in pairs])
    right = (
        {job for job, _ in pairs} & {"1", "8"}
        if "a" in dict.fromkeys(n for _, n in pairs)
        else set()
    )
    assert (before - table.job_ids, count) == (right, len(right))
    assert not table.live.in_transaction


@pytest.mark.parametrize("case", ["not asked for", "lock", "autocommit", "read_only"])
def test_no_row_goes_unasked_or_in_a_session_that_is_not_ours(wire, case):
    gate, table = gate_on(wire, ROWS, WISHES._replace(rows=case != "not asked for"))
    if case == "lock":
        table.locked = False
    elif case in table.session:
        table.session[case] = {"autocommit": 0, "read_only": "ON"}[case]
    with pytest.raises(rp.PurgeError, match="No job rows may go"):
        gate.delete_rows([rp.Row("1", "a", {})])
    assert ("1" in table.job_ids, table.writes) == (True, 0)


def test_a_delete_of_rows_is_rolled_back_by_whoever_asks_next(wire, monkeypatch):
    gate, table = gate_on(wire, ROWS)
    table.before_commit = lambda: 1 / 0
    monkeypatch.setattr(gate, "_run", lambda sql, doing="": 1 / 0 if sql == "COMMIT" else
                        rp.Gate._run(gate, sql))  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        gate.delete_rows([rp.Row("1", "a", {})])
    assert (table.writes, "1" in table.job_ids) == (1, False)
    gate.known(["a"])
    assert "1" in table.job_ids


# --- Permits --------------------------------------------------------------------------------------


def altered(permit: rp.Permit, **facts: Any) -> rp.Permit:
    for name, fact in facts.items():
        object.__setattr__(permit, name, fact)
    return permit


WRONG_PERMITS: dict[str, Any] = {
    "forged": lambda permit: rp.Permit(permit.keys, permit.asked),
    "copied": copy.copy,
    "deeply copied": copy.deepcopy,
    "replaced": lambda permit: replace(permit, keys=("in/keep",)),
    "other keys": partial(altered, keys=("in/keep",)),
    "more keys": lambda permit: altered(permit, keys=(*permit.keys, "in/keep")),
    "younger": lambda permit: altered(permit, asked=permit.asked + 100),
    "of another class": lambda permit: type(
        "Permit", (), vars(permit) | {"__hash__": lambda s: 1}
    )(),
}


@pytest.mark.parametrize("case", WRONG_PERMITS)
def test_no_permit_serves_that_the_gate_did_not_give_just_so(wire, bucket, case):
    gate, _ = gate_on(wire, free("a"))
    ((permit,), _) = gate.ask(expired("a"), WITNESSES)
    with pytest.raises(rp.PurgeError, match="without a permit"):
        gate.delete(WRONG_PERMITS[case](permit))
    assert bucket.asked == []


def test_a_permit_serves_once_and_at_its_own_gate(wire, bucket):
    gate, _ = gate_on(wire, free("a"))
    other, _ = gate_on(wire, free("a"))
    (one, two), _ = gate.ask(expired("a", "b") + expired("a"), WITNESSES, 1)[0] * 2, 0
    with pytest.raises(rp.PurgeError, match="without a permit"):
        other.delete(one)
    gate.delete(one)
    for permit in (one, two):
        with pytest.raises(rp.PurgeError, match="without a permit"):
            gate.delete(permit)
    assert len(bucket.asked) == 1


# --- The last look --------------------------------------------------------------------------------

OTHER = b"<Delete><Object><Key>in/keep</Key></Object></Delete>"


def in_place(**_: Any) -> Any:
    from botocore.awsrequest import AWSResponse

    body = b"<DeleteResult><Deleted><Key>in/a</Key></Deleted></DeleteResult>"
    raw = type("Raw", (), {"stream": lambda self, *_, **__: iter([body])})()
    return AWSResponse("http://nowhere", 200, {}, raw)


def assign(**facts: Any) -> Any:
    def change(request: Any, **_: Any) -> None:
        for name, fact in facts.items():
            setattr(request, name, fact(getattr(request, name)) if callable(fact) else fact)

    return change


def key_in_body(params: dict[str, Any], **_: Any) -> None:
    params["body"] = params["body"].replace(b"</Delete>", OTHER[8:])


HOOKS: dict[str, tuple[str, Any]] = {  # an event of botocore, and what is done there, last
    "a key in the body": ("before-call.s3.DeleteObjects", key_in_body),
    "another body": ("before-call.s3", lambda params, **_: params.update(body=OTHER)),
    "a body before it is signed": ("before-sign.s3", assign(data=OTHER)),
    "a body before it leaves": ("before-send.s3", assign(body=OTHER)),
    "a body from a file": ("before-send.s3", assign(body=lambda body: iter([body]))),
    "another bucket": ("before-send.s3", assign(url=lambda u: u.replace("data?", "other?"))),
    "a longer bucket": ("before-send.s3", assign(url=lambda u: u.replace("data?", "data2?"))),
    "a bucket before": ("before-send.s3", assign(url=lambda u: u.replace("/in", "/my-in"))),
    "a folder before": ("before-send.s3", assign(url=lambda u: u.replace("/in", "/x/in"))),
    "a single key": (
        "before-send.s3",
        assign(method="DELETE", body=b"", url=lambda u: u.replace("?delete", "/in/keep")),
    ),
    "an object instead": (
        "before-send.s3",
        assign(method="PUT", url=lambda u: u.replace("?delete", "/in/keep")),
    ),
    "an answer in place": ("before-send.s3", in_place),
}


@pytest.mark.parametrize("who", ["session", "reader", "_writer"])
@pytest.mark.parametrize("case", HOOKS)
def test_no_hook_changes_what_leaves(session, own_wire, bucket, case, who):
    place, change = HOOKS[case]
    if who == "session":
        session.events.register_last(place, change)
        own_wire = rp.Wire(session, "incoming-data", 1, lambda ages: None)
        session.events.unregister(place, change)
    else:
        getattr(own_wire, who).meta.events.register_last(place, change)
    gate, _ = gate_on(own_wire, free("a"))
    ((permit,), _) = gate.ask(expired("a"), WITNESSES)
    verdicts, answered = None, "did not leave"
    try:
        verdicts = gate.delete(permit)
    except rp.PurgeError as error:
        answered = error.message
    assert bucket.asked in ([], [("incoming-data", [("in/a", "")])]), "something else left"
    assert "did not leave" in answered
    assert bucket.asked or verdicts is None or verdicts[0].code


@pytest.mark.parametrize(
    "request_",
    [
        ("delete_object", {"Key": "in/keep"}),
        ("delete_objects", {"Delete": {"Objects": [{"Key": "in/keep"}]}}),
        ("put_object", {"Key": "in/keep", "Body": b""}),
        ("delete_bucket", {}),
    ],
)
@pytest.mark.parametrize("who", ["reader", "_writer"])
def test_neither_client_lets_anything_else_leave(wire, bucket, request_, who):
    seen: list[str] = []
    bucket.before_answer = lambda method, query: seen.append(method)
    with pytest.raises(Exception, match=r"did not write|NoneType|no attribute"):
        getattr(getattr(wire, who), request_[0])(Bucket="incoming-data", **request_[1])
    assert seen == bucket.asked == []


@pytest.mark.parametrize(("seconds", "leaves"), [(29.9, True), (30.1, False)])
def test_the_age_is_taken_after_the_connection_is_made(
    own_wire, bucket, monkeypatch, seconds, leaves
):
    """The clock runs on while the connection is made, and only then."""
    from urllib3.connection import HTTPConnection

    now, ages = [1000.0], list[float]()
    monkeypatch.setattr(rp, "boot_seconds", lambda: now[0])
    connect = HTTPConnection.connect

    def slow(self: Any) -> None:
        connect(self)
        now[0] += seconds

    own_wire._count = ages.extend
    gate, _ = gate_on(own_wire, free("a"))
    ((permit,), _) = gate.ask(expired("a"), WITNESSES)
    monkeypatch.setattr(HTTPConnection, "connect", slow)
    (verdict,) = gate.delete(permit)
    assert (verdict.code, bool(bucket.asked)) == (("" if leaves else "NotSent"), leaves)
    assert ages == pytest.approx([seconds] if leaves else [])


def test_whoever_counts_the_deletes_is_told_after_they_have_left(own_wire, bucket):
    """Else the re-check would grow old in his hands, behind the last look."""
    gate, told = gate_on(own_wire, free("a"))[0], list[int]()
    own_wire._count = lambda ages: told.append(len(bucket.asked))
    ((permit,), _) = gate.ask(expired("a"), WITNESSES)
    gate.delete(permit)
    assert told == [1]


def test_a_slow_answer_of_the_table_counts_as_age(wire, bucket, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(rp, "boot_seconds", lambda: now[0])
    gate, table = gate_on(wire, free("a"))
    table.before_ask = lambda: now.__setitem__(0, now[0] + 31)
    ((permit,), _) = gate.ask(expired("a"), WITNESSES)
    assert [verdict.code for verdict in gate.delete(permit)] == ["NotSent"]
    assert bucket.asked == []


def test_the_clock_of_the_age_counts_while_the_machine_is_suspended(monkeypatch):
    monkeypatch.setattr(time, "clock_gettime", {time.CLOCK_BOOTTIME: 7.0}.get)
    assert rp.boot_seconds() == 7.0


ANSWERS = {  # what a delete comes to when S3 says this: (code, in doubt)
    b"<html>": ("InvalidAnswer", True),
    b"": ("InvalidAnswer", True),
    b"<DeleteResult/>": ("NoAnswer", True),
    b"<Error><Code>InternalError</Code></Error>": ("InternalError", True),
    b"<Error><Code>SlowDown</Code></Error>": ("SlowDown", False),
}


@pytest.mark.parametrize("body", ANSWERS)
def test_only_s3s_own_words_say_what_was_done(wire, bucket, body, monkeypatch):
    monkeypatch.setattr(bucket, "deleted", lambda name, sent: body)
    gate, _ = gate_on(wire, free("a"))
    ((permit,), _) = gate.ask(expired("a"), WITNESSES)
    ((code, _, _, in_doubt, _),) = gate.delete(permit)
    assert (code, in_doubt) == ANSWERS[body]


def test_the_way_from_a_candidate_to_its_delete_has_six_stations_all_in_the_gate(
    own_wire, monkeypatch
):
    def stations() -> list[str]:
        frames = [f for f in traceback.extract_stack() if Path(f.filename).name == SCRIPT.name]
        assert all(f.lineno in GATE or f.name == "query" for f in frames)
        return [f.name for f in frames if f.name not in ("query", "_run", "boot_seconds")]

    ways: list[list[str]] = []

    def clock() -> float:
        way = stations()
        ways.extend([way] if way[-1] == "_last_look" else [])
        return 0.0

    monkeypatch.setattr(rp, "boot_seconds", clock)
    gate, table = gate_on(own_wire, free("a"))
    table.before_ask = lambda: ways.append(stations())
    ((permit,), _) = gate.ask(expired("a"), WITNESSES)
    gate.delete(permit)
    assert ways == [["ask", "known"], ["delete", "_post", "request", "_last_look"]]


def test_an_answer_before_a_redirect_is_not_the_answer_to_what_left_after_it(wire, bucket, session):
    """botocore itself sends a delete again to the region that S3 names. That one is carried out,
    and its answer is lost."""
    moved = b"<Error><Code>PermanentRedirect</Code><Message>moved</Message></Error>"
    left, ages = list[Request](), list[float]()

    def before(request: Request) -> Answer:
        left.append(request)
        if len(left) == 1:
            return Answer(301, moved, {"x-amz-bucket-region": "eu-central-1"})
        proxy.forward(request)
        return DROP

    with S3Proxy(bucket.url) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        proxy.before = before
        gate, _ = gate_on(rp.Wire(session, "incoming-data", 1, ages.extend), free("a"))
        ((permit,), _) = gate.ask(expired("a"), WITNESSES)
        (verdict,) = gate.delete(permit)
    assert (len(left), len(ages), len(bucket.asked)) == (2, 2, 1)
    assert (verdict.code, verdict.in_doubt) == ("NoAnswer", True)


def test_the_gate_and_its_way_to_s3_are_of_one_bucket(wire):
    with pytest.raises(rp.PurgeError, match="another bucket"):
        gate_on(wire, [], WISHES._replace(bucket="payroll"))


# --- The session, the terms, the column -----------------------------------------------------------

TERMS = {  # now, as_of, grace: cutoff, orphans_before (days before now), or None if refused
    (None, None): (90, None),
    (None, 7): (90, 7),
    (None, -3): (90, 0),
    (timedelta(days=10), 0): (100, 0),
    (timedelta(days=-1), 7): None,
    (timedelta(0), 7): (90, 7),
}


@pytest.mark.parametrize("case", TERMS)
def test_the_terms_are_made_of_the_wishes_and_the_clock_of_the_database(case):
    now = datetime(2026, 1, 1, 12, 0, 0, 5, tzinfo=UTC)
    (ago, grace), right = case, TERMS[case]
    as_of = None if ago is None else now - ago
    wishes = rp.Wishes("b", "in/", 90, as_of, grace, True)
    if right is None:
        with pytest.raises(rp.PurgeError) as refused:
            rp.terms_of(wishes, now)
        assert refused.value.exit_code == 3
        return
    terms = rp.terms_of(wishes, now)
    base = now.replace(microsecond=0) if ago is None else now
    before = None if right[1] is None else now - timedelta(days=right[1])
    assert terms == rp.Terms("in/", now, base - timedelta(days=right[0]), before, True)
    for days in (0, -1):
        with pytest.raises(rp.PurgeError):
            rp.terms_of(wishes._replace(retention_days=days), now)


SESSIONS = {"autocommit": 0, "time_zone": "+05:00", "sql_mode": "ANSI_QUOTES",
            "sql_select_limit": 3,
            "read_only": "ON", "innodb_read_only": 1, "locked": False}  # fmt: skip


@pytest.mark.parametrize("what", SESSIONS)
def test_a_session_that_is_not_as_it_was_set_gives_no_permit(wire, what):
    gate, table = gate_on(wire, free("a"))
    assert gate.ask(expired("a"), WITNESSES)[0]
    if what == "locked":
        table.locked = False
    else:
        table.session[what] = SESSIONS[what]
    with pytest.raises(rp.PurgeError, match="is not as it was set"):
        gate.ask(expired("a"), WITNESSES)


def test_the_answer_to_an_earlier_question_gives_no_permit(wire, monkeypatch):
    gate, table = gate_on(wire, free("a"))
    answers, run = list[Any](), table.run

    def late(statement: str) -> Any:
        answers.append(run(statement))
        asked = " UNION ALL " in statement
        return next(each for each in answers if len(each[0]) > 1) if asked else answers[-1]

    monkeypatch.setattr(table, "run", late)
    assert gate.ask(expired("a"), WITNESSES)[0]
    with pytest.raises(rp.PurgeError, match="is not as it was set"):
        gate.ask(expired("a"), WITNESSES)


def test_an_answer_in_which_a_name_has_two_groups_gives_no_permit(wire, monkeypatch):
    """The last of them would hide the OFFICIAL job."""
    gate, table = gate_on(wire, [*free("a"), Job("official", LONG_AGO, "OFFICIAL", "a")])
    run = table.run

    def cut_apart(statement: str) -> Any:
        rows, count = run(statement)
        groups = [(b"a", 1, 0), (b"a", 1, 1)]
        halves = ([row] if row[0] != b"a" else groups for row in rows)
        return [row for half in halves for row in half], count

    monkeypatch.setattr(table, "run", cut_apart)
    with pytest.raises(rp.PurgeError, match="is not as it was set"):
        gate.ask(expired("a"), WITNESSES)


@pytest.mark.parametrize("read_only", [0, "0", "OFF"])
@pytest.mark.parametrize("autocommit", [1, "1", "ON"])
def test_flags_in_any_spelling_are_understood(wire, read_only, autocommit):
    gate, table = gate_on(wire, free("a"), read_only=read_only, innodb_read_only=read_only)
    table.session["autocommit"] = autocommit
    assert gate.ask(expired("a"), WITNESSES)[0]


@pytest.mark.parametrize("collation", ["sjis_japanese_ci", "utf16_bin", None, "binary"])
def test_a_column_whose_names_cannot_be_compared_is_refused(wire, collation, monkeypatch):
    known = fakes.Table._canned

    def canned(self: Any, statement: str) -> Any:
        found = known(self, statement)
        if statement.startswith("SHOW FULL"):
            found = [(name, kind, collation, *more) for name, kind, _, *more in found]
        return found

    monkeypatch.setattr(fakes.Table, "_canned", canned)
    with pytest.raises(rp.PurgeError, match="must be a text column"):
        gate_on(wire, [])


# --- Undo -----------------------------------------------------------------------------------------


@pytest.fixture
def versioned(bucket) -> Iterator[fakes.Bucket]:
    bucket.versioned = True
    yield bucket
    bucket.versioned = False


@pytest.mark.parametrize("liar", [False, True])
def test_only_the_latest_delete_marker_is_removed_and_never_a_version(own_wire, versioned, liar):
    """Of keys that are spelled as the beginning of others, too. A liar rewrites what the reading
    client is told: all versions are delete markers."""
    bucket = versioned
    for key in ("in/a", "in/aa", "in/live", "in/null", "in/old", "in/twice"):
        bucket.put(key, version_id=f"v-{key}")
    for key in ("in/a", "in/aa", "in/old"):
        bucket.hide(key, f"m-{key}")
    bucket.hide("in/null", "null")
    bucket.put("in/old", version_id="newer")
    bucket.hide("in/twice", "first")
    bucket.hide("in/twice", "second")
    if liar:

        def lie(response_dict: Any, **_: Any) -> None:
            body = response_dict["body"].replace(b"DeleteMarker>", b"Version>")
            response_dict["body"] = body.replace(b"Version>", b"DeleteMarker>")

        own_wire.reader.meta.events.register_first("before-parse.*", lie)
    asked = [("in/a", "m-in/a"), ("in/a", "v-in/a"), ("in/aa", "v-in/aa"), ("in/null", "null"),
             ("in/live", "v-in/live"), ("in/old", "m-in/old"), ("in/old", "newer"),
             ("in/twice", "first"), ("in/a", ""), ("in/live", ""), ("in/none", "x")]  # fmt: skip
    verdicts = own_wire.restore(asked)
    assert bucket.removed == []
    assert [pair for _, pairs in bucket.asked for pair in pairs] == asked[:1]
    assert [verdict.code for verdict in verdicts] == [""] + ["NotLatest"] * 10
    assert bucket.live == {"in/a", "in/live", "in/old"}


# --- The file -------------------------------------------------------------------------------------

TEXT = SCRIPT.read_text()
LINES = TEXT.splitlines()
BANNERS = [n for n, line in enumerate(LINES, 1) if line.startswith("# --- ")]
(START,) = [n for n in BANNERS if "gate" in LINES[n - 1]]
END = min(n for n in BANNERS if n > START) - 1
GATE = range(START, END + 1)


def test_the_gate_can_be_read_alone():
    """At most 280 lines, 200 of them code, and README tells how many."""
    own = LINES[START - 1 : END]
    prose = {n for node in ast.walk(ast.parse(TEXT)) if isinstance(node, ast.Expr)
             and isinstance(node.value, ast.Constant) and node.lineno in GATE
             for n in range(node.lineno, node.end_lineno + 1)}  # fmt: skip
    code = [n for n in GATE if LINES[n - 1].strip() and LINES[n - 1].strip()[0] != "#"]
    assert len(own) <= 280
    assert len({*code} - prose) <= 200
    readme = (SCRIPT.parent / "README.md").read_text()
    (told,) = {*re.findall(r"gate.{0,80}?(\d{3}) lines", readme, re.S)}
    assert int(told) == len(own)


def test_nothing_outside_the_gate_can_delete():
    """No other place calls delete_object(s), makes a client of S3, or a DELETE statement."""
    inside = list[str]()
    for node in ast.walk(ast.parse(TEXT)):
        name = getattr(node, "attr", getattr(node, "id", ""))
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        calls = re.fullmatch(r"delete_\w+|_writer|_make_api_call|_post", name)
        deletes = re.search(r"(?<!EXPLAIN )\bDELETE( FROM\b| \Z)|\bTRUNCATE|\bDROP", text)
        if name == "delete_rows" or not (calls or deletes or text == "s3"):
            continue
        assert node.lineno in GATE, f"line {node.lineno}: {name or text}"
        inside.append(name or text)
    assert {"delete_objects", "DELETE ", "s3", "_post"} <= {*inside}, "the search finds nothing"


# --- On real servers ------------------------------------------------------------------------------

IN_USE = f"INSERT INTO {TABLE} (jobId, type, sourceData) VALUES ('new', 'TRIAL', '{EXPIRED[0]}')"
GLOBALS = ("init_connect = ''", "read_only = 0", "completion_type = 'NO_CHAIN'")


@pytest.fixture(params=["mariadb", "mysql"])
def real(request, box: Sandbox) -> Iterator[World]:
    """The sandbox with the original jobs and objects, whose user may delete rows, on each server.
    Requests pass a proxy, and the first listing waits until the test lets it go."""
    box = box if request.param == "mariadb" else request.getfixturevalue("mysql_box")
    box.load(*seed())
    box.sql(f"GRANT DELETE ON {DATABASE}.* TO {USER}@'%'")
    world = World(box)
    with S3Proxy(box.s3_url) as proxy:
        world.settings["AWS_ENDPOINT_URL_S3"] = proxy.url
        world.held = Held(proxy, "list")
        yield world
    world.stop()
    box.sql(*(f"SET GLOBAL {text}" for text in GLOBALS))
    if request.param == "mariadb":
        box.sql("SET GLOBAL system_versioning_asof = DEFAULT")
    box.sql(f"REVOKE DELETE ON {DATABASE}.* FROM {USER}@'%'")


def after_the_plan(world: World, *statements: str, **more: Any) -> Result:
    """A run that deletes rows, and during which this happens to the table that it has read."""
    run = world.start(*AS_OF, "--delete-jobs", "--json", **more)
    world.held.wait()
    world.box.sql(*statements)
    world.held.release()
    return ended(run)


LEFT_OPEN = """
plan = rp.make_plan
def make_plan(run, bucket, terms, jobs, *more):
    jobs._connection.cursor().execute({!r})
    return plan(run, bucket, terms, jobs, *more)
rp.make_plan = make_plan
"""
SNAPSHOT = "START TRANSACTION WITH CONSISTENT SNAPSHOT"
BLIND = {  # what the server does to each new session, or the script to its own
    "no autocommit": ("init_connect = 'SET autocommit = 0'", ""),
    "a snapshot": (f"init_connect = 'SET autocommit = 0; {SNAPSHOT}'", ""),
    "modes": ("init_connect = \"SET sql_mode = 'ANSI_QUOTES,NO_BACKSLASH_ESCAPES'\"", ""),
    "few rows": ("init_connect = \"SET sql_select_limit = 2, time_zone = '-12:00'\"", ""),
    "chained": ("completion_type = 'CHAIN'", ""),
    "left open": ("init_connect = ''", LEFT_OPEN.format(SNAPSHOT)),
}


@pytest.mark.parametrize("case", BLIND)
def test_a_re_check_sees_the_table_as_it_is_whatever_the_server_did_to_the_session(real, case):
    setting, patch = BLIND[case]
    real.box.sql(f"SET GLOBAL {setting}")
    before = {*real.box.job_ids()}
    result = after_the_plan(real, IN_USE, patch=patch)
    gone = {*EXPIRED} - {*real.box.live_keys()}
    assert (result.code, gone) == (0, {*EXPIRED[1:]}), result.err
    assert result.summary["retained"] == 1
    rows = before - {*real.box.job_ids()}
    assert 0 < len(rows) == result.summary["jobs_deleted"], "counted, and still there"


def test_a_moment_is_compared_as_a_moment_even_if_its_column_is_a_text(real):
    """The run refuses such a column. The gate does not depend on that."""
    text = "ALTER TABLE {} MODIFY completedAt varchar(30)", "UPDATE {} SET completedAt = '19-12-31'"
    real.box.sql(*(each.format(TABLE) for each in text))
    wishes = rp.Wishes(BUCKET, as_of=datetime(2019, 6, 3, tzinfo=UTC))
    way: Any = SimpleNamespace(bucket=BUCKET)
    with real.box.database.admin() as connection:
        gate = rp.Gate(way, connection, f"{DATABASE}.{TABLE}", "lock", wishes)
        assert gate.known(EXPIRED)[1][EXPIRED[0]].expired == 0


def test_a_change_that_is_not_committed_is_no_change(real):
    """On a server that shows such changes to whoever does not ask for more."""
    level = "SET GLOBAL TRANSACTION ISOLATION LEVEL"
    real.box.sql("SET GLOBAL completion_type = 'CHAIN'", f"{level} READ UNCOMMITTED")
    before = {*real.box.live_keys()}
    with real.box.database.admin(database=DATABASE, autocommit=False) as other:
        other.cursor().execute(f"UPDATE {TABLE} SET type = 'TRIAL' WHERE type = 'OFFICIAL'")
        real.held.release()
        result = real.purge(*AS_OF, "--json")
        other.rollback()
    real.box.sql(f"{level} REPEATABLE READ")
    assert (result.code, before - {*real.box.live_keys()}) == (0, {*EXPIRED}), result.err


CHANGED = """
real = rp.Gate.known
def changed(gate, names):
    gate._connection.cursor().execute({!r})
    return real(gate, names)
rp.Gate.known = changed
"""
IN_RUN = ("SET time_zone = '+05:00'", "SET autocommit = 0", "SET sql_mode = 'ANSI_QUOTES'",
          "SET sql_select_limit = 3", "DO RELEASE_ALL_LOCKS()",
          "SET @a = 1 /*M!100318 , system_versioning_asof = NOW(6) */", "read_only")  # fmt: skip


@pytest.mark.parametrize("change", IN_RUN)
def test_a_run_ends_whose_session_changes_in_the_middle(real, change):
    before = state(real.box)
    if "M!" in change and real.box.database.kind == "mysql":
        pytest.skip("MariaDB alone has system-versioned tables")
    if change == "read_only":
        result = after_the_plan(real, "SET GLOBAL read_only = 1")
    else:
        result = after_the_plan(real, "DO 0", patch=CHANGED.format(change))
    assert (result.code, state(real.box)) == (1, before)
    assert "is not as it was set, lost its lock, or its server is read-only" in result.error


def test_a_system_versioned_table_does_not_answer_with_its_past(real):
    if real.box.database.kind == "mysql":
        pytest.skip("MariaDB alone has system-versioned tables")
    past = "SET GLOBAL system_versioning_asof = NOW(6)"
    real.box.sql(f"ALTER TABLE {TABLE} ADD SYSTEM VERSIONING", past, IN_USE)
    real.held.release()
    result = real.purge(*AS_OF, "--json")
    assert (result.code, {*EXPIRED} - {*real.box.live_keys()}) == (0, {*EXPIRED[1:]})


def test_a_table_that_is_half_reloaded_in_the_middle_loses_no_object_of_a_job(real):
    """`adopted` is an orphan to the plan. Then a job takes it in, and the table is loaded anew."""
    box = real.box
    box.put("adopted", age=timedelta(days=1))
    run = real.start(*AS_OF, *EVERYTHING, "--json")
    real.held.wait()
    few = f"SELECT * FROM {TABLE} WHERE NOT (type <=> 'TRIAL') ORDER BY jobId LIMIT 5"
    adopt = f"INSERT INTO {TABLE} (jobId, type, sourceData) VALUES ('new', 'OFFICIAL', 'adopted')"
    box.sql(adopt, f"CREATE TABLE few AS {few}", f"TRUNCATE {TABLE}",
            f"INSERT INTO {TABLE} SELECT * FROM few", "DROP TABLE few")  # fmt: skip
    before = {*box.live_keys()}
    real.held.release()
    summary = ended(run).summary
    assert summary["planned"]["orphan"] > 0, "nothing was at stake"
    assert ({*box.live_keys()}, summary["retained"]) == (before, sum(
        summary["planned"][reason] for reason in ("orphan", "expired")))  # fmt: skip


def test_rows_whose_delete_was_given_up_are_rolled_back(real):
    """The run is killed while its DELETE waits for one row. Then the server could go on."""
    before = real.box.job_ids()
    real.held.release()
    with real.box.database.admin(database=DATABASE, autocommit=False) as connection:
        row = f"SELECT * FROM {TABLE} WHERE type = 'TRIAL' ORDER BY jobId DESC FOR UPDATE"
        connection.cursor().execute(row)
        run = real.start(*AS_OF, "--delete-jobs")
        until(real.box, "SELECT 1 FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'")
        run.kill()
        run.wait()
        connection.rollback()
    until_gone(real.box)
    assert real.box.job_ids() == before
