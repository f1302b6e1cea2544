"""Deletes: which keys go in which request, and what an answer is taken to say of each."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from datetime import datetime
from unittest.mock import patch
from xml.etree import ElementTree

import pytest
from conftest import AS_OF, EVERYTHING, OLD, World, events
from hypothesis import given
from hypothesis import strategies as st
from local_bucket import LocalBucket
from proxies import Request
from sandbox import COLUMNS, TABLE

import retention_purge as rp

bucket = LocalBucket()
UNSPELT = ["a\x01b", "a\x08", "c\rd", "\ufffe", "x\uffffy"]  # XML cannot carry them
PLAIN = [
    "../up", "a/../b", "/lead", "double//slash", "dot.", ".", "..", " lead", "trail ", "p+lus",
    "per%20cent", "%", "q?x=1&y#z", "'quote\"", "<tag>&amp;", "\\back", "é", "e\u0301", "жук",
    "\U0001f600", "\U0001f600" * 60, "\xa0", "\x7f", "\x85", "\u2028", "~", "a b", '"*"', "$(x)",
    "new\nline", "tab\tbed", "]]>",
]  # fmt: skip


def expire(world: World, keys: list[str]) -> None:
    """One expired job and one object for each key."""
    jobs = [(f"j{n}", OLD, "TRIAL", key) for n, key in enumerate(keys)]
    world.box.load(jobs, [(key, 1) for key in keys])


# --- Requests -------------------------------------------------------------------------------------


def test_all_sorts_of_keys_go_but_those_that_xml_cannot_carry_are_doubtful(world, proxy):
    """Expired keys and orphans. Their neighbours have jobs that remain."""
    expired, near = UNSPELT + PLAIN, ["a", "b", "c", "d", "lead", "p lus", "\ufffd", "oa"]
    jobs = [("TRIAL", key) for key in expired] + [("OFFICIAL", key) for key in near]
    rows = [(f"j{n}", OLD, kind, key) for n, (kind, key) in enumerate(jobs)]
    world.box.load(rows, [(key, 1) for key in [*expired, *near, *(f"o{key}" for key in expired)]])
    going = [("expired", key) for key in PLAIN] + [("orphan", f"o{key}") for key in PLAIN]
    listed = world.purge(*AS_OF, *EVERYTHING, "-n").listed
    assert listed == sorted(going, key=lambda line: line[1])
    summary = world.purge(*AS_OF, *EVERYTHING, "--json").summary
    assert (summary["exit_code"], summary["doubtful"]) == (0, 2 * len(UNSPELT))
    assert summary["requests"]["delete"] == proxy.count("delete") > proxy.count("delete-one") == 0
    stay = near + UNSPELT + [f"o{key}" for key in UNSPELT]
    assert world.box.live_keys() == sorted(stay)


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


SPELT = st.text(min_size=1).filter(lambda key: not rp.NOT_XML.search(key))


@given(st.lists(SPELT, min_size=1, unique=True))
def test_a_request_names_exactly_these_keys_and_each_is_found_in_the_answer(keys):
    assert bucket.fill().delete(keys) == [rp.Verdict()] * len(keys)
    (body,) = bucket.sent
    assert [node.text for node in ElementTree.fromstring(body).iterfind("*/*")] == keys
    assert bucket.store.gone == {*keys}


# The age of a re-check, and how long the connection takes; whether the request leaves.
AGES = [(0, 0, True), (30, 0, True), (30.1, 0, False), (1, 29, True), (1, 29.1, False)]


@pytest.mark.parametrize(("age", "connecting", "leaves"), AGES)
def test_a_request_leaves_only_if_its_re_check_is_fresh_once_it_is_connected(
    age, connecting, leaves
):
    now = [1000.0]
    bucket.fill().connect = lambda: now.append(now[-1] + connecting)
    with patch.object(rp, "boot_seconds", lambda: now[-1]):
        (verdict,) = bucket.delete("k", age)
    assert (len(bucket.sent), verdict.code) == ((1, "") if leaves else (0, "NotSent"))
    assert bucket.ages == ([pytest.approx(age + connecting)] if leaves else [])
    assert not verdict.in_doubt


def test_a_round_s_statements_fit_into_the_smallest_default_of_max_allowed_packet(may_delete):
    """20,000 rows of missing keys, in a column whose literals are long; a remaining job vouches."""
    world, remaining = may_delete, ("kept", None, "TRIAL", "kept")
    columns = COLUMNS.replace("sourceData varchar(64)", "sourceData varchar(64) CHARSET latin1")
    world.box.load([remaining], [("kept", 1)], columns)
    rows = f"SELECT seq, '{OLD}', 'TRIAL', LPAD(seq, 64, '0') FROM seq_1_to_20000"
    world.box.sql(f"INSERT INTO {TABLE} {rows}", "SET GLOBAL max_allowed_packet = 4194304")
    try:
        result = world.purge(*AS_OF, "--delete-jobs", "--json")
    finally:
        world.box.sql("SET GLOBAL max_allowed_packet = DEFAULT")
    assert (result.summary["error"], result.summary["jobs_deleted"]) == (None, 20_000)


# --- Answers --------------------------------------------------------------------------------------


def told(verdict: rp.Verdict) -> str:
    """The code, "?" if it is in doubt, "!" if it is of the whole request, "=" and the marker."""
    code = (verdict.code or "gone") + "?" * verdict.in_doubt + "!" * verdict.whole
    return f"{code}={verdict.marker}" if verdict.marker else code


def result(*items: str) -> str:
    return f"<DeleteResult>{''.join(items)}</DeleteResult>"


def error(code: str, key: str = "") -> str:
    return f"<Error>{key}<Code>{code}</Code><Message>why</Message></Error>"


K, HTML, JSON = "<Key>k</Key>", "<html><body>Busy</body></html>", '{"Code": "SlowDown"}'
REFUSED, GONE = error("Denied", K), f"<Deleted>{K}</Deleted>"
MARKED = f"<Deleted>{K}<DeleteMarkerVersionId>v1</DeleteMarkerVersionId></Deleted>"
SPACED = "<x:DeleteResult xmlns:x =\n'u'><x:Deleted><x:Key>k</x:Key></x:Deleted></x:DeleteResult>"
# The keys, the answer to their request, and what it is taken to say.
ANSWERS = [
    ("k", 200, result(GONE), "gone"),
    ("k", 200, result(MARKED), "gone=v1"),
    ("k", 200, SPACED, "gone"),
    ("k", 200, SPACED.replace("x:Deleted>", "x:Error>"), "unknown?"),
    ("k", 200, result(REFUSED, GONE), "Denied"),
    ("k", 200, result(GONE, REFUSED), "Denied"),
    ("k", 200, result(error("", K)), "unknown?"),
    ("k", 200, result(error("InternalError", K)), "InternalError?"),
    ("k", 200, result(error("503", K)), "503?"),
    ("jkl", 200, result("<Deleted><Key>f</Key></Deleted>", REFUSED), "NoAnswer? Denied NoAnswer?"),
    ("k", 200, result("<Deleted></Deleted>"), "NoAnswer?"),
    ("k", 200, error("InternalError"), "InternalError?!"),  # S3 sends it with a 200
    ("k", 500, error("InternalError"), "InternalError?!"),
    ("k", 400, error("RequestTimeout"), "RequestTimeout?!"),
    ("k", 409, error("OperationAborted"), "OperationAborted?!"),
    ("k", 503, error("SlowDown"), "SlowDown!"),
    ("k", 301, error("PermanentRedirect"), "PermanentRedirect!"),
    ("jk", 403, error("AccessDenied"), "AccessDenied! AccessDenied!"),
    ("k", 503, error("503"), "503?!"),
    ("k", 503, error("Service Unavailable"), "Service Unavailable?!"),
    ("k", 503, f"<html>{error('SlowDown')}</html>", "InvalidAnswer?"),
    ("k", 200, "", "InvalidAnswer?"),
    ("k", 200, f"<DeleteResult>{GONE}", "InvalidAnswer?"),
    ("k", 200, result(GONE, "<a></b>"), "InvalidAnswer?"),
    ("k", 200, f"<ListBucketResult>{GONE}</ListBucketResult>", "InvalidAnswer?"),
    ("k", 200, f'<?xml version="1.0" encoding="x"?>{result(GONE)}', "InvalidAnswer?"),
    ("k", 204, "", "InvalidAnswer?"),
    ("k", 503, result(GONE), "InvalidAnswer?"),
]
GATEWAYS = (200, 403, 408, 429, 502, 503, 504, 520, 524)
ANSWERS += [("k", code, body, "InvalidAnswer?") for code in GATEWAYS for body in (HTML, JSON)]


@pytest.mark.parametrize(("keys", "status", "body", "said"), ANSWERS)
def test_only_s3_s_own_words_tell_for_certain_what_became_of_a_key(keys, status, body, said):
    bucket.fill().after = lambda *_: (status, body.encode())
    assert " ".join(map(told, bucket.delete(keys))) == said


BREAKS = [ConnectionResetError, TimeoutError, ZeroDivisionError, MemoryError]


@pytest.mark.parametrize("fault", BREAKS)
def test_what_breaks_before_a_request_leaves_is_certain_and_after_it_is_in_doubt(fault):
    def breaks(*_: object) -> None:
        raise fault

    bucket.fill().connect = breaks
    assert ([*map(told, bucket.delete("jk"))], bucket.sent) == (["NotSent"] * 2, [])
    bucket.fill().after = breaks
    assert ([*map(told, bucket.delete("jk"))], len(bucket.sent)) == (["NoAnswer?"] * 2, 1)


def test_a_key_that_s3_refuses_has_failed_and_is_told_in_one_line(world, proxy):
    told = rb"<Deleted><Key>(incoming_000013)</Key>.*?</Deleted>"
    error = rb"<Error><Key>\1</Key><Code>Nope</Code><Message>a\nERROR forged</Message></Error>"
    proxy.after = lambda _, answer: replace(answer, body=re.sub(told, error, answer.body))
    result = world.purge(*AS_OF, "--json")
    deleted = result.summary["deleted"]["expired"]
    assert (result.code, result.summary["failed"], deleted) == (4, 1, 16)
    assert "1 keys failed: Nope: a ERROR forged (incoming_000013)\n" in result.err
