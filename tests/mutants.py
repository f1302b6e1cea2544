"""Break the script on purpose, one rule at a time, and see that a test notices.

    .venv/bin/python tests/mutants.py [--only TEXT]

Each mutant is one replacement in `retention_purge.py`, made in a copy of the project, and the tests
that must catch it. Prints a line for each; exits with 1 if one survives, or no longer applies.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What is broken, the code, what becomes of it, the tests that must fail (pytest's -k).
MUTANTS = [
    # The policy
    ("a job at the cutoff expires", "`completedAt` < '{moment}'", "`completedAt` <= '{moment}'", "surely_expired"),
    ("zero dates expire", "`completedAt` >= '{FIRST_TIMESTAMP}' AND ", "", "surely_expired"),
    ("type by collation", "{text_bytes('`type`')} = 'TRIAL'", "`type` = 'TRIAL'", "surely_expired"),
    ("NULL is expired", " IS TRUE)\"", " IS NOT FALSE)\"", "surely_expired"),
    ("any expired job will do", "IF(MIN(", "IF(MAX(", "surely_expired"),
    ("grace period ignored", "found.last_modified < self.orphans_before", "True", "orphan"),
    ("grace at the edge", "found.last_modified < self", "found.last_modified <= self", "grace"),
    ("orphans unasked", "if self.orphans_before is not None and found", "if found", "key_by_key"),
    ("remaining keys planned", "return Reason.EXPIRED if reference.expired else None", "return Reason.EXPIRED", "seed"),
    # Comparison of keys
    ("names by collation", "CAST(CONVERT({column} USING utf8mb4) AS BINARY)", "CONVERT({column} USING utf8mb4)", "collation"),
    ("names stripped", "name.decode(), expired", "name.decode().strip(), expired", "collation or lead"),
    ("re-check in the server's terms", "CONVERT(%s USING {self._charset}) COLLATE {self._collation}", "%s", "re_check_finds"),
    ("prefix forgotten in the re-check", "item.key[start:] for item", "item.key for item", "under_a_prefix"),
    ("listing not decoded", "unquote_plus, errors", "str, errors", "all_sorts"),
    ("order not checked", "if last is not None and item.key <= last", "if False", "out_of_order"),
    ("order of a page not checked", "if key <= last:\n                raise out_of_order(LISTING", "if False:\n                raise out_of_order(LISTING", "page_out_of_order"),
    ("prefix of a listing not checked", "if not key.startswith(self.prefix)", "if False", "outside_the_prefix"),
    # Silence
    ("KeyCount not checked", "if any(len(column) != count for column in columns) or", "if", "no_listing"),
    ("objects not counted", " or body.count(b\"<Contents>\") != count:", ":", "no_listing"),
    ("end of a listing not looked at", "if not frame.rstrip().endswith(", "if False and frame.rstrip().endswith(", "cut"),
    ("wrong objects of a page", "[key in wanted for key in self.keys]", "[key not in wanted for key in self.keys]", "as_it_was_written"),
    ("root element not checked", "if root_tag not in tag:", "if False:", "no_listing or answered_by_nothing"),
    ("silence is success", 'Verdict(item.key, "NoAnswer", silent)', "Verdict(item.key)", "answered_by_nothing"),
    ("any status deletes", "if status != 204:", "if False:", "single_delete_counts"),
    ("replies to other buckets", "if page.bucket != self.name and", "if False and", "another_bucket"),
    # Guards
    ("--max-objects off by one", "planned > limits.max_objects", "planned > limits.max_objects + 1", "guard"),
    ("--max-percent of the wrong whole", "planned + totals.remaining, ", "totals.listed + totals.remaining + planned, ", "guard"),
    ("--max-percent lets NaN pass", "if not planned <= whole * limits.max_percent / 100:", "if planned > whole * limits.max_percent / 100:", "guard"),
    ("--max-percent not of the listing", "if limits.orphans:\n        shares", "if False:\n        shares", "speaks_for_itself"),
    ("a strange listing is accepted", "if limits.orphans and totals.remaining and not", "if False and not", "no_remaining_key"),
    ("clocks not compared", "if apart > MAX_SKEW:", "if False:", "clock_that_is_off"),
    ("--as-of in the future", "if self.as_of is not None and self.as_of > now:", "if False:", "guard"),
    ("guards after the delete", "        if reasons:\n            raise Refused", "        if False:\n            raise Refused", "guard"),
    # Re-check, lock, session
    ("no re-check", "if item.key in used:\n", "if False:\n", "inserted_after"),
    ("retained and deleted", "item for item in batch.candidates if item.key not in used", "item for item in batch.candidates", "inserted_after"),
    ("orphans re-checked like expired keys", "name in found if item.reason is Reason.ORPHAN else found.get(name)", "found.get(name)", "took_in_since"),
    ("expired jobs not asked for", "by_any=orphans", "by_any=False", "took_in_since"),
    ("re-check for expired jobs alone", "f'AND NOT {self._expired}'} GROUP", "f'AND {self._expired}'} GROUP", "inserted_after"),
    ("one expired job is enough", "MAX(NOT {self._expired})", "MIN(NOT {self._expired})", "re_check_finds"),
    ("re-check by collation", "if found in asked}", "}", "re_check_finds"),
    ("re-check of odd characters by index", "self._charset in ROUND_TRIP_CHARSETS and self._is_indexed()", "self._is_indexed()", "re_check_finds"),
    ("remaining keys out of order", "        if name <= last:\n", "        if False:\n", "out_of_order"),
    ("remaining keys forgotten by orphans", "all_keys = options.orphans or options.delete_jobs", "all_keys = options.delete_jobs", "orphans"),
    ("remaining keys forgotten by rows", "all_keys = options.orphans or options.delete_jobs", "all_keys = options.orphans", "rows or delete_jobs"),
    ("no re-check of a retry", "            used = self._in_use([item for batch in chunk for item in batch.candidates])", "            used = self._in_use([item for batch in chunk for item in batch.candidates if not batch.tries])", "checked_again"),
    ("no lock", "if not got:", "if False:", "two_runs"),
    ("lock on the bucket alone", "json.dumps([bucket, prefix, table])", "json.dumps([bucket])", "another_prefix"),
    ("replica accepted", "if any(query(connection, doing", "if False and any(query(connection, doing", "replica"),
    ("server's row limit", "sql_select_limit = 18446744073709551615, ", "", "row_limit"),
    ("server's SQL mode", "sql_mode = '', ", "", "sql_mode"),
    ("server's isolation level", "ISOLATION LEVEL REPEATABLE READ", "ISOLATION LEVEL READ UNCOMMITTED", "still_open"),
    ("session's time zone", "SET time_zone = '+00:00', ", "SET ", "time_zone"),
    ("range of the re-check", "(min(names), max(names))", "(min(names), min(names))", "inserted_after or took_in"),
    # TLS
    ("certificate not verified", '"ssl_verify_identity": True', '"ssl_verify_identity": False', "secret"),
    ("no CA needed", "needed=password is None or not is_loopback(server.host)", "needed=False", "loopback_only or without_a_ca"),
    # Accounting
    ("failed keys forgotten", "            else:\n                self._ledger.failed(item, verdict)", "            else:\n                pass", "refuses or answered_by_nothing"),
    ("failures exit with 0", "return 4 if self.failed else 0", "return 0", "refuses"),
    ("a retry too few", "batch.tries < ATTEMPTS", "batch.tries < ATTEMPTS - 3", "tried_again or sent_again"),
    ("rest of a stopped run uncounted", "for batch in chain(self._retries, self._checked, source):", "for batch in chain(self._retries, self._checked):", "whole_request or in_flight"),
    ("in flight uncounted", "            self._settle(ALL_COMPLETED)\n        unsent", "            pass\n        unsent", "in_flight"),
    ("counted twice", "        batch.candidates = [item for item in batch.candidates if item not in gone]", "        pass", "lost"),
    ("markers not looked for", 'if not batch.tries or self._ledger.report.versioning != "enabled":', "if True:", "lost"),
    # Audit log, undo, rows
    ("intent after the request", "                    self._ledger.intend(self._checked[0].candidates)\n", "", "intent_is_on_disk or whole_run"),
    ("a broken log is ignored", "        if self._broken is not None:\n            reason", "        if False:\n            reason", "full_disk"),
    ("undo of data versions", "if item.version_id in markers:", "if True:", "no_delete_marker"),
    ("undo of another bucket", 'if event["bucket"] != bucket:', "if False:", "not_its_log"),
    ("rows of present objects", "            elif found is None:\n", "            else:\n", "failed_and_retained"),
    ("rows that changed", "AND {self._expired} \"\n                f\"AND (", "\"\n                f\"AND (", "row_that_changed"),
    ("dry run deletes", "        if not options.dry_run:\n            ledger.open", "        if True:\n            ledger.open", "dry_run"),
    ("signals ignored", "            self._stop.check()\n            self._drop_stale", "            self._drop_stale", "in_flight_finish"),
    ("rate ignored", "        if self._rate:\n", "        if False:\n", "rate"),
    ("manifest of raw keys", "{quote(item.key)}", "{item.key}", "manifest"),
]  # fmt: skip


def survives(old: str, new: str, tests: str) -> str | None:
    """None if a test catches the mutant, else why not."""
    source = (ROOT / "retention_purge.py").read_text()
    if old not in source:
        return "does not apply: the code has changed"
    with tempfile.TemporaryDirectory(prefix="purge-mutant-") as place:
        copy = Path(place)
        shutil.copytree(ROOT / "tests", copy / "tests")
        for name in ("README.md", "rds-ca-bundle.pem.example"):
            shutil.copy(ROOT / name, copy)
        (copy / "retention_purge.py").write_text(source.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "tests"]
        done = subprocess.run(
            [*command, "-k", tests],
            cwd=copy,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
    return {0: "SURVIVED", 1: None}.get(done.returncode, f"pytest ended with {done.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="mutants whose name has this text")
    only = parser.parse_args().only
    failures = 0
    for name, old, new, tests in MUTANTS:
        if only in name:
            problem = survives(old, new, tests)
            failures += problem is not None
            print(f"{problem or 'caught':10} {name}", flush=True)
    print(f"{failures} not caught")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
