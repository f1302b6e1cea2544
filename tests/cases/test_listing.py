"""What lies in the bucket: read strictly, found wherever it lies, with few requests."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import cycle
from unittest.mock import patch

import pytest
import s3_stub
from conftest import AS_OF, EVERYTHING, expire, version
from faults import edited
from hypothesis import given, settings
from hypothesis import strategies as st
from local_bucket import LocalBucket
from proxies import Answer, Request

import retention_purge as rp

bucket = LocalBucket()


def pairs(bucket: rp.Bucket, wanted: Iterable[str], whole: bool) -> Iterator[tuple[str, str]]:
    """Of each pair the keys of its reference and of its object."""
    references = rp.Spool(rp.Reference(key, 1, 1) for key in sorted(wanted))
    for reference, item in rp.outer_join(references, bucket.objects(references, whole)):
        if whole or reference:
            yield reference.key if reference else "", item.key if item else ""


def expected(objects: Iterable[str], wanted: Iterable[str], whole: bool) -> list[tuple[str, str]]:
    """All that `pairs` must find, in the order of the keys."""
    objects, wanted = {*objects}, {*wanted}
    keys = objects | wanted if whole else wanted
    return [(key * (key in wanted), key * (key in objects)) for key in sorted(keys)]


# --- The outer join -------------------------------------------------------------------------------

N, M = [f"{n:07}" for n in range(100_000)], [f"m{n:06}" for n in range(10_000)]
ODD = "ab\x01\x02\n \x7f\ud7ff\ue000\uffff\U00010000\U0010ffff"
KEYS = st.text(st.sampled_from(ODD), min_size=1, max_size=4)
TILED = st.tuples(st.integers(0, 99), st.integers(1, 30)).map(lambda at: {*N[at[0] : sum(at)]})
MANY = st.sets(KEYS, max_size=40) | TILED | st.lists(TILED).map(lambda sets: set().union(*sets))
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6))
DICE = st.none() | st.integers(0, 99).map(random.Random)


@settings(max_examples=250, deadline=None)
@given(MANY, MANY, st.booleans(), SIZES, DICE)
def test_each_pair_is_found_once_however_the_listing_is_cut(objects, wanted, whole, sizes, dice):
    """`dice` makes pages shorter than they may be, as S3's may: they may even have no keys. The
    stub's tokens are keys: a page that a token asks for is not empty, or the same token came again.
    """
    page, sparse, workers = sizes
    full, tokens = bucket.fill(objects, workers=workers).store.page, set[str]()

    def short(after: str, prefix: str, limit: int) -> tuple[list[str], bool]:
        keys, more = full(after, prefix, dice.randint(after in tokens, limit))
        tokens.update(keys[-1:] or [after])
        return keys, more

    if dice:
        bucket.store.page = short
    constants = {"PAGE": page, "BLOCK": page, "SEEK": min(page, 2), "SPARSE": sparse}
    with patch.multiple(rp, LISTED_AHEAD=4 * page, SOUGHT_AHEAD=8 * page, **constants):
        assert [*pairs(bucket, wanted, whole)] == expected(objects, wanted, whole)
    sought = [query.get("start-after", "") for query in bucket.asked]
    assert not any(map(rp.NOT_XML.search, sought)), "S3 could not repeat it in its answer"


def test_what_a_page_shows_to_be_empty_is_looked_at_once():
    """At each look another page has just shown what lies before, or behind, all objects."""
    gaps = cycle([("", N[0]), (N[4999], rp.END)])
    gap = property(lambda _: next(gaps), lambda *_: None)
    with patch.object(LocalBucket, "_gap", gap, create=True):
        found = [*pairs(bucket.fill(N[:5000]), N[:5000:50], False)]
    assert found == expected(N[:5000], N[:5000:50], False)


# --- How many requests ----------------------------------------------------------------------------

AMID, BETWEEN = [f"m005000{n:06}" for n in range(99_999)], [f"{key}{n}" for key in M for n in "12"]
RUNS = [key for n in range(0, 100_000, 9000) for key in N[n : n + 4000 : 40 if n % 2 else 1]]
# The objects, the wanted keys, whether all are listed; at most how many requests, objects listed.
COSTS: dict[str, tuple[list[str], list[str], bool, int, int]] = {
    "all": (N, N, False, 201, 201_000),
    "each far from the next": (N, N[::1000], False, 102, 3000),
    "in runs, dense and sparse": (N, RUNS, False, 110, 110_000),
    "behind a character that XML cannot carry": (N, [N[0], "\uffffx"], False, 3, 3000),
    "missing": (M, sorted(AMID + BETWEEN), False, 35, 35_000),
    "a full listing": (N, [key for n, key in enumerate(N) if n % 10], True, 150, 150_000),
    "a clump of orphans": (M + AMID[::2], M, True, 90, 90_000),
}


@pytest.mark.parametrize("case", COSTS)
def test_about_a_request_a_page_or_a_wanted_key_finds_all(case):
    objects, wanted, whole, requests, listed = COSTS[case]
    bucket = LocalBucket().fill(objects, workers=8)  # a new one: no thread still asks of it
    assert [*pairs(bucket, wanted, whole)] == expected(objects, wanted, whole)
    assert len(bucket.asked) <= min(requests, len(wanted) + 2)
    assert sum(int(query["max-keys"]) for query in bucket.asked) <= listed


# --- Faults on every border -----------------------------------------------------------------------

THINGS = {f"in/{n:02}" for n in range(24)}
JOBS = {f"in/{n:02}" for n in range(0, 30, 2)} | {f"in/{n:02}x" for n in range(0, 24, 3)}


def of_entries(body: bytes, change: Callable[[list[bytes]], list[bytes]]) -> bytes:
    """The page with its entries changed, and counted."""
    body = edited(body, b"Contents", change)
    return re.sub(rb"<KeyCount>\d+", b"<KeyCount>%d" % body.count(b"<Contents>"), body)


reverse = partial(of_entries, change=lambda parts: parts[::-1])
# Of a page, the first one and the one that was answered last, perhaps to another part.
FAULTS: dict[str, Callable[[bytes, bytes, bytes], bytes]] = {
    "reversed": lambda body, *_: reverse(body),
    "an object twice": lambda body, *_: of_entries(body, lambda parts: [*parts, parts[-1]]),
    "a key of another prefix": lambda body, *_: b"<Key>out/".join(body.rsplit(b"<Key>in/", 1)),
    "an object lost": lambda body, *_: edited(body, b"Contents", lambda parts: parts[:-1]),
    "the first page again": lambda body, first, last: first,
    "another part's page": lambda body, first, last: last,
    "no token": lambda body, *_: re.sub(rb"<NextCont.*Token>", b"", body),
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
@patch.multiple(rp, PAGE=5, SEEK=2, SPARSE=2)
def test_a_fault_at_any_request_ends_the_run_or_does_no_harm(fault, whole):
    """It may do none: a page is reversed that has one object, a token dropped that there is not."""
    truth = expected(THINGS, JOBS, whole)

    def ends(at: int) -> bool:
        """Whether the run does, with a fault in this answer; otherwise it finds all."""
        bodies = [b""]

        def after(number: int, answer: tuple[int, bytes]) -> tuple[int, bytes]:
            bodies.append(answer[1])
            spoils = number == at and b"<Contents>" in answer[1]
            return 200, FAULTS[fault](answer[1], bodies[1], bodies[-2]) if spoils else answer[1]

        bucket.fill(THINGS, "in/", workers=5).after = after
        with suppress(rp.PurgeError):
            assert [*pairs(bucket, JOBS, whole)] == truth
            return False
        return True

    assert not ends(0)
    requests = len(bucket.asked)
    assert requests >= 5
    assert sum(map(ends, range(1, requests + 1))) > requests / 3


# --- Answers that are no answers ------------------------------------------------------------------

TEXT = st.text(st.sampled_from("ab &<>+%/\"'\t]é\U0001f600"), min_size=1, max_size=9)


@given(st.sets(TEXT), st.sampled_from([{}, {"encoding-type": "url"}]), st.sampled_from(["", "\n "]))
def test_a_listing_is_read_as_it_was_written(keys, query, gap):
    """Percent-encoded or not, as that of Ceph, and with whitespace between the elements."""
    body = s3_stub.listing(s3_stub.Store(keys), "b", query)[1].decode()
    page = rp.parse_listing(body.replace("><", f">{gap}<"))
    assert (page.token, page.bucket) == (None, "b")
    told = [(item.key, item.size) for item in page.objects]
    assert told == [(key, str(len(key))) for key in sorted(keys)]


KEY, SIZE = b"<Key>k</Key>", b"<Size>1</Size>"
DATE = b"<LastModified>2019-01-01T00:00:00.000Z</LastModified>"
HEAD = b"<Name>bucket</Name><KeyCount>1</KeyCount><IsTruncated>false</IsTruncated><Contents>"
ONE = b"<ListBucketResult>" + HEAD + KEY + SIZE + DATE + b"</Contents></ListBucketResult>"
NONE = re.sub(b"<Contents>.*</Contents>", b"", ONE.replace(b"Count>1", b"Count>0"))
NOT_A_LISTING = {
    "empty": b"",
    "html": b"<html><body>Sign in</body></html>",
    "no utf-8": ONE.replace(b"k<", b"\xff<"),
    "closed at once": b"<ListBucketResult/>",
    "no count": NONE.replace(b"<KeyCount>0</KeyCount>", b""),
    "truncated without token": NONE.replace(b"false", b"true"),
    "nothing said of an end": re.sub(b"<IsTr.*ted>", b"", NONE),
    "no name": NONE.replace(b"<Name>bucket</Name>", b""),
    "an object without key": ONE.replace(KEY, b""),
    "a size that is none": ONE.replace(b">1</Size>", b">-1</Size>"),
    "a date without a zone": ONE.replace(b"000Z", b"000"),
    "two in one": ONE.replace(KEY, KEY + SIZE + DATE + KEY).replace(b"Count>1", b"Count>2"),
}
NOT_A_LISTING |= {f"cut after {n}": ONE[:n] for n in range(len(ONE))}


@pytest.mark.parametrize("body", NOT_A_LISTING.values(), ids=NOT_A_LISTING)
def test_an_answer_that_is_no_listing_is_not_an_empty_bucket(body):
    bucket.fill().after = lambda *_: (200, body)
    with pytest.raises(rp.PurgeError, match="Cannot list bucket") as caught:
        bucket.page()
    assert caught.value.code == "InvalidAnswer"


ARN = "arn:aws:s3:eu-west-1:123456789012:accesspoint/a"
OF_BUCKET = {"bucket": True, ARN: True, "a-1x-s3alias": True, "another": False, "bucket2": False}


@pytest.mark.parametrize("body", [ONE, NONE], ids=["one", "none"])
@pytest.mark.parametrize("name", OF_BUCKET)
def test_a_listing_of_another_bucket_is_an_error_but_to_an_access_point(name, body):
    bucket.fill().name, bucket.after = name, lambda *_: (200, body)
    foreign = pytest.raises(rp.PurgeError, match="gave of bucket, which was not asked for")
    with nullcontext() if OF_BUCKET[name] else foreign:
        assert len(bucket.page().objects) == (body == ONE)


@pytest.mark.parametrize("name", ["start-after", "continuation-token"])
@pytest.mark.parametrize("key", ["a", "k+/=", "k k", "k&", "k&+"])
def test_a_page_must_be_the_one_that_was_asked_for(name, key):
    """Where the answer repeats what was asked for, as S3's does."""
    where = {"token" if name == "continuation-token" else "after": key}
    assert bucket.fill(["z"]).page(**where).objects[-1].key == "z"
    query = {"max-keys": "9", "encoding-type": "url", name: "k"}
    bucket.after = lambda *_: s3_stub.listing(bucket.store, "bucket", query)
    with pytest.raises(rp.PurgeError, match="gave after k, which was not asked for"):
        bucket.page(**where)


