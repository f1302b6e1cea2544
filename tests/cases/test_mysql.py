"""The same on a real MySQL: tests of the other files, run on `mysql_box`, and what differs."""

from __future__ import annotations

import pytest
from sandbox import Sandbox
from test_database import *  # noqa: F403
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
    ((plugin,),) = box.sql("SELECT plugin FROM mysql.user WHERE user = 'dataops'")
    assert (plugin, "maria" in box.database.version.lower()) == ("caching_sha2_password", False)
