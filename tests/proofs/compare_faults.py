"""The same faults of S3 on other tools that delete: what each says, and what is gone.

    PATH=$PATH:WHERE_THEY_ARE .venv/bin/python tests/proofs/compare_faults.py

gives `retention_purge.py`, and of `s5cmd rm`, `rclone delete` and `s3cmd del` those in PATH, a
bucket of 12 objects to delete, through each fault, and prints a Markdown table. Each cell: the exit
code, the number of objects that it says to have deleted, the number that is gone. LIE: exit code 0
with objects left, or more said than gone. rclone deletes key by key: a fault of some keys of a
request is, for it, one of those requests. All retries are cut down to two.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "world"))
from faults import S3_FAULTS, Answer, Forward, Scene, error, keys_of
from proxies import Request
from sandbox import BUCKET, sandbox

KEYS = [f"k{n:02}" for n in range(12)]
HIT = set(KEYS[::3])
LASTING = 1000


class Tool(NamedTuple):
    """How to call it (with the S3 address), and how it says that it has deleted an object."""

    name: str
    command: Callable[[str], list[str]]
    says: str


TOOLS = [
    Tool(
        "s5cmd rm",
        lambda url: [*f"s5cmd --endpoint-url {url} --retry-count 2 rm".split(), f"s3://{BUCKET}/*"],
        r"^rm s3://",
    ),
    Tool(
        "rclone delete",
        lambda url: f"rclone delete :s3:{BUCKET} -vv --retries 1 --low-level-retries 2".split(),
        r": Deleted$",
    ),
    Tool(
        "s3cmd del",
        lambda url: (
            f"s3cmd -c /dev/null --host {url[7:]} --host-bucket {url[7:]} --no-ssl --max-retries 2 "
            f"del --recursive --force s3://{BUCKET}/"
        ).split(),
        r"^delete: ",
    ),
]


class Case(NamedTuple):
    """A fault of the first so many requests of a kind."""

    fault: str
    listing: bool = False
    times: int = LASTING

    def __str__(self) -> str:
        when = "always" if self.times == LASTING else f"the first {self.times}"
        return f"{self.fault} ({'listing' if self.listing else 'delete'}, {when})"


CASES = [
    Case("none"),
    Case("AccessDenied for some keys"),
    Case("InternalError for some keys", times=1),
    Case("InternalError for some keys"),
    Case("SlowDown for some keys", times=1),
    Case("keys missing from the answer"),
    Case("200 without a body"),
    Case("200 with HTML"),
    Case("200 with truncated XML"),
    Case("503 SlowDown", times=1),
    Case("503 SlowDown"),
    Case("connection reset before the request took effect", times=1),
    Case("connection reset after the request took effect", times=1),
    Case("ExpiredToken"),
    Case("200 without a body", listing=True),
    Case("200 with HTML", listing=True),
    Case("200 with truncated XML", listing=True),
    Case("listing page reversed", listing=True),
    Case("ExpiredToken", listing=True),
]


def is_listing(request: Request) -> bool:
    """Of objects, in either version of the API."""
    path, _, query = request.path.partition("?")
    return request.method == "GET" and path.strip("/") == BUCKET and "versioning" not in query


def faulty(case: Case) -> Callable[[Request, Forward], Answer]:
    """What S3 does with each request."""
    left = case.times

    def answer(request: Request, forward: Forward) -> Answer:
        nonlocal left
        deleting = request.operation in ("delete", "delete-one")
        if not (is_listing(request) if case.listing else deleting) or left <= 0:
            return forward(request)
        found = broken(case, request, forward)
        left -= found is not None
        return found or forward(request)

    return answer


def broken(case: Case, request: Request, forward: Forward) -> Answer | None:
    if case.fault == "none":
        return None
    if case.fault == "ExpiredToken":
        return Answer(400, error("ExpiredToken"))
    if request.operation == "delete-one" and "keys" in case.fault:
        if keys_of(request)[0] not in HIT:
            return None
        code = case.fault.split()[0]
        statuses = {"AccessDenied": 403, "InternalError": 500, "SlowDown": 503, "keys": 204}
        return Answer(statuses[code], b"" if code == "keys" else error(code))
    return S3_FAULTS[case.fault][1](request, forward)


def fill(scene: Scene) -> None:
    jobs = [(key, "2019-01-01 00:00:00", "TRIAL", key) for key in KEYS]
    scene.box.load(jobs, [(key, 1) for key in KEYS])


def cell(scene: Scene, code: int | None, said: int) -> str:
    """`exit 0, says 12, gone 12`; None is a tool that did not come to an end."""
    scene.s3.settle()
    gone = len(KEYS) - len(scene.box.live_keys())
    lie = (code == 0 and gone < len(KEYS)) or said > gone
    ended = "never ends" if code is None else f"exit {code}"
    return f"{ended}, says {said}, gone {gone}{' **LIE**' * lie}"


def by_tool(scene: Scene, tool: Tool) -> str:
    """Let another tool delete all objects."""
    credentials = {
        "RCLONE_S3_PROVIDER": "Other",
        "RCLONE_S3_ENV_AUTH": "true",
        "RCLONE_S3_ENDPOINT": scene.s3.url,
        "RCLONE_CONFIG": "",
    }
    try:
        done = subprocess.run(
            tool.command(scene.s3.url),
            env=scene.box.environment | credentials,
            capture_output=True,
            text=True,
            timeout=40,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return cell(scene, None, 0)
    said = len(re.findall(tool.says, done.stdout + done.stderr, re.MULTILINE))
    return cell(scene, done.returncode, said)


def by_purge(scene: Scene) -> str:
    run = scene.purge("--as-of", "2019-06-03T00:00:00Z", check=False)
    return cell(scene, run.code, run.counted("deleted"))


def rows() -> Iterator[list[str]]:
    tools = [tool for tool in TOOLS if shutil.which(tool.name.split()[0])]
    yield ["fault", "retention_purge.py", *(tool.name for tool in tools)]
    with sandbox() as box:
        for case in CASES:
            row = [str(case)]
            for tool in (None, *tools):
                with Scene(box) as scene:
                    fill(scene)
                    act, ask = faulty(case), scene.s3.ask
                    scene.s3.ask = lambda request, act=act, ask=ask: act(request, ask)
                    row.append(by_tool(scene, tool) if tool else by_purge(scene))
            yield row


def main() -> None:
    for number, row in enumerate(rows()):
        print(f"| {' | '.join(row)} |", flush=True)
        if not number:
            print("|---" * len(row) + "|")


if __name__ == "__main__":
    os.environ.pop("AWS_PROFILE", None)
    main()
