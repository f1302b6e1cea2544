"""The pure part: terms, policy, merge, plan, guards, and the small functions on keys."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from unicodedata import normalize
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

import retention_purge as rp

NOW = datetime(2026, 3, 1, tzinfo=UTC)
# Every text that can be a key: all of Unicode but surrogates, which UTF-8 cannot carry.
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
FEW_KEYS = st.text("a\x01é\ue000😀", min_size=1, max_size=2)


def item(key: str, age_days: float = 0) -> rp.S3Object:
    return rp.S3Object(key, str(len(key)), (NOW - timedelta(days=age_days)).isoformat())


def terms(grace_days: float | None = None, rows: bool = False, prefix: str = "") -> rp.Terms:
    before = None if grace_days is None else NOW - timedelta(days=grace_days)
    return rp.Terms(prefix, NOW, NOW - timedelta(days=90), before, rows)


def references(rows: Any, under: rp.Terms, totals: rp.Totals) -> list[rp.Reference]:
    jobs: Any = SimpleNamespace(references=lambda: iter(rows))
    return list(rp.read_references(jobs, under, totals, []))


# What the command line asked for; the cutoff and the date of orphans, in days before now.
TERMS: list[tuple[dict[str, Any], float, float | None]] = [
    ({}, 90, None),
    ({"retention_days": 1, "orphan_grace_days": 7}, 1, 7),
    ({"as_of": NOW - timedelta(days=9), "orphan_grace_days": 7}, 99, 7),
    ({"as_of": NOW, "orphan_grace_days": 0}, 90, 0),
    ({"orphan_grace_days": -7}, 90, 0),
]


@pytest.mark.parametrize(("wishes", "cutoff", "grace"), TERMS)
def test_the_cutoff_is_counted_from_as_of_and_the_grace_period_from_the_clock(
    wishes, cutoff, grace
):
    found = rp.terms_of(rp.Wishes("b", "p/", rows=True, **wishes), NOW)
    before = None if grace is None else NOW - timedelta(days=grace)
    assert found == rp.Terms("p/", NOW, NOW - timedelta(days=cutoff), before, True)


LATER = {"as_of": NOW + timedelta(microseconds=1)}, {"retention_days": 0}


@pytest.mark.parametrize("wishes", LATER)
def test_a_job_cannot_expire_before_its_time(wishes):
    with pytest.raises(rp.PurgeError, match="later than the database clock"):
        rp.terms_of(rp.Wishes("b", **wishes), NOW)


@given(
    table=st.dictionaries(FEW_KEYS, st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any)),
    objects=st.dictionaries(FEW_KEYS, st.integers(0, 3)),
    grace=st.none() | st.integers(0, 3),
    rows=st.booleans(),
)
def test_plan_is_what_the_rules_say_key_by_key(table, objects, grace, rows):
    """`table`: of each key its expired and its remaining jobs; `objects`: days since. XML cannot
    carry "\x01"; let "é" be what the column cannot hold."""
    under, totals, lost = terms(grace, rows), rp.Totals(), set[str]()
    read = [(key.encode(), sum(table[key]), table[key][0]) for key in sorted(table)]
    found = [item(key, objects[key]) for key in sorted(objects)]
    pairs = list(rp.outer_join(references(read, under, totals), found))
    planned = rp.Spool(rp.plan(iter(pairs), under, totals, lost.add))
    planned = list(rp.without_doubtful(iter(planned), totals, lambda key: "é" in key))

    expired = {key for key, (some, others) in table.items() if some and not others}
    mixed = {key for key, jobs in table.items() if all(jobs)}
    orphans = {key for key in {*objects} - {*table} if grace is not None and objects[key] > grace}
    doubtful = {key for key in orphans if "é" in key}
    doubtful |= {key for key in orphans | expired & {*objects} if "\x01" in key}
    going = (orphans | expired & {*objects}) - doubtful
    reasons = {"expired": expired & going, "orphan": orphans & going}
    reasons |= {"missing": expired - {*objects}, "shared": mixed} if rows else {}
    wanted = [(reason, key) for reason, keys in reasons.items() for key in keys]
    assert sorted((each.reason, each.key) for each in planned) == sorted(wanted)
    assert (totals.planned.objects, totals.planned["bytes"]) == (len(going), sum(map(len, going)))
    assert totals.jobs == sum(map(sum, table.values()))
    assert totals.expired_jobs == sum(some for some, _ in table.values())
    assert (totals.expired, totals.remaining) == (len(expired), len(table) - len(expired))
    assert (totals.missing, totals.doubtful) == (len(expired - {*objects}), len(doubtful))
    if grace is not None:
        dangling = {*table} - expired - {*objects}
        assert (totals.listed, totals.dangling, lost) == (len(objects), len(dangling), dangling)
        assert totals.dangling_key in (dangling or {""})


@pytest.mark.parametrize("keys", [["a", "a"], ["a", "c", "b"]])
def test_a_stream_out_of_order_is_an_error(keys):
    with pytest.raises(rp.PurgeError, match="bucket's listing is out of order"):
        list(rp.outer_join([], [item(key) for key in keys]))
    with pytest.raises(rp.PurgeError, match="list of the table's keys is out of order"):
        references([(key.encode(), 1, key == "b") for key in keys], terms(), rp.Totals())


def test_names_that_are_no_key_are_no_reference():
    longest, totals = b"x" * (rp.KEY_BYTES - 2), rp.Totals()
    rows = [(b"", 7, 7), (b"6", 2, 2), (longest, 1, 1), (longest + b"y", 5, 5), (b"\xff", 3, 3)]
    found = references(rows, terms(prefix="p/"), totals)
    assert found == [("p/6", 2, 2), (f"p/{longest.decode()}", 1, 1)]
    counted = totals.jobs, totals.nameless, totals.expired_jobs, totals.remaining
    assert counted == (18, 15, 3, 0)


def test_an_orphan_as_old_as_the_grace_period_or_called_like_the_prefix_stays():
    under, orphan = terms(7, prefix="p/"), rp.Reason.ORPHAN
    ages = ("p/k", 7), ("p/k", 7.001), ("p/", 99)
    assert [rp.reason_of(under, None, item(*age)) for age in ages] == [None, orphan, None]


# Two names, and whether one may be meant by the other.
SPELLINGS = [
    ("a/b", "/a/b", True),
    ("a b", "a%20b", True),
    ("Key", "kEY", True),
    ("é", "e\u0301", True),
    ("straße", "STRASSE", True),
    ("Ä/b", "//a%CC%88%2fB", True),
    ("a", "b", False),
    ("a", "a/", False),
    ("a b", "a+b", False),
    ("e", "é", False),
    ("a", "a ", False),
]


@pytest.mark.parametrize(("name", "other", "same"), SPELLINGS)
def test_a_name_is_found_by_other_spellings_of_it(name, other, same):
    for known, asked in ((name, other), (other, name)):
        names = rp.Spellings()
        names.add(known)
        names.add(known)  # two jobs' keys may be the same but for the spelling
        assert (names.has(known), names.has(asked)) == (True, same)


@given(KEYS.filter(lambda name: "%" not in name))
def test_slash_percent_encoding_and_unicode_form_make_no_other_name(name):
    forms = f"/{name}", quote(name), quote(name, safe=""), normalize("NFD", name)
    assert {rp.folded(form) for form in forms} == {rp.folded(name)}


@pytest.mark.parametrize("count", [0, 1, rp.SAMPLE, rp.SAMPLE + 1, 3000])
def test_a_sample_is_spread_over_the_whole_stream(count):
    times, chosen = 200, Counter[str]()
    for _ in range(times):
        sample = list[str]()
        for n in range(count):
            rp.pick(sample, n + 1, f"{n:04}")
        assert len({*sample}) == len(sample) == min(count, rp.SAMPLE)
        chosen.update(name[:2] for name in sample)
    share = {tens: found * 30 / rp.SAMPLE / times for tens, found in chosen.items()}
    if count == 3000:  # about as many of each hundred, for five standard deviations
        assert len(share) == 30
        assert 0.7 < min(share.values()) <= max(share.values()) < 1.3


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


def refused(planned=0, percent=50, most=None, orphans=False, rows=False, **seen: int) -> Any:
    totals = rp.Totals(**seen)
    totals.planned["orphan" if orphans else "expired"] = planned
    return rp.refusals(totals, terms(7 if orphans else None, rows), rp.Limits(most, percent))


def clocks(database: int, s3: int) -> Any:
    return rp.clock_refusals(timedelta(seconds=database), timedelta(seconds=s3))


def alone(expired: int, missing: int, **more: int) -> Any:
    """Job rows may go, and no job remains."""
    return refused(rows=True, percent=100, expired=expired, missing=missing, **more)


NO_JOBS = "but {} jobs have no remaining one among them"
# What is seen, and what is said of it, if it is refused.
GUARDS = [
    (refused(planned=5, remaining=5, expired_jobs=6, jobs=6, listed=5), ""),
    (refused(planned=6, remaining=5), "6 of 11 keys that are planned"),
    (refused(planned=1, remaining=999, percent=0), "1 of 1000 keys"),
    (refused(planned=2, most=2, percent=100), ""),
    (refused(planned=3, most=2, percent=100), "more than --max-objects 2"),
    (refused(planned=1, most=0, percent=100), "more than --max-objects 0"),
    (refused(rows=True, expired_jobs=5, jobs=10), ""),
    (refused(rows=True, expired_jobs=6, jobs=11), "6 of 11 job rows"),
    (refused(orphans=True, planned=5, remaining=95, listed=10), ""),
    (refused(orphans=True, planned=5, remaining=95, listed=9), "5 of 9 objects in the l"),
    (refused(orphans=True, planned=1, percent=100, listed=9), NO_JOBS.format(0)),
    (refused(orphans=True, planned=1, percent=100, listed=9, jobs=3), NO_JOBS.format(3)),
    (refused(orphans=True, planned=0, listed=9, jobs=3), ""),
    (alone(expired=5, missing=3), "only 2 of 5 expired keys have an object, and no job remains"),
    (alone(expired=4, missing=2), ""),
    (alone(expired=5, missing=3, remaining=1), ""),
    (refused(expired=5, missing=3), ""),
    (clocks(300, 0), ""),
    (clocks(301, 1), "clock of the database is 301 seconds ahead of that of this host"),
    (clocks(0, -301), "clock of this host is 301 seconds ahead of that of S3"),
    (clocks(200, -200), "clock of the database is 400 seconds ahead of that of S3"),
]


@pytest.mark.parametrize(("reasons", "refusal"), GUARDS)
def test_each_guard_of_limits_places_and_clocks_speaks_for_itself(reasons, refusal):
    found = [*reasons]
    assert (len(found), refusal in "".join(found)) == (bool(refusal), True)


# What is seen, and asked for; the keys that are looked for, and how many of these must be there.
PLACES: list[tuple[dict[str, int], dict[str, Any], int, int]] = [
    ({"expired": 5, "missing": 4}, {}, 0, 0),  # nothing is concluded from absence
    ({"expired": 5, "missing": 5}, {}, 50, 25),
    ({"expired": 5, "missing": 5, "remaining": 3}, {}, 3, 2),
    ({"expired": 5, "missing": 1}, {"rows": True}, 50, 25),
    ({"expired": 5, "missing": 0}, {"rows": True}, 0, 0),
    ({"expired": 0, "missing": 0}, {}, 0, 0),
    ({"expired": 5, "missing": 5, "remaining": 0}, {"rows": True}, 0, 0),
]


@pytest.mark.parametrize(("seen", "asked", "looked", "needed"), PLACES)
def test_absence_is_believed_only_where_most_of_a_sample_is_there(seen, asked, looked, needed):
    totals, sample, wanted = rp.Totals(**{"remaining": 999} | seen), list[str](), list[str]()
    for n in range(totals.remaining):
        rp.pick(sample, n + 1, f"{n:03}")

    def refusals(there: int) -> int:
        def find(key: str) -> rp.S3Object | None:
            wanted.append(key)
            return item(key) if len(wanted) <= there else None

        wanted.clear()
        bucket: Any = SimpleNamespace(each=map, find=find)
        return len([*rp.wrong_place(totals, terms(prefix="p/", **asked), sample, bucket)])

    assert refusals(needed) == 0
    if needed:
        assert refusals(needed - 1) == 1
    assert len(wanted) == len({*wanted}) == looked
    assert all(key.startswith("p/") for key in wanted)


@pytest.mark.parametrize(("remaining", "dangling"), [(4, 2), (5, 2), (0, 0)])
def test_with_orphans_absence_is_believed_where_most_of_all_remaining_keys_are_there(
    remaining, dangling
):
    for more in range(1 + (remaining > 0)):  # a dangling key more is one too many
        lost, there = dangling + more, remaining - dangling - more
        totals = rp.Totals(remaining=remaining, dangling=lost, dangling_key="a\n")
        found = [*rp.wrong_place(totals, terms(7), [], SimpleNamespace())]
        says = f'only {there} of {remaining} keys of remaining jobs have an object; "a\\n", for one'
        assert [text[: len(says)] for text in found] == [says] * more
