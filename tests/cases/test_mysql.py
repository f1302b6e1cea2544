"""The same on a real MySQL: tests of the other files, run on `mysql_box`, and what differs."""

from __future__ import annotations

import pytest
from sandbox import Sandbox
from test_database import (  # noqa: F401
    test_a_job_that_is_not_surely_expired_keeps_its_object,
    test_a_row_deleted_by_a_transaction_that_is_still_open_is_still_there,
    test_a_setting_of_the_server_decides_nothing,
    test_keys_that_only_a_collation_equates_are_different,
    test_random_tables_are_purged_as_the_model_says,
    test_the_type_column_may_have_any_collation,
)
from test_job_rows import *  # noqa: F403
from test_lock import *  # noqa: F403
from test_recheck import (  # noqa: F401
    test_a_key_that_is_in_use_or_whose_rows_have_vanished_since_is_retained_and_on_record,
)
from test_seed import *  # noqa: F403


@pytest.fixture(scope="session")
def box(mysql_box: Sandbox) -> Sandbox:
    return mysql_box


def test_this_is_no_mariadb(box: Sandbox):
    ((told,),) = box.sql("SELECT @@version_comment")
    assert "mariadb" not in f"{told} {box.database.version}".lower()
    ((plugin,),) = box.sql("SELECT plugin FROM mysql.user WHERE user = 'dataops'")
    assert plugin == "caching_sha2_password"