def test_an_object_is_found_by_a_request_for_its_key_alone():
    found = [bucket.fill(there).find("k") for there in ("az", ["kk"], ["k", "kk"])]
    assert [item and item.key for item in found] == [None, None, "k"]
    asked = [(query["prefix"], query["max-keys"]) for query in bucket.asked]
    assert asked == [("k", "1")]


@pytest.mark.parametrize("tokens", [b"abc", b"abb", b"aa"])
def test_pages_without_objects_are_followed_but_not_to_the_same_token_again(tokens):
    token = b"true</IsTruncated><NextContinuationToken>%c</NextContinuationToken>"
    bodies = [NONE.replace(b"false</IsTruncated>", token % each) for each in tokens]
    bucket.fill().after = lambda number, _: (200, [*bodies, ONE][number - 1])
    stuck = pytest.raises(rp.PurgeError, match="same token again")
    with stuck if tokens[-2] == tokens[-1] else nullcontext():
        assert bucket.page().objects[-1].key == "k"


# --- In a whole run -------------------------------------------------------------------------------

# The operation whose answer is another, which, and what is said: without the hook before the parse
# botocore would take whatever is well-formed for an answer that has nothing to tell.
UNTRUSTED: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "disorder": ("list", reverse, "listing is out of order"),
    "no listing": ("list", lambda _: b"<html/>", "Cannot list bucket incoming-data: InvalidAnswer"),
    "no versioning": ("versioning", lambda _: b"<html/>", "Cannot read the versioning of bucket"),
    "no versions": ("other", lambda _: b"<html/>", "Cannot list the versions in bucket"),
    "no end": ("other", lambda _: b"<ListVersionsResult/>", "Cannot list the versions in bucket"),
}


