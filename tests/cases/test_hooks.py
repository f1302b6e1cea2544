"""The hooks into botocore's events, which no contract of botocore's promises: each still fires."""

from __future__ import annotations

from importlib.metadata import version as installed

import pytest
from conftest import AS_OF, SCRIPT, version
from proxies import Answer, Request

FOREIGN = Answer(200, b"<html>Sign in to the hotel's network</html>")


def test_the_botocore_that_is_installed_is_the_one_that_is_pinned():
    lines = (SCRIPT.parent / "requirements.txt").read_text().split()
    assert f"botocore=={installed('botocore')}" in lines


def asked_for(request: Request) -> str:
    return "versions" if "versions" in request.query else request.operation


@pytest.mark.parametrize(
    ("operation", "says"),
    [
        ("versioning", "Cannot read the versioning of bucket incoming-data: InvalidAnswer"),
        ("list", "Cannot list bucket incoming-data: InvalidAnswer"),
        ("versions", "Cannot list the versions in bucket incoming-data: InvalidAnswer"),
        ("delete", "17 keys failed: InvalidAnswer"),
    ],
)
def test_before_parse_sees_each_answer(world, proxy, operation, says, tmp_path):
    path = tmp_path / "log"
    options = [*AS_OF, "--audit-log", str(path)]
    if operation == "versions":
        version(world)
        assert world.purge(*options).code == 0
        options = ["--undo", str(path)]
    proxy.before = lambda request: FOREIGN if asked_for(request) == operation else None
    result = world.purge(*options, patch="rp.ATTEMPTS = 1")
    assert result.code == (4 if operation == "delete" else 1)
    assert says in result.err


def test_before_send_sees_each_request(world, proxy):
    """It counts them, and takes the age of the re-check; test_recheck tests that it may refuse."""
    slow = [Answer(503, b"<Error><Code>SlowDown</Code></Error>") for _ in range(2)]
    proxy.before = lambda request: slow.pop() if request.operation == "list" and slow else None
    world.box.put("\x01")
    summary = world.purge(*AS_OF, "--orphans", "--orphan-grace-days", "0", "--json").summary
    assert summary["requests"]["list"] == proxy.count("list") > 2
    assert summary["requests"]["delete"] == proxy.count("delete") + proxy.count("delete-one") == 2
    assert summary["max_recheck_age_seconds"] > 0
