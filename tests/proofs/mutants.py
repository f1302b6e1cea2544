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
LATER = 1e12  # of `boot_seconds`
EMPTY = b"<ListBucketResult><Name>bucket</Name><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"
Patch = Callable[[dict[str, Any]], None]  # of the script's names


def stale() -> None:
    STALE.write_text("")
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
                FIRED.write_text("")
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
        FIRED.write_text("")

    return patch


def sql(pattern: str, new: Any) -> Patch:
    """Change each statement that is sent."""

    def execute(original: Any, cursor: Any, text: str, args: Any = None) -> Any:
        changed = re.sub(pattern, new, text)
        if changed != text:
            FIRED.write_text("")
        return original(cursor, changed, args)

    return function("pymysql.cursors.Cursor.execute", execute, fires=False)


def answer(change: Callable[[bytes], bytes]) -> Patch:
    """Change each answer of S3's to a question: mended, a check of it finds no fault."""

    def read(original: Any, *, response_dict: Any, **named: Any) -> Any:
        changed = change(response_dict["body"])
        if changed != response_dict["body"]:
            FIRED.write_text("")
            response_dict["body"] = changed
        return original(response_dict=response_dict, **named)

    return function("check_answer", read, fires=False)


def verdicts(change: Callable[[Any], Any]) -> Patch:
    """Change what an answer to a delete is taken to say of each key."""
    return function("read_verdicts", lambda original, *args: [*map(change, original(*args))])


def reason(change: Callable[[Any], Any]) -> Patch:
    """Plan by other terms."""
    broken = lambda original, terms, *pair: original(change(terms), *pair)  # noqa: E731
    return function("reason_of", broken)


def undone(**change: Any) -> Patch:
    """Know something else of each key that a run meant to delete."""

    def plan(original: Any, found: Any, *more: Any) -> Any:
        pairs = ((intent._replace(**change), versions) for intent, versions in found)
        return original(pairs, *more)

    return function("plan_undo", plan)


def forgiving(original: Any, *args: Any, **named: Any) -> Any:
    """The same, but what it raises counts as nothing."""
    with suppress(BaseException):
        return original(*args, **named)


def cut_at_errors(original: Any, *args: Any) -> Any:
    """A stream that ends where it raises."""
    return iter(partial(forgiving, iter(original(*args)).__next__), None)


def full_requests(original: Any, rounds: Any, *args: Any) -> None:
    original(rounds, *args)
    rounds._size = max(rounds._size, 1000)


def indexed(original: Any, jobs: Any, *args: Any) -> None:
    original(jobs, *args)
    jobs.indexed = jobs.indexed or True


def ends_at_same_token(original: Any, bucket: Any, *args: Any, **named: Any) -> Any:
    try:
        return original(bucket, *args, **named)
    except Exception as error:
        if "same token" not in str(error):
            raise
        return original.__globals__["Page"]([], None, bucket.name, [])


