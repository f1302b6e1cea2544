"""When a run is refused: limits and clocks. Other slips of an operator are in test_slips."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from conftest import AS_OF, EVERYTHING, sql, state
from proxies import Answer, Request
from sandbox import TABLE


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-objects", "16"], "17 objects would be deleted, more than --max-objects 16"),
        (["--max-objects", "17"], ""),
        (["--max-percent", "37.7"], "17 of 45 keys that are planned or belong to remaining jobs"),
        (["--max-percent", "37.8"], ""),
        ([*EVERYTHING, "--max-percent", "41"], "20 of 48 objects in the listing would be deleted"),
        ([*EVERYTHING, "--max-percent", "42"], ""),
        (["--delete-jobs", "--max-percent", "43"], "22 of 50 job rows would be deleted (44.0 %)"),
        (["--delete-jobs", "--max-percent", "44"], ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "refused" if value else "ok",
)
def test_a_run_within_its_limits_goes_ahead_and_more_is_refused(may_delete, options, says):
    before = state(may_delete.box)
    result = may_delete.purge(*AS_OF, *options)
    assert result.code == (3 if says else 0)
    assert not says or says in result.error
    assert (state(may_delete.box) == before) is bool(says)


def test_more_than_half_is_refused_by_default_and_a_dry_run_lists_the_plan(world):
    sql(world.box, f"DELETE FROM {TABLE} WHERE type = 'OFFICIAL'")
    del world.settings["RETENTION_PURGE_MAX_PERCENT"]
    dry = world.purge(*AS_OF, "-n")
    assert (dry.code, len(dry.listed)) == (3, 17)
    assert "more than --max-percent 50" in dry.error


def test_looking_for_the_right_place_costs_50_requests_at_most_and_none_where_keys_are_seen(world):
    many = "SELECT seq, now(), 'OFFICIAL', concat('n', seq) FROM seq_1_to_900"
    sql(world.box, f"INSERT INTO {TABLE} {many}")
    right = world.purge(*AS_OF, "-n", "--json").summary
    wrong = world.purge(*AS_OF, "-n", "--json", "--prefix", "wrong/").summary
    assert (right["requests"]["list"], wrong["exit_code"]) == (1, 3)
    assert 2 < wrong["requests"]["list"] <= 1 + 50


@pytest.mark.parametrize(("shift", "code"), [(-400, 3), (400, 3), (-200, 0), (200, 0)])
@pytest.mark.parametrize("clock", ["the database", "S3"])
def test_clocks_that_are_more_than_five_minutes_apart_are_refused(world, proxy, clock, shift, code):
    def after(request: Request, answer: Answer) -> Answer:
        if clock == "S3":
            name = next(name for name in answer.headers if name.lower() == "date")
            moment = datetime.now(UTC) + timedelta(seconds=shift)
            answer.headers[name] = moment.strftime("%a, %d %b %Y %H:%M:%S GMT")
        return answer

    proxy.after = after
    if clock == "the database":
        moved = f"SET timestamp = unix_timestamp() + {shift}"
        sql(world.box, f"SET GLOBAL init_connect = '{moved}'")
    try:
        result = world.purge(*AS_OF)
    finally:
        sql(world.box, "SET GLOBAL init_connect = ''")
    assert (result.code, len(world.box.live_keys())) == (code, 48 if code else 31)
    if code:
        assert "the clock of" in result.error
        assert clock in result.error
