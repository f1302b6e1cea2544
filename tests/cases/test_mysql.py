"""The same on a real MySQL: tests of the other files, run on `mysql_box`, and what differs."""

from __future__ import annotations

import pytest
from sandbox import Sandbox
from test_database import *  # noqa: F403
from test_job_rows import *  # noqa: F403
from test_lock import (  # noqa: F401
    test_a_lost_lock_stops_the_run,
    test_of_two_runs_started_together_one_purges_and_one_exits_75,
)
from test_recheck import (  # noqa: F401
    test_a_key_that_is_in_use_or_whose_rows_have_vanished_since_is_retained_and_on_record,
    test_a_session_that_is_no_longer_as_it_was_set_ends_the_run,
)
from test_seed import *  # noqa: F403


@pytest.fixture(scope="session")
def box(mysql_box: Sandbox) -> Sandbox:
    return mysql_box


def test_this_is_no_mariadb(box: Sandbox):
    ((plugin,),) = box.sql("SELECT plugin FROM mysql.user WHERE user = 'dataops'")
    assert (plugin, "maria" in box.database.version.lower()) == ("caching_sha2_password", False)
