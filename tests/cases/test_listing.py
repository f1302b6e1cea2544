"""What lies in the bucket: read strictly, found wherever it lies, with few requests."""

from __future__ import annotations

import random
import re
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from urllib.parse import quote_plus
from xml.sax.saxutils import escape

import pytest
import s3_stub
from conftest import AS_OF, EVERYTHING
from hypothesis import given, settings
from hypothesis import strategies as st
from local_bucket import Answer, LocalBucket
from proxies import Answer as ProxyAnswer
from proxies import Request

import retention_purge as rp

MODIFIED = "2026-03-01T00:00:00.000Z"


class ListedBucket(rp.Bucket):
    """Finds keys in a sorted list instead of S3's listing. `dice` makes pages shorter than they
    may be, as S3's may."""

    def __init__(self, keys: Iterable[str], workers: int = 8, dice: int | None = None) -> None:
        self.keys, self.prefix, self.workers = sorted(keys), "", workers
        self._dice, self._lock = None if dice is None else random.Random(dice), threading.Lock()
        self.asked: list[int] = []

    def page(
        self, after: str = "", limit: int = 0, token: str | None = None, prefix: str = ""
    ) -> rp.Page:
        limit = most = limit or rp.PAGE
        with self._lock:
            self.asked.append(limit)
            if self._dice is not None:
                most = self._dice.randint(1, limit)
        start = bisect_right(self.keys, after) if token is None else int(token)
        keys = self.keys[start : start + most]
        ends = start + len(keys) >= len(self.keys)
        token = None if ends else str(start + len(keys))
        return rp.Page(keys, ["1"] * len(keys), [MODIFIED] * len(keys), token, "bucket", [])


def spool(keys: Iterable[str]) -> rp.Spool[rp.Reference]:
    return rp.Spool(rp.Reference(key, 1, 1) for key in sorted(keys))


def pairs(bucket: rp.Bucket, wanted: Iterable[str], whole: bool) -> Iterator[tuple[str, str]]:
    """Of each pair the keys of its reference and of its object."""
    references = spool(wanted)
    for reference, item in rp.outer_join(references, bucket.objects(references, whole)):
        if whole or reference:
            yield reference.key if reference else "", item.key if item else ""


def found(bucket: rp.Bucket, wanted: Iterable[str], whole: bool) -> Counter[tuple[str, str]]:
    return Counter(pairs(bucket, wanted, whole))


def expected(objects: set[str], wanted: set[str], whole: bool) -> Counter[tuple[str, str]]:
    keys = objects | wanted if whole else wanted
    return Counter((key * (key in wanted), key * (key in objects)) for key in keys)


@pytest.fixture(scope="module")
def bucket() -> LocalBucket:
    return LocalBucket()


# --- The outer join -------------------------------------------------------------------------------

KEYS = st.text(st.sampled_from("ab\x01\x02\n \ud7ff\ue000\uffff\U0010ffff"), min_size=1, max_size=4)
TILED = st.tuples(st.integers(0, 99), st.integers(1, 30)).map(
    lambda span: {f"{n:03}" for n in range(span[0], sum(span))}
)
MANY = st.sets(KEYS, max_size=40) | TILED | st.lists(TILED).map(lambda sets: set().union(*sets))


@settings(max_examples=300, deadline=None)
@given(
    objects=MANY,
    wanted=MANY,
    whole=st.booleans(),
    page=st.integers(1, 9),
    sparse=st.integers(0, 9),
    workers=st.integers(1, 6),
    dice=st.none() | st.integers(0, 99),
)
def test_each_pair_is_found_once_however_the_listing_is_cut(
    objects, wanted, whole, page, sparse, workers, dice
):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PAGE": page, "SEEK": min(page, 2), "SPARSE": sparse}.items():
            patch.setattr(rp, name, value)
        bucket = ListedBucket(objects, workers, dice)
        assert found(bucket, wanted, whole) == expected(objects, wanted, whole)


ODD = ["\x01", "a\x01", "a\x01\x01", "a\x7f", "b", "b\x02z", "b\ud7ff", "b\ue000",
       "b\uffff", "b\uffff\uffff", "b\U00010000", "b\U0010ffff", "b\U0010ffff\U0010ffff",
       "\uffff"]  # fmt: skip


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("present", [ODD, ODD[::2], ODD[1::2], []], ids=["all", "even", "odd", "0"])
def test_odd_keys_at_the_borders_of_parts(bucket, monkeypatch, whole, present):
    """As requests, in which S3 could not repeat some of them."""
    for name, value in {"PAGE": 1, "SEEK": 1}.items():
        monkeypatch.setattr(rp, name, value)
    bucket.fill(present, workers=10)
    assert found(bucket, ODD, whole) == expected({*present}, {*ODD}, whole)
    assert not any(rp.NOT_XML.search(query.get("start-after", "")) for query in bucket.asked)


