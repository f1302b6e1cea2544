"""Break the script by rule, not by line, and see that a test notices.

    .venv/bin/python tests/proofs/mutants.py [--only TEXT] [--jobs N]

Each mutant is Python that runs at the end of a copy of the script, just before its `main()`. It
works at borders that a refactoring leaves alone: the SQL that is sent, the answers that come back,
the standard library, and functions that are named in the design. One that finds nothing to break
says so. Exit code 1: a mutant survived or no longer applies, or tests fail unbroken.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial, reduce, wraps
from pathlib import Path
from traceback import extract_tb
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIRED, STALE = ROOT / "mutant-fired", ROOT / "mutant-stale"
EARLY, LATE = datetime(2000, 1, 1, tzinfo=UTC), datetime(3000, 1, 1, tzinfo=UTC)
EMPTY = b"<ListBucketResult><Name>bucket</Name><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"
Patch = Callable[[dict[str, Any]], None]  # of the script's names


def stale() -> None:
    STALE.touch()
    os._exit(3)


def function(name: str, broken: Callable[..., Any], fires: bool = True) -> Patch:
    """Call `broken` in its place, with the function itself and its arguments."""

    def patch(names: dict[str, Any]) -> None:
        *way, last = name.split(".")
        owner = reduce(getattr, way, sys.modules[names["__name__"]])
        original = getattr(owner, last)

        @wraps(original)
        def called(*args: Any, **named: Any) -> Any:
            if fires:
                FIRED.touch()
            try:
                return broken(original, *args, **named)
            except (AttributeError, LookupError, NameError, TypeError, ValueError) as error:
                files = [frame.filename for frame in extract_tb(error.__traceback__)]
                if [file for file in files if file.startswith(str(ROOT))][-1:] == [__file__]:
                    stale()  # what the mutant builds upon is not as it was
                raise

        setattr(owner, last, called)

    return patch


def constants(**changes: Callable[[Any], Any]) -> Patch:
    def patch(names: dict[str, Any]) -> None:
        names.update({name: change(names[name]) for name, change in changes.items()})
        FIRED.touch()

    return patch


def sql(pattern: str, new: Any) -> Patch:
    """Change each statement that is sent."""

    def execute(original: Any, cursor: Any, text: str, args: Any = None) -> Any:
        changed = re.sub(pattern, new, text)
        if changed != text:
            FIRED.touch()
        return original(cursor, changed, args)

    return function("pymysql.cursors.Cursor.execute", execute, fires=False)


def answer(change: Callable[[bytes], bytes]) -> Patch:
    """Change each answer of S3's before it is read: mended, a check of it finds no fault."""

    def read(original: Any, *, response_dict: Any, **named: Any) -> Any:
        changed = change(response_dict["body"])
        if changed != response_dict["body"]:
            FIRED.touch()
            response_dict["body"] = changed
        return original(response_dict=response_dict, **named)

    return function("read_answer", read, fires=False)


def forgiving(original: Any, *args: Any, **named: Any) -> Any:
    """The same, but what it raises counts as nothing."""
    with suppress(BaseException):
        return original(*args, **named)


def cut_at_errors(original: Any, *args: Any) -> Any:
    """A stream that ends where it raises."""
    return iter(partial(forgiving, iter(original(*args)).__next__), None)


