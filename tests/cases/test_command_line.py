"""Options, environment, wrong usage; and every Python from 3.11 that this machine has. More slips
in variables are in test_slips."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from sysconfig import get_path

import pytest
from conftest import AS_OF, SCRIPT

WRONG = [
    "--retention-days 0", "--orphan-grace-days -1", "--max-percent 101", "--workers 0", "surplus",
    "--as-of yesterday", "--db-table a.b.c", "--db-port 0", "--run-id 1",
    "--db-host localhost:3306", "--db-host mysql://db", "--db-host=", "--bucket=", "--bucket a/b",
    "--profile no-such-profile", "--manifest /no/where --audit-log /no/./where",
]  # fmt: skip
VARIABLES = {"DB_HOST": None, "DB_USER": None, "DB_NAME": None, "BUCKET": None}
VARIABLES |= {"DRYRUN": "1", "DRY_RUN": "", "AUDIT_LOG": "audit.jsonl\r", "WORKERS": "8\r"}
VARIABLES |= {"DB_PASSWORD": "secret\n"}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_usage_is_one_line_and_exit_2(world, arguments):
    result = world.purge(*arguments.split())
    assert (result.code, result.out) == (2, "")
    assert arguments.split()[0].rstrip("=") in result.error
    assert len(result.err.splitlines()) == 1


PLAIN = {  # without words that only click knows: types, ranges
    "--max-objects 20,000": "'20,000' is not a whole number",
    "--retention-days 1.5": "'1.5' is not a whole number from 1 to 36",
    "--max-percent half": "'half' is not a number from 0 to 100",
    "--workers 65": "'65' is not a whole number from 1 to 64",
    "--prefix a\rb": "--prefix has a control character in it ('\\r')",
    "--bucket b\x7f": "--bucket has a control character in it ('\\x7f')",
    "--manifest m\n": "--manifest has a control character in it ('\\n')",
}


@pytest.mark.parametrize("arguments", PLAIN)
def test_what_is_wrong_with_a_value_is_said_in_plain_words(world, arguments):
    result = world.purge(*AS_OF, *arguments.split(" "))
    assert (result.code, result.out, len(world.box.live_keys())) == (2, "", 48)
    assert PLAIN[arguments] in result.error
    assert result.err == f"Error: {result.error}\n"


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_that_is_missing_unknown_or_empty_ends_the_run(world, variable):
    name, value = f"RETENTION_PURGE_{variable}", VARIABLES[variable]
    result = world.purge(*AS_OF, **{name: value})
    assert (result.code, result.out, len(world.box.live_keys())) == (2, "", 48)
    option = f"--{variable.lower().replace('_', '-')}"
    assert (option if value is None else f"{name} ") in result.error
    assert (value or "").isprintable() == ("control character" not in result.error)
    assert "secret" not in result.err


def test_options_come_from_the_environment_too(world):
    settings = dict.fromkeys(["ORPHANS", "DRY_RUN", "JSON", "QUIET"], "1")
    settings |= {"AS_OF": "2019-06-03T02:00:00+02:00", "ORPHAN_GRACE_DAYS": "0"}
    result = world.purge(**{f"RETENTION_PURGE_{name}": settings[name] for name in settings})
    told = [result.summary[name] for name in ("mode", "cutoff", "planned")]
    planned = {"expired": 17, "orphan": 3, "bytes": 523, "jobs": 0}
    assert (told, result.err) == (["dry-run", "2019-03-05T00:00:00+00:00", planned], "")


def test_a_time_without_offset_is_utc_and_other_retention_moves_the_cutoff(world):
    options = ("-n", "--json", "--as-of", "2019-06-03T00:00:00", "--retention-days", "30")
    summary = world.purge(*options, TZ="Asia/Tokyo").summary
    assert summary["cutoff"] == "2019-05-04T00:00:00+00:00"
    assert summary["planned"]["expired"] == 22


def test_a_low_rate_makes_small_requests(world, proxy):
    summary = world.purge(*AS_OF, "--json", "--max-rate", "5").summary
    sizes = [r.body.count(b"<Key>") for r in proxy.requests if r.operation == "delete"]
    assert (sizes, summary["deleted"]["expired"]) == ([5, 5, 5, 2], 17)
    assert summary["seconds"] > 3, "after each full request a second"


def python(version: str) -> str:
    """One that can be started; a shim of a version manager cannot always."""
    beside = Path(sys.base_prefix).parent.glob(f"{version}.*/bin/python3")
    for found in (*map(str, beside), shutil.which(f"python{version}")):
        if found and not subprocess.call([found, "-c", ""], stderr=subprocess.DEVNULL):
            return found
    pytest.skip(f"no Python {version} on this machine")


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_it_purges_with_this_python(may_delete, version):
    world = may_delete
    command = [python(version), str(SCRIPT), *AS_OF, "--delete-jobs"]
    settings = {"PYTHONPATH": get_path("purelib"), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, env=world.environment(**settings), check=True)
    assert (len(world.box.live_keys()), len(world.box.job_ids())) == (48 - 17, 50 - 22)
