"""What lies in the bucket: read strictly, found wherever it lies, with few requests."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from urllib.parse import quote_plus
from xml.sax.saxutils import escape

import pytest
import s3_stub
from conftest import AS_OF, EVERYTHING
from faults import edited
from hypothesis import given, settings
from hypothesis import strategies as st
from local_bucket import LocalBucket
from proxies import Answer

import retention_purge as rp


def pairs(bucket: rp.Bucket, wanted: Iterable[str], whole: bool) -> Iterator[tuple[str, str]]:
    """Of each pair the keys of its reference and of its object."""
    references = rp.Spool(rp.Reference(key, 1, 1) for key in sorted(wanted))
    for reference, item in rp.outer_join(references, bucket.objects(references, whole)):
        if whole or reference:
            yield reference.key if reference else "", item.key if item else ""


def expected(objects: Iterable[str], wanted: Iterable[str], whole: bool) -> Counter:
    objects, wanted = {*objects}, {*wanted}
    keys = objects | wanted if whole else wanted
    return Counter((key * (key in wanted), key * (key in objects)) for key in keys)


@pytest.fixture(scope="module")
def bucket() -> LocalBucket:
    return LocalBucket()


# --- The outer join -------------------------------------------------------------------------------

ODD = "ab\x01\x02\n \x7f\ud7ff\ue000\uffff\U00010000\U0010ffff"
KEYS = st.text(st.sampled_from(ODD), min_size=1, max_size=4)
TILED = st.tuples(st.integers(0, 99), st.integers(1, 30)).map(
    lambda span: {f"{n:03}" for n in range(span[0], sum(span))}
)
MANY = st.sets(KEYS, max_size=40) | TILED | st.lists(TILED).map(lambda sets: set().union(*sets))


@settings(max_examples=250, deadline=None)
@given(
    objects=MANY,
    wanted=MANY,
    whole=st.booleans(),
    page=st.integers(1, 9),
    sparse=st.integers(0, 9),
    workers=st.integers(1, 6),
    dice=st.none() | st.integers(0, 99).map(random.Random),
)
def test_each_pair_is_found_once_however_the_listing_is_cut(
    bucket, objects, wanted, whole, page, sparse, workers, dice
):
    """`dice` makes pages shorter than they may be, as S3's may."""
    bucket.fill(objects, workers=workers)
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"PAGE": page, "BLOCK": page, "SEEK": min(page, 2), "SPARSE": sparse}
        for name, value in sizes.items():
            patch.setattr(rp, name, value)

        def shorter(after="", limit=page, token=None):
            return LocalBucket.page(bucket, after, dice.randint(1, limit), token)

        if dice:
            patch.setattr(bucket, "page", shorter)
        assert Counter(pairs(bucket, wanted, whole)) == expected(objects, wanted, whole)
    sought = [query.get("start-after", "") for query in bucket.asked]
    assert not any(map(rp.NOT_XML.search, sought)), "S3 could not repeat it in its answer"


# --- How many requests ----------------------------------------------------------------------------

N, M = [f"{n:07}" for n in range(100_000)], [f"m{n:06}" for n in range(10_000)]
CLUMP, MISSING = [f"x{n:05}" for n in range(50_000)], [f"{n:06}" for n in range(100_000)]
# The objects, the wanted keys, whether all are listed, how many requests it may cost at most.
COSTS: dict[str, tuple[list[str], list[str], bool, int]] = {
    "nothing": ([], [], True, 1),
    "a tiny table": (N[:2500], ["01700x"], True, 4),
    "all": (N, N, False, 201),
    "every 20th": (N, N[::20], False, 201),
    "each far from the next": (N, N[::1000], False, 102),
    "thinly, then densely": (N, [N[0], *N[50_000:]], False, 110),
    "behind a character that XML cannot carry": (N, [N[0], "\uffffx"], False, 3),
    "missing, between objects": (M, [f"{key}{n}" for key in M for n in range(10)], False, 25),
    "missing, behind": (M, ["z" + key for key in MISSING], False, 25),
    "missing, before": (M, ["a" + key for key in MISSING], False, 25),
    "missing, in a gap": (M, ["m005000" + key for key in MISSING], False, 25),
    "a full listing": (N, [key for n, key in enumerate(N) if n % 10], True, 150),
    "a clump of orphans before": (M + ["a" + key for key in CLUMP], M, True, 90),
    "a clump of orphans amid": (M + ["m005000" + key for key in CLUMP], M, True, 90),
    "a clump of orphans behind": (M + ["z" + key for key in CLUMP], M, True, 90),
}


