"""The same on a real MySQL: tests of the other files, run on `mysql_box`, and what differs."""

from __future__ import annotations

import pytest
from conftest import AS_OF, World
from sandbox import Sandbox
from test_database import (  # noqa: F401
    test_a_completed_at_that_is_no_time_is_refused,
    test_a_job_that_is_not_surely_expired_keeps_its_object,
    test_a_read_only_server_may_be_a_replica_and_serves_dry_runs_alone,
    test_a_row_deleted_by_a_transaction_that_is_still_open_is_still_there,
    test_a_row_limit_of_the_server_hides_no_reference,
    test_a_table_that_is_not_the_job_table_is_explained,
    test_a_time_zone_of_the_server_does_not_move_the_cutoff,
    test_an_index_on_the_key_changes_nothing,
    test_keys_that_only_a_collation_equates_are_different,
    test_random_tables_are_purged_as_the_model_says,
    test_the_type_column_may_have_any_collation,
)
from test_job_rows import (  # noqa: F401
    test_a_row_that_another_transaction_holds_ends_the_run_and_stays,
    test_a_row_that_changed_after_it_was_read_stays,
    test_expired_rows_go_when_asked_for_and_others_stay,
    test_rows_of_failed_and_retained_keys_stay,
)
from test_lock import (  # noqa: F401
    test_two_runs_started_together_one_purges_and_one_exits_75,
)
from test_recheck import (  # noqa: F401
    test_a_key_that_is_in_use_by_now_is_retained,
    test_a_key_whose_rows_have_vanished_is_retained,
)
from test_seed import (  # noqa: F401
    test_a_dry_run_lists_what_the_real_run_deletes_and_changes_nothing,
    test_a_second_run_finds_nothing_to_do,
    test_expired_keys_go_and_everything_else_stays,
    test_orphans_go_when_asked_for,
    test_without_as_of_the_database_clock_decides,
)


@pytest.fixture(scope="session")
def box(mysql_box: Sandbox) -> Sandbox:
    return mysql_box


def test_this_is_no_mariadb(box: Sandbox):
    ((told,),) = box.sql("SELECT @@version_comment")
    assert "mariadb" not in f"{told} {box.database.version}".lower()
    ((plugin,),) = box.sql("SELECT plugin FROM mysql.user WHERE user = 'dataops'")
    assert plugin == "caching_sha2_password"


def test_expired_rows_go_with_their_objects(may_delete: World):
    world = may_delete
    summary = world.purge(*AS_OF, "--delete-jobs", "--json").summary
    assert (summary["deleted"]["expired"], summary["jobs_deleted"]) == (17, 22)
    assert len(world.box.job_ids()) == 50 - 22
    again = world.purge(*AS_OF, "--delete-jobs", "--json").summary
    assert (again["jobs_deleted"], again["missing"]) == (0, 0)