# fmt: off
# What it breaks (an Invariant by its number, a Guard, or a Word of DESIGN.md) and how; the patch;
# tests/cases/test_….py and pytest's -k that must notice, of a library's in a process of its own.
MUTANTS: list[tuple[str, str, Patch, str, str]] = [
    ("nothing", "must survive", constants(), "job_rows", "go_when_asked"),
    ("expired", "a job at the cutoff is expired", sql("`completedAt` < '", "`completedAt` <= '"), "database", "surely_expired"),
    ("expired", "zero dates are expired", constants(FIRST_TIMESTAMP=lambda _: "0000-00-00 00:00:00"), "database", "surely_expired"),
    ("expired", "the type is compared by collation", sql(r"CAST\(CONVERT\(`type` USING utf8mb4\) AS BINARY\)", "`type`"), "database", "surely_expired"),
    ("expired", "what is NULL is expired", sql("IS TRUE", "IS NOT FALSE"), "database", "surely_expired"),
    ("expired", "the server's time zone moves the cutoff", sql(r"\btime_zone = '[^']*'", "time_zone = @@time_zone"), "database", "time_zone"),
    ("expired key", "one expired job is enough", function("Policy.reason", lambda original, rules, known, found: original(rules, known and known._replace(jobs=known.expired), found)), "policy", "key_by_key"),
    ("bytes", "names are grouped by collation", sql("GROUP BY 1", "GROUP BY `sourceData`"), "database", "only_a_collation"),
    ("orphan", "the grace period includes its end", function("Policy.reason", lambda original, rules, *pair: original(replace(rules, orphans_before=rules.orphans_before and rules.orphans_before + timedelta(microseconds=1)), *pair)), "policy", "grace"),
    ("orphan", "orphans go unasked", function("Policy.reason", lambda original, rules, *pair: original(replace(rules, orphans_before=rules.orphans_before or datetime.now(UTC)), *pair)), "policy", "key_by_key"),
    ("orphan", "what is called like the prefix is an orphan", function("Policy.reason", lambda original, rules, *pair: original(replace(rules, prefix=""), *pair)), "policy", "prefix"),
    ("orphan", "names that the column cannot hold are orphans", function("JobTable.can_hold", lambda *_: True), "slips", "somebodys"),
    ("1 remaining", "the re-check sees expired jobs alone", function("JobTable.referenced", lambda original, *args: {key: each._replace(jobs=each.expired) for key, each in original(*args).items() if each.expired}), "recheck", "in_use"),
    ("1 remaining", "a job that took an orphan in is not seen", function("may_go", lambda original, reason, found: reason == "orphan" or original(reason, found)), "rounds", "orphan"),
    ("1 remaining", "uncommitted deletes are believed", sql("REPEATABLE READ", "READ UNCOMMITTED"), "database", "still_open"),
    ("1 errors", "a table that breaks off is read", function("JobTable.references", cut_at_errors), "faults", "mid_stream"),
    ("1 errors", "an error ends the listing", function("Bucket.objects", cut_at_errors), "listing", "cannot_be_trusted"),
    ("1 vanished", "keys go whose rows have vanished", function("may_go", lambda original, reason, found: found is None or original(reason, found)), "rounds", "how_a_key_ends"),
    ("1 age", "a request leaves at any age", function("Bucket.delete", lambda original, bucket, items, checked: original(bucket, items, time.monotonic())), "deletes", "leaves_only"),
    ("1 age", "a re-check may take any time", function("time.monotonic", lambda _: 0.0), "recheck", "takes_too_long"),
    ("1 age", "what is too old has failed", constants(UNDONE=lambda codes: codes - {"NotSent"}), "rounds", "how_a_key_ends"),
    ("2 short read", "a row limit of the server cuts the table", sql(r"sql_select_limit = \d+", "sql_select_limit = @@sql_select_limit"), "database", "row_limit"),
    ("2 foreign", "an empty or foreign answer is an empty bucket", answer(lambda body: EMPTY if b"<html" in body else body or EMPTY), "listing", "not_an_empty_bucket"),
    ("2 order", "the listing may be out of order", function("outer_join", lambda original, names, found: original(names, sorted({each.key: each for each in found}.values()))), "policy", "out_of_order"),
    ("2 missing", "a key without an answer is deleted", function("Bucket.delete", lambda original, *args: [each._replace(code=each.code.replace("NoAnswer", "")) for each in original(*args)]), "deletes", "answer_says_so"),
    ("2 missing", "any status of a single delete is success", function("Bucket.delete", lambda original, *args: [each._replace(code=each.code.replace("InvalidAnswer", "")) for each in original(*args)]), "deletes", "status_that"),
    ("2 missing", "of two answers the better one counts", answer(lambda body: re.sub(rb"<Error>.*?</Error>", b"", body) if b"<Deleted>" in body else body), "deletes", "answer_says_so"),
    ("2 listing", "a page may be out of order", function("Bucket._check", lambda original, bucket, found, after, *more: original(bucket, found._replace(objects=sorted({item for item in found.objects if item.key > after})), after, *more)), "listing", "at_any_request or always"),
    ("2 listing", "a page may have keys of another prefix", function("Bucket._check", lambda original, bucket, found, after, *more: original(bucket, found._replace(objects=[item for item in found.objects if item.key.startswith(bucket.prefix)]), after, *more)), "listing", "at_any_request"),
    ("2 listing", "a page may begin anywhere", function("Bucket._check", lambda original, bucket, found, after, *more: original(bucket, found._replace(begins=[]), after, *more)), "listing", "must_be_the_one"),
    ("2 listing", "a page tells that all is empty", function("Bucket.page", lambda original, bucket, *args, **named: (original(bucket, *args, **named), setattr(bucket, "_gap", ("", "\U0010ffff" * 1024)))[0]), "listing", "found_once"),
    ("2 listing", "a page may be of another bucket", function("Bucket._check", lambda original, bucket, found, after, *more: original(bucket, found._replace(bucket=bucket.name), after, *more)), "listing", "another_bucket"),
    ("2 listing", "KeyCount is ignored", answer(lambda body: re.sub(rb"<KeyCount>\d+", b"<KeyCount>%d" % body.count(b"<Contents>"), body)), "listing", "at_any_request"),
    ("2 listing", "the end of an answer may be missing", answer(lambda body: body if body.rstrip().endswith(b"Result>") else body + b"</ListBucketResult>"), "listing", "cut"),
    ("3 ends once", "a retained key counts twice", function("Ledger.retained", lambda original, *args: (original(*args), original(*args))), "rounds", "exactly_once"),
    ("3 ends once", "a failed key is forgotten", function("Ledger.failed", lambda *_: None), "deletes", "refuses"),
    ("3 ends once", "keys are not said to be not attempted", function("Report.as_dict", lambda original, report: original(report) | {"not_attempted": 0}), "rounds", "exactly_once"),
    ("3 exit code", "failures are exit code 0", function("Report.end", lambda original, report, error: (original(report, error), setattr(report, "exit_code", report.exit_code % 4))), "deletes", "refuses"),
    ("3 lost", "a lost request is held for undone", constants(UNDONE=lambda codes: codes | {"NoAnswer", "InternalError"}, DOUBTFUL=lambda _: set()), "rounds", "how_a_key_ends"),
    ("4 key", "no intent", function("Ledger.intend", lambda *_: None), "audit_log", "on_disk"),
    ("4 key", "intents are not on disk", function("Ledger.write", lambda original, ledger, event, items, sync=False: original(ledger, event, items)), "recheck", "grows_old"),
    ("4 key", "a log that breaks is ignored", function("Ledger.write", forgiving), "audit_log", "breaks"),
    ("4 row", "no intent of a row", function("Ledger.write", lambda original, ledger, event, items, sync=False: event == "delete-job" or original(ledger, event, items, sync)), "job_rows", "on_record"),
    ("5 primary key", "rows go by name", sql(r"(?s)^DELETE (.*?) WHERE `jobId` IN \(.*?\) AND (.*) AND \(CAST.*?, (CAST.*?BINARY\))\) IN \((.*)\)$", lambda found: f"DELETE {found[1]} WHERE {found[2]} AND {found[3]} IN (" + ",".join(re.findall(r",('[^']*')\)", found[4] + ")")) + ")"), "job_rows", "changed"),
    ("5 condition", "rows go though they expire no more", sql(r"(?s)^(DELETE .*?) AND \(\(`completedAt` >= .*? IS TRUE\)", r"\1"), "job_rows", "changed"),
    ("5 bytes", "rows go though they name another key", sql(r"(?s)^(DELETE .*) AND \(CAST\(CONVERT\(`jobId` .*$", r"\1"), "job_rows", "changed"),
    ("5 when", "rows go of failed and retained keys", sql(r"(?s)^(SELECT `jobId`.*? WHERE ).*( AND \(\(`completedAt`.*)$", r"\1TRUE\2"), "job_rows", "failed_and_retained"),
    ("5 when", "a shared key is not asked again", function("Policy.reason", lambda original, *args: "missing" if original(*args) == "shared" else original(*args)), "job_rows", "whose_remaining"),
    ("5 when", "a locked row is awaited for ever", sql(r"innodb_lock_wait_timeout = \d+", "innodb_lock_wait_timeout = 60"), "job_rows", "another_transaction"),
    ("6", "a dry run is a real one", function("check_usage", lambda original, given: (original(given), given.update(dry_run=False))), "seed", "dry_run"),
    ("6", "a dry run writes a log", function("check_usage", lambda original, given: (original(given), given["audit_log"] and given["audit_log"].touch())), "seed", "dry_run"),
    ("7", "certificate and host name are not verified", function("pymysql.connect", lambda original, **named: original(**named | {"ssl_verify_identity": False})), "database", "another_ca or another_host"),
    ("7", "TLS is left to the server", function("pymysql.connect", lambda original, **named: original(**{key: value for key, value in named.items() if not key.startswith("ssl")})), "database", "without_tls"),
    ("7", "a password goes anywhere", function("tls_settings", lambda original, bundle, local: original(bundle, True)), "database", "loopback_only"),
    ("8 again", "an answer that is lost stacks a marker", function("Bucket.versions", lambda *_: []), "undo", "stacks_no_marker and lost"),
    ("8 undo", "it knows answers alone", function("plan_undo", lambda original, known, *more: original((each for each in known if each[2]), *more)), "undo", "crash"),
    ("8 undo", "it takes somebody else's marker", function("plan_undo", lambda original, known, *more: original(((item, (EARLY, LATE), None) for item, _, _ in known), *more)), "undo", "somebody_else"),
    ("8 undo", "it takes an older marker", function("plan_undo", lambda original, known, *more: original(((item, (EARLY, during[1]), marker) for item, during, marker in known), *more)), "undo", "older_than"),
    ("8 undo", "it takes a later marker", function("plan_undo", lambda original, known, *more: original(((item, (during[0], LATE), marker) for item, during, marker in known), *more)), "undo", "long_after"),
    ("8 undo", "it takes one though S3 refused", function("plan_undo", lambda original, known, *more: original(((item, during, None if marker in ("failed", "retained") else marker) for item, during, marker in known), *more)), "undo", "refused or kept"),
    ("8 undo", "it needs no version below", function("Bucket.versions", lambda original, *args: [each for found in original(*args) for each in (found, found._replace(is_marker=False))]), "undo", "without_a_version_below"),
    ("8 undo", "it takes the first of several runs", function("choose_run", lambda original, events, run_id, *more: original(events, run_id or events.execute("SELECT run_id FROM events WHERE event = 'delete'").fetchone()[0], *more)), "undo", "several_runs"),
    ("8 undo", "it takes the log of another bucket", function("choose_run", lambda original, events, run_id, bucket: original(events, run_id, events.execute("SELECT bucket FROM events WHERE event = 'start'").fetchone()[0])), "undo", "another_bucket"),
    ("9", "the table is read into memory", function("JobTable.references", lambda original, jobs: iter(list(original(jobs)))), "properties", "memory"),
    ("9", "the merge is read into memory", function("outer_join", lambda original, *args: iter(list(original(*args)))), "properties", "memory"),
    ("guard", "--max-objects is off by one", function("refusals", lambda original, seen, rules, most, percent: original(seen, rules, most and most + 1, percent)), "policy", "limits"),
    ("guard", "--max-percent is ignored", function("refusals", lambda original, seen, rules, most, percent: original(seen, rules, most, 100)), "policy", "guard"),
    ("guard", "clocks may differ", function("clock_refusals", lambda *_: iter(())), "policy", "clocks"),
    ("guard", "--as-of may be in the future", function("check_usage", lambda original, given: (original(given), given.update(as_of=given["as_of"] and EARLY))), "slips", "future"),
    ("guard", "wrong place: keys that nobody has seen exist", function("Bucket.exists", lambda *_: True), "slips", "prefix"),
    ("guard", "wrong place: remaining jobs are not looked at", function("JobTable.sample", lambda *_: []), "slips", "prefix"),
    ("guard", "wrong place, with --orphans", function("refusals", lambda original, seen, *more: original(replace(seen, known=1), *more)), "policy", "orphans"),
    ("guard", "rights: a user without DELETE will do", function("JobTable.row_refusals", lambda *_: iter(())), "slips", "DELETE"),
    ("lock", "there is none", function("take_lock", lambda *_: None), "lock", "two_runs"),
    ("lock", "it is the bucket's alone", function("take_lock", lambda original, connection, bucket, prefix, table: original(connection, bucket, "", table)), "lock", "two_runs"),
    ("lock", "that it is lost is not noticed", function("JobTable.ping", lambda *_: None), "lock", "lost_lock"),
    ("lock", "a replica will do", sql(r"@@(global\.read_only|innodb_read_only)", "0"), "slips", "replica"),
    ("signals", "SIGHUP breaks off what is in flight", function("signal.signal", lambda original, signum, action: original(signum, signal.SIG_DFL if signum == signal.SIGHUP else action)), "signals", "in_flight"),
    ("signals", "one waits for the query", function("signal.signal", lambda original, signum, action: original(signum, partial(forgiving, action) if callable(action) else action)), "signals", "while_the_table_is_read"),
    ("signals", "nohup is ignored", function("signal.getsignal", lambda *_: signal.SIG_DFL), "signals", "nohup"),
    ("contract", "unknown and empty variables are ignored", function("check_usage", forgiving), "command_line", "variable"),
    ("contract", "the rate is ignored", function("Pace.sent", lambda *_: None), "rounds", "rate"),
]
# fmt: on


