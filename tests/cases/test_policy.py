"""The pure part: policy, merge, plan, guards, and the small functions on keys."""

from __future__ import annotations

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
FEW_KEYS = st.text("aé\ue000😀", min_size=1, max_size=2)


def item(key: str, age_days: float = 0) -> rp.S3Object:
    return rp.S3Object(key, str(len(key)), (NOW - timedelta(days=age_days)).isoformat())


def policy(grace_days: float | None = None, rows: bool = False, prefix: str = "") -> rp.Policy:
    before = None if grace_days is None else NOW - timedelta(days=grace_days)
    return rp.Policy(NOW - timedelta(days=90), prefix, before, rows)


def references(rows: Any, rules: rp.Policy, totals: rp.Totals) -> list[rp.Reference]:
    jobs: Any = SimpleNamespace(references=lambda: iter(rows))
    return list(rp.read_references(jobs, rules, totals))


@given(
    table=st.dictionaries(FEW_KEYS, st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any)),
    objects=st.dictionaries(FEW_KEYS, st.integers(0, 3)),
    grace=st.none() | st.integers(0, 3),
    rows=st.booleans(),
)
def test_plan_is_what_the_rules_say_key_by_key(table, objects, grace, rows):
    """`table`: of each key its expired and its remaining jobs; `objects`: days since."""
    rules, totals = policy(grace, rows), rp.Totals()
    read = [(key, sum(table[key]), table[key][0]) for key in sorted(table, key=str.encode)]
    found = [item(key, objects[key]) for key in sorted(objects, key=str.encode)]
    pairs = list(rp.outer_join(references(read, rules, totals), found))
    doubtful = {key for key in objects if "é" in key}
    planned = list(rp.plan(pairs, rules, totals, doubtful.__contains__))

    expired = {key for key, (some, others) in table.items() if some and not others}
    mixed = {key for key, jobs in table.items() if all(jobs)}
    orphans = {key for key in {*objects} - {*table} if grace is not None and objects[key] > grace}
    reasons = {"expired": expired & {*objects}, "orphan": orphans - doubtful}
    going = set.union(*reasons.values())
    reasons |= {"missing": expired - {*objects}, "shared": mixed} if rows else {}
    wanted = [(reason, key) for reason, keys in reasons.items() for key in keys]
    assert sorted((each.reason, each.key) for each in planned) == sorted(wanted)
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


@pytest.mark.parametrize("keys", [["a", "a"], ["a", "c", "b"]])
def test_a_stream_out_of_order_is_an_error(keys):
    with pytest.raises(rp.PurgeError, match="bucket's listing is out of order"):
        list(rp.outer_join([], [item(key) for key in keys]))
    with pytest.raises(rp.PurgeError, match="list of the table's keys is out of order"):
        references([(key, 1, key == "b") for key in keys], policy(), rp.Totals())


def test_names_that_are_no_key_are_no_reference():
    longest, totals = "x" * (rp.KEY_BYTES - 2), rp.Totals()
    rows = [("", 7, 7), ("6", 2, 2), (longest, 1, 1), (f"{longest}y", 5, 5)]
    found = references(rows, policy(prefix="p/"), totals)
    assert found == [("p/6", 2, 2), (f"p/{longest}", 1, 1)]
    assert (totals.jobs, totals.expired_jobs, totals.remaining) == (15, 3, 0)


def test_an_orphan_as_old_as_the_grace_period_or_called_like_the_prefix_stays():
    rules, orphan = policy(7, prefix="p/"), rp.Reason.ORPHAN
    found = [rules.reason(None, item(*of)) for of in (("p/k", 7), ("p/k", 7.001), ("p/", 99))]
    assert found == [None, orphan, None]


@given(KEYS | st.just("k" * rp.KEY_BYTES))
def test_seeking_just_before_a_key_never_skips_it_but_its_plain_neighbours(key):
    before = rp.just_before(key)
    assert before.encode() < key.encode()
    assert len(before.encode()) <= rp.KEY_BYTES
    assert not rp.NOT_XML.search(before)
    if len(key) < rp.KEY_BYTES and not rp.NOT_XML.search(key + chr(max(ord(key[-1]) - 1, 0))):
        neighbour = key[:-1] + before[len(key) - 1]
        assert (neighbour + "z" * 50).encode() <= before.encode()


# --- Guards ---------------------------------------------------------------------------------------


def limits(planned=0, percent=50, limit=None, orphans=False, rows=False, **seen: int) -> Any:
    totals = rp.Totals(**seen)
    totals.planned["expired"] = planned
    return rp.refusals(totals, policy(7 if orphans else None, rows), limit, percent)


def clocks(database: int, s3: int) -> Any:
    return rp.clock_refusals(timedelta(seconds=database), timedelta(seconds=s3))


NO_JOBS = "none of the {} objects listed is referred to by any of the {} jobs"
# What is seen, and what is said of it, if it is refused.
GUARDS = [
    (limits(planned=5, remaining=5, expired_jobs=6, jobs=6, listed=5), ""),
    (limits(planned=6, remaining=5), "6 of 11 keys that are planned"),
    (limits(planned=1, remaining=999, percent=0), "1 of 1000 keys"),
    (limits(planned=2, limit=2, percent=100), ""),
    (limits(planned=3, limit=2, percent=100), "more than --max-objects 2"),
    (limits(planned=1, limit=0, percent=100), "more than --max-objects 0"),
    (limits(rows=True, expired_jobs=5, jobs=10), ""),
    (limits(rows=True, expired_jobs=6, jobs=11), "6 of 11 job rows"),
    (limits(orphans=True, planned=5, remaining=95, known=1, listed=10), ""),
    (limits(orphans=True, planned=5, remaining=95, known=1, listed=9), "5 of 9 objects in the l"),
    (limits(orphans=True, listed=9), NO_JOBS.format(9, 0)),
    (limits(orphans=True, jobs=3), NO_JOBS.format(0, 3)),
    (limits(orphans=True, listed=9, jobs=3, known=1), ""),
    (clocks(300, 0), ""),
    (clocks(301, 1), "clock of the database is 301 seconds ahead of that of this host"),
    (clocks(0, -301), "clock of this host is 301 seconds ahead of that of S3"),
    (clocks(200, -200), "clock of the database is 400 seconds ahead of that of S3"),
]


@pytest.mark.parametrize(("reasons", "refusal"), GUARDS)
def test_each_guard_of_limits_orphans_and_clocks_speaks_for_itself(reasons, refusal):
    found = [*reasons]
    assert (len(found), refusal in "".join(found)) == (bool(refusal), True)
