"""The pure part: policy, merge, plan, guards, and the small functions on keys."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import retention_purge as rp

NOW = datetime(2026, 3, 1, tzinfo=UTC)
# Every text that can be a key: all of Unicode but surrogates, which UTF-8 cannot carry.
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def item(key: str, age_days: float = 0) -> rp.S3Object:
    return rp.S3Object(key, str(len(key)), (NOW - timedelta(days=age_days)).isoformat())


def policy(grace_days: float | None = None, rows: bool = False, prefix: str = "") -> rp.Policy:
    before = None if grace_days is None else NOW - timedelta(days=grace_days)
    return rp.Policy(NOW - timedelta(days=90), prefix, before, rows)


def references(rows: Any, rules: rp.Policy, totals: rp.Totals) -> list[rp.Reference]:
    jobs: Any = SimpleNamespace(references=lambda: iter(rows))
    return list(rp.read_references(jobs, rules, totals))


@given(
    table=st.dictionaries(KEYS, st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any)),
    objects=st.dictionaries(KEYS, st.integers(0, 20)),
    shared=st.lists(KEYS, max_size=5),
    grace=st.none() | st.integers(0, 20),
    rows=st.booleans(),
)
def test_plan_is_what_the_rules_say_key_by_key(table, objects, shared, grace, rows):
    """`table`: of each key its expired and its remaining jobs."""
    for place, key in enumerate(shared):
        table.setdefault(key, (place % 2, 1 - place % 2))
        objects.setdefault(key, place)
    rules, totals = policy(grace, rows), rp.Totals()
    read = [(key.encode(), sum(table[key]), table[key][0]) for key in sorted(table, key=str.encode)]
    found = [item(key, objects[key]) for key in sorted(objects, key=str.encode)]
    pairs = list(rp.outer_join(references(read, rules, totals), found))
    doubtful = {key for key in objects if len(key) % 5 == 0}
    planned = list(rp.plan(pairs, rules, totals, doubtful.__contains__))

    expired = {key for key, (some, others) in table.items() if some and not others}
    orphans = {key for key in objects if grace is not None and key not in table}
    orphans = {key for key in orphans if objects[key] > grace}
    mixed = {key for key, jobs in table.items() if all(jobs)}
    assert {(c.reason, c.key) for c in planned} == (
        {("expired", key) for key in expired & {*objects}}
        | {("orphan", key) for key in orphans - doubtful}
        | {("missing", key) for key in expired - {*objects} if rows}
        | {("shared", key) for key in mixed if rows}
    )
    going = (expired & {*objects}) | (orphans - doubtful)
    assert len(planned) == len({c.key for c in planned})
    assert (totals.planned.objects, totals.planned["bytes"]) == (len(going), sum(map(len, going)))
    assert totals.jobs == sum(map(sum, table.values()))
    assert totals.expired_jobs == sum(some for some, _ in table.values())
    assert (totals.expired, totals.remaining) == (len(expired), len(table) - len(expired))
    assert totals.missing == len(expired - {*objects})
    if grace is not None:
        assert totals.doubtful == len(orphans & doubtful)
        assert totals.listed == len(objects)
        assert totals.known == len({*objects} & {*table})
        assert totals.dangling == len({*table} - expired - {*objects})


@pytest.mark.parametrize("keys", [["b", "a"], ["a", "a"], ["a", "c", "b"]])
def test_a_stream_out_of_order_is_an_error(keys):
    with pytest.raises(rp.PurgeError, match="bucket's listing is out of order"):
        list(rp.outer_join([], [item(key) for key in keys]))
    with pytest.raises(rp.PurgeError, match="list of the table's keys is out of order"):
        references([(key.encode(), 1, key == "b") for key in keys], policy(), rp.Totals())


def test_names_that_are_no_key_are_no_reference(caplog, monkeypatch):
    monkeypatch.setattr(rp.log, "propagate", True)
    longest = b"x" * (rp.KEY_BYTES - 2)
    rows = [(None, 3, 3), (b"", 4, 4), (b"5", 1, 1), (b"6", 2, 1)]
    rows += [(longest, 1, 1), (longest + b"y", 5, 5)]
    totals = rp.Totals()
    found = references(rows, policy(prefix="p/"), totals)
    assert found == [("p/5", 1, 1), (f"p/{longest.decode()}", 1, 1)]
    assert (totals.jobs, totals.expired_jobs, totals.remaining) == (16, 3, 1)
    assert "12 jobs have no sourceData" in caplog.text


def test_an_orphan_as_old_as_the_grace_period_or_called_like_the_prefix_stays():
    rules, orphan = policy(7, prefix="p/"), rp.Reason.ORPHAN
    found = [rules.reason(None, item(*of)) for of in (("p/k", 7), ("p/k", 7.001), ("p/", 99))]
    assert found == [None, orphan, None]


def test_the_re_check_lets_go_only_what_it_surely_may():
    """An expired key needs jobs, all of them expired; an orphan must have none."""
    found = [None, *(rp.Reference("k", *jobs) for jobs in ((0, 0), (1, 0), (2, 1), (2, 2)))]
    assert [rp.may_go("expired", each) for each in found] == [False] * 4 + [True]
    assert [rp.may_go("orphan", each) for each in found] == [True] + [False] * 4


# --- Keys -----------------------------------------------------------------------------------------


@given(KEYS | st.just("k" * rp.KEY_BYTES))
def test_seeking_just_before_a_key_never_skips_it_but_its_plain_neighbours(key):
    before = rp.just_before(key)
    assert before.encode() < key.encode()
    assert len(before.encode()) <= rp.KEY_BYTES
    assert not rp.NOT_XML.search(before)
    short = len(key) < rp.KEY_BYTES
    if short and not rp.NOT_XML.search(key + chr(max(ord(key[-1]) - 1, 0))):
        neighbour = key[:-1] + before[len(key) - 1]
        assert (neighbour + "z" * 50).encode() <= before.encode()


# --- Guards ---------------------------------------------------------------------------------------


def is_said(refusal: str, reasons: Iterable[str]) -> None:
    """There is this one reason, or none."""
    found = [*reasons]
    assert len(found) == bool(refusal)
    assert refusal in "".join(found)


ORPHANS, ROWS = {"grace_days": 7}, {"rows": True}
# The options, the totals, and what is said of them, if they are refused.
GUARDS: list[tuple[dict[str, Any], dict[str, int], str]] = [
    ({}, {"planned": 5, "remaining": 5}, ""),
    ({}, {"planned": 6, "remaining": 5}, "6 of 11 keys"),
    ({}, {"planned": 5, "remaining": 5, "listed": 5, "jobs": 3}, ""),
    (ORPHANS, {"planned": 5, "remaining": 95, "known": 1, "listed": 10}, ""),
    (ORPHANS, {"planned": 5, "remaining": 95, "known": 1, "listed": 9}, "5 of 9 objects in the l"),
    (ROWS, {"expired_jobs": 5, "jobs": 10}, ""),
    (ROWS, {"expired_jobs": 6, "jobs": 11}, "6 of 11 job rows"),
    ({}, {"expired_jobs": 6, "jobs": 6}, ""),
    ({"percent": 0}, {"planned": 1, "remaining": 999}, "1 of 1000 keys that are planned"),
    ({"percent": 100, "limit": 0}, {"planned": 1}, "--max-objects 0"),
    # No key of any job is among the objects listed.
    ({"percent": 100, **ORPHANS}, {"listed": 9, "jobs": 3}, "none of the 9 objects listed"),
    ({"percent": 100, **ORPHANS}, {"listed": 9}, "any of the 0 jobs"),
    ({"percent": 100, **ORPHANS}, {"jobs": 3}, "any of the 3 jobs"),
    ({"percent": 100, **ORPHANS}, {"listed": 9, "jobs": 3, "known": 1}, ""),
]


@pytest.mark.parametrize(("options", "seen", "refusal"), GUARDS)
def test_each_guard_speaks_for_itself_and_orphans_that_no_job_knows_are_refused(
    options, seen, refusal
):
    seen, options = dict(seen), {"percent": 50, "limit": None, **options}
    planned, limit, percent = seen.pop("planned", 0), options.pop("limit"), options.pop("percent")
    totals = rp.Totals(**seen)
    totals.planned["expired"] = planned
    reasons = rp.refusals(totals, policy(**options), limit, percent)
    is_said(refusal, reasons)


@pytest.mark.parametrize(
    ("database", "s3", "refusal"),
    [
        (300, 0, ""),
        (301, 1, "clock of the database is 301 seconds ahead of that of this host"),
        (0, -301, "clock of this host is 301 seconds ahead of that of S3"),
        (200, -200, "clock of the database is 400 seconds ahead of that of S3"),
    ],
)
def test_clocks_more_than_five_minutes_apart_are_refused(database, s3, refusal):
    is_said(refusal, rp.clock_refusals(timedelta(seconds=database), timedelta(seconds=s3)))
