"""Deletes: which keys go in which request, what an answer says of each, and what is tried again."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter

import pytest
from conftest import AS_OF, OLD, World
from conftest import expire as expire_many
from hypothesis import given
from hypothesis import strategies as st
from local_bucket import LocalBucket
from proxies import DROP, Answer, Request
from sandbox import BUCKET

import retention_purge as rp

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


def candidates(*keys: str) -> list[rp.Candidate]:
    return [rp.Candidate(key, rp.Reason.EXPIRED) for key in keys]


# --- Requests -------------------------------------------------------------------------------------

KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(st.lists(KEYS, unique=True, max_size=30))
def test_every_key_is_in_one_batch_and_odd_keys_are_alone(keys):
    batches = list(rp.batches(candidates(*keys)))
    assert sorted(item.key for batch in batches for item in batch) == sorted(keys)
    odd = [batch for batch in batches if any(rp.NOT_XML.search(item.key) for item in batch)]
    assert all(len(batch) == 1 for batch in odd)


def test_a_batch_holds_what_one_request_may_carry():
    keys = [f"{n:05}" for n in range(2500)]
    assert [len(batch) for batch in rp.batches(candidates(*keys))] == [1000, 1000, 500]


@pytest.mark.parametrize("key", ODD)
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
    assert world.purge(*AS_OF, "--json").summary["deleted"]["expired"] == len(ODD + PLAIN)
    assert world.box.live_keys() == []


def test_requests_run_at_the_same_time_but_no_more_than_workers(world, proxy):
    keys = expire_many(world, 6000)
    world.box.put(f"{keys[0]}x")
    now, most, lock = [0], [0], threading.Lock()
    three = threading.Barrier(3, timeout=20)

    def before(request: Request) -> None:
        if request.operation == "delete":
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            three.wait()
            with lock:
                now[0] -= 1

    proxy.before = before
    result = world.purge(*AS_OF, "--json", "--workers", "3", "--max-rate", "0")
    assert result.summary["deleted"]["expired"] == 6000
    assert most[0] == 3
    sizes = [r.body.count(b"<Key>") for r in proxy.requests if r.operation == "delete"]
    assert sizes == [1000] * 6
    assert world.box.live_keys() == [f"{keys[0]}x"]


# --- Answers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket() -> LocalBucket:
    return LocalBucket()


def verdict(bucket: LocalBucket, body: str, status: int = 200, key: str = "k") -> rp.Verdict:
    """What the answer is taken to say of one key."""
    bucket.fill().after = lambda number, answer: (status, body.encode()) if number == 1 else answer
    try:
        (found,) = bucket.delete(candidates(key), time.monotonic())
    except rp.PurgeError as error:
        return rp.Verdict(error.code)
    return found


def test_verdicts_come_in_the_order_of_the_keys(bucket):
    inner = "<Deleted><Key>c</Key></Deleted><Error><Key>a</Key><Code>SlowDown</Code></Error>"
    inner += "<Deleted><Key>foreign</Key></Deleted><Deleted><Key>b</Key></Deleted>"
    body = f"<DeleteResult>{inner}</DeleteResult>".encode()
    bucket.fill().after = lambda number, answer: (200, body)
    found = bucket.delete(candidates("a", "b", "c", "d"), time.monotonic())
    assert [verdict.code for verdict in found] == ["SlowDown", "", "", "NoAnswer"]


@pytest.mark.parametrize("prefix", ["", "s3:"])
@pytest.mark.parametrize("space", ['="u:s3"', "='u:s3'", ' =\n"u:s3"'])
def test_verdicts_are_read_whatever_their_namespace_looks_like(bucket, prefix, space):
    name = f"xmlns:{prefix[:-1]}" if prefix else "xmlns"
    key = '<Key>a xmlns="b" &amp; c</Key>'
    for inner, code in {
        f"<Deleted>{key}</Deleted>": "",
        f"<Error>{key}<Code>SlowDown</Code></Error>": "SlowDown",
    }.items():
        body = re.sub(r"<(/?)(?=[A-Z])", rf"<\1{prefix}", inner)
        body = f"<{prefix}DeleteResult {name}{space}>{body}</{prefix}DeleteResult>"
        assert verdict(bucket, body, key='a xmlns="b" & c').code == code


REFUSED, GONE = "<Error><Key>k</Key><Code>Denied</Code></Error>", "<Deleted><Key>k</Key></Deleted>"


@pytest.mark.parametrize(
    ("inner", "code"),
    [
        (GONE, ""),
        (GONE.replace("</Key>", "</Key><VersionId></VersionId>"), ""),
        (GONE.replace("</Key>", "</Key><VersionId>null</VersionId>"), ""),
        (GONE + GONE, ""),
        (REFUSED, "Denied"),
        (REFUSED + GONE, "Denied"),
        (GONE + REFUSED, "Denied"),
        (REFUSED.replace("Denied", ""), "unknown"),
        (REFUSED.replace("<Code>Denied</Code>", ""), "unknown"),
        (REFUSED.replace("<Code>Denied</Code>", "<Code/>"), "unknown"),
        ("", "NoAnswer"),
        (GONE.replace("k", "another"), "NoAnswer"),
        ("<Deleted></Deleted>", "NoAnswer"),
        ("<Gone><Key>k</Key></Gone>", "NoAnswer"),
    ],
)
def test_a_key_is_deleted_only_if_the_answer_says_so(bucket, inner, code):
    assert verdict(bucket, f"<DeleteResult>{inner}</DeleteResult>").code == code


NOT_A_DELETE_RESULT = {
    "empty": "",
    "html": "<html><body>Sign in</body></html>",
    "cut": f"<DeleteResult>{GONE}<Deleted><Key>incom",
    "cut at its end": f"<DeleteResult>{GONE}",
    "a listing": "<ListBucketResult></ListBucketResult>",
    "another root": f"<Result>{GONE}</Result>",
    "not xml": f"<DeleteResult>{GONE}<a></b></DeleteResult>",
}


@pytest.mark.parametrize("status", [200, 204])
@pytest.mark.parametrize("body", NOT_A_DELETE_RESULT.values(), ids=NOT_A_DELETE_RESULT)
def test_an_answer_of_another_kind_says_nothing_of_any_key(bucket, body, status):
    assert verdict(bucket, body, status).code in ("InvalidAnswer", "NoAnswer")


def test_an_error_may_come_with_status_200(bucket):
    assert verdict(bucket, "<Error><Code>InternalError</Code></Error>").code == "InternalError"


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (204, "", ""),
        (200, "", "InvalidAnswer"),
        (202, "", "InvalidAnswer"),
        (302, "", "302"),
        (403, "<Error><Code>AccessDenied</Code></Error>", "AccessDenied"),
        (403, "<Error><Code></Code></Error>", "unknown"),
        (503, "", "503"),
    ],
)
def test_a_single_delete_counts_only_with_the_status_that_s3_documents(bucket, status, body, code):
    assert verdict(bucket, body, status, "a\x01b").code == code


@pytest.mark.parametrize("key", ["k", "a\x01b"])
def test_a_request_leaves_only_while_its_re_check_is_fresh(bucket, key):
    bucket.fill()
    with pytest.raises(rp.PurgeError, match="when it would have left"):
        bucket.delete(candidates(key), time.monotonic() - rp.MAX_RECHECK_AGE - 0.1)
    assert bucket.asked == []
    bucket.delete(candidates(key), time.monotonic() - rp.MAX_RECHECK_AGE + 5)
    assert len(bucket.asked) == 1


# --- What is tried again, in whole runs -----------------------------------------------------------


def spoil(answer: Answer, keys: list[str], code: str, message: str = "m") -> Answer:
    """Turn the verdict on these keys from deleted into an error."""
    for key in keys:
        answer.body = re.sub(
            rf"<Deleted><Key>{key}</Key>.*?</Deleted>".encode(),
            f"<Error><Key>{key}</Key><Code>{code}</Code><Message>{message}</Message></Error>".encode(),
            answer.body,
        )
    return answer


@pytest.mark.parametrize("fault", [DROP, Answer(503, b""), Answer(500, b"<html>oops</html>")])
def test_a_request_that_fails_for_a_moment_is_sent_again(world, proxy, fault):
    faults = [fault, fault]
    proxy.before = lambda r: faults.pop() if r.operation == "delete" and faults else None
    summary = world.purge(*AS_OF, "--json").summary
    assert (summary["deleted"]["expired"], summary["failed"]) == (17, 0)
    assert summary["requests"]["delete"] == 3


def test_an_answer_lost_after_the_delete_is_asked_for_again(world, proxy):
    lost = [DROP]
    proxy.after = lambda request, answer: (
        lost.pop() if request.operation == "delete" and lost else answer
    )
    summary = world.purge(*AS_OF, "--json").summary
    assert (summary["deleted"]["expired"], summary["failed"]) == (17, 0)


@pytest.mark.parametrize("code", ["InternalError", "SlowDown"])
def test_a_key_that_s3_cannot_delete_just_now_is_tried_again(world, proxy, code):
    times = [2]

    def after(request: Request, answer: Answer) -> Answer:
        if request.operation == "delete" and times[0]:
            times[0] -= 1
            return spoil(answer, ["incoming_000012", "incoming_000040"], code)
        return answer

    proxy.after = after
    result = world.purge(*AS_OF, "--json")
    assert (result.code, result.summary["deleted"]["expired"]) == (0, 17)
    sizes = [r.body.count(b"<Key>") for r in proxy.requests if r.operation == "delete"]
    assert sizes == [17, 2, 2]


def test_a_key_that_s3_never_answers_for_has_failed_after_five_tries(world, proxy):
    silence = Answer(200, b"<DeleteResult></DeleteResult>")
    proxy.before = lambda request: silence if request.operation == "delete" else None
    result = world.purge(*AS_OF, "--json")
    assert result.code == 4
    assert (result.summary["deleted"]["expired"], result.summary["failed"]) == (0, 17)
    assert proxy.count("delete") == 5
    assert "17 keys failed: NoAnswer: S3's answer does not mention the key (" in result.err


def test_slow_down_of_s3_makes_the_run_slower_not_wrong(world, proxy):
    expire_many(world, 5000)
    counts: Counter[str] = Counter()

    def before(request: Request) -> Answer | None:
        counts[request.operation] += 1
        busy = request.operation == "delete" and counts["delete"] % 3
        return Answer(503, b"<Error><Code>SlowDown</Code></Error>") if busy else None

    proxy.before = before
    result = world.purge(*AS_OF, "--json", "--workers", "4")
    deleted, failed = result.summary["deleted"]["expired"], result.summary["failed"]
    assert deleted + failed == 5000
    assert deleted >= 3000
    assert len(world.box.live_keys()) == failed


def test_max_rate_holds_a_run_back(world):
    expire_many(world, 3000)
    slow = world.purge(*AS_OF, "--json", "--max-rate", "1000").summary
    assert slow["deleted"]["expired"] == 3000
    assert slow["seconds"] >= 2


# --- Refusals of S3 -------------------------------------------------------------------------------


def test_a_key_that_s3_refuses_is_reported_with_its_reason(world):
    deny = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:DeleteObject",
        "Resource": f"arn:aws:s3:::{BUCKET}/incoming_000013",
    }
    world.box.s3().put_bucket_policy(Bucket=BUCKET, Policy=json.dumps({"Statement": [deny]}))
    result = world.purge(*AS_OF, "--json")
    assert (result.code, result.summary["failed"]) == (4, 1)
    assert result.summary["deleted"]["expired"] == 16
    assert "1 keys failed: AccessDenied: " in result.err
    assert "(incoming_000013)" in result.err
    assert "incoming_000013" in world.box.live_keys()


def test_a_message_of_s3_cannot_forge_a_line_of_the_log(world, proxy):
    keys, message = ["incoming_000012"], "a\\nERROR forged"
    proxy.after = lambda request, answer: spoil(answer, keys, "AccessDenied", message)
    result = world.purge(*AS_OF)
    assert result.code == 4
    assert "ERROR forged" in result.err
    assert not [line for line in result.err.splitlines() if line.startswith("ERROR forged")]


@pytest.mark.parametrize("code", ["AccessDenied", "ExpiredToken"])
def test_a_refusal_of_the_whole_request_stops_the_run(world, proxy, code):
    expire_many(world, 3500)
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    proxy.before = lambda r: Answer(403, body) if r.operation == "delete" else None
    result = world.purge(*AS_OF, "--json", "--workers", "1")
    assert result.code == 1
    assert code in result.summary["error"]
    assert (result.summary["failed"], result.summary["not_attempted"]) == (1000, 2500)
    assert proxy.count("delete") == 1
    assert len(world.box.live_keys()) == 3500


def test_a_single_delete_that_is_refused_does_not_stop_the_others(world, proxy):
    expire(world, ["a\x01b", "plain"])
    body = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
    proxy.before = lambda r: Answer(403, body) if r.operation == "delete-one" else None
    result = world.purge(*AS_OF, "--json", "--workers", "1")
    assert result.code == 4
    assert (result.summary["deleted"]["expired"], result.summary["failed"]) == (1, 1)
    assert '1 keys failed: AccessDenied: no ("a\\u0001b")' in result.err
