"""The same against an S3 server that nobody here wrote: SeaweedFS, with versioning and undo.

It lists by directory and then by name, so keys have no `/` here: the order of an S3 listing is that
of the bytes.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import pytest
from conftest import AS_OF, EVERYTHING, World
from sandbox import BUCKET, REGION, free_port, seed

WEED = shutil.which("weed", path=str(Path(sys.executable).parent))
NAMES = ("master.port", "volume.port", "filer.port", "s3.port")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if WEED is None:
        pytest.skip("no SeaweedFS for this machine in tests/requirements.txt")
    ports = {name: free_port() for name in (*NAMES, *(f"{name}.grpc" for name in NAMES))}
    place = tmp_path_factory.mktemp("weed")
    command = [WEED, "server", "-s3", "-ip=127.0.0.1", f"-dir={place}", "-volume.max=20"]
    command += [
        "-master.volumeSizeLimitMB=16",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=place)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", ports["s3.port"]), 1):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{ports['s3.port']}"
    finally:
        process.kill()  # in order it takes 25 seconds
        process.wait()


@pytest.fixture
def s3(server: str, world: World) -> Iterator[Any]:
    """A bucket of its own, with the seed's objects."""
    world.settings["AWS_ENDPOINT_URL_S3"] = server
    secret = {"aws_access_key_id": "any", "aws_secret_access_key": "any"}
    client = boto3.client("s3", endpoint_url=server, region_name=REGION, **secret)
    for attempt in range(30):
        try:
            client.create_bucket(Bucket=BUCKET)
            break
        except Exception:  # the gateway answers before its filer does
            if attempt == 29:
                raise
            time.sleep(0.5)
    yield client
    versions = client.list_object_versions(Bucket=BUCKET)
    for each in versions.get("Versions", []) + versions.get("DeleteMarkers", []):
        client.delete_object(Bucket=BUCKET, Key=each["Key"], VersionId=each["VersionId"])
    client.delete_bucket(Bucket=BUCKET)


def keys(s3: Any) -> list[str]:
    return [item["Key"] for item in s3.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def fill(s3: Any, *more: str) -> list[str]:
    everything = sorted([key for key, _ in seed()[1]] + [*more])
    for key in everything:
        s3.put_object(Bucket=BUCKET, Key=key, Body=b"x")
    assert keys(s3) == everything
    return everything


def test_what_is_expired_and_what_is_an_orphan_goes_and_a_second_run_finds_nothing(s3, world):
    fill(s3, "an orphan", "é+%")
    first = world.purge(*AS_OF, *EVERYTHING, "--json").summary
    assert first["deleted"]["expired"] == 17
    referenced = {name for *_, name in seed()[0]}
    assert set(keys(s3)) <= referenced
    again = world.purge(*AS_OF, *EVERYTHING, "--json").summary
    assert (again["planned"]["expired"], again["planned"]["orphan"]) == (0, 0)


def test_in_a_versioned_bucket_an_undo_brings_all_back(s3, world, tmp_path):
    s3.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    before, log = fill(s3), str(tmp_path / "log")
    summary = world.purge(*AS_OF, "--audit-log", log, "--json").summary
    assert (summary["deleted"]["expired"], summary["recoverable"]) == (17, True)
    assert len(keys(s3)) == len(before) - 17
    assert world.purge("--undo", log, "--json").summary["restored"]["expired"] == 17
    assert keys(s3) == before
