"""The one way to run the script: as a process, in the sandbox, as it is or changed a little."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import forks
from sandbox import Sandbox

SCRIPT = Path(__file__).resolve().parents[2] / "retention_purge.py"
ERROR = re.compile(r"^(?:\S+Z )?Error: (.*?)(?: \(run [0-9a-f-]{36}\))?$", re.MULTILINE)
CHANGED = """
import sys; sys.path.insert(0, {folder!r})
import retention_purge as rp
known = {{*vars(rp)}}
{patch}
assert known == {{*vars(rp)}}, "The script has no such constant."
rp.main()
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
        return str(message)


Process = Popen[str]


def ended(process: Process, seconds: float = 120) -> Result:
    """Wait for a run."""
    out, err = process.communicate(timeout=seconds)
    return Result(process.returncode, out, err)


@dataclass
class World:
    """The sandbox, and the purge in it. `settings` are laid over the sandbox's environment.

    A `patch` is Python that changes the script, `rp`, before it runs; this one each time.
    """

    box: Sandbox
    patch: str = ""
    # The tests' tables and buckets are small: the guard on percentages has tests of its own.
    settings: dict[str, str] = field(default_factory=lambda: {"RETENTION_PURGE_MAX_PERCENT": "100"})
    processes: list[Process] = field(default_factory=list)

    def environment(self, **settings: str | None) -> dict[str, str]:
        """With more settings; None removes one."""
        merged = self.box.environment | self.settings | settings
        return {name: value for name, value in merged.items() if value is not None}

    def command(self, *arguments: str, patch: str = "") -> list[str]:
        """What starts the script."""
        patch = f"{self.patch}\n{patch}".strip()
        code = CHANGED.format(folder=str(SCRIPT.parent), patch=patch)
        script = ["-c", code] if patch else [str(SCRIPT)]
        # A parent that ignores these (nohup, a background job) must not pass that on.
        return ["env", "--default-signal=HUP,INT,TERM", sys.executable, *script, *arguments]

    def start(self, *arguments: str, patch: str = "", **settings: str | None) -> Process:
        command, environment = self.command(*arguments, patch=patch), self.environment(**settings)
        process = Popen(command, env=environment, text=True, stdout=PIPE, stderr=PIPE)
        self.processes.append(process)
        return process

    def purge(self, *arguments: str, patch: str = "", **settings: Any) -> Result:
        """Start a run and wait for it. It is forked, unless Python itself must start otherwise."""
        if {"LC_ALL", "PYTHONUTF8", "PYTHONIOENCODING"} & {*settings, *self.settings}:
            return ended(self.start(*arguments, patch=patch, **settings))
        patch = f"{self.patch}\n{patch}".strip()
        code = CHANGED.format(folder=str(SCRIPT.parent), patch=patch) if patch else ""
        return Result(*forks.run([*arguments], self.environment(**settings), code))

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
