"""Spool files: streams on disk, read again, from several threads, and on a full disk."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import AS_OF, OLD, World

import retention_purge as rp


@pytest.fixture(scope="module")
def records() -> list[rp.Reference]:
    return [rp.Reference(f"{n:05}", n, n % 2) for n in range(2500)]


@pytest.fixture(scope="module")
def spool(records: list[rp.Reference]) -> rp.Spool[rp.Reference]:
    return rp.Spool(iter(records))


def test_it_gives_back_what_it_was_filled_with_to_several_readers_at_once(spool, records):
    first, second = iter(spool), iter(spool)
    assert [next(first) for _ in range(1500)] == records[:1500]
    assert list(second) == records
    assert list(first) == records[1500:]
    assert len(spool) == 2500


def test_its_slices_are_those_of_a_list_in_several_threads_too(spool, records):
    bounds = list(pairwise(range(0, 2501, 100)))
    with ThreadPoolExecutor(8) as pool:
        slices = list(pool.map(lambda cut: list(spool.slice(*cut)), bounds))
    assert slices == [records[start:end] for start, end in bounds]
    assert list(spool.slice(7, 7)) == []
    assert [spool[place] for place in (0, 1234, 2499)] == [records[n] for n in (0, 1234, 2499)]


def test_it_knows_its_keys(spool):
    assert spool.has("00000")
    assert spool.has("02499")
    assert not any(map(spool.has, ("", "0", "00000x", "02500")))
    assert not rp.Spool([]).has("k")


@pytest.mark.parametrize("key", ["a\0b", "\ud7ff", "\uffff", "\U0010ffff", " ", "é", "e\u0301"])
def test_odd_keys_come_back_as_they_were(key):
    assert list(rp.Spool([rp.Reference(key, 1, 1)])) == [(key, 1, 1)]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs privileges that this machine does not give")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_ends_the_run_with_nothing_deleted(world: World, small_disk: Path):
    world.box.load([(f"{n}", OLD, "TRIAL", f"{'k' * 50}{n:05}") for n in range(40_000)], [("k", 1)])
    result = world.purge(*AS_OF, TMPDIR=str(small_disk))
    assert result.code == 1
    assert "TMPDIR" in result.error
    assert world.box.live_keys() == ["k"]
    assert os.listdir(small_disk) == []
