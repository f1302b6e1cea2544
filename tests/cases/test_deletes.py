"""Deletes: which keys go in which request, what an answer says of each, and what is refused.

What is tried again, and how often: test_faults.py in whole runs, test_rounds.py key by key.
"""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import replace

import pytest
from conftest import AS_OF, OLD, World
from conftest import expire as expire_many
from local_bucket import LocalBucket
from proxies import Answer, Request
from sandbox import BUCKET

import retention_purge as rp

# moto's server cannot delete a key with both CR and LF: it answers 404.
ODD = ["a\x01b", "a\x08", "c\rd", "\ufffe", "x\uffffy", "new\nline", "tab\tbed"]
PLAIN = [
    "../up", "a/../b", "/lead", "double//slash", "dot.", ".", "..", " lead", "trail ", "p+lus",
    "per%20cent", "%", "q?x=1&y#z", "'quote\"", "<tag>&amp;", "\\back", "é", "e\u0301", "жук",
    "\U0001f600", "\U0001f600" * 60, "\xa0", "\x7f", "\x85", "\u2028", "~", "a b", '"*"', "$(x)",
]  # fmt: skip


def expire(world: World, keys: list[str]) -> None:
    """One expired job and one object for each key."""
    jobs = [(f"j{n}", OLD, "TRIAL", key) for n, key in enumerate(keys)]
    world.box.load(jobs, [(key, 1) for key in keys])


def candidates(*keys: str) -> list[rp.Candidate]:
    return [rp.Candidate(key, rp.Reason.EXPIRED) for key in keys]


# --- Requests -------------------------------------------------------------------------------------


def test_all_sorts_of_keys_are_listed_and_deleted_and_their_neighbours_stay(world):
    expire(world, ODD + PLAIN)
    near = ["a", "b", "c", "d", "lead", "p lus", "\ufffd"]
    for neighbour in near:
        world.box.put(neighbour)
    dry = world.purge(*AS_OF, "-n")
    assert dry.listed == [("expired", key) for key in sorted(ODD + PLAIN)]
    assert world.purge(*AS_OF, "--json").summary["deleted"]["expired"] == len(ODD + PLAIN)
    assert world.box.live_keys() == sorted(near)


def test_full_requests_run_at_the_same_time_but_no_more_than_workers(world, proxy):
    expire_many(world, 6000)
    three, free, crowded = threading.Barrier(3, timeout=20), threading.Semaphore(3), []

    def before(request: Request) -> None:
        if request.operation == "delete":
            crowded.append(not free.acquire(blocking=False))
            three.wait()
            free.release()

    proxy.before = before
    result = world.purge(*AS_OF, "--json", "--workers", "3", "--max-rate", "0")
    assert (result.summary["deleted"]["expired"], crowded) == (6000, [False] * 6)
    sizes = [r.body.count(b"<Key>") for r in proxy.requests if r.operation == "delete"]
    assert sizes == [1000] * 6


def test_max_rate_holds_a_run_back(world):
    expire_many(world, 3000)
    slow = world.purge(*AS_OF, "--json", "--max-rate", "1000").summary
    assert slow["deleted"]["expired"] == 3000
    assert slow["seconds"] >= 2


# --- Answers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket() -> LocalBucket:
    return LocalBucket()


def verdict(bucket: LocalBucket, body: str, status: int = 200, key: str = "k") -> str:
    """The code of what the answer is taken to say of one key, none if it is deleted; or that of
    the request as a whole, which may stop the run."""
    bucket.fill().after = lambda number, answer: (status, body.encode()) if number == 1 else answer
    try:
        return bucket.delete(candidates(key), time.monotonic())[0].code
    except rp.PurgeError as error:
        return f"all: {error.code}"


def test_verdicts_come_in_the_order_of_the_keys(bucket):
    inner = "<Deleted><Key>c</Key></Deleted><Error><Key>a</Key><Code>SlowDown</Code></Error>"
    inner += "<Deleted><Key>foreign</Key></Deleted><Deleted><Key>b</Key></Deleted>"
    bucket.fill().after = lambda *_: (200, f"<DeleteResult>{inner}</DeleteResult>".encode())
    found = bucket.delete(candidates("a", "b", "c", "d"), time.monotonic())
    assert [verdict.code for verdict in found] == ["SlowDown", "", "", "NoAnswer"]


