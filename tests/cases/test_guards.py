"""When a run is refused: limits, rights, clocks, the wrong place. Nothing changes then."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from conftest import AS_OF, EVERYTHING, World, sql, state
from proxies import Answer, Request
from sandbox import DATABASE, TABLE

DRY = pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["real", "dry"])
ROWS = pytest.mark.parametrize("rows", [[], ["--delete-jobs"]], ids=["objects", "rows"])


def refused(world: World, *options: str, says: tuple[str, ...]) -> None:
    before = state(world.box)
    result = world.purge(*AS_OF, *options)
    assert result.code == 3
    for words in says:
        assert words in result.error
    assert state(world.box) == before


# --- Limits ---------------------------------------------------------------------------------------


@DRY
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-objects", "16"], ("17 objects", "--max-objects 16")),
        (["--max-percent", "37"], ("17 of 45", "37.8 %", "--max-percent 37")),
        ([*EVERYTHING, "--max-percent", "41"], ("20 of 48 objects", "41.7 %", "--max-percent 41")),
        (["--delete-jobs", "--max-percent", "43"], ("22 of 50 job rows", "44.0 %")),
    ],
)
def test_more_than_the_limits_is_refused_with_its_numbers(may_delete, options, says, dry):
    refused(may_delete, *options, *dry, says=says)


@pytest.mark.parametrize(
    "options", [["--max-objects", "17"], ["--max-percent", "37.8"], ["--max-percent", "100"]]
)
def test_a_run_within_its_limits_goes_ahead(world, options):
    assert world.purge(*AS_OF, *options, "--json").summary["deleted"]["expired"] == 17


def test_more_than_half_is_refused_by_default(world):
    sql(world.box, f"DELETE FROM {TABLE} WHERE type = 'OFFICIAL'")
    del world.settings["RETENTION_PURGE_MAX_PERCENT"]
    refused(world, says=("--max-percent 50",))


def test_a_refused_run_lists_its_plan_and_leaves_no_manifest_of_an_earlier_one(world, tmp_path):
    path = tmp_path / "manifest"
    for options, lines in (["-n"], 17), (["-n", "--max-objects", "3"], None):
        result = world.purge(*AS_OF, *options, "--manifest", str(path))
        assert len(result.listed) == 17
        assert (path.exists() and len(path.read_text().splitlines())) == (lines or False)
    assert result.code == 3


# --- The wrong place ------------------------------------------------------------------------------


@ROWS
@pytest.mark.parametrize("options", [["--prefix", "wrong/"], ["--bucket", "another", "-n"]])
def test_a_prefix_or_bucket_without_any_key_of_the_table_is_refused(may_delete, options, rows):
    if "another" not in may_delete.box.backend.buckets:
        may_delete.box.backend.create_bucket("another", "eu-west-1")
    says = ("none of the 17 expired keys and of 28 keys of remaining jobs", "--prefix")
    refused(may_delete, *options, *rows, says=says)


@DRY
def test_the_wrong_table_is_refused_with_orphans(world, dry):
    sql(world.box, f"CREATE OR REPLACE TABLE strangers LIKE {TABLE}")
    options = (*EVERYTHING, "--db-table", f"{DATABASE}.strangers", *dry)
    refused(world, *options, says=("none of the 48 objects", "--db-table"))  # an empty one
    sql(world.box, "INSERT INTO strangers VALUES ('1', now(), 'OFFICIAL', 'not in this bucket')")
    refused(world, *options, says=("none of the 48 objects", "--db-table"))


def test_looking_for_the_right_place_costs_50_requests_at_most_and_none_where_keys_are_seen(world):
    sql(
        world.box,
        f"INSERT INTO {TABLE} SELECT seq, now(), 'OFFICIAL', concat('n', seq) FROM seq_1_to_900",
    )
    right = world.purge(*AS_OF, "-n", "--json").summary
    wrong = world.purge(*AS_OF, "-n", "--json", "--prefix", "wrong/").summary
    assert right["requests"]["list"] == 1
    assert (wrong["exit_code"], wrong["planned"]["expired"]) == (3, 0)
    assert wrong["requests"]["list"] <= right["requests"]["list"] + 50


@ROWS
@pytest.mark.parametrize("case", ["all missing", "none expired", "empty table", "all kept"])
def test_honest_steady_states_are_no_refusal(may_delete, case, rows):
    world = may_delete
    if case == "all missing":
        assert world.purge(*AS_OF).code == 0
    elif case == "none expired":
        sql(world.box, f"DELETE FROM {TABLE} WHERE type = 'TRIAL'")
    elif case == "empty table":
        sql(world.box, f"DELETE FROM {TABLE}")
    else:
        sql(world.box, f"UPDATE {TABLE} SET type = 'OFFICIAL'")
    assert world.purge(*AS_OF, *rows).code == 0


# --- Rights and clocks ----------------------------------------------------------------------------


@DRY
def test_without_the_right_to_delete_rows_no_object_goes(world, dry):
    refused(world, "--delete-jobs", *dry, says=(f"no DELETE on {DATABASE}.{TABLE}",))


def test_as_of_after_the_database_clock_is_refused(world):
    refused(world, "--as-of", "2999-01-01", says=("--as-of", "later than the database clock"))


@pytest.mark.parametrize("shift", [-400, 400])
def test_a_database_clock_that_is_off_is_refused(world, shift):
    sql(world.box, f"SET GLOBAL init_connect = 'SET timestamp = unix_timestamp() + {shift}'")
    try:
        result = world.purge(*AS_OF)
    finally:
        sql(world.box, "SET GLOBAL init_connect = ''")
    assert result.code == 3
    assert re.search(r"clock of .* is (399|40[01]) seconds ahead", result.error)
    assert "the database" in result.error
    assert len(world.box.live_keys()) == 48


@pytest.mark.parametrize(("shift", "code"), [(-400, 3), (400, 3), (-200, 0), (200, 0)])
def test_an_s3_clock_that_is_off_is_refused(world, proxy, shift, code):
    def after(request: Request, answer: Answer) -> Answer:
        moment = datetime.now(UTC) + timedelta(seconds=shift)
        name = next(name for name in answer.headers if name.lower() == "date")
        answer.headers[name] = moment.strftime("%a, %d %b %Y %H:%M:%S GMT")
        return answer

    proxy.after = after
    result = world.purge(*AS_OF)
    assert result.code == code
    if code:
        assert "S3" in result.error
