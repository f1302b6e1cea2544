"""The same against an S3 server that nobody here wrote: SeaweedFS. It lists by directory and then
by name, S3 by bytes: keys have no `/` here."""

from __future__ import annotations

import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, Popen

import boto3
import pytest
from conftest import AS_OF, EVERYTHING
from sandbox import BUCKET, REGION, free_port, seed
from test_seed import EXPIRED

WEED = shutil.which("weed", path=str(Path(sys.executable).parent))
NAMES = ("master.port", "volume.port", "filer.port", "s3.port")


@pytest.fixture
def s3(world, tmp_path):
    """A client of such a server, which has the bucket and is where the purge is led."""
    ports = {name: free_port() for name in (*NAMES, *(f"{name}.grpc" for name in NAMES))}
    command = [WEED, "server", "-s3", "-ip=127.0.0.1", f"-dir={tmp_path}", "-volume.max=20"]
    command += ["-master.volumeSizeLimitMB=16", *(f"-{name}={ports[name]}" for name in ports)]
    url = world.settings["AWS_ENDPOINT_URL_S3"] = f"http://127.0.0.1:{ports['s3.port']}"
    client = boto3.Session("any", "any", region_name=REGION).client("s3", endpoint_url=url)
    process = Popen(command, stdout=DEVNULL, stderr=DEVNULL, cwd=tmp_path)
    try:
        for _ in range(240):
            with suppress(Exception):  # it needs some seconds
                client.create_bucket(Bucket=BUCKET)
            with suppress(Exception):  # and some more until it has a place for objects
                client.put_object(Bucket=BUCKET, Key="probe", Body=b"x")
                client.delete_object(Bucket=BUCKET, Key="probe")
                break
            time.sleep(0.5)
        yield client
    finally:
        process.kill()  # in order it takes 25 seconds
        process.wait()


@pytest.mark.skipif(WEED is None, reason="no SeaweedFS for this machine in requirements.txt")
def test_what_is_expired_or_an_orphan_goes_once_and_an_undo_brings_it_back(s3, world, tmp_path):
    def keys() -> list[str]:
        return [item["Key"] for item in s3.list_objects_v2(Bucket=BUCKET)["Contents"]]

    s3.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    everything = sorted([key for key, _ in seed()[1]] + ["an orphan", "zé+%"])
    for key in everything:
        s3.put_object(Bucket=BUCKET, Key=key, Body=b"x")
    assert keys() == everything
    options = (*AS_OF, *EVERYTHING, "--json", "--audit-log", str(tmp_path / "log"))
    first, again = (world.purge(*options).summary for _ in range(2))
    assert (first["deleted"]["expired"], first["deleted"]["orphan"]) == (17, 5)
    assert keys() == sorted({name for *_, name in seed()[0]} & {*everything} - {*EXPIRED})
    assert again["planned"] == {"expired": 0, "orphan": 0, "bytes": 0, "jobs": 0}
    undone = world.purge("--undo", options[-1], "--json").summary
    assert (undone["restored"]["expired"], undone["restored"]["orphan"]) == (17, 5)
    assert keys() == everything