REFUSED, GONE = "<Error><Key>k</Key><Code>Denied</Code></Error>", "<Deleted><Key>k</Key></Deleted>"
PREFIXED = "<x:DeleteResult xmlns:x =\n'u'><x:Deleted><x:Key>k</x:Key></x:Deleted></x:DeleteResult>"


@pytest.mark.parametrize(
    ("inner", "code"),
    [
        (GONE, ""),
        (REFUSED, "Denied"),
        (REFUSED + GONE, "Denied"),
        (GONE + REFUSED, "Denied"),
        (REFUSED.replace("<Code>Denied</Code>", ""), "unknown"),
        (REFUSED.replace("<Code>Denied</Code>", "<Code/>"), "unknown"),
        ("", "NoAnswer"),
        (GONE.replace("k", "another"), "NoAnswer"),
        ("<Deleted></Deleted>", "NoAnswer"),
    ],
)
def test_a_key_is_deleted_only_if_the_answer_says_so(bucket, inner, code):
    for namespace in ("", ' xmlns="u:s3"'):
        assert verdict(bucket, f"<DeleteResult{namespace}>{inner}</DeleteResult>") == code


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (PREFIXED, ""),
        (PREFIXED.replace("x:Deleted>", "x:Error>"), "unknown"),
        (
            "<Error><Code>InternalError</Code></Error>",
            "all: InternalError",
        ),  # S3 sends it with a 200
        ("", "all: InvalidAnswer"),
        ("<html><body>Sign in</body></html>", "all: InvalidAnswer"),
        (f"<DeleteResult>{GONE}", "all: InvalidAnswer"),
        (f"<DeleteResult>{GONE}<a></b></DeleteResult>", "all: 500"),
        ("<ListBucketResult></ListBucketResult>", "all: InvalidAnswer"),
        (f"<Result>{GONE}</Result>", "all: InvalidAnswer"),
    ],
)
def test_an_answer_of_another_kind_says_nothing_of_any_key(bucket, body, code):
    assert verdict(bucket, body) == code


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (204, "", ""),
        (200, "", "InvalidAnswer"),
        (302, "", "302"),
        (403, "<Error><Code>AccessDenied</Code></Error>", "AccessDenied"),
        (403, "<Error><Code></Code></Error>", "unknown"),
        (503, "", "503"),
    ],
)
def test_a_single_delete_counts_only_with_the_status_that_s3_documents(bucket, status, body, code):
    assert verdict(bucket, body, status, "a\x01b") == code


@pytest.mark.parametrize("key", ["k", "a\x01b"])
def test_a_request_leaves_only_while_its_re_check_is_fresh(bucket, key):
    bucket.fill()
    with pytest.raises(rp.PurgeError, match="when it would have left"):
        bucket.delete(candidates(key), time.monotonic() - rp.MAX_RECHECK_AGE - 0.1)
    assert bucket.asked == []
    bucket.delete(candidates(key), time.monotonic() - rp.MAX_RECHECK_AGE + 5)
    assert len(bucket.asked) == 1


# --- Refusals of S3, in whole runs ----------------------------------------------------------------


def test_a_key_that_s3_refuses_is_reported_in_one_line_whatever_its_message(world, proxy):
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:DeleteObject"}
    deny["Resource"] = f"arn:aws:s3:::{BUCKET}/incoming_000013"
    world.box.s3().put_bucket_policy(Bucket=BUCKET, Policy=json.dumps({"Statement": [deny]}))
    proxy.after = lambda request, answer: replace(
        answer, body=answer.body.replace(b"<Message>", b"<Message>a\nERROR forged")
    )
    result = world.purge(*AS_OF, "--json")
    deleted = result.summary["deleted"]["expired"]
    assert (result.code, result.summary["failed"], deleted) == (4, 1, 16)
    (line,) = [line for line in result.err.splitlines() if "forged" in line]
    assert re.search(r"1 keys failed: AccessDenied: a ERROR forged.*\(incoming_000013\)", line)
    assert "incoming_000013" in world.box.live_keys()


@pytest.mark.parametrize("code", ["AccessDenied", "ExpiredToken"])
def test_a_refusal_of_the_whole_request_stops_the_run(world, proxy, code):
    expire_many(world, 1500)
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    proxy.before = lambda r: Answer(403, body) if r.operation == "delete" else None
    result = world.purge(*AS_OF, "--json", "--workers", "1")
    assert (result.code, code in result.summary["error"]) == (1, True)
    assert (result.summary["failed"], result.summary["not_attempted"]) == (1000, 500)
    assert (proxy.count("delete"), len(world.box.live_keys())) == (1, 1500)
