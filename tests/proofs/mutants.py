"""Break the script on purpose, one rule at a time, and see that a test notices.

    .venv/bin/python tests/proofs/mutants.py [--only TEXT]

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

ROOT = Path(__file__).resolve().parent.parent.parent

# What is broken, the code, what becomes of it, the file and the tests that must fail (pytest's -k).
MUTANTS = [
    # The policy
    ("a job at the cutoff expires", "`completedAt` < '{moment}'", "`completedAt` <= '{moment}'", "database", "surely_expired"),
    ("zero dates expire", "`completedAt` >= '{FIRST_TIMESTAMP}' AND ", "", "database", "surely_expired"),
    ("type by collation", "{text_bytes('`type`')} = 'TRIAL'", "`type` = 'TRIAL'", "database", "surely_expired"),
    ("NULL is expired", " IS TRUE)\"", " IS NOT FALSE)\"", "database", "surely_expired"),
    ("one expired job is enough", "            if reference.expired < reference.jobs:\n", "            if False:\n", "policy", "key_by_key"),
    ("remaining keys planned", "            if not reference.expired:\n", "            if False:\n", "policy", "key_by_key"),
    ("orphans unasked", "or self.orphans_before is None or", "or", "policy", "key_by_key"),
    ("grace at the edge", "modified < self.orphans_before", "modified <= self.orphans_before", "policy", "grace"),
    ("a folder object is an orphan", "or found.key == self.prefix:", "or False:", "slips", "folder or prefix"),
    ("lookalikes are orphans", "return not jobs.can_hold(name) or any(others)", "return False", "slips", "normalis or longer or hold or orphan"),
    ("names by collation", "CAST(CONVERT({column} USING utf8mb4) AS BINARY)", "CONVERT({column} USING utf8mb4)", "database", "collation"),
    # The listing
    ("order of a page", "            if key <= last:\n                raise out_of_order(\"bucket's listing\", key, last)\n        foreign", "            if False:\n                raise out_of_order(\"bucket's listing\", key, last)\n        foreign", "listing", "at_any_request"),
    ("order above the place asked for", "zip([after, *page.keys], page.keys", "zip([\"\", *page.keys], page.keys", "listing", "always"),
    ("order in the merge", "        if item.key <= last:", "        if False:", "policy", "out_of_order"),
    ("order of the references", "        if key <= last:\n            raise out_of_order(\"list", "        if False:\n            raise out_of_order(\"list", "policy", "out_of_order"),
    ("prefix of a page", "if not key.startswith(self.prefix)]", "if False]", "listing", "at_any_request"),
    ("bucket of a page", "if page.bucket != self.name and", "if False and", "listing", "another_bucket or at_any"),
    ("page of another part", "if page.asked and asked not in page.asked:", "if False:", "listing", "at_any_request or must_be"),
    ("KeyCount", "if any(len(column) != count for column in columns) or", "if", "listing", "no_listing"),
    ("Contents counted", "or body.count(\"<Contents>\") != count", "", "listing", "no_listing"),
    ("end of an answer", "if not root[2] and not body.rstrip()", "if False and not body.rstrip()", "listing", "cut"),
    ("root of an answer", "if not root or wanted not in root[1]:", "if False:", "deletes", "another_kind"),
    ("keys not decoded", "unquote_plus(k, errors=\"strict\") if", "k if", "deletes", "all_sorts"),
    ("low end of a part", "first = bisect_right(page.keys, low)", "first = 0", "listing", "odd_keys or however"),
    ("high end of a part", "upto = len(page.keys) if high is None else bisect_right(page.keys, high)", "upto = len(page.keys)", "listing", "however"),
    ("page without keys", "            if page.keys or page.token is None:\n                return page", "            if True:\n                return page", "listing", "followed"),
    ("token forgotten", "after, token = page.keys[-1], page.token", "after, token = page.keys[-1], None", "listing", "however or bounds or expired_keys"),
    ("never dense", "limit = SEEK if density_of(page, references, start) < SPARSE else PAGE", "limit = SEEK", "listing", "densely"),
    # The re-check
    ("no re-check", "            if not may_go(item.reason, reference):\n", "            if False:\n", "rounds", "once"),
    ("vanished rows may go", "return found is not None and found.expired == found.jobs > 0", "return found is None or found.expired == found.jobs > 0", "rounds", "ends"),
    ("orphans like expired keys", "        return found is None\n    return found is not", "        return found is None or found.expired == found.jobs\n    return found is not", "rounds", "ends"),
    ("a lost key is retained", "if tried is not None and tried.lost:", "if False:", "rounds", "ends"),
    ("prefix in the re-check", "found.get(item.key[start:])", "found.get(item.key)", "rounds", "ends"),
    ("age of the re-check", "if age > MAX_RECHECK_AGE:", "if False:", "deletes", "leaves_only"),
    ("re-check in the server's terms", "CONVERT(%s USING {self._charset}) COLLATE {self._collation}", "%s", "database", "re_check or index"),
    ("a lost lock", "                    self._jobs.ping()  # the lock may be lost\n", "                    pass\n", "lock", "lost_lock"),
    # Accounting
    ("503 may have an effect", "tried.lost |= verdict.code in DOUBTFUL", "tried.lost = verdict.code in DOUBTFUL", "rounds", "how_a_key"),
    ("in flight uncounted", "            while self._in_flight:\n                with suppress", "            while False:\n                with suppress", "rounds", "once"),
    ("a second marker", "            if versions and versions[0].hides_since", "            if False and versions[0].hides_since", "rounds", "once"),
    ("silence is success", "silence = Verdict(\"NoAnswer\", \"S3's answer does not mention the key\")", "silence = Verdict()", "deletes", "answer_says_so or order_of"),
    ("any status deletes", "if status != 204:", "if False:", "deletes", "status_that"),
    ("failures exit with 0", "4 if self.failed else 0", "0", "deletes", "refuses or answer_says_so"),
    ("rate ignored", "        if self.rate:\n", "        if False:\n", "rounds", "rate"),
    ("signals ignored", "    def check(self) -> None:\n        if self.received:", "    def check(self) -> None:\n        if False:", "signals", "in_flight"),
    ("nohup ignored", " if signal.getsignal(each) is not signal.SIG_IGN]", "]", "signals", "nohup or ignored"),
    # Audit log, rows, undo
    ("intent after the request", "        self._ledger.intend(items)\n", "", "rounds", "once"),
    ("a broken log is ignored", "            raise PurgeError(reason) from error\n\n    def plan", "\n    def plan", "audit_log", "full or broken"),
    ("rows of retained keys", "names |= {key[start:] for key in self._gone}", "names |= {item.key[start:] for item in items}", "rounds", "once"),
    ("shared keys not asked again", "if item.expired < item.jobs}", "}", "rounds", "once"),
    ("rows without the condition", "WHERE `jobId` IN ({ids}) AND {self._expired} ", "WHERE `jobId` IN ({ids}) ", "job_rows", "changed"),
    ("rows without the bytes", "f\"AND ({text_bytes('`jobId`')}, {NAME}) IN ({pairs})\"", "\"\"", "job_rows", "changed or equates"),
    ("row intents", "                self._ledger.write(\"delete-job\", facts, sync=True)\n", "", "job_rows", "on_record"),
    ("rows wait for ever", "innodb_lock_wait_timeout = {LOCK_TIMEOUT}", "innodb_lock_wait_timeout = 60", "job_rows", "another_transaction"),
    ("undo of a marker not ours", "(marker or not latest.hides_since(since))", "False", "undo", "somebody or foreign or marker or older"),
    ("undo of answers alone", "elif latest.version_id != marker and (marker or not", "elif latest.version_id != marker and (True or not", "undo", "kill or crash or lost or answer"),
    ("undo without a version below", "elif latest is None or below is None or below.is_marker:", "elif latest is None:", "undo", "below"),
    ("undo of another bucket", "    if place != (bucket,):\n", "    if False:\n", "undo", "bucket or not_its_log or log"),
    # Guards
    ("--max-objects off by one", "planned > max_objects", "planned > max_objects + 1", "guards", "guard"),
    ("--max-percent", "part > whole * max_percent / 100", "part >= whole * max_percent / 100", "policy", "guard"),
    ("--max-percent of the rows", "* policy.rows\n", "* False\n", "slips", "rows or years or percent"),
    ("wrong place", "if totals.expired and totals.missing == totals.expired and not totals.known:", "if False:", "slips", "prefix or bucket or place"),
    ("foreign table with --orphans", "    if orphans and not totals.known and (totals.listed or totals.jobs):", "    if False:", "slips", "orphans or table or empty"),
    ("no right to DELETE", "if error.code == \"1142\":", "if False:", "slips", "grant or DELETE or right"),
    ("unknown variables", "        if name not in known:\n", "        if False:\n", "slips", "variable or RETENTION"),
    ("empty variables", "        if not os.environ[name].strip():\n", "        if False:\n", "slips", "variable or RETENTION"),
    ("clocks", "if ahead - behind > MAX_SKEW:", "if False:", "policy", "clocks"),
    ("--as-of in the future", "    if as_of > now:\n", "    if False:\n", "guards", "guard"),
    ("no lock", "    if not got:", "    if False:", "lock", "two_runs"),
    ("lock on the bucket alone", "json.dumps([bucket, prefix, table])", "json.dumps([bucket])", "lock", "another_prefix"),
    ("replica accepted", "    if any(query(connection, doing", "    if False and any(query(connection, doing", "database", "replica"),
    # The session, TLS, the rest
    ("server's row limit", "sql_select_limit = 18446744073709551615, ", "", "database", "row_limit"),
    ("server's SQL mode", "sql_mode = '', ", "", "database", "sql_mode"),
    ("server's sort length", "max_sort_length = 8192, ", "", "database", "sort"),
    ("server's isolation level", "ISOLATION LEVEL REPEATABLE READ", "ISOLATION LEVEL READ UNCOMMITTED", "database", "still_open"),
    ("session's time zone", "SET time_zone = '+00:00', ", "SET ", "database", "time_zone"),
    ("certificate not verified", "\"ssl_verify_identity\": True", "\"ssl_verify_identity\": False", "database", "secret"),
    ("no CA needed", "    if bundle is None and local:\n", "    if bundle is None:\n", "database", "loopback_only or without_a_ca"),
    ("a dry run deletes", "    if not given[\"dry_run\"]:\n        stop.note()\n", "    if True:\n        stop.note()\n", "seed", "dry_run"),
    ("a dry run has a log", "    if given[\"audit_log\"] and not given[\"dry_run\"]:", "    if given[\"audit_log\"]:", "audit_log", "dry_run"),
    ("spool's slices", "rowid > ? AND rowid <= ?", "rowid >= ? AND rowid <= ?", "spool", "slices"),
    ("manifest of raw keys", "{quote(item.key)}", "{item.key}", "output", "manifest_is"),
    ("hooks that do not fire", "register(\"before-send.s3\"", "register(\"before-sent.s3\"", "hooks", ""),
]  # fmt: skip


def survives(old: str, new: str, file: str, tests: str) -> str | None:
    """None if a test catches the mutant, else why not."""
    source = (ROOT / "retention_purge.py").read_text()
    if old not in source:
        return "does not apply: the code has changed"
    with tempfile.TemporaryDirectory(prefix="purge-mutant-") as place:
        copy = Path(place)
        shutil.copytree(ROOT / "tests", copy / "tests")
        for name in ("README.md", "requirements.txt", "rds-ca-bundle.pem.example"):
            shutil.copy(ROOT / name, copy)
        if (ROOT / ".mysql").exists():
            (copy / ".mysql").symlink_to(ROOT / ".mysql")
        (copy / "retention_purge.py").write_text(source.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--timeout=120"]
        try:
            done = subprocess.run(
                [*command, f"tests/cases/test_{file}.py", "-k", tests],
                cwd=copy,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None  # it goes on for ever, which is noticed
    return {0: "SURVIVED", 1: None}.get(done.returncode, f"pytest ended with {done.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="mutants whose name has this text")
    only = parser.parse_args().only
    failures = 0
    for name, *mutant in MUTANTS:
        if only in name:
            problem = survives(*mutant)
            failures += problem is not None
            print(f"{problem or 'caught':10} {name}", flush=True)
    print(f"{failures} not caught")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
