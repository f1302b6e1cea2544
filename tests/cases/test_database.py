"""MySQL for real: the policy to the byte, the login, and what happens before any secret is sent."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from conftest import AS_OF, EVERYTHING, OLD, SCRIPT, World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proxies import TcpProxy
from sandbox import DATABASE, USER, Certificates, free_port, mariadb

import retention_purge as rp

NEW = "2019-05-01 00:00:00"
CUTOFF = "2019-03-05 00:00:00"  # 90 days before AS_OF
TABLES = {
    "general_ci": "varchar(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci",
    "bin": "varchar(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin",
    "nopad": "varchar(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_520_nopad_ci",
    "utf8mb3": "varchar(64) CHARACTER SET utf8mb3 COLLATE utf8mb3_general_ci",
    "latin1": "varchar(64) CHARACTER SET latin1 COLLATE latin1_german1_ci",
}


def columns(source_data: str, type_: str = "varchar(12)", more: str = "") -> str:
    return (
        f"(jobId varchar(64) PRIMARY KEY, completedAt timestamp NULL, type {type_}, "
        f"sourceData {source_data} {more})"
    )


def load(world: World, jobs: list[tuple[str | None, str | None, str]], table: str) -> None:
    """Jobs as (type, completedAt, sourceData), and an object for each key."""
    rows = [(f"job{n}", done, type_, key) for n, (type_, done, key) in enumerate(jobs)]
    keys = {key for _, _, key in jobs if key}
    world.box.load(rows, [(key, 1) for key in keys], table)


def deleted(world: World, *options: str) -> set[str]:
    before = set(world.box.live_keys())
    result = world.purge(*AS_OF, *options, "--json")
    gone = before - set(world.box.live_keys())
    summary = result.summary
    assert result.code == 0, result.err
    assert (
        summary["deleted"] | {"jobs": 0} == summary["planned"]
    )  # not merely saved by the re-check
    assert summary["deleted"]["expired"] + summary["deleted"]["orphan"] == len(gone)
    return gone


@pytest.mark.parametrize("table", TABLES)
def test_keys_that_only_a_collation_equates_are_different(world, table):
    spellings = ["abc", "ABC", "abc ", "abc  ", "Abc", "àbc", "straße", "strasse"]
    jobs = [("TRIAL", OLD, key) for key in spellings]
    kept = [spellings[1], spellings[2]]
    load(world, jobs + [("OFFICIAL", OLD, key) for key in kept], columns(TABLES[table]))
    assert deleted(world) == set(spellings) - set(kept)


@pytest.mark.parametrize("table", TABLES)
def test_an_index_on_the_key_changes_nothing(world, table):
    load(
        world,
        [("TRIAL", OLD, "abc"), ("TRIAL", OLD, "ABC"), ("OFFICIAL", OLD, "ABC")],
        columns(TABLES[table], more=", KEY (sourceData)"),
    )
    assert deleted(world) == {"abc"}


SPELLINGS = ["abc ", "\ud7ff", "\ue000", "日本", "≒", "жук", "ゃ", "や", "😀", "àbc"]
SPELLINGS += ["abc", "ABC", "Abc", "a", "straße", "strasse", "Straße", "it's", "a\\b", 'a"b']
SPELLINGS += ["%", "a%", "_", "~", "?", "??"]
STRANGERS = {"Abc", "abc ", "strasse", "や", "?"}


def spellable(name: str, table: str) -> bool:
    """Whether a row of that table can hold the name."""
    try:
        name.encode("cp1252" if table == "latin1" else "utf-8")
    except UnicodeEncodeError:
        return False
    return table != "utf8mb3" or max(name) <= "\uffff"


@pytest.mark.parametrize("table", TABLES)
def test_orphans_whose_names_the_column_cannot_hold_are_kept(world, table):
    """A job may mean them: its name would stand there mangled, or cut."""
    load(world, [("OFFICIAL", OLD, "abc"), ("TRIAL", OLD, "old")], columns(TABLES[table]))
    strangers = ["ABC", "abc ", "жук", "日本", "😀", "?", "??", "x" * 64, "x" * 65]
    for key in strangers:
        world.box.put(key, age=timedelta(days=8))
    held = {key for key in strangers if spellable(key, table) and len(key) <= 64}
    assert deleted(world, "--orphans") == {"old", *held}


@pytest.mark.parametrize("key", ["", ", KEY (sourceData)"], ids=["scan", "index"])
@pytest.mark.parametrize("table", TABLES)
def test_a_re_check_finds_the_jobs_of_its_names_and_no_others(world, table, key):
    stored = [name for name in SPELLINGS if spellable(name, table) and name not in STRANGERS]
    kinds = [[("TRIAL", OLD)], [("OFFICIAL", OLD)], [("TRIAL", OLD), ("TRIAL", NEW)]]
    jobs = [
        (f"{number}-{type_}-{done}", done, type_, name)
        for number, name in enumerate(stored)
        for type_, done in kinds[number % 3]
    ]
    world.box.load(jobs, [], columns(TABLES[table], more=key))
    counts = [(1, 1), (1, 0), (2, 1)]  # jobs, and expired ones
    known = {name: rp.Reference(name, *counts[n % 3]) for n, name in enumerate(stored)}
    with world.box.database.admin(database=DATABASE) as connection:
        for statement in rp.SESSION:
            connection.cursor().execute(statement)
        place = DATABASE, "ndvr_job_status"
        jobs_ = rp.JobTable(connection, place, datetime.fromisoformat(f"{CUTOFF}Z"))
        assert jobs_.indexed == bool(key)
        for asked in [SPELLINGS, *([name] for name in SPELLINGS)]:
            found = {name: known[name] for name in asked if name in known}
            assert jobs_.referenced(asked) == found


@pytest.mark.parametrize("charset", ["sjis", "cp932", "gbk"])
def test_a_character_set_that_spells_a_name_in_two_ways_is_refused(world, charset):
    load(world, [("TRIAL", OLD, "gone")], columns(f"varchar(64) CHARACTER SET {charset}"))
    result = world.purge(*AS_OF, "-n")
    assert result.code == 1
    assert "sourceData must be a text column" in result.error
    assert charset in result.error


@pytest.mark.parametrize(
    ("type_", "completed"),
    [
        ("OFFICIAL", OLD),
        ("trial", OLD),
        ("TRIAL ", OLD),
        (" TRIAL", OLD),
        ("TRÎAL", OLD),
        ("BETA", OLD),
        ("", OLD),
        (None, OLD),
        ("TRIAL", None),
        ("TRIAL", "0000-00-00 00:00:00"),
        ("TRIAL", CUTOFF),
        ("TRIAL", NEW),
    ],
)
def test_a_job_that_is_not_surely_expired_keeps_its_object(world, type_, completed):
    load(
        world,
        [(type_, completed, "kept"), ("TRIAL", OLD, "kept"), ("TRIAL", OLD, "gone")],
        columns(TABLES["general_ci"]),
    )
    assert deleted(world) == {"gone"}


def test_the_last_second_before_the_cutoff_is_expired(world):
    load(world, [("TRIAL", "2019-03-04 23:59:59", "gone")], columns(TABLES["bin"]))
    assert deleted(world) == {"gone"}


def test_the_type_column_may_have_any_collation(world):
    for type_ in ("varchar(12) CHARACTER SET latin1", "enum('TRIAL','OFFICIAL')", "varbinary(12)"):
        load(
            world,
            [("TRIAL", OLD, "gone"), ("OFFICIAL", OLD, "kept")],
            columns(TABLES["bin"], type_),
        )
        assert deleted(world) == {"gone"}


def test_empty_and_null_names_name_nothing_and_are_counted_in_the_log(world):
    jobs = [("TRIAL", OLD, ""), ("TRIAL", OLD, None), ("TRIAL", OLD, None), ("TRIAL", OLD, "gone")]
    load(world, jobs, columns(TABLES["general_ci"]))
    result = world.purge(*AS_OF, "--prefix", "", "--json")
    assert "3 jobs have no sourceData" in result.err
    assert result.summary["deleted"]["expired"] == 1


def test_a_time_zone_of_the_server_does_not_move_the_cutoff(world):
    with world.box.database.admin() as connection:
        cursor = connection.cursor()
        cursor.execute("SET GLOBAL time_zone = '+13:00'")
        try:
            load(
                world,
                [("TRIAL", "2019-03-04 23:59:59", "gone"), ("TRIAL", CUTOFF, "kept")],
                columns(TABLES["bin"]),
            )
            assert deleted(world) == {"gone"}
        finally:
            cursor.execute("SET GLOBAL time_zone = 'SYSTEM'")


def test_a_server_that_sorts_by_the_first_bytes_alone_takes_no_names_for_one_another(world):
    start = "é" * 40  # 80 bytes
    load(
        world, [("TRIAL", OLD, f"{start}a"), ("OFFICIAL", OLD, f"{start}b")], columns(TABLES["bin"])
    )
    with world.box.database.admin(database=DATABASE) as connection:
        connection.cursor().execute("SET GLOBAL max_sort_length = 64")
        try:
            assert deleted(world, "--orphans") == {f"{start}a"}
        finally:
            connection.cursor().execute("SET GLOBAL max_sort_length = DEFAULT")


def test_a_prefix_is_put_before_every_name_and_bounds_the_listing(world):
    world.box.load(
        [("1", OLD, "TRIAL", "a"), ("2", OLD, "OFFICIAL", "b"), ("3", OLD, "TRIAL", "../x")],
        [(key, 1) for key in ("a", "b", "in/a", "in/b", "in/c", "in/../x", "x", "io", "im/z")],
    )
    for key in ("in/c", "io", "im/z"):
        world.box.put(key, age=timedelta(days=30))
    assert deleted(world, "--prefix", "in/", "--orphans") == {"in/a", "in/c", "in/../x"}


def test_a_table_in_another_schema_with_an_awkward_name(world):
    with world.box.database.admin() as connection:
        cursor = connection.cursor()
        cursor.execute("CREATE OR REPLACE DATABASE `old``jobs`")
        cursor.execute(f"GRANT SELECT ON `old``jobs`.* TO {USER}@'%'")
        cursor.execute(f"CREATE TABLE `old``jobs`.`a b` LIKE {DATABASE}.ndvr_job_status")
        cursor.execute(
            f"INSERT INTO `old``jobs`.`a b` VALUES ('1', '{OLD}', 'TRIAL', 'incoming_000001')"
        )
    assert deleted(world, "--db-table", "old`jobs.a b") == {"incoming_000001"}


# The reference model: the policy in three obvious lines.
TEXTS = st.text(st.sampled_from("aAàá bB\x01'\"%\\`жß😀"), min_size=1, max_size=3)
JOBS = st.lists(
    st.tuples(
        st.sampled_from(["TRIAL", "TRIAL", "OFFICIAL", "trial", "TRIAL ", None]),
        st.sampled_from([OLD, OLD, NEW, CUTOFF, None, "0000-00-00 00:00:00"]),
        TEXTS,
    ),
    max_size=25,
)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(jobs=JOBS, strangers=st.sets(TEXTS, max_size=4), orphans=st.booleans())
def test_random_tables_are_purged_as_the_model_says(world, jobs, strangers, orphans):
    jobs = [*jobs, ("OFFICIAL", OLD, "kept")]  # where no key is seen, orphans are refused
    load(world, jobs, columns(TABLES["general_ci"]))
    for key in strangers:
        world.box.put(key, age=timedelta(days=30))
    named = {key for _, _, key in jobs}
    remaining = {key for type_, done, key in jobs if (type_, done) != ("TRIAL", OLD)}
    expected = (named - remaining) | ((strangers - named) if orphans else set())
    assert deleted(world, *(["--orphans"] if orphans else [])) == expected


# --- Settings of the server that must not decide --------------------------------------------------


@pytest.mark.parametrize("limit", [1, 4, 20])
def test_a_row_limit_of_the_server_hides_no_reference(world, limit):
    with world.box.database.admin() as connection:
        cursor = connection.cursor()
        cursor.execute(f"SET GLOBAL sql_select_limit = {limit}")
        try:
            assert len(deleted(world, *EVERYTHING)) == 20
        finally:
            cursor.execute("SET GLOBAL sql_select_limit = DEFAULT")


@pytest.mark.parametrize(
    "mode", ["PAD_CHAR_TO_FULL_LENGTH", "ANSI", "ORACLE", "NO_BACKSLASH_ESCAPES", "TRADITIONAL"]
)
def test_an_sql_mode_of_the_server_changes_nothing(world, mode):
    load(
        world,
        [("OFFICIAL", OLD, "kept"), ("TRIAL", OLD, "gone"), ("TRIAL", OLD, "a'\\b")],
        columns("char(64) CHARACTER SET utf8mb4"),
    )
    with world.box.database.admin() as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT @@global.sql_mode")
        before = cursor.fetchall()[0][0]
        cursor.execute("SET GLOBAL sql_mode = %s", (mode,))
        try:
            assert deleted(world, "--orphans") == {"gone", "a'\\b"}
        finally:
            cursor.execute("SET GLOBAL sql_mode = %s", (before,))


def test_a_row_deleted_by_a_transaction_that_is_still_open_is_still_there(world):
    with world.box.database.admin() as connection, connection.cursor() as cursor:
        cursor.execute("SET GLOBAL TRANSACTION ISOLATION LEVEL READ UNCOMMITTED")
        cursor.execute("BEGIN")
        cursor.execute(f"DELETE FROM {DATABASE}.ndvr_job_status WHERE type = 'OFFICIAL'")
        try:
            assert len(deleted(world, *EVERYTHING)) == 20
        finally:
            cursor.execute("ROLLBACK")
            cursor.execute("SET GLOBAL TRANSACTION ISOLATION LEVEL REPEATABLE READ")


def test_a_read_only_server_may_be_a_replica_and_serves_dry_runs_alone(world):
    with world.box.database.admin() as connection:
        cursor = connection.cursor()
        cursor.execute("SET GLOBAL read_only = 1")
        try:
            result = world.purge(*AS_OF)
            assert result.code == 3
            assert "replica" in result.error
            assert world.purge(*AS_OF, "-n").code == 0
        finally:
            cursor.execute("SET GLOBAL read_only = 0")
    assert len(world.box.live_keys()) == 48


def test_a_column_called_name_is_not_taken_for_the_key(world):
    load(
        world,
        [("TRIAL", OLD, "gone1"), ("TRIAL", OLD, "gone2"), ("OFFICIAL", OLD, "kept")],
        columns(TABLES["bin"]),
    )
    with world.box.database.admin(database=DATABASE) as connection:
        connection.cursor().execute("ALTER TABLE ndvr_job_status ADD name int DEFAULT 1")
    assert deleted(world) == {"gone1", "gone2"}


def test_a_table_name_with_a_percent_sign(world):
    with world.box.database.admin(database=DATABASE) as connection:
        connection.cursor().execute("CREATE OR REPLACE TABLE `100%s` LIKE ndvr_job_status")
    assert world.purge(*AS_OF, "--db-table", "100%s").code == 0


def test_a_completed_at_that_is_no_time_is_refused(world):
    with world.box.database.admin(database=DATABASE) as connection:
        connection.cursor().execute("ALTER TABLE ndvr_job_status MODIFY completedAt varchar(20)")
    result = world.purge(*AS_OF)
    assert result.code == 1
    assert "completedAt must be a TIMESTAMP" in result.error


def test_an_early_as_of_is_not_read_as_a_later_century(world):
    for moment in ("0030-06-03", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
        result = world.purge("--as-of", moment)
        assert result.code == 2
        assert "--as-of" in result.error
    result = world.purge("--as-of", "1970-01-02", "--retention-days", "36500", "--json")
    assert result.summary["cutoff"].startswith("1870-")
    assert result.summary["planned"]["expired"] == 0


# --- Login -----------------------------------------------------------------------------------


def test_the_login_is_a_fresh_token_checked_by_the_server(world):
    before = len(world.box.token_attempts())
    assert world.purge(*AS_OF).code == 0
    attempts = world.box.token_attempts()[before:]
    assert attempts, "nobody logged in"
    assert [attempt["refused"] for attempt in attempts] == [None] * len(attempts)


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "wrong signature"),
        ({"AWS_DEFAULT_REGION": "us-east-1"}, "another key, day, region or service"),
    ],
)
def test_a_token_that_the_server_refuses_is_explained(world, settings, refused):
    result = world.purge(*AS_OF, **settings)
    assert result.code == 1
    assert "rds-db:connect" in result.error
    assert "IAM authentication is not enabled" in result.error
    assert world.box.token_attempts()[-1]["refused"] == refused
    assert len(world.box.live_keys()) == 48


def refused_before_any_secret(world: World, result, cause: str) -> None:
    """The run failed for this cause, with nothing deleted, and the secret nowhere to be seen."""
    assert result.code == 1
    assert cause in result.error
    assert "No secret was sent" in result.error
    assert len(world.box.live_keys()) == 48


def longest_tls_record(sent: bytes) -> int:
    """Bytes in the longest TLS record after the MySQL packet that asks for TLS."""
    place, longest = 4 + int.from_bytes(sent[:3], "little"), 0
    while place + 5 <= len(sent):
        kind, length = sent[place], int.from_bytes(sent[place + 3 : place + 5], "big")
        longest = max(longest, length if kind == 23 else 0)  # 23: encrypted data
        place += 5 + length
    return longest


@pytest.mark.parametrize("password", [None, "s3cret-passw0rd"])
def test_a_server_whose_certificate_another_ca_made_gets_no_secret(world, tmp_path, password):
    other = Certificates(tmp_path / "tls")
    before = len(world.box.token_attempts())
    with TcpProxy(world.box.database.port) as wire:
        result = world.purge(
            *AS_OF,
            RETENTION_PURGE_DB_PORT=str(wire.port),
            RETENTION_PURGE_CA_BUNDLE=str(other.ca),
            RETENTION_PURGE_DB_PASSWORD=password,
        )
        refused_before_any_secret(world, result, "certificate was not accepted")
        assert wire.sent, "the purge never came this way"
        assert longest_tls_record(wire.sent) < 40, "more than an alert was sent"
        # The same wire with the right CA: here the token is seen to pass.
        del wire.sent[:]
        assert world.purge(*AS_OF, RETENTION_PURGE_DB_PORT=str(wire.port)).code == 1
        assert longest_tls_record(wire.sent) > 200
    assert len(world.box.token_attempts()) == before + 1


def test_a_server_with_a_certificate_for_another_host_gets_no_secret(world):
    before = len(world.box.token_attempts())
    result = world.purge(*AS_OF, "--db-host", "127.0.0.1")
    refused_before_any_secret(world, result, "certificate is not valid for '127.0.0.1'")
    assert len(world.box.token_attempts()) == before


def test_a_server_with_an_expired_certificate_gets_no_secret(world):
    day = timedelta(days=1)
    expired = Certificates(
        world.box.home / "expired-tls",
        not_before=datetime.now(UTC) - 9 * day,
        not_after=datetime.now(UTC) - day,
    )
    with mariadb(world.box.home / "expired", *expired.server_options) as server:
        result = world.purge(
            *AS_OF,
            RETENTION_PURGE_DB_PORT=str(server.port),
            RETENTION_PURGE_CA_BUNDLE=str(expired.ca),
        )
    refused_before_any_secret(world, result, "certificate has expired")


@pytest.mark.parametrize("password", [None, "s3cret-passw0rd"])
def test_a_server_without_tls_gets_no_secret(world, password):
    with (
        mariadb(world.box.home / f"plain-{password}", "--skip-ssl") as server,
        TcpProxy(server.port) as wire,
    ):
        result = world.purge(
            *AS_OF,
            RETENTION_PURGE_DB_PORT=str(wire.port),
            RETENTION_PURGE_DB_PASSWORD=password,
        )
        refused_before_any_secret(world, result, "offers no TLS")
        assert not wire.sent, "the client must not go past the server's greeting"


@pytest.fixture
def password_user(world):
    """A user `local` with a password, for TLS and without."""
    with world.box.database.admin() as connection:
        cursor = connection.cursor()
        cursor.execute("CREATE OR REPLACE USER local@'%' IDENTIFIED BY 'pässword'")
        cursor.execute(f"GRANT SELECT ON {DATABASE}.* TO local@'%'")
    return {"RETENTION_PURGE_DB_PASSWORD": "pässword", "RETENTION_PURGE_DB_USER": "local"}


def test_a_password_replaces_the_token(world, password_user):
    before = len(world.box.token_attempts())
    assert world.purge(*AS_OF, "--json", **password_user).summary["deleted"]["expired"] == 17
    assert len(world.box.token_attempts()) == before


def test_a_password_without_a_ca_bundle_is_for_loopback_only(world, password_user):
    result = world.purge(*AS_OF, "-n", **password_user, RETENTION_PURGE_CA_BUNDLE=None)
    assert result.code == 0
    for host in ("db.example.com", "10.0.0.1", "localhost.example.com"):
        result = world.purge(
            *AS_OF,
            **password_user,
            RETENTION_PURGE_CA_BUNDLE=None,
            RETENTION_PURGE_DB_HOST=host,
        )
        assert result.code == 2
        assert "No CA bundle" in result.error


def test_a_ca_bundle_that_is_given_is_used_with_a_password_too(world, password_user, tmp_path):
    other = Certificates(tmp_path / "tls")
    result = world.purge(*AS_OF, "--ca-bundle", str(other.ca), **password_user)
    refused_before_any_secret(world, result, "certificate was not accepted")


def test_a_token_is_never_sent_without_a_ca_bundle(world):
    with TcpProxy(world.box.database.port) as wire:
        result = world.purge(
            *AS_OF, RETENTION_PURGE_DB_PORT=str(wire.port), RETENTION_PURGE_CA_BUNDLE=None
        )
        assert not wire.sent
    assert result.code == 2
    assert "global-bundle.pem" in result.error


@pytest.mark.parametrize("content", [None, "", "text\n", "example"])
def test_a_ca_bundle_without_certificates_says_where_to_get_one(world, tmp_path, content):
    bundle = tmp_path / "bundle.pem"
    if content == "example":
        bundle = SCRIPT.parent / "rds-ca-bundle.pem.example"
    elif content is not None:
        bundle.write_text(content)
    result = world.purge(*AS_OF, "--ca-bundle", str(bundle))
    assert result.code == 2
    assert "truststore.pki.rds.amazonaws.com/global/global-bundle.pem" in result.error


def test_hosts_that_are_not_there_are_explained(world):
    result = world.purge(*AS_OF, "--db-host", "no-such-host.invalid")
    assert (result.code, "Check --db-host" in result.error) == (1, True)
    result = world.purge(*AS_OF, "--db-port", str(free_port()))
    assert (result.code, "Check --db-host, --db-port" in result.error) == (1, True)


def test_no_credentials_for_a_token_are_explained(world):
    result = world.purge(
        *AS_OF,
        AWS_ACCESS_KEY_ID=None,
        AWS_SECRET_ACCESS_KEY=None,
        AWS_EC2_METADATA_DISABLED="true",
    )
    assert result.code == 2
    assert "credentials" in result.error


# --- The table ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--db-table", "no_such_table"], "--db-table"),
        (["--db-name", "no_such_schema"], "no_such_schema"),
        (["--db-table", "mysql.user"], "Grant SELECT"),
        (["--db-table", "information_schema.COLUMNS"], "has no column jobId"),
    ],
)
def test_a_table_that_is_not_the_job_table_is_explained(world, options, hint):
    result = world.purge(*AS_OF, *options)
    assert result.code == 1
    assert hint in result.error


def test_a_binary_key_column_is_refused(world):
    load(world, [("TRIAL", OLD, "gone")], columns("varbinary(64)"))
    result = world.purge(*AS_OF)
    assert result.code == 1
    assert "must be a text column" in result.error