def apply(number: int, names: dict[str, Any]) -> None:
    """Called by the broken script, as it is run or imported."""
    try:
        MUTANTS[number][2](names)
    except (AttributeError, KeyError, TypeError):
        stale()


def tested(number: int) -> str:
    """What becomes of a mutant under its tests."""
    *_, file, tests = MUTANTS[number]
    limits = f"timeout -s INT -k 30 240 {sys.executable} -m pytest --timeout=120"  # may hang
    options = f"-xq -p no:cacheprovider -c tests/pytest.ini tests/cases/test_{file}.py -k"
    head, start, tail = (ROOT / "retention_purge.py").read_text().partition("\nif __name__ ==")
    with tempfile.TemporaryDirectory(prefix="purge-mutant-") as place:
        copy = Path(place).resolve()
        shutil.copytree(ROOT / "tests", copy / "tests")
        head += f"\nsys.path.append({str(copy / 'tests/proofs')!r})\n"
        head += f"import mutants\nmutants.apply({number}, globals())\n"
        (copy / "retention_purge.py").write_text(head + start + tail)
        command = [*limits.split(), *options.split(), tests]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        fired, is_stale = ((copy / path.name).exists() for path in (FIRED, STALE))
    verdicts = {0: "SURVIVED", 124: "caught by a timeout"}
    if failed := re.findall(r"^FAILED \S+::(\S+)", done.stdout, re.MULTILINE):
        verdicts[1] = f"caught by {failed[0]}"
    verdict = verdicts.get(done.returncode, f"NO VERDICT: pytest ended with {done.returncode}")
    return "no longer applies" if is_stale or (verdict[:2] != "NO" and not fired) else verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="mutants whose line has this text")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at the same time")
    asked = parser.parse_args()
    lines = [f"{breaks:14} {rule} [{file}]" for breaks, rule, _, file, _ in MUTANTS]
    chosen = [n for n, line in enumerate(lines) if asked.only in line]
    problems = 0
    with ThreadPoolExecutor(asked.jobs) as pool:
        for n, result in zip(chosen, pool.map(tested, chosen), strict=True):
            print(f"{lines[n]}: {result}", flush=True)
            problems += not result.startswith("caught" if n else "SURVIVED")
    print(f"{len(chosen)} mutants, {problems} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