def test_an_object_keeps_its_size_and_its_date(bucket):
    bucket.fill(["k"])
    bucket.store.tails[0] = re.sub("<Size>.*?</Size>", "<Size>77</Size>", bucket.store.tails[0])
    (item,) = bucket.objects(spool(["k"]), whole=False)
    assert item == ("k", "77", "2019-01-01T00:00:00.000Z")


@pytest.mark.parametrize("keys", [0, 1, 999, 1000, 1001, 2500])
@pytest.mark.parametrize("table", [0, 1, 2])
def test_an_empty_and_a_tiny_table_still_list_all(keys, table):
    objects = {f"{n:05}" for n in range(keys)}
    wanted = {"01700x", "0"} if table == 2 else {"01700"} if table else set()
    bucket = ListedBucket(objects)
    assert found(bucket, wanted, whole=True) == expected(objects, wanted, whole=True)
    assert len(bucket.asked) <= keys / 1000 + 2


# --- How many requests ----------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(1, 30), st.randoms(use_true_random=False))
def test_there_are_no_more_requests_than_expired_keys_and_two(count, every, dice):
    """Runs of dense and of sparse wanted keys."""
    objects = [f"{n:07}" for n in range(count * every * 10)]
    wanted, n = [], 0
    while n < len(objects):
        step = dice.choice([1, 1, every, every * 40])
        for _ in range(dice.randrange(1, 1500)):
            if n < len(objects):
                wanted.append(objects[n])
            n += step
    bucket = ListedBucket(objects)
    assert found(bucket, wanted, whole=False) == Counter((key, key) for key in wanted)
    assert len(bucket.asked) <= len(wanted) + 2


@pytest.mark.parametrize("every", [1, 2, 7, 20])
def test_where_expired_keys_lie_densely_there_are_about_as_many_as_pages(every):
    objects = [f"{n:07}" for n in range(100_000)]
    bucket = ListedBucket(objects)
    assert len(found(bucket, objects[::every], whole=False)) == len(objects[::every])
    assert len(bucket.asked) <= 2 * len(objects) / 1000 + 1
    assert sum(bucket.asked) <= 2 * len(objects)


def test_where_they_lie_thinly_each_costs_one_small_request():
    objects = [f"{n:07}" for n in range(500_000)]
    bucket = ListedBucket(objects)
    assert len(found(bucket, objects[::1000], whole=False)) == 500
    assert len(bucket.asked) <= 502
    assert sum(bucket.asked) <= 500 * rp.SEEK + 33 * rp.PAGE


@pytest.mark.parametrize("where", ["between", "behind", "before", "in a gap"])
def test_a_run_of_missing_keys_costs_hardly_more_than_the_pages_of_the_bucket(where):
    """A tenth of a million missing keys over 100,000 objects, which may cost 250 requests."""
    objects = [f"m{n:06}" for n in range(10_000)]
    if where == "between":
        wanted = [f"{key}{digit}" for key in objects for digit in range(10)]
    elif where == "in a gap":
        wanted = [f"m005000{n:06}" for n in range(100_000)]
    else:
        wanted = [f"{'z' if where == 'behind' else 'a'}{n:06}" for n in range(100_000)]
    bucket = ListedBucket(objects)
    seen = found(bucket, wanted, whole=False)
    assert (len(seen), {item for _, item in seen}) == (100_000, {""})
    assert len(bucket.asked) <= 25


def test_a_full_listing_costs_about_as_many_as_it_has_pages():
    objects = [f"{n:07}" for n in range(300_000)]
    wanted = [key for n, key in enumerate(objects) if n % 10]
    bucket = ListedBucket(objects)
    seen = found(bucket, wanted, whole=True)
    assert (len(seen), sum(not key for key, _ in seen)) == (300_000, 30_000)
    assert len(bucket.asked) <= 1.5 * 300


@pytest.mark.parametrize("where", ["a", "m005000", "z"], ids=["before", "amid", "behind"])
def test_a_clump_of_objects_that_no_job_knows_is_found_exactly(where):
    known = {f"m{n:06}" for n in range(10_000)}
    clump = {f"{where}x{n:05}" for n in range(50_000)}
    bucket = ListedBucket(known | clump)
    assert found(bucket, known, whole=True) == expected(known | clump, known, whole=True)
    assert len(bucket.asked) <= 1.5 * 60