@pytest.mark.parametrize("case", COSTS)
def test_about_a_request_a_page_or_a_wanted_key_finds_all(bucket, case):
    objects, wanted, whole, most = COSTS[case]
    bucket.fill(objects, workers=8)
    assert Counter(pairs(bucket, wanted, whole)) == expected(objects, wanted, whole)
    listed = sum(int(query["max-keys"]) for query in bucket.asked)
    assert len(bucket.asked) <= most
    assert whole or listed <= 2 * len(objects) + 25 * rp.PAGE
    assert case != "each far from the next" or listed <= 100 * rp.SEEK + 2 * rp.PAGE


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.integers(1, 30), st.randoms(use_true_random=False))
def test_there_are_no_more_requests_than_expired_keys_and_two(bucket, count, every, dice):
    """Runs of dense and of sparse wanted keys."""
    wanted, n, objects = [], 0, N[: count * every * 5]
    while n < len(objects):
        step = dice.choice([1, 1, every, every * 40])
        run = objects[n : n + step * dice.randrange(1, 1500) : step]
        wanted, n = wanted + run, n + step * len(run)
    bucket.fill(objects, workers=8)
    assert Counter(pairs(bucket, wanted, False)) == Counter((key, key) for key in wanted)
    assert len(bucket.asked) <= len(wanted) + 2


# --- Faults on every border -----------------------------------------------------------------------

THINGS = {f"in/{n:02}" for n in range(24)}
JOBS = {f"in/{n:02}" for n in range(0, 30, 2)} | {f"in/{n:02}x" for n in range(0, 24, 3)}


def of_entries(body: bytes, first: bytes, last: bytes, change: Callable) -> bytes:
    """The page with its entries changed, and counted."""
    body = edited(body, b"Contents", change)
    return re.sub(rb"<KeyCount>\d+", b"<KeyCount>%d" % body.count(b"<Contents>"), body)


def without_keys(body: bytes, *_: bytes) -> bytes:
    """S3 may answer such a page, to be followed, where it has skipped what no longer lives."""
    (asked,) = re.findall(rb"<(?:StartAfter|ContinuationToken)>([^<]*)<", body)
    body = of_entries(body, b"", b"", change=lambda parts: [])
    body = re.sub(rb"<NextCont.*Token>|<IsTruncated>.*</IsTruncated>", b"", body)
    more = b"<IsTruncated>true</IsTruncated><NextContinuationToken>%b</NextContinuationToken></List"
    return body.replace(b"</List", more % (asked or b"in/"))


