"""The pure part: policy, merge, and the small functions on keys."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

import retention_purge as rp

NOW = datetime(2026, 3, 1, tzinfo=UTC)
# Every text that can be a key: all of Unicode but surrogates, which UTF-8 cannot carry.
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def item(key: str, age_days: float = 0) -> rp.S3Object:
    return rp.S3Object(key, len(key), NOW - timedelta(days=age_days))


def policy(grace_days: float | None = None) -> rp.Policy:
    before = None if grace_days is None else NOW - timedelta(days=grace_days)
    return rp.Policy(cutoff=NOW - timedelta(days=90), orphans_before=before)


@given(
    references=st.dictionaries(KEYS, st.booleans()),
    objects=st.dictionaries(KEYS, st.integers(0, 20)),
    shared=st.lists(KEYS, max_size=5),
    grace=st.none() | st.integers(0, 20),
    rows=st.booleans(),
)
def test_plan_is_what_the_rules_say_key_by_key(references, objects, shared, grace, rows):
    for place, key in enumerate(shared):
        references.setdefault(key, place % 2 == 0)
        objects.setdefault(key, place)
    totals = rp.Totals()
    by_bytes = lambda key: key.encode()  # noqa: E731
    names = [
        ((b"+" if references[key] else b"-") + key.encode(),)
        for key in sorted(references, key=by_bytes)
    ]
    found = [item(key, objects[key]) for key in sorted(objects, key=by_bytes)]
    needed = rp.references(names, "", totals, all_keys=grace is not None or rows)
    planned = list(rp.plan(rp.outer_join(needed, found), policy(grace), totals))
    expired = {key for key in objects if references.get(key) is True}
    orphans = {key for key in objects if key not in references and grace is not None}
    orphans = {key for key in orphans if objects[key] > grace}
    assert {c.key for c in planned if c.reason is rp.Reason.EXPIRED} == expired
    assert {c.key for c in planned if c.reason is rp.Reason.ORPHAN} == orphans
    assert len(planned) == len(expired) + len(orphans) == totals.planned.objects
    assert totals.planned.bytes == sum(len(key) for key in expired | orphans)
    assert totals.missing == sum(e and key not in objects for key, e in references.items())
    assert totals.remaining == sum(not e for e in references.values())
    assert totals.expired == sum(references.values())
    assert totals.listed == len(objects)


@pytest.mark.parametrize("keys", [["b", "a"], ["a", "a"], ["a", "c", "b"]])
def test_a_stream_out_of_order_is_an_error(keys):
    with pytest.raises(rp.PurgeError, match="bucket's listing is out of order"):
        list(rp.outer_join([], [item(key) for key in keys]))
    with pytest.raises(rp.PurgeError, match="spooled key list is out of order"):
        list(rp.outer_join([rp.Reference(key, True) for key in keys], []))
    rows = [(f"{'-' if key == 'a' else '+'}{key}".encode(),) for key in keys]
    with pytest.raises(rp.PurgeError, match="job table's name list is out of order"):
        list(rp.references(rows, "p/", rp.Totals(), all_keys=False))


def test_names_that_are_no_key_are_no_reference(caplog):
    rows = [(b"12",), (b"++",), (b"+5",), (b"-6",), (b"+\xff",)]
    totals = rp.Totals()
    found = list(rp.references(rows, "p/", totals, all_keys=False))
    assert found == [rp.Reference("p/+", True), rp.Reference("p/5", True)]
    assert totals.remaining == 1
    assert "12 jobs have no sourceData" in caplog.text


def test_an_orphan_as_old_as_the_grace_period_stays():
    assert policy(7).reason(None, item("k", 7)) is None
    assert policy(7).reason(None, item("k", 7.001)) is rp.Reason.ORPHAN


@given(KEYS)
def test_seeking_just_before_a_key_never_skips_it(key):
    before = rp.just_before(key)
    assert before.encode() < key.encode()
    assert not rp.NOT_XML.search(before)


@given(KEYS)
def test_seeking_just_before_a_plain_key_skips_its_neighbours(key):
    if rp.NOT_XML.search(key) or rp.NOT_XML.match(chr(max(ord(key[-1]) - 1, 0))):
        return
    neighbour = key[:-1] + rp.just_before(key)[len(key) - 1]
    assert neighbour.encode() <= rp.just_before(key).encode()
    assert (neighbour + "z" * 50).encode() <= rp.just_before(key).encode()


def test_seeking_from_a_key_of_full_length_stays_within_the_limit_of_s3():
    assert len(rp.just_before("k" * rp.KEY_BYTES).encode()) <= rp.KEY_BYTES


@given(st.lists(KEYS, unique=True, max_size=30))
def test_every_candidate_is_in_one_batch_and_odd_keys_are_alone(keys):
    candidates = [rp.Candidate(*item(key), rp.Reason.EXPIRED) for key in keys]
    batches = list(rp.batches(candidates))
    assert sorted(c.key for batch in batches for c in batch) == sorted(keys)
    assert all(
        len(batch) == 1 or not any(rp.NOT_XML.search(c.key) for c in batch) for batch in batches
    )


def test_a_batch_holds_what_one_request_may_carry():
    candidates = [rp.Candidate(*item(f"{n:05}"), rp.Reason.EXPIRED) for n in range(2500)]
    assert [len(batch) for batch in rp.batches(candidates)] == [1000, 1000, 500]


@given(KEYS)
def test_a_printed_key_is_one_line_and_unmistakable(key):
    printed = rp.printable(key)
    assert printed.splitlines() == [printed]
    assert "\t" not in printed
    assert printed == key or __import__("json").loads(printed) == key
    assert printed != key or not key.startswith('"')


def test_a_spool_gives_back_what_it_was_filled_with_to_several_readers_at_once():
    records = [rp.Reference(f"{n:05}", n % 2 == 0) for n in range(2500)]
    spool = rp.Spool(rp.Reference, iter(records))
    first, second = iter(spool), iter(spool)
    assert [next(first) for _ in range(1500)] == records[:1500]
    assert list(second) == records
    assert list(first) == records[1500:]
    assert spool.count == 2500


def refused(limits: rp.Limits, **seen: int) -> str:
    planned = rp.Tally(expired=seen.pop("planned"))
    return "; ".join(rp.refusals(rp.Totals(planned=planned, **seen), limits))


def test_each_guard_speaks_for_itself():
    half, all_ = rp.Limits(None, 50, orphans=False), rp.Limits(None, 100, orphans=True)
    assert refused(half, planned=5, remaining=5) == ""
    assert "6 of 11 keys" in refused(half, planned=6, remaining=5)
    assert refused(half, planned=5, remaining=5, listed=5) == ""
    orphans = rp.Limits(None, 50, orphans=True)
    seen = {"remaining": 95, "listed_remaining": 1}
    assert refused(orphans, planned=5, listed=10, **seen) == ""
    assert "5 of 9 objects in the listing" in refused(orphans, planned=5, listed=9, **seen)
    assert "none of the 3 keys" in refused(all_, planned=1, remaining=3, listed=9)
    assert refused(all_, planned=1, remaining=3, listed=9, listed_remaining=1) == ""
    assert refused(all_, planned=0, remaining=0, listed=0) == ""
    assert refused(rp.Limits(0, 100, orphans=False), planned=0) == ""
    assert "--max-objects 0" in refused(rp.Limits(0, 100, orphans=False), planned=1)


@pytest.mark.parametrize(
    ("database", "s3", "refusal"),
    [
        (0, 0, ""),
        (300, 0, ""),
        (301, 0, "clock of the database is 301 seconds ahead of that of this host"),
        (0, -301, "clock of this host is 301 seconds ahead of that of S3"),
        (200, -200, "clock of the database is 400 seconds ahead of that of S3"),
    ],
)
def test_clocks_more_than_five_minutes_apart_are_refused(database, s3, refusal):
    later = NOW + timedelta(seconds=database)
    reasons = list(rp.clock_refusals(NOW, later, timedelta(seconds=s3)))
    assert len(reasons) == bool(refusal)
    assert refusal in "".join(reasons)