# --- Faults on every border -----------------------------------------------------------------------

CONTENTS = re.compile(rb"<Contents>.*?</Contents>", re.DOTALL)
THINGS = {f"in/{n:02}" for n in range(24)}
JOBS = {f"in/{n:02}" for n in range(0, 30, 2)} | {f"in/{n:02}x" for n in range(0, 24, 3)}


def shuffled(body: bytes, change, count: int | None = None) -> bytes:
    """The listing with its Contents changed by `change` (a function of their list)."""
    parts = CONTENTS.findall(body)
    start, end = body.index(b"<Contents>"), body.rindex(b"</Contents>") + len(b"</Contents>")
    changed = change(parts)
    body = body[:start] + b"".join(changed) + body[end:]
    return re.sub(rb"<KeyCount>\d+", b"<KeyCount>%d" % (count or len(changed)), body)


FAULTS = {
    "reversed": lambda body, other: shuffled(body, lambda parts: parts[::-1]),
    "an object twice": lambda body, other: shuffled(body, lambda parts: [*parts, parts[-1]]),
    "its begin again": lambda body, other: shuffled(body, lambda parts: [*parts, parts[0]]),
    "an object lost": lambda body, other: shuffled(
        body, lambda parts: parts[:-1], body.count(b"<Contents>")
    ),
    "the first page again": lambda body, other: other["first"],
    "another part's page": lambda body, other: other["last"],
    "cut": lambda body, other: body[: len(body) * 2 // 3],
    "a key of another prefix": lambda body, other: shuffled(
        body, lambda parts: [*parts, parts[-1].replace(b"<Key>in/", b"<Key>out/")]
    ),
    "another bucket": lambda body, other: body.replace(b"<Name>bucket<", b"<Name>another<"),
    "no token": lambda body, other: re.sub(rb"<NextCont.*Token>", b"", body),
    "html": lambda body, other: b"<html><body>Sign in</body></html>",
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
        spoiled, other = [], dict[str, bytes]()
        bucket.fill(THINGS, "in/", workers=3)

        def after(number: int, answer: Answer) -> Answer:
            body = answer[1]
            other.setdefault("first", body)
            if number == at and b"<Contents>" in body:
                body = FAULTS[fault](body, {"last": b"", **other})
                spoiled[:] = [True] * (body != answer[1])
            other["last"] = answer[1]
            return 200, body

        bucket.after = after
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
    assert requests >= 6
    ended = sum(play(at) == 0 for at in range(1, requests + 1))
    assert ended > requests / 3


def test_a_page_without_keys_is_followed(bucket, monkeypatch):
    """S3 may answer one, where it has skipped what no longer lives."""
    monkeypatch.setattr(rp, "PAGE", 5)

    def after(number: int, answer: Answer) -> Answer:
        query = bucket.asked[number - 1]
        asked = query.get("continuation-token") or query["start-after"] or "in/"
        if number % 2 and b"<Contents>" in answer[1]:
            body = shuffled(answer[1], lambda parts: [], 0)
            body = re.sub(rb"<NextCont.*Token>|<IsTruncated>.*</IsTruncated>", b"", body)
            body = body.replace(b"<KeyCount>5", b"<KeyCount>0")
            more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{asked}"
            return 200, body.replace(b"</List", f"{more}</NextContinuationToken></List".encode())
        return answer

    bucket.fill(THINGS, "in/", workers=4).after = after
    for whole in (True, False):
        assert found(bucket, JOBS, whole) == expected(THINGS, JOBS, whole)


# --- Answers that are no answers ------------------------------------------------------------------

OBJECTS = st.dictionaries(
    st.text(st.sampled_from("ab &<>+%/\"'\t]é\U0001f600"), min_size=1, max_size=9),
    st.tuples(st.integers(0, 5 << 40), st.datetimes(datetime(2006, 3, 14), datetime(2100, 1, 1))),
)
# The characters that a server leaves to XML when it percent-encodes keys; None if it does not.
ENCODED = st.sampled_from([None, "/*", "/*'&<>\"]"])


def listing(objects: dict[str, tuple[int, datetime]], encoded: str | None, gap: str) -> str:
    """As S3 writes it, or Ceph, or with whitespace between the elements."""
    quotes = {"'": "&apos;", '"': "&quot;"}
    entries = [
        [
            f"<Key>{escape(key if encoded is None else quote_plus(key, encoded), quotes)}</Key>",
            f"<LastModified>{date.isoformat(timespec='milliseconds')}Z</LastModified>",
            f"<ETag>&quot;{size:x}&quot;</ETag><Size>{size}</Size>",
        ]
        for key, (size, date) in objects.items()
    ]
    head = ["<Name>b</Name>", "<Prefix/>", f"<KeyCount>{len(entries)}</KeyCount>"]
    head += ["<EncodingType>url</EncodingType>"] * (encoded is not None)
    head += ["<IsTruncated>false</IsTruncated>"]
    whole = [part for entry in entries for part in ("<Contents>", *entry, "</Contents>")]
    start = '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.test/">'
    return gap.join([start, *head, *whole, "</ListBucketResult>\n"])


@given(OBJECTS, ENCODED, st.sampled_from(["", "\n  "]))
def test_a_listing_is_read_as_it_was_written(objects, encoded, gap):
    page = rp.parse_listing(listing(objects, encoded, gap))
    dates = [date.isoformat(timespec="milliseconds") + "Z" for _, date in objects.values()]
    assert (page.keys, page.token, page.bucket) == ([*objects], None, "b")
    assert (page.sizes, page.moments) == ([str(size) for size, _ in objects.values()], dates)
    moments = [datetime.fromisoformat(moment) for moment in page.moments]
    assert all(moment.tzinfo == UTC for moment in moments)


@given(OBJECTS, ENCODED, st.data())
def test_a_listing_that_is_cut_is_no_listing(bucket, objects, encoded, data):
    body = listing(objects, encoded, "").rstrip()
    cut = body[: data.draw(st.integers(0, len(body) - 1))].encode()
    bucket.after = lambda number, answer: (200, cut)
    with pytest.raises(rp.PurgeError) as caught:
        bucket.page()
    assert caught.value.code == "InvalidAnswer"


def objects_of(*parts: str, count: int = 1) -> bytes:
    head = f"<Name>bucket</Name><KeyCount>{count}</KeyCount><IsTruncated>false</IsTruncated>"
    contents = "".join(f"<Contents>{part}</Contents>" for part in parts)
    return f"<ListBucketResult>{head}{contents}</ListBucketResult>".encode()


KEY, SIZE = "<Key>k</Key>", "<Size>1</Size>"
DATE = "<LastModified>2019-01-01T00:00:00.000Z</LastModified>"
OTHER = KEY.replace("k<", "l<") + SIZE + DATE
NOT_A_LISTING = {
    "empty": b"",
    "html": b"<html><body>Sign in</body></html>",
    "not xml": b"<ListBucketResult><Contents>",
    "no utf-8": objects_of(KEY + SIZE + DATE).replace(b"k<", b"\xff<"),
    "percent-encoded no utf-8": objects_of(KEY + SIZE + DATE).replace(
        b">k</Key>", b">%FF</Key><EncodingType>url</EncodingType>"
    ).replace(b"<Name>", b"<EncodingType>url</EncodingType><Name>"),
    "another answer": b"<DeleteResult></DeleteResult>",
    "bare": b"<ListBucketResult></ListBucketResult>",
    "closed at once": b"<ListBucketResult/>",
    "another root": objects_of().replace(b"ListBucketResult", b"Listing"),
    "no count": objects_of().replace(b"<KeyCount>1</KeyCount>", b""),
    "another count": objects_of(KEY + SIZE + DATE, count=3),
    "two counts": objects_of(count=0).replace(b"<Name>", b"<KeyCount>0</KeyCount><Name>"),
    "truncated without token": objects_of(count=0).replace(b"false", b"true"),
    "nothing said of an end": re.sub(rb"<IsTr.*ted>", b"", objects_of(count=0)),
    "no name": objects_of(count=0).replace(b"<Name>bucket</Name>", b""),
    "an object without key": objects_of(SIZE + DATE),
    "an object without size": objects_of(KEY + DATE),
    "an object without date": objects_of(KEY + SIZE),
    "a size that is none": objects_of(KEY + SIZE.replace("1", "-1") + DATE),
    "a date without a zone": objects_of(KEY + SIZE + DATE.replace("Z", "")),
    "two keys in one": objects_of(KEY + SIZE + DATE + OTHER),
    "two in one by count": objects_of(KEY + SIZE + DATE + OTHER, count=2),
    "more than it counts": objects_of(KEY + SIZE + DATE, OTHER),
}  # fmt: skip


@pytest.mark.parametrize("body", NOT_A_LISTING.values(), ids=NOT_A_LISTING)
def test_an_answer_that_is_no_listing_is_not_an_empty_bucket(bucket, body):
    bucket.after = lambda number, answer: (200, body)
    with pytest.raises(rp.PurgeError, match="Cannot list bucket") as caught:
        bucket.page()
    assert caught.value.code == "InvalidAnswer"


def test_the_listings_above_would_be_read_if_they_were_whole(bucket):
    bucket.fill().after = lambda number, answer: (
        200,
        objects_of(KEY + SIZE + DATE, OTHER, count=2),
    )
    assert bucket.page().keys == ["k", "l"]
    bucket.after = lambda number, answer: (200, objects_of(count=0))
    assert bucket.page().keys == []


@pytest.mark.parametrize("whole", [True, False])
def test_a_server_that_always_answers_the_first_page_is_noticed(bucket, monkeypatch, whole):
    monkeypatch.setattr(rp, "PAGE", 3)
    bucket.fill("abcdefgh").after = lambda number, answer: (200, first)
    first = s3_stub.listing(bucket.store, "bucket", {"max-keys": "3"})[1]
    with pytest.raises(rp.PurgeError, match="out of order"):
        found(bucket, "abcdefgh", whole)
    with pytest.raises(rp.PurgeError, match="out of order"):
        bucket.page("a")


@pytest.mark.parametrize("name", ["start-after", "continuation-token"])
@pytest.mark.parametrize("key", ["a", "k+/=", "k k", "k&", "k&+"])
def test_a_page_must_be_the_one_that_was_asked_for(bucket, name, key):
    """Where the answer repeats what was asked for, as S3's does."""
    where = {"token" if name == "continuation-token" else "after": key}
    bucket.fill(["z"])
    assert bucket.page(**where).keys == ["z"]
    query = {"max-keys": "9", "encoding-type": "url", name: "k"}
    bucket.after = lambda number, answer: s3_stub.listing(bucket.store, "bucket", query)
    with pytest.raises(rp.PurgeError, match="gave after k, which was not asked for"):
        bucket.page(**where)


@pytest.mark.parametrize("name", ["another", "", "bucket2"])
def test_a_listing_of_another_bucket_is_an_error(bucket, name):
    bucket.fill(["k"]).after = lambda number, answer: (
        200, answer[1].replace(b"<Name>bucket<", f"<Name>{name}<".encode())
    )  # fmt: skip
    with pytest.raises(rp.PurgeError, match="not asked for"):
        bucket.page()


def test_an_access_point_may_be_answered_with_the_name_of_its_bucket(bucket):
    for name in ("arn:aws:s3:eu-west-1:123456789012:accesspoint/a", "a-1x-s3alias"):
        bucket.fill(["k"]).name = name
        bucket.after = lambda number, answer: (200, objects_of(KEY + SIZE + DATE))
        assert bucket.page().keys == ["k"]


@pytest.mark.parametrize("there", [[], ["k"], ["kk"], ["k", "kk"]])
def test_whether_a_key_exists_is_asked_of_that_key(bucket, there):
    bucket.fill([*there, "a", "z"])
    assert bucket.exists("k") == ("k" in there)
    assert bucket.asked == [
        {"list-type": "2", "prefix": "k", "max-keys": "1", "encoding-type": "url",
         "start-after": ""}
    ]  # fmt: skip


# --- In a whole run -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), EVERYTHING], ids=["expired", "orphans"])
@pytest.mark.parametrize("fault", ["html", "reversed"])
def test_a_listing_that_cannot_be_trusted_ends_the_run(world, proxy, fault, options):
    def after(request: Request, answer: ProxyAnswer) -> ProxyAnswer:
        if request.operation == "list":
            answer.body = FAULTS[fault](answer.body, {})
        return answer

    proxy.after = after
    result = world.purge(*AS_OF, "--json", *options)
    assert result.code == 1
    assert ("InvalidAnswer" if fault == "html" else "out of order") in result.summary["error"]
    assert result.summary["planned"] is None
    assert proxy.count("delete") == 0


def test_one_foreign_answer_to_a_listing_is_asked_again(world, proxy):
    bodies = [b"", b"<html/>"]
    proxy.before = lambda request: (
        ProxyAnswer(200, bodies.pop()) if request.operation == "list" and bodies else None
    )
    assert world.purge(*AS_OF, "--json").summary["deleted"]["expired"] == 17


def test_a_bucket_that_is_not_there_and_s3_that_cannot_be_reached_are_explained(world):
    assert "Check --bucket" in world.purge(*AS_OF, "--bucket", "no-such-bucket").error
    assert "Cannot" in world.purge(*AS_OF, AWS_ENDPOINT_URL_S3="http://127.0.0.1:9").error