# fmt: off
# What it breaks (an Invariant by its number, a Guard, or a Word of DESIGN.md) and how; the patch;
# tests/cases/test_….py and pytest's -k that must notice, of a library's in a process of its own.
MUTANTS: list[tuple[str, str, Patch, str, str]] = [
    ("nothing", "must survive", constants(), "job_rows", "go_when_asked"),
    ("expired", "a job at the cutoff is expired", sql("`completedAt` < ", "`completedAt` <= "), "database", "surely_expired"),
    ("expired", "zero dates are expired", sql(r"TO_DAYS\(`completedAt`\) IS NOT NULL", "TRUE"), "database", "surely_expired"),
    ("expired", "the type is compared by collation", sql(r"CAST\(CONVERT\(`type` USING utf8mb4\) AS BINARY\)", "`type`"), "database", "surely_expired"),
    ("expired", "what is NULL is expired", sql("IS TRUE", "IS NOT FALSE"), "database", "surely_expired"),
    ("expired", "the server's time zone moves the cutoff", sql(r"\btime_zone = '[^']*'", "time_zone = @@time_zone"), "database", "time_zone"),
    ("expired key", "one expired job is enough", function("reason_of", lambda original, terms, known, found: original(terms, known and known._replace(jobs=known.expired), found)), "policy", "key_by_key"),
    ("bytes", "names are grouped by collation", sql("GROUP BY 1", "GROUP BY `sourceData`"), "database", "only_a_collation"),
    ("orphan", "the grace period includes its end", reason(lambda terms: terms._replace(orphans_before=terms.orphans_before and terms.orphans_before + timedelta(microseconds=1))), "policy", "grace"),
    ("orphan", "orphans go unasked", reason(lambda terms: terms._replace(orphans_before=terms.orphans_before or datetime.now(UTC))), "policy", "key_by_key"),
    ("orphan", "what is called like the prefix is an orphan", reason(lambda terms: terms._replace(prefix="")), "policy", "prefix"),
    ("doubtful", "names that the column cannot hold are orphans", function("JobTable.can_hold", lambda *_: True), "slips", "somebodys"),
    ("doubtful", "other spellings of a dangling key are orphans", function("Spellings.has", lambda *_: False), "policy", "other_spellings"),
    ("doubtful", "letter case makes another name", function("folded", lambda original, name: name if original(name) == name.lower() else original(name)), "policy", "other_spellings"),
    ("doubtful", "doubtful orphans are planned", function("without_doubtful", lambda original, items, *_: items), "policy", "key_by_key"),
    ("doubtful", "keys that XML cannot carry are planned", constants(NOT_XML=lambda _: re.compile("(?!)")), "deletes", "all_sorts"),
    ("1 remaining", "the re-check sees expired jobs alone", function("Gate.known", lambda original, gate, names: (True, {name: counts._replace(jobs=counts.expired) for name, counts in original(gate, names)[1].items() if counts.expired})), "recheck", "in_use"),
    ("1 remaining", "a job that took an orphan in is not seen", function("Gate.objection", lambda original, gate, item, counts: original(gate, item, None if item.reason == "orphan" else counts)), "database", "only_a_collation"),
    ("1 remaining", "uncommitted deletes are believed", sql("REPEATABLE READ", "READ UNCOMMITTED"), "database", "still_open"),
    ("1 errors", "a table that breaks off is read", function("JobTable.references", cut_at_errors), "faults", "mid_stream"),
    ("1 errors", "an error ends the listing", function("Bucket.objects", cut_at_errors), "listing", "cannot_be_trusted"),
    ("1 vanished", "keys go whose rows have vanished", function("Gate.objection", lambda original, gate, item, counts: counts and original(gate, item, counts)), "recheck", "vanished"),
    ("1 age", "a request leaves at any age", function("Wire._post", lambda original, wire, items, asked: original(wire, items, LATER)), "deletes", "leaves_only"),
    ("1 age", "a re-check may take any time", function("boot_seconds", lambda _: 0.0), "recheck", "takes_too_long"),
    ("2 short read", "a row limit of the server cuts the table", sql(r"sql_select_limit = \d+", "sql_select_limit = @@sql_select_limit"), "database", "row_limit"),
    ("2 foreign", "an empty or foreign answer is an empty bucket", answer(lambda body: EMPTY if b"<html" in body else body or EMPTY), "listing", "not_an_empty_bucket"),
    ("2 order", "the listing may be out of order", function("outer_join", lambda original, names, found: original(names, sorted({each.key: each for each in found}.values()))), "policy", "out_of_order"),
    ("2 missing", "a key without an answer is deleted", verdicts(lambda each: each._replace(code=each.code.replace("NoAnswer", ""))), "deletes", "own_words"),
    ("2 missing", "of two answers the better one counts", function("read_verdicts", lambda original, answer, *more: original((answer[0], re.sub(rb"<Error>.*?</Error>", b"", answer[1]) if b"<Deleted>" in answer[1] else answer[1]), *more)), "deletes", "own_words"),
    ("2 listing", "a page may be out of order", function("Bucket._check", lambda original, bucket, found, after, *more: original(bucket, found._replace(objects=sorted({item for item in found.objects if item.key > after})), after, *more)), "listing", "at_any_request"),
    ("2 listing", "a page may have keys of another prefix", function("Bucket._check", lambda original, bucket, found, after, *more: original(bucket, found._replace(objects=[item for item in found.objects if item.key.startswith(bucket.prefix)]), after, *more)), "listing", "at_any_request"),
    ("2 listing", "a page may begin anywhere", function("Bucket._check", lambda original, bucket, found, after, *more: original(bucket, found._replace(begins=[]), after, *more)), "listing", "must_be_the_one"),
    ("2 listing", "a page tells that all is empty", function("Bucket.page", lambda original, bucket, *args, **named: (original(bucket, *args, **named), setattr(bucket, "_gap", ("", "\U0010ffff" * 1024)))[0]), "listing", "found_once"),
    ("2 listing", "a page may be of another bucket", function("Bucket._check", lambda original, bucket, found, after, *more: original(bucket, found._replace(bucket=bucket.name), after, *more)), "listing", "another_bucket"),
    ("2 listing", "the same token again ends a listing", function("Bucket.page", ends_at_same_token), "listing", "same_token"),
    ("2 listing", "KeyCount is ignored", answer(lambda body: re.sub(rb"<KeyCount>\d+", b"<KeyCount>%d" % body.count(b"<Contents>"), body)), "listing", "at_any_request"),
    ("2 listing", "the end of an answer may be missing", answer(lambda body: body if body.rstrip().endswith(b"Result>") else body + b"</ListBucketResult>"), "listing", "cut"),
    ("3 doubt", "a gateway's answer is certain", verdicts(lambda each: each._replace(in_doubt=each.in_doubt and each.code != "InvalidAnswer")), "deletes", "own_words"),
    ("3 doubt", "any code is certain", function("is_certain", lambda *_: True), "deletes", "own_words"),
    ("3 doubt", "InternalError is certain", constants(MAYBE_DONE=lambda codes: codes - {"InternalError"}), "deletes", "own_words"),
    ("3 doubt", "no answer means that nothing was sent", verdicts(lambda each: each._replace(in_doubt=each.in_doubt and each.code != "NoAnswer")), "deletes", "breaks_before"),
    ("3 doubt", "a lost request is held for undone", function("Rounds._ask", lambda original, rounds, items: ([setattr(tried, "lost", False) for tried in rounds._pending.values()], original(rounds, items))[1]), "rounds", "exactly_once"),
    ("3 doubt", "in a versioned bucket it is tried again", function("Rounds.__init__", lambda original, rounds, *args: (original(rounds, *args), setattr(rounds, "_versioned", False))[0]), "rounds", "in_doubt"),
    ("3 doubt", "it is never tried again", function("Rounds.__init__", lambda original, rounds, *args: (original(rounds, *args), setattr(rounds, "_versioned", True))[0]), "rounds", "in_doubt"),
    ("3 doubt", "an outage is sat out", constants(OUTAGE=lambda _: 10**9), "rounds", "hears_nothing"),
    ("3 ends once", "a retained key counts twice", function("Ledger.account", lambda original, ledger, ends: original(ledger, [*ends, *(end for end in ends if end[0] == "retained")])), "rounds", "exactly_once"),
    ("3 ends once", "a failed key is forgotten", function("Ledger.account", lambda original, ledger, ends: original(ledger, [end for end in ends if end[0] != "failed"])), "deletes", "refuses"),
    ("3 ends once", "keys are not said to be not attempted", function("Report.as_dict", lambda original, report: original(report) | {"not_attempted": 0}), "rounds", "exactly_once"),
    ("3 exit code", "failures are exit code 0", function("Report.end", lambda original, report, error: (original(report, error), setattr(report, "exit_code", report.exit_code % 4))), "deletes", "refuses"),
    ("3 rows", "rows are counted that did not go", function("Rounds._commit", lambda original, rounds, rows: (original(rounds, rows), len(rows))[1]), "job_rows", "leave_their_batch"),
    ("4 key", "no intent", function("Ledger.intend", lambda *_: None), "audit_log", "on_disk"),
    ("4 key", "intents are not on disk", function("Ledger.write", lambda original, ledger, event, items, sync=False: original(ledger, event, items)), "recheck", "grows_old"),
    ("4 key", "a log that breaks is ignored", function("Ledger.write", forgiving), "audit_log", "breaks"),
    ("4 row", "no intent of a row", function("Ledger.write", lambda original, ledger, event, items, sync=False: event == "delete-job" or original(ledger, event, items, sync)), "job_rows", "on_record"),
    ("4 row", "four columns of a row are on record", function("JobTable.expired_rows", lambda original, *args: [row._replace(columns=dict([*row.columns.items()][:4])) for row in original(*args)]), "job_rows", "all_columns"),
    ("5 primary key", "rows go by name", sql(r"^(DELETE .*? WHERE )`jobId` IN \(.*?\) AND ", r"\1"), "job_rows", "changed"),
    ("5 condition", "rows go though they expire no more", sql(r"^(DELETE .*?) AND \(\(TO_DAYS\(.*? IS TRUE\)", r"\1"), "job_rows", "changed"),
    ("5 bytes", "rows go though they name another key", sql(r"^(DELETE .*\)) AND IFNULL\(.*?, ''\) IN \([^)]*\)", r"\1"), "job_rows", "changed"),
    ("5 when", "rows go of failed and retained keys", sql(r"^(SELECT .*? WHERE )`sourceData` IN .*?( AND \(\(TO_DAYS\(.* LIMIT \d+)$", r"\1TRUE\2"), "job_rows", "failed_and_retained"),
    ("5 when", "a shared key is not asked again", function("reason_of", lambda original, *args: "missing" if original(*args) == "shared" else original(*args)), "job_rows", "whose_remaining"),
    ("5 transaction", "there is none", sql("^START TRANSACTION$", "DO 0"), "job_rows", "given_up"),
    ("5 transaction", "a locked row is awaited for ever", sql(r"lock_wait_timeout = \d+", "lock_wait_timeout = 60"), "job_rows", "leave_their_batch"),
    ("5 transaction", "a locked row ends the run", constants(ROWS_STAY=lambda _: ()), "job_rows", "leave_their_batch"),
    ("5 transaction", "a deadlock ends the run", constants(DEADLOCK=lambda _: ""), "job_rows", "deadlock"),
    ("6", "a dry run is a real one", function("check_usage", lambda original, ctx, given: (original(ctx, given), given.update(dry_run=False))), "seed", "dry_run"),
    ("6", "a dry run writes a log", function("check_usage", lambda original, ctx, given: (original(ctx, given), given["audit_log"] and given["audit_log"].touch())), "seed", "dry_run"),
    ("7", "certificate and host name are not verified", function("pymysql.connect", lambda original, **named: original(**named | {"ssl_verify_identity": False})), "database", "another_ca or another_host"),
    ("7", "TLS is left to the server", function("pymysql.connect", lambda original, **named: original(**{key: value for key, value in named.items() if not key.startswith("ssl")})), "database", "without_tls"),
    ("7", "a password goes anywhere", function("tls_settings", lambda original, login: original(login._replace(host="localhost"))), "database", "loopback_only"),
    ("8 undo", "it knows answers alone", function("plan_undo", lambda original, found, *more: original((pair for pair in found if pair[0].marker), *more)), "undo", "crash"),
    ("8 undo", "it takes somebody else's marker", undone(since=EARLY, until=LATE, marker=None), "undo", "somebody_else"),
    ("8 undo", "it takes an older marker", undone(since=EARLY), "undo", "older_than"),
    ("8 undo", "it takes a later marker", undone(until=LATE), "undo", "long_after"),
    ("8 undo", "it takes one though S3 refused", function("plan_undo", lambda original, found, *more: original(((each._replace(marker=None if each.marker in ("failed", "retained") else each.marker), versions) for each, versions in found), *more)), "undo", "refused or kept"),
    ("8 undo", "it needs no version below", function("Bucket.versions", lambda original, *args: [each for found in original(*args) for each in (found, found._replace(is_marker=False))]), "undo", "without_a_version_below"),
    ("8 undo", "it takes the first of several runs", function("choose_run", lambda original, runs, since, run_id, what: original(runs, since, run_id or next(iter(runs)), what)), "undo", "several_runs"),
    ("8 undo", "it takes the log of another bucket", function("Log.choose", lambda original, log, run_id, _: original(log, run_id, "another")), "undo", "another_bucket"),
    ("8 undo", "a killed run is over at once", function("warn_of_late", lambda *_: None), "undo", "crash"),
    ("8 undo", "keys that stay hidden are exit code 0", function("Report.end", lambda original, report, error: (original(report, error), setattr(report, "exit_code", report.exit_code % 4))), "undo", "is_counted"),
    ("8 undo", "rows come back over those that are there again", function("rows_sql", lambda original, *args: (line.replace("ON DUPLICATE KEY UPDATE `jobId` = `jobId`", "ON DUPLICATE KEY UPDATE `type` = VALUES(`type`), `completedAt` = VALUES(`completedAt`)") for line in original(*args))), "undo_rows", "there_again"),
    ("8 undo", "rows come back as the server's SQL mode has it", function("literal", lambda original, value: repr(value) if isinstance(value, str) else original(value)), "undo_rows", "byte_identical"),
    ("9", "the table is read into memory", function("JobTable.references", lambda original, jobs: iter(list(original(jobs)))), "properties", "memory"),
    ("9", "the merge is read into memory", function("outer_join", lambda original, *args: iter(list(original(*args)))), "properties", "memory"),
    ("guard", "--max-objects is off by one", function("refusals", lambda original, totals, terms, limits: original(totals, terms, limits._replace(objects=limits.objects and limits.objects + 1))), "policy", "each_guard"),
    ("guard", "--max-percent is ignored", function("refusals", lambda original, totals, terms, limits: original(totals, terms, limits._replace(percent=100))), "policy", "each_guard"),
    ("guard", "--max-percent is of keys alone", function("shares", lambda original, *args: [*original(*args)][:1]), "policy", "each_guard"),
    ("guard", "the digest hides how near a limit is", function("limits_text", lambda *_: ""), "output", "digest"),
    ("guard", "clocks may differ", function("clock_refusals", lambda *_: iter(())), "policy", "each_guard"),
    ("guard", "--as-of may be in the future", function("terms_of", lambda original, wishes, now: original(wishes._replace(as_of=wishes.as_of and min(wishes.as_of, now)), now)), "slips", "future"),
    ("guard", "wrong place: one accidental hit is enough", function("wrong_place", lambda original, *args: (text for text in original(*args) if text.startswith("only 0 "))), "policy", "absence_is_believed"),
    ("guard", "wrong place: only for rows and orphans", function("wrong_place", lambda original, totals, *more: original(replace(totals, expired=0), *more)), "policy", "absence_is_believed"),
    ("guard", "wrong place: not for rows", function("wrong_place", lambda original, totals, terms, *more: original(totals, terms._replace(rows=False), *more)), "policy", "absence_is_believed"),
    ("guard", "wrong place: keys that nobody has seen exist", function("Bucket.find", lambda original, bucket, key: original.__globals__["S3Object"](key, "1", "")), "slips", "prefix"),
    ("guard", "wrong place: the sample is a table's beginning", function("pick", lambda original, sample, seen, name: original(sample, seen, name) if len(sample) < 50 else None), "policy", "sample"),
    ("guard", "wrong place: no job needs to remain", function("refusals", lambda original, totals, *more: original(replace(totals, remaining=max(totals.remaining, 1)), *more)), "policy", "each_guard"),
    ("guard", "rights: a user without DELETE will do", function("JobTable.row_refusals", lambda *_: iter(())), "slips", "DELETE"),
    ("guard", "any jobId will do", function("JobTable.row_refusals", lambda *_: iter(())), "job_rows", "unique_text"),
    ("lock", "there is none", function("take_lock", lambda *_: None), "lock", "two_runs"),
    ("lock", "it is the bucket's alone", function("lock_name", lambda original, connection, wishes, table: original(connection, wishes._replace(prefix=""), table)), "lock", "two_runs"),
    ("lock", "two spellings of a table are two", sql("@@lower_case_table_names", "0"), "lock", "two_spellings"),
    ("lock", "an audit log has none", function("hold", lambda *_: None), "audit_log", "same_log"),
    ("lock", "that it is lost is not noticed", function("JobTable.ping", lambda *_: None), "lock", "lost_lock"),
    ("lock", "a replica will do", sql(r"@@(global\.read_only|innodb_read_only)", "0"), "slips", "replica"),
    ("signals", "SIGHUP breaks off what is in flight", function("signal.signal", lambda original, signum, action: original(signum, signal.SIG_DFL if signum == signal.SIGHUP else action)), "signals", "in_flight"),
    ("signals", "one waits for the query", function("signal.signal", lambda original, signum, action: original(signum, partial(forgiving, action) if callable(action) else action)), "signals", "within_10"),
    ("signals", "nohup is ignored", function("signal.getsignal", lambda *_: signal.SIG_DFL), "signals", "nohup"),
    ("contract", "unknown and empty variables are ignored", function("check_usage", forgiving), "command_line", "variable"),
    ("contract", "a control character may stand in a value", function("check_characters", lambda *_: None), "slips", "carriage or bell"),
    ("contract", "others may read its files", function("os.open", lambda original, path, flags, mode=0o777, **named: original(path, flags, mode | 0o044, **named)), "slips", "its_owners"),
    ("contract", "an index that the server ignores will do", function("JobTable.__init__", indexed), "slips", "does_not_use"),
    ("contract", "an explanation shows one job of a key", function("JobTable.jobs_of", lambda original, jobs, name, most: original(jobs, name, most=1)), "explain", "listed_up_to_20"),
    ("contract", "the rate is ignored", function("Pace.sent", lambda *_: None), "rounds", "rate"),
    ("contract", "a request holds more keys than the rate", function("Rounds.__init__", full_requests), "rounds", "exactly_once"),
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
