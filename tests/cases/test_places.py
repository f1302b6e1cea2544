"""Where it may be run: with every Python from 3.11 that this machine has, and in a C locale."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import boto3
import pytest
from conftest import AS_OF, OLD, SCRIPT, World
from sandbox import BUCKET

PACKAGES = str(Path(boto3.__file__).parents[1])


def python(version: str) -> str:
    """One that can be started; a shim of a version manager cannot always."""
    beside = Path(sys.base_prefix).parent.glob(f"{version}.*/bin/python3")
    for found in (*map(str, beside), shutil.which(f"python{version}")):
        if found and not subprocess.call([found, "-c", ""], stderr=subprocess.DEVNULL):
            return found
    pytest.skip(f"no Python {version} on this machine")


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_it_purges_with_this_python(may_delete: World, version: str):
    world = may_delete
    command = [python(version), str(SCRIPT), *AS_OF, "--delete-jobs", "--dry-run"]
    environment = world.environment(PYTHONPATH=PACKAGES, PYTHONDONTWRITEBYTECODE="1")
    dry = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (dry.returncode, dry.stdout.count("\n" + "expired\t")) == (0, 16), dry.stderr
    assert not subprocess.run([*command[:-1], "-q"], env=environment, check=False).returncode
    assert (len(world.box.live_keys()), len(world.box.job_ids())) == (48 - 17, 50 - 22)


def test_a_c_locale_changes_what_is_printed_and_nothing_else(world: World, tmp_path: Path):
    keys = ["e\u0301", "na\u00efve", "\u0436\U0001f600"]
    world.box.load([(key, OLD, "TRIAL", key) for key in keys], [(key, 1) for key in keys])
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    manifest = tmp_path / "plan.csv"
    dry = world.purge(*AS_OF, "-n", "--manifest", str(manifest), **locale)
    assert (dry.code, dry.out.count("expired\t")) == (0, 3)
    assert manifest.read_text() == "".join(f"{BUCKET},{quote(key)}\n" for key in keys)
    assert world.purge(*AS_OF, "--json", **locale).summary["deleted"]["expired"] == 3
    assert world.box.live_keys() == []
