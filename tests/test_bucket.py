"""S3: odd keys, many keys, strict answers, and faults on the wire."""

from __future__ import annotations

import json
import re
import threading
from datetime import UTC, datetime
from urllib.parse import quote_plus
from xml.sax.saxutils import escape

import pytest
from conftest import AS_OF, World
from hypothesis import given
from hypothesis import strategies as st
from proxies import DROP, Answer, Request, S3Proxy
from sandbox import BUCKET

import retention_purge as rp

OLD = "2019-01-01 00:00:00"
# moto's server cannot delete a key with both CR and LF: it answers 404.
ODD = ["a\x01b", "a\x08", "c\rd", "\ufffe", "x\uffffy", "new\nline", "tab\tbed"]
PLAIN = [
    "../up", "a/../b", "/lead", "double//slash", "dot.", ".", "..", " lead", "trail ", "p+lus",
    "per%20cent", "%", "q?x=1&y#z", "'quote\"", "<tag>&amp;", "\\back", "é", "e\u0301", "жук",
    "\U0001f600", "\U0001f600" * 60, "\xa0", "\x7f", "\x85", "\u2028", "~", "a b", "*", "$(x)",
]  # fmt: skip


def expire(world: World, keys: list[str]) -> None:
    """One expired job and one object for each key."""
    jobs = [(f"j{n}", OLD, "TRIAL", key) for n, key in enumerate(keys)]
    world.box.load(jobs, [(key, 1) for key in keys])


@pytest.mark.parametrize("key", [*ODD, "a/../b", " lead", "p+lus", "\U0001f600" * 60], ids=ascii)
def test_a_key_that_s3_allows_is_found_and_deleted_alone(world, key):
    expire(world, [key])
    near = ["a", "b", "c", "d", "lead", "p lus", "\ufffd"]
    for neighbour in near:
        world.box.put(neighbour)
    result = world.purge(*AS_OF, "--json")
    assert result.summary["deleted"]["expired"] == 1, result.err
    assert world.box.live_keys() == sorted(near)


def test_all_sorts_of_keys_are_listed_and_deleted_together(world):
    expire(world, ODD + PLAIN)
    dry = world.purge(*AS_OF, "-n")
    assert dry.listed == [("expired", key) for key in sorted(ODD + PLAIN)]
    summary = world.purge(*AS_OF, "--json").summary
    assert summary["deleted"]["expired"] == len(ODD + PLAIN)
    alone = [key for key in ODD if re.search("[^\t\n\x20-\ud7ff\ue000-\ufffd]", key)]
    assert summary["requests"]["delete"] == 1 + len(alone)
    assert world.box.live_keys() == []


def test_more_keys_than_one_request_may_carry(world, proxy):
    keys = [f"k{n:05}" for n in range(2500)]
    expire(world, keys)
    world.box.put("k00000x")
    result = world.purge(*AS_OF, "--json")
    assert result.summary["deleted"]["expired"] == 2500
    assert world.box.live_keys() == ["k00000x"]
    sizes = [r.body.count(b"<Key>") for r in proxy.requests if r.operation == "delete"]
    assert sum(sizes) == 2500
    assert max(sizes) == 1000


def test_a_large_bucket_is_listed_only_where_expired_keys_lie(world):
    expire(world, ["m1", "m2"])
    for n in range(5000):
        world.box.put(f"a{n:05}")
    summary = world.purge(*AS_OF, "--json").summary
    assert summary["deleted"]["expired"] == 2
    assert summary["requests"]["list"] <= 3


# --- Answers that are no answers ------------------------------------------------------------------

OBJECTS = st.dictionaries(
    st.text(st.sampled_from("ab &<>+%/\"'\t]é\U0001f600"), min_size=1, max_size=9),
    st.tuples(st.integers(0, 5 << 40), st.datetimes(datetime(2006, 3, 14), datetime(2100, 1, 1))),
)