# Of a page, the first one and the one that was answered last, perhaps to another part.
FAULTS: dict[str, Callable[[bytes, bytes, bytes], bytes]] = {
    "reversed": partial(of_entries, change=lambda parts: parts[::-1]),
    "an object twice": partial(of_entries, change=lambda parts: [*parts, parts[-1]]),
    "its begin again": partial(of_entries, change=lambda parts: [*parts, parts[0]]),
    "a key of another prefix": partial(
        of_entries, change=lambda parts: [*parts, parts[-1].replace(b"<Key>in/", b"<Key>out/")]
    ),
    "an object lost": lambda body, *_: edited(body, b"Contents", lambda parts: parts[:-1]),
    "the first page again": lambda body, first, last: first,
    "another part's page": lambda body, first, last: last,
    "cut": lambda body, *_: body[: len(body) * 2 // 3],
    "another bucket": lambda body, *_: body.replace(b"<Name>bucket<", b"<Name>another<"),
    "no token": lambda body, *_: re.sub(rb"<NextCont.*Token>", b"", body),
    "html": lambda body, *_: b"<html><body>Sign in</body></html>",
    "no keys": without_keys,
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_request_ends_the_run_or_does_no_harm(bucket, monkeypatch, fault, whole):
    """It may do none: a page is reversed that has one object, a token dropped that there is not."""
    for name, value in {"PAGE": 5, "SEEK": 2, "SPARSE": 2}.items():
        monkeypatch.setattr(rp, name, value)
    truth = expected(THINGS, JOBS, whole)

    def play(at: int) -> int:
        """One fault; how many requests there were, 0 if the run ended in order."""
        bodies, spoiled = [], []

        def after(number: int, answer: tuple[int, bytes]) -> tuple[int, bytes]:
            body = answer[1]
            bodies.append(body)
            if number == at and b"<Contents>" in body:
                body = FAULTS[fault](body, bodies[0], [b"", *bodies][-2])
                spoiled[:] = [True] * (body != answer[1])
            return 200, body

        bucket.fill(THINGS, "in/", workers=5).after = after
        given = Counter[tuple[str, str]]()
        try:
            for pair in pairs(bucket, JOBS, whole):
                given[pair] += 1
        except rp.PurgeError:
            assert spoiled
            assert given <= truth
            return 0
        assert given == truth
        return len(bucket.asked)

    requests = play(0)
    assert requests >= 5
    ended = sum(play(at) == 0 for at in range(1, requests + 1))
    assert ended == 0 if fault == "no keys" else ended > requests / 3


# --- Answers that are no answers ------------------------------------------------------------------

OBJECTS = st.dictionaries(
    st.text(st.sampled_from("ab &<>+%/\"'\t]é\U0001f600"), min_size=1, max_size=9),
    st.tuples(st.integers(0, 5 << 40), st.datetimes(datetime(2006, 3, 14), datetime(2100, 1, 1))),
)
# The characters that a server leaves to XML when it percent-encodes keys; None if it does not.
ENCODED = st.sampled_from([None, "/*", "/*'&<>\"]"])
QUOTES = {"'": "&apos;", '"': "&quot;"}


def listing(objects: dict[str, tuple[int, datetime]], encoded: str | None, gap: str) -> str:
    """As S3 writes it, or Ceph, or with whitespace between the elements."""
    head = ["<Name>b</Name>", "<Prefix/>", f"<KeyCount>{len(objects)}</KeyCount>"]
    head += ["<EncodingType>url</EncodingType>"] * (encoded is not None)
    head += ["<IsTruncated>false</IsTruncated>"]
    for key, (size, date) in objects.items():
        name = key if encoded is None else quote_plus(key, encoded)
        head += ["<Contents>", f"<Key>{escape(name, QUOTES)}</Key>"]
        head += [f"<LastModified>{date.isoformat(timespec='milliseconds')}Z</LastModified>"]
        head += [f"<ETag>&quot;{size:x}&quot;</ETag><Size>{size}</Size>", "</Contents>"]
    start = '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.test/">'
    return gap.join([start, *head, "</ListBucketResult>\n"])


@given(OBJECTS, ENCODED, st.sampled_from(["", "\n  "]))
def test_a_listing_is_read_as_it_was_written(objects, encoded, gap):
    page = rp.parse_listing(listing(objects, encoded, gap))
    dates = [date.isoformat(timespec="milliseconds") + "Z" for _, date in objects.values()]
    assert (page.keys, page.token, page.bucket) == ([*objects], None, "b")
    assert (page.sizes, page.moments) == ([str(size) for size, _ in objects.values()], dates)
    assert all(datetime.fromisoformat(moment).tzinfo == UTC for moment in page.moments)


def is_no_listing(bucket: LocalBucket, body: bytes) -> None:
    bucket.fill().after = lambda *_: (200, body)
    with pytest.raises(rp.PurgeError, match="Cannot list bucket") as caught:
        bucket.page()
    assert caught.value.code == "InvalidAnswer"


@given(OBJECTS, ENCODED, st.data())
def test_a_listing_that_is_cut_is_no_listing(bucket, objects, encoded, data):
    body = listing(objects, encoded, "").rstrip()
    is_no_listing(bucket, body[: data.draw(st.integers(0, len(body) - 1))].encode())


KEY, SIZE = b"<Key>k</Key>", b"<Size>1</Size>"
DATE = b"<LastModified>2019-01-01T00:00:00.000Z</LastModified>"
HEAD = b"<Name>bucket</Name><KeyCount>1</KeyCount><IsTruncated>false</IsTruncated><Contents>"
ONE = b"<ListBucketResult>" + HEAD + KEY + SIZE + DATE + b"</Contents></ListBucketResult>"
NONE = re.sub(b"<Contents>.*</Contents>", b"", ONE.replace(b"Count>1", b"Count>0"))
URL, TWO = b"<EncodingType>url</EncodingType><Name>", KEY.replace(b"k", b"l") + SIZE + DATE
NOT_A_LISTING = {
    "empty": b"",
    "html": b"<html><body>Sign in</body></html>",
    "no utf-8": ONE.replace(b"k<", b"\xff<"),
    "percent-encoded no utf-8": ONE.replace(b">k<", b">%FF<").replace(b"<Name>", URL),
    "closed at once": b"<ListBucketResult/>",
    "another root": NONE.replace(b"ListBucketResult", b"Listing"),
    "no count": NONE.replace(b"<KeyCount>0</KeyCount>", b""),
    "two counts": NONE.replace(b"<Name>", b"<KeyCount>0</KeyCount><Name>"),
    "truncated without token": NONE.replace(b"false", b"true"),
    "nothing said of an end": re.sub(b"<IsTr.*ted>", b"", NONE),
    "no name": NONE.replace(b"<Name>bucket</Name>", b""),
    "an object without key": ONE.replace(KEY, b""),
    "an object without size": ONE.replace(SIZE, b""),
    "an object without date": ONE.replace(DATE, b""),
    "a size that is none": ONE.replace(b">1</Size>", b">-1</Size>"),
    "a date without a zone": ONE.replace(b"000Z", b"000"),
    "two keys in one": ONE.replace(DATE, DATE + TWO),
    "two in one by count": ONE.replace(DATE, DATE + TWO).replace(b"Count>1", b"Count>2"),
    "more than it counts": ONE.replace(DATE, DATE + b"</Contents><Contents>" + TWO),
}


@pytest.mark.parametrize("body", NOT_A_LISTING.values(), ids=NOT_A_LISTING)
def test_an_answer_that_is_no_listing_is_not_an_empty_bucket(bucket, body):
    is_no_listing(bucket, body)


ARN, ALIAS = "arn:aws:s3:eu-west-1:123456789012:accesspoint/a", "a-1x-s3alias"


@pytest.mark.parametrize("name", ["bucket", ARN, ALIAS, "another", "bucket2"])
def test_a_listing_of_another_bucket_is_an_error_but_to_an_access_point(bucket, name):
    for body, keys in {ONE: ["k"], NONE: []}.items():
        bucket.fill().after = lambda *_, body=body: (200, body)
        bucket.name = name
        if name in ("bucket", ARN, ALIAS):
            assert bucket.page().keys == keys
            continue
        with pytest.raises(rp.PurgeError, match="gave of bucket, which was not asked for"):
            bucket.page()


@pytest.mark.parametrize("name", ["start-after", "continuation-token"])
@pytest.mark.parametrize("key", ["a", "k+/=", "k k", "k&", "k&+"])
def test_a_page_must_be_the_one_that_was_asked_for(bucket, name, key):
    """Where the answer repeats what was asked for, as S3's does."""
    where = {"token" if name == "continuation-token" else "after": key}
    assert bucket.fill(["z"]).page(**where).keys == ["z"]
    query = {"max-keys": "9", "encoding-type": "url", name: "k"}
    bucket.after = lambda *_: s3_stub.listing(bucket.store, "bucket", query)
    with pytest.raises(rp.PurgeError, match="gave after k, which was not asked for"):
        bucket.page(**where)


@pytest.mark.parametrize("there", [[], ["k"], ["kk"], ["k", "kk"]])
def test_whether_a_key_exists_is_asked_of_that_key(bucket, there):
    assert bucket.fill([*there, "a", "z"]).exists("k") == ("k" in there)
    assert [query["max-keys"] for query in bucket.asked] == ["1"]


# --- In a whole run -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), EVERYTHING], ids=["expired", "orphans"])
@pytest.mark.parametrize(("fault", "says"), [("html", "InvalidAnswer"), ("reversed", "of order")])
def test_a_listing_that_cannot_be_trusted_ends_the_run(world, proxy, fault, says, options):
    change = FAULTS[fault]
    proxy.after = lambda request, answer: (
        Answer(200, change(answer.body, b"", b"")) if request.operation == "list" else answer
    )
    summary = world.purge(*AS_OF, "--json", *options).summary
    assert (summary["exit_code"], summary["planned"]) == (1, None)
    assert says in summary["error"]
    assert proxy.count("delete") == 0


def test_s3_that_cannot_be_reached_is_explained(world):
    assert "Cannot" in world.purge(*AS_OF, AWS_ENDPOINT_URL_S3="http://127.0.0.1:9").error
