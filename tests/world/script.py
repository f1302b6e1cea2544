"""The one way to run the script: as a process, in the sandbox, as it is or changed a little."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE
from typing import Any

from sandbox import Sandbox

SCRIPT = Path(__file__).resolve().parents[2] / "retention_purge.py"
ERROR = re.compile(r"^(?:\S+Z )?Error: (.*?)(?: \(run [0-9a-f-]{36}\))?$", re.MULTILINE)
CHANGED = """
import sys; sys.path.insert(0, {folder!r})
import retention_purge as rp
for name, value in {constants!r}.items():
    assert hasattr(rp, name), f"The script has no constant {{name}}."
    setattr(rp, name, value)
{patch}
rp.main()
"""
# To sign such a share of the deletes takes so many seconds, as when AWS credentials are refreshed.
SLOW_SIGNING = """
import random, time
from botocore.signers import RequestSigner
def slow(self, operation, *arguments, sign=RequestSigner.sign, **named):
    if operation.startswith("Delete") and random.random() < {}:
        time.sleep({})
    return sign(self, operation, *arguments, **named)
RequestSigner.sign = slow
"""


@dataclass
class Result:
    """How a run of the script ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        """The one JSON object of `--json`."""
        (line,) = self.out.splitlines()
        summary: dict[str, Any] = json.loads(line)
        assert summary["exit_code"] == self.code
        return summary

    @property
    def listed(self) -> list[tuple[str, str]]:
        """Reason and key of each line of a dry run."""
        rows = [line.split("\t") for line in self.out.splitlines() if "\t" in line]
        return [(row[0], json.loads(row[3]) if row[3].startswith('"') else row[3]) for row in rows]

    @property
    def error(self) -> str:
        """The one line that tells what went wrong; in a log it has a time and the run's id."""
        assert "Traceback" not in self.err
        (message,) = ERROR.findall(self.err)
        assert isinstance(message, str)
        return message


Process = subprocess.Popen[str]


def ended(process: Process, seconds: float = 120) -> Result:
    """Wait for a run."""
    out, err = process.communicate(timeout=seconds)
    return Result(process.returncode, out, err)


@dataclass
class World:
    """The sandbox, and the purge in it. `settings` are laid over the sandbox's environment.

    `patches` are constants of the script by name, such as {"BATCH": 4}, and SIGN: the share and
    seconds of SLOW_SIGNING.
    """

    box: Sandbox
    patches: dict[str, Any] = field(default_factory=dict)
    # The tests' tables and buckets are small: the guard on percentages has tests of its own.
    settings: dict[str, str] = field(default_factory=lambda: {"RETENTION_PURGE_MAX_PERCENT": "100"})
    processes: list[Process] = field(default_factory=list)

    def environment(self, **settings: str | None) -> dict[str, str]:
        """With more settings; None removes one."""
        merged = self.box.environment | self.settings | settings
        return {name: value for name, value in merged.items() if value is not None}

    def command(self, *arguments: str, patch: str = "") -> list[str]:
        """What starts the script; `patch` is Python that changes it, `rp`."""
        constants = dict(self.patches)
        if "SIGN" in constants:
            patch += SLOW_SIGNING.format(*constants.pop("SIGN"))
        code = CHANGED.format(folder=str(SCRIPT.parent), constants=constants, patch=patch)
        script = ["-c", code] if constants or patch else [str(SCRIPT)]
        # A parent that ignores these (nohup, a background job) must not pass that on.
        return ["env", "--default-signal=HUP,INT,TERM", sys.executable, *script, *arguments]

    def start(
        self,
        *arguments: str,
        stdout: Any = PIPE,
        stderr: Any = PIPE,
        patch: str = "",
        **settings: str | None,
    ) -> Process:
        process = subprocess.Popen(
            self.command(*arguments, patch=patch),
            env=self.environment(**settings),
            stdout=stdout,
            stderr=stderr,
            text=True,
        )
        self.processes.append(process)
        return process

    def purge(self, *arguments: str, patch: str = "", **settings: str | None) -> Result:
        return ended(self.start(*arguments, patch=patch, **settings))

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