# The characters that a server leaves to XML when it percent-encodes keys; None if it does not.
ENCODED = st.sampled_from([None, "/*", "/*'&<>\"]"])


def listing(objects: dict[str, tuple[int, datetime]], encoded: str | None, gap: str) -> bytes:
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
    return gap.join([start, *head, *whole, "</ListBucketResult>\n"]).encode()


@given(OBJECTS, ENCODED, st.sampled_from(["", "\n  "]))
def test_a_listing_is_read_as_it_was_written(objects, encoded, gap):
    page = rp.parse_listing(listing(objects, encoded, gap))
    found = {item.key: (item.size, item.last_modified) for item in page.objects()}
    to_the_millisecond = {
        key: (size, date.replace(microsecond=date.microsecond // 1000 * 1000, tzinfo=UTC))
        for key, (size, date) in objects.items()
    }
    assert (found, page.token, page.bucket) == (to_the_millisecond, None, "b")
    some = set(list(objects)[::2])
    assert [item.key for item in page.objects(some)] == [key for key in objects if key in some]


@given(OBJECTS, ENCODED, st.data())
def test_a_listing_that_is_cut_is_no_listing(objects, encoded, data):
    body = listing(objects, encoded, "").rstrip()
    with pytest.raises((rp.InvalidAnswer, ValueError)):
        rp.parse_listing(body[: data.draw(st.integers(0, len(body) - 1))])


@pytest.mark.parametrize("prefix", ["", "s3:"])
@pytest.mark.parametrize("space", ['="u:s3"', "='u:s3'", ' =\n"u:s3"'])
def test_verdicts_are_read_whatever_their_namespace_looks_like(prefix, space):
    name = f"xmlns:{prefix[:-1]}" if prefix else "xmlns"
    key = '<Key>a xmlns="b" &amp; c</Key>'
    inner = f"<Deleted>{key}</Deleted><Error>{key}<Code>SlowDown</Code></Error>"
    inner = re.sub(r"<(/?)(?=[A-Z])", rf"<\1{prefix}", inner)
    body = f"<{prefix}DeleteResult {name}{space}>{inner}</{prefix}DeleteResult>"
    verdicts = [rp.Verdict('a xmlns="b" & c', code) for code in (None, "SlowDown")]
    assert rp.parse_deletes(body.encode()) == verdicts


@pytest.mark.parametrize("refused_first", [True, False])
def test_a_key_that_is_answered_twice_is_deleted_only_if_both_say_so(world, proxy, refused_first):
    refused = b"<Error><Key>k</Key><Code>AccessDenied</Code></Error>"
    parts = [refused, b"<Deleted><Key>k</Key></Deleted>"][:: 1 if refused_first else -1]
    expire(world, ["k"])
    answer = Answer(200, b"<DeleteResult>%b</DeleteResult>" % b"".join(parts))
    proxy.before = lambda request: answer if request.operation == "delete" else None
    result = world.purge(*AS_OF, "--json")
    assert (result.code, result.summary["failed"]) == (4, 1)


NOT_A_LISTING = {
    "empty": b"",
    "html": b"<html><body>Sign in</body></html>",
    "not xml": b"<ListBucketResult><Contents>",
    "another answer": b"<DeleteResult></DeleteResult>",
    "bare": b"<ListBucketResult></ListBucketResult>",
    "another root": b"<Listing><Name>incoming-data</Name><KeyCount>0</KeyCount>"
    b"<IsTruncated>false</IsTruncated></Listing>",
    "no count": b"<ListBucketResult><Name>b</Name>"
    b"<IsTruncated>false</IsTruncated></ListBucketResult>",
    "wrong count": b"<ListBucketResult><Name>b</Name><KeyCount>3</KeyCount>"
    b"<IsTruncated>false</IsTruncated></ListBucketResult>",
    "truncated without token": b"<ListBucketResult><Name>b</Name><KeyCount>0</KeyCount>"
    b"<IsTruncated>true</IsTruncated></ListBucketResult>",
}


KEY, SIZE = b"<Key>incoming_000012</Key>", b"<Size>1</Size>"
DATE = b"<LastModified>2019-01-01T00:00:00.000Z</LastModified>"
for name, parts in {
    "an object without key": [SIZE + DATE],
    "an object without size": [KEY + DATE],
    "an object without date": [KEY + SIZE],
    "a size that is none": [KEY + b"<Size>-1</Size>" + DATE],
    "a date without a zone": [KEY + SIZE + DATE.replace(b"Z", b"")],
    "two keys in one": [KEY + KEY.replace(b"12", b"13") + 2 * SIZE + 2 * DATE],
    "more than it counts": 2 * [KEY + SIZE + DATE],
}.items():
    NOT_A_LISTING[name] = b"<ListBucketResult><Name>incoming-data</Name><KeyCount>1</KeyCount>"
    NOT_A_LISTING[name] += b"<IsTruncated>false</IsTruncated><Contents>"
    NOT_A_LISTING[name] += b"</Contents><Contents>".join(parts) + b"</Contents></ListBucketResult>"
NOT_A_LISTING["two in one by count"] = NOT_A_LISTING["two keys in one"].replace(
    b"<KeyCount>1", b"<KeyCount>2"
)


@pytest.mark.parametrize("orphans", [[], ["--orphans"]], ids=["expired", "orphans"])
@pytest.mark.parametrize("body", NOT_A_LISTING.values(), ids=NOT_A_LISTING)
def test_a_listing_that_is_no_listing_is_not_an_empty_bucket(world, proxy, body, orphans):
    proxy.before = lambda r: Answer(200, body) if r.operation == "list" else None
    result = world.purge(*AS_OF, "--json", *orphans)
    assert result.code == 1
    assert "Cannot list bucket" in result.summary["error"]
    assert proxy.count("delete") == 0


def test_one_foreign_answer_to_a_listing_is_asked_again(world, proxy):
    bodies = [b"", b"<html/>"]
    proxy.before = lambda r: Answer(200, bodies.pop()) if r.operation == "list" and bodies else None
    assert world.purge(*AS_OF, "--json").summary["deleted"]["expired"] == 17


def shuffled(body: bytes, change) -> bytes:
    """The listing with its Contents changed by `change` (a function of their list)."""
    parts = re.findall(rb"<Contents>.*?</Contents>", body, re.DOTALL)
    start, end = body.index(parts[0]), body.rindex(parts[-1]) + len(parts[-1])
    parts = change(parts)
    body = body[:start] + b"".join(parts) + body[end:]
    return re.sub(rb"<KeyCount>\d+", b"<KeyCount>%d" % len(parts), body)


@pytest.mark.parametrize(
    "change", [lambda p: p[::-1], lambda p: p + p[-1:], lambda p: p + p[:1]], ids=[0, 1, 2]
)
def test_a_listing_out_of_order_ends_the_run(world, proxy, change):
    def after(request: Request, answer: Answer) -> Answer:
        if request.operation == "list":
            answer.body = shuffled(answer.body, change)
        return answer

    proxy.after = after
    result = world.purge(*AS_OF, "--orphans", "--orphan-grace-days", "0")
    assert result.code == 1
    assert "out of order" in result.error
    assert proxy.count("delete") == 0


def test_a_key_outside_the_prefix_ends_the_run(world, proxy):
    def after(request: Request, answer: Answer) -> Answer:
        answer.body = answer.body.replace(b"<Key>incoming_", b"<Key>outgoing_")
        return answer

    proxy.after = after
    result = world.purge(*AS_OF, "--prefix", "incoming_", "--orphans", "--orphan-grace-days", "0")
    assert result.code == 1
    assert "outgoing_000001, which was not asked for" in result.error


@pytest.mark.parametrize("name", [b"another-bucket", b""])
def test_a_listing_of_another_bucket_ends_the_run(world, proxy, name):
    def after(request: Request, answer: Answer) -> Answer:
        answer.body = answer.body.replace(b"<Name>incoming-data<", b"<Name>" + name + b"<")
        return answer

    proxy.after = after
    result = world.purge(*AS_OF)
    assert result.code == 1
    assert "not asked for" in result.error
    assert proxy.count("delete") == 0


def test_a_key_that_is_no_utf_8_is_not_read_as_another(world, proxy):
    def after(request: Request, answer: Answer) -> Answer:
        answer.body = answer.body.replace(b"<Key>incoming_000011<", b"<Key>incoming_%FF<")
        return answer

    proxy.after = after
    result = world.purge(*AS_OF, "--orphans", "--orphan-grace-days", "0")
    assert result.code == 1
    assert "InvalidAnswer" in result.error


def test_a_204_without_a_body_answers_for_no_key(world, proxy):
    proxy.before = lambda r: Answer(204, b"") if r.operation == "delete" else None
    expire(world, [f"k{n:05}" for n in range(5000)])
    result = world.purge(*AS_OF, "--json")
    assert result.code == 4
    assert (result.summary["deleted"]["expired"], result.summary["failed"]) == (0, 5000)


@pytest.mark.parametrize("version", [b"<VersionId></VersionId>", b"<VersionId>null</VersionId>"])
def test_a_version_id_that_was_not_asked_for_does_not_matter(world, proxy, version):
    def after(request: Request, answer: Answer) -> Answer:
        if request.operation == "delete":
            answer.body = answer.body.replace(b"</Key>", b"</Key>" + version)
        return answer

    proxy.after = after
    assert world.purge(*AS_OF, "--json").summary["deleted"]["expired"] == 17
    assert proxy.count("delete") == 1


def test_a_message_of_s3_cannot_forge_a_line_of_the_log(world, proxy):
    def after(request: Request, answer: Answer) -> Answer:
        forged = "AccessDenied</Code><Message>a\\nERROR forged\\n</Message><Code>x"
        return spoil(answer, ["incoming_000012"], forged)

    proxy.after = after
    result = world.purge(*AS_OF)
    assert result.code == 4
    assert not [line for line in result.err.splitlines() if line.startswith("ERROR forged")]


NOT_A_DELETE_RESULT = {
    "empty": b"",
    "html": b"<html><body>Sign in</body></html>",
    "cut": b"<DeleteResult><Deleted><Key>incom",
    "a listing": b"<ListBucketResult></ListBucketResult>",
    "silent": b"<DeleteResult></DeleteResult>",
    "another root": b"<Result><Deleted><Key>incoming_000011</Key></Deleted></Result>",
    "foreign": b"<DeleteResult><Deleted><Key>another</Key></Deleted></DeleteResult>",
}


@pytest.mark.parametrize("body", NOT_A_DELETE_RESULT.values(), ids=NOT_A_DELETE_RESULT)
def test_a_delete_answered_by_nothing_counts_as_failed(world, proxy, body):
    proxy.before = lambda r: Answer(200, body) if r.operation == "delete" else None
    result = world.purge(*AS_OF, "--json")
    assert result.code == 4
    summary = result.summary
    assert (summary["deleted"]["expired"], summary["failed"]) == (0, 17)
    assert proxy.count("delete") == 5
    assert len(re.findall("failed incoming_", result.err)) == 17


@pytest.mark.parametrize("fault", [DROP, Answer(503, b""), Answer(500, b"<html>oops</html>")])
def test_a_request_that_fails_for_a_moment_is_sent_again(world, proxy, fault):
    faults = [fault, fault]
    proxy.before = lambda r: faults.pop() if r.operation == "delete" and faults else None
    summary = world.purge(*AS_OF, "--json").summary
    assert (summary["deleted"]["expired"], summary["failed"]) == (17, 0)
    assert summary["requests"]["delete"] == 3


def test_an_answer_lost_after_the_delete_is_asked_for_again(world, proxy):
    lost = [DROP]

    def after(request: Request, answer: Answer) -> Answer:
        return lost.pop() if request.operation == "delete" and lost else answer

    proxy.after = after
    summary = world.purge(*AS_OF, "--json").summary
    assert (summary["deleted"]["expired"], summary["failed"]) == (17, 0)


def spoil(answer: Answer, keys: list[str], code: str) -> Answer:
    """Turn the verdict on these keys from deleted into an error."""
    for key in keys:
        answer.body = re.sub(
            rf"<Deleted><Key>{key}</Key>.*?</Deleted>".encode(),
            f"<Error><Key>{key}</Key><Code>{code}</Code><Message>m</Message></Error>".encode(),
            answer.body,
        )
    return answer


@pytest.mark.parametrize("code", ["InternalError", "SlowDown", "ServiceUnavailable"])
def test_a_key_that_s3_cannot_delete_just_now_is_tried_again(world, proxy, code):
    times = [2]

    def after(request: Request, answer: Answer) -> Answer:
        if request.operation == "delete" and times[0]:
            times[0] -= 1
            return spoil(answer, ["incoming_000012", "incoming_000040"], code)
        return answer

    proxy.after = after
    result = world.purge(*AS_OF, "--json")
    assert result.code == 0
    assert result.summary["deleted"]["expired"] == 17
    sizes = [r.body.count(b"<Key>") for r in proxy.requests if r.operation == "delete"]
    assert sizes == [17, 2, 2]


def test_a_key_that_s3_refuses_is_reported_with_its_reason(world):
    deny = {
        "Statement": [
            {
                "Effect": "Deny",
                "Principal": "*",
                "Action": "s3:DeleteObject",
                "Resource": f"arn:aws:s3:::{BUCKET}/incoming_000013",
            }
        ]
    }
    world.box.s3().put_bucket_policy(Bucket=BUCKET, Policy=json.dumps(deny))
    result = world.purge(*AS_OF, "--json")
    assert result.code == 4
    assert result.summary["deleted"]["expired"] == 16
    assert result.summary["failed"] == 1
    assert "failed incoming_000013: AccessDenied" in result.err
    assert "incoming_000013" in world.box.live_keys()


@pytest.mark.parametrize("code", ["AccessDenied", "NoSuchBucket", "ExpiredToken"])
def test_a_refusal_of_the_whole_request_stops_the_run(world, proxy, code):
    expire(world, [f"k{n:05}" for n in range(3500)])
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    proxy.before = lambda r: Answer(403, body) if r.operation == "delete" else None
    result = world.purge(*AS_OF, "--json", "--workers", "1")
    assert result.code == 1
    assert code in result.summary["error"]
    assert result.summary["failed"] == 3500
    assert proxy.count("delete") == 1
    assert len(world.box.live_keys()) == 3500


def test_a_single_delete_that_is_refused_does_not_stop_the_others(world, proxy):
    expire(world, ["a\x01b", "plain"])
    body = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
    proxy.before = lambda r: Answer(403, body) if r.operation == "delete-one" else None
    result = world.purge(*AS_OF, "--json", "--workers", "1")
    assert result.code == 4
    assert (result.summary["deleted"]["expired"], result.summary["failed"]) == (1, 1)
    assert 'failed "a\\u0001b": AccessDenied' in result.err


@pytest.mark.parametrize("status", [200, 202, 302])
def test_a_single_delete_counts_only_with_the_status_that_s3_documents(world, proxy, status):
    expire(world, ["a\x01b"])
    proxy.before = lambda r: Answer(status, b"") if r.operation == "delete-one" else None
    result = world.purge(*AS_OF, "--json")
    assert result.code in (1, 4)
    assert result.summary["failed"] == 1
    assert result.summary["deleted"]["expired"] == 0


def test_requests_run_at_the_same_time_but_no_more_than_workers(world, proxy):
    expire(world, [f"k{n:05}" for n in range(6000)])
    now, most, lock = [0], [0], threading.Lock()
    both = threading.Barrier(3, timeout=20)

    def before(request: Request) -> None:
        if request.operation == "delete":
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            both.wait()
            with lock:
                now[0] -= 1

    proxy.before = before
    result = world.purge(*AS_OF, "--json", "--workers", "3")
    assert result.summary["deleted"]["expired"] == 6000
    assert most[0] == 3


def test_a_bucket_that_is_not_there_is_explained(world):
    result = world.purge(*AS_OF, "--bucket", "no-such-bucket-here")
    assert result.code == 1
    assert "Check --bucket" in result.error


def test_s3_that_cannot_be_reached_is_explained(world):
    result = world.purge(*AS_OF, AWS_ENDPOINT_URL_S3="http://127.0.0.1:9")
    assert result.code == 1
    assert "Cannot" in result.error


# --- Between the plan and the delete --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["OFFICIAL", "TRIAL"])
def test_a_job_inserted_after_the_plan_keeps_its_object(world, proxy, kind):
    def before(request: Request) -> None:
        if request.operation == "list":
            with world.box.database.admin(database="ndvr") as connection:
                connection.cursor().execute(
                    "INSERT IGNORE INTO ndvr_job_status VALUES"
                    f" ('late', now(), '{kind}', 'incoming_000012')"
                )

    proxy.before = before
    result = world.purge(*AS_OF, "--json")
    assert result.code == 0
    assert result.summary["retained"] == 1
    assert result.summary["deleted"]["expired"] == 16
    assert "incoming_000012" in world.box.live_keys()


def test_a_job_inserted_after_the_plan_keeps_its_object_under_a_prefix_too(world, proxy):
    world.box.put("in/incoming_000012")
    world.box.put("in/incoming_000013")

    def before(request: Request) -> None:
        if request.operation == "list":
            with world.box.database.admin(database="ndvr") as connection:
                connection.cursor().execute(
                    "INSERT INTO ndvr_job_status VALUES"
                    " ('late', now(), 'OFFICIAL', 'incoming_000012')"
                )

    proxy.before = before
    summary = world.purge(*AS_OF, "--prefix", "in/", "--json").summary
    assert (summary["retained"], summary["deleted"]["expired"]) == (1, 1)
    assert "in/incoming_000012" in world.box.live_keys()


@pytest.mark.parametrize("completed", [f"'{OLD}'", "NULL"])
def test_an_orphan_that_any_job_took_in_since_is_kept(world, proxy, completed):
    def before(request: Request) -> None:
        if request.operation == "list":
            with world.box.database.admin(database="ndvr") as connection:
                connection.cursor().execute(
                    "INSERT IGNORE INTO ndvr_job_status VALUES"
                    f" ('late', {completed}, 'TRIAL', 'test_1.txt')"
                )

    proxy.before = before
    summary = world.purge(*AS_OF, "--orphans", "--orphan-grace-days", "0", "--json").summary
    assert (summary["retained"], summary["deleted"]["orphan"]) == (1, 2)
    assert "test_1.txt" in world.box.live_keys()


def test_a_key_is_checked_again_before_it_is_tried_again(world, proxy: S3Proxy):
    def before(request: Request) -> Answer | None:
        if request.operation == "delete" and proxy.count("delete") == 1:
            with world.box.database.admin(database="ndvr") as connection:
                connection.cursor().execute(
                    "INSERT INTO ndvr_job_status VALUES"
                    " ('late', now(), 'OFFICIAL', 'incoming_000012')"
                )
            return Answer(503, b"")
        return None

    proxy.before = before
    summary = world.purge(*AS_OF, "--json").summary
    assert (summary["retained"], summary["deleted"]["expired"]) == (1, 16)
    assert "incoming_000012" in world.box.live_keys()