@pytest.mark.parametrize("case", UNTRUSTED)
def test_an_answer_that_cannot_be_trusted_ends_the_run(world, proxy, tmp_path, case):
    operation, change, says = UNTRUSTED[case]
    options = [*AS_OF, *EVERYTHING]
    if operation == "other":  # in an undo the list of versions
        version(world)
        options = ["--undo", str(tmp_path / "log")]
        assert world.purge(*AS_OF, "--audit-log", options[1]).code == 0

    def after(request: Request, answer: Answer) -> Answer:
        spoils = request.operation == operation
        return replace(answer, body=change(answer.body)) if spoils else answer

    proxy.after = after
    left = world.box.live_keys()
    summary = world.purge(*options, "--json").summary
    assert (summary["exit_code"], summary["planned"]) == (1, None)
    assert says in summary["error"]
    assert world.box.live_keys() == left


FULL = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (30_000, 30_000))"


@pytest.mark.parametrize("patch", [FULL, "rp.tempfile.tempdir = '/no/such/folder'"])
def test_a_full_disk_ends_the_run_with_nothing_deleted(world, patch):
    keys = expire(world, 3000)
    assert "Cannot write a spool file" in world.purge(*AS_OF, patch=patch).error
    assert world.box.live_keys() == keys


def test_a_thread_that_cannot_start_ends_its_stream_after_those_before_it(monkeypatch):
    start, begun, got = threading.Thread.start, list[threading.Thread](), list[int]()

    def start_two(thread: threading.Thread) -> None:
        begun.append(thread)
        if len(begun) > 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(rp.PurgeError, match="lower --workers"):
        got.extend(rp.ahead(([n] for n in range(9)), 4))
    assert (got, len(begun)) == ([0, 1], 3)
