"""Spool files: streams on disk, read again, from several threads, and on a full disk."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from conftest import AS_OF, OLD

import retention_purge as rp

RECORDS = [rp.Reference(f"{n:05}", n, n % 2) for n in range(2500)]


def test_it_gives_back_all_of_it_and_any_slice_to_several_readers_at_once():
    spool, bounds = rp.Spool(iter(RECORDS)), [*pairwise(range(0, 2501, 100)), (7, 7), (1, 2500)]
    readers = zip(spool, spool, strict=True)
    assert [first for first, second in readers if first == second] == RECORDS
    with ThreadPoolExecutor(8) as pool:
        slices = [*pool.map(lambda cut: [*spool.slice(*cut)], bounds)]
    assert slices == [RECORDS[start:end] for start, end in bounds]
    assert all(spool.has(record.key) for record in RECORDS[::100] + RECORDS[-9:])
    assert not any(map(spool.has, ("", "0", "00000x", "02500")))
    assert not rp.Spool([]).has("k")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", tmp_path]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting needs privileges that this machine does not give")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_ends_the_run_with_nothing_deleted(world, small_disk):
    world.box.load([(f"{n}", OLD, "TRIAL", f"{'k' * 50}{n:05}") for n in range(40_000)], [("k", 1)])
    result = world.purge(*AS_OF, TMPDIR=str(small_disk))
    assert (result.code, "TMPDIR" in result.error) == (1, True)
    assert (world.box.live_keys(), os.listdir(small_disk)) == (["k"], [])
