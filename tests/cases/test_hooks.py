"""The hooks into botocore's events, which no contract of botocore's promises: each still fires."""

from __future__ import annotations

from importlib.metadata import version as installed

import pytest
from conftest import AS_OF, EVERYTHING, SCRIPT, version
from proxies import Answer, Request

FOREIGN = b"<html>Sign in to the hotel's network</html>"


def test_the_botocore_that_is_installed_is_the_one_that_is_pinned():
    lines = (SCRIPT.parent / "requirements.txt").read_text().split()
    assert f"botocore=={installed('botocore')}" in lines


@pytest.mark.parametrize(
    ("operation", "body", "says"),
    [
        ("versioning", FOREIGN, "Cannot read the versioning of bucket incoming-data: InvalidAns"),
        ("list", FOREIGN, "Cannot list bucket incoming-data: InvalidAnswer"),
        ("versions", FOREIGN, "Cannot list the versions in bucket incoming-data: InvalidAnswer"),
        ("versions", b"<ListVersionsResult/>", "Cannot list the versions"),
        ("delete", FOREIGN, "17 keys failed: InvalidAnswer"),
    ],
)
def test_before_parse_sees_each_answer(world, proxy, operation, body, says, tmp_path):
    """So that an answer which is not S3's, though well-formed, ends in an error."""
    options = [*AS_OF, "--audit-log", str(tmp_path / "log")]
    if operation == "versions":
        version(world)
        assert world.purge(*options).code == 0
        options = ["--undo", str(tmp_path / "log")]

    def before(request: Request) -> Answer | None:
        asked = "versions" if "versions" in request.query else request.operation
        return Answer(200, body) if asked == operation else None

    proxy.before = before
    result = world.purge(*options, patch="rp.ATTEMPTS = 1")
    assert result.code == (4 if operation == "delete" else 1)
    assert says in result.err


def test_before_send_sees_each_request(world, proxy):
    """It counts them, and takes the age of the re-check; test_recheck tests that it may refuse."""
    slow = ["list", "list", "delete"]  # so often they are told to come again

    def before(request: Request) -> Answer | None:
        if request.operation not in slow:
            return None
        slow.remove(request.operation)
        return Answer(503, b"<Error><Code>SlowDown</Code></Error>")

    proxy.before = before
    world.box.put("\x01")  # it goes by a request of another kind
    summary = world.purge(*AS_OF, *EVERYTHING, "--json").summary
    assert summary["requests"]["list"] == proxy.count("list") == 3
    assert summary["requests"]["delete"] == proxy.count("delete") + proxy.count("delete-one") == 3
    assert summary["max_recheck_age_seconds"] > 0
