"""Deletes: which keys go in which request, and what an answer is taken to say of each."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import replace
from datetime import datetime

import pytest
from conftest import AS_OF, OLD, World, events
from local_bucket import LocalBucket
from proxies import Request

import retention_purge as rp

bucket = LocalBucket()
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


# --- Requests -------------------------------------------------------------------------------------


def test_all_sorts_of_keys_are_listed_and_deleted_and_their_neighbours_stay(world, proxy):
    expire(world, ODD + PLAIN)
    near = ["a", "b", "c", "d", "lead", "p lus", "\ufffd"]
    for neighbour in near:
        world.box.put(neighbour)
    assert world.purge(*AS_OF, "-n").listed == [("expired", key) for key in sorted(ODD + PLAIN)]
    summary = world.purge(*AS_OF, "--json").summary
    assert summary["deleted"]["expired"] == len(ODD + PLAIN)
    assert summary["requests"]["delete"] == proxy.count("delete") + proxy.count("delete-one")
    assert world.box.live_keys() == sorted(near)


def test_full_requests_run_at_the_same_time_but_no_more_than_workers(world, proxy):
    expire(world, [str(n) for n in range(6000)])
    three, free, crowded = threading.Barrier(3, timeout=60), threading.Semaphore(3), []

    def before(request: Request) -> None:
        if request.operation == "delete":
            crowded.append(not free.acquire(blocking=False))
            three.wait()
            free.release()

    proxy.before = before
    result = world.purge(*AS_OF, "--json", "--workers", "3", "--max-rate", "0")
    assert (result.summary["deleted"]["expired"], crowded) == (6000, [False] * 6)


def test_max_rate_holds_requests_back(world, proxy, tmp_path):
    """Measured from the first intent: the first request may take long to arrive."""
    expire(world, [str(n) for n in range(3000)])
    log = tmp_path / "log"
    assert world.purge(*AS_OF, "--max-rate", "1000", "--audit-log", str(log)).code == 0
    start = datetime.fromisoformat(events(log, "delete")[0]["time"]).timestamp()
    sent = [request.at for request in proxy.requests if request.operation == "delete"]
    assert (len(sent), sent[2] - start >= 1.9) == (3, True)


# --- Answers --------------------------------------------------------------------------------------


def codes(keys: str, age: float = 0) -> list[str]:
    """Of what S3 is taken to say of each key, none if it is deleted."""
    items = [rp.Candidate(key, rp.Reason.EXPIRED) for key in keys.split()]
    return [verdict.code for verdict in bucket.delete(items, time.monotonic() - age)]


REFUSED, GONE = "<Error><Key>k</Key><Code>Denied</Code></Error>", "<Deleted><Key>k</Key></Deleted>"
SPACED = "<x:DeleteResult xmlns:x =\n'u'><x:Deleted><x:Key>k</x:Key></x:Deleted></x:DeleteResult>"
FOREIGN, ERROR = "<Deleted><Key>foreign</Key></Deleted>", "<Error><Code>%s</Code></Error>"
# The keys, the answer to their request, and what it is taken to say; "all" stops the run. `ODD_ONE`
# goes by a request of its own, which S3 answers with a 204.
ODD_ONE = "a\x01b"
ANSWERS = [
    ("k", 200, f"<DeleteResult>{GONE}</DeleteResult>", ""),
    ("k", 200, SPACED, ""),
    ("k", 200, SPACED.replace("x:Deleted>", "x:Error>"), "unknown"),
    ("k", 200, f"<DeleteResult>{REFUSED + GONE}</DeleteResult>", "Denied"),
    ("k", 200, f"<DeleteResult>{GONE + REFUSED}</DeleteResult>", "Denied"),
    ("k", 200, "<DeleteResult><Error><Key>k</Key><Code/></Error></DeleteResult>", "unknown"),
    ("j k l", 200, f"<DeleteResult>{FOREIGN + REFUSED}</DeleteResult>", "NoAnswer Denied NoAnswer"),
    ("k", 200, "<DeleteResult><Deleted></Deleted></DeleteResult>", "NoAnswer"),
    ("k", 200, ERROR % "InternalError", "all: InternalError"),  # S3 sends it with a 200
    ("k", 403, ERROR % "AccessDenied", "all: AccessDenied"),
    ("k", 200, "", "all: InvalidAnswer"),
    ("k", 200, "<html><body>Sign in</body></html>", "all: InvalidAnswer"),
    ("k", 200, f"<DeleteResult>{GONE}", "all: InvalidAnswer"),
    ("k", 200, f"<DeleteResult>{GONE}<a></b></DeleteResult>", "all: 500"),
    ("k", 200, f"<ListBucketResult>{GONE}</ListBucketResult>", "all: InvalidAnswer"),
    (ODD_ONE, 204, "", ""),
    (ODD_ONE, 200, "", "InvalidAnswer"),
    (ODD_ONE, 302, "", "302"),
    (ODD_ONE, 403, ERROR % "AccessDenied", "AccessDenied"),
    (ODD_ONE, 403, ERROR % "", "unknown"),
    (ODD_ONE, 503, "", "503"),
]


@pytest.mark.parametrize(("keys", "status", "body", "said"), ANSWERS)
def test_a_key_is_deleted_only_if_the_answer_says_so_with_the_status_that_s3_documents(
    keys, status, body, said
):
    bucket.fill().after = lambda number, other: (status, body.encode()) if number == 1 else other
    try:
        found = " ".join(codes(keys))
    except rp.PurgeError as error:
        found = f"all: {error.code}"
    assert found == said


@pytest.mark.parametrize("key", ["k", ODD_ONE])
def test_a_request_leaves_only_while_its_re_check_is_fresh(key):
    bucket.fill()
    with pytest.raises(rp.PurgeError, match="when it would have left"):
        codes(key, age=rp.MAX_RECHECK_AGE + 0.1)
    assert bucket.asked == []
    codes(key, age=rp.MAX_RECHECK_AGE - 5)
    assert len(bucket.asked) == 1


def test_a_key_that_s3_refuses_has_failed_and_is_told_in_one_line(world, proxy):
    told = rb"<Deleted><Key>(incoming_000013)</Key>.*?</Deleted>"
    error = rb"<Error><Key>\1</Key><Code>Nope</Code><Message>a\nERROR forged</Message></Error>"
    proxy.after = lambda _, answer: replace(answer, body=re.sub(told, error, answer.body))
    result = world.purge(*AS_OF, "--json")
    deleted = result.summary["deleted"]["expired"]
    assert (result.code, result.summary["failed"], deleted) == (4, 1, 16)
    assert "1 keys failed: Nope: a ERROR forged (incoming_000013)\n" in result.err
