"""What the tool reads in a real database: the policy to the byte, whatever the table and the server
are set to; and whom it gives its secret. test_mysql.py runs a part of it on MySQL again."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from conftest import AS_OF, EVERYTHING, OLD, SCRIPT, Result, World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proxies import Request, TcpProxy
from sandbox import DATABASE, TABLE, USER, Certificates, mariadb

NEW = "2019-05-01 00:00:00"
CUTOFF = "2019-03-05 00:00:00"  # 90 days before AS_OF
JUST_BEFORE = "2019-03-04 23:59:59"
TABLES = {
    "general_ci": "varchar(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci",
    "bin": "varchar(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin",
    "nopad": "varchar(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_520_nopad_ci",
    "utf8mb3": "varchar(64) CHARACTER SET utf8mb3 COLLATE utf8mb3_general_ci",
    "latin1": "varchar(64) CHARACTER SET latin1 COLLATE latin1_german1_ci",
}


def load(
    world: World,
    jobs: list[tuple[str | None, str | None, Any]],
    source_data: str = TABLES["bin"],
    type_: str = "varchar(12)",
    more: str = "",
) -> None:
    """Jobs as (type, completedAt, sourceData), in such columns, and an object for each key."""
    rows: Any = [(f"job{n}", done, type_, key) for n, (type_, done, key) in enumerate(jobs)]
    keys = {key for _, _, key in jobs if key}
    columns = f"completedAt timestamp NULL, type {type_}, sourceData {source_data} {more}"
    world.box.load(rows, [(key, 1) for key in keys], f"(jobId varchar(64) PRIMARY KEY, {columns})")


def strangers(world: World, *keys: str) -> None:
    """Objects that no job refers to, older than the grace period."""
    for key in keys:
        world.box.put(key, age=timedelta(days=30))


def deleted(world: World, *options: str, retained: int = 0) -> set[str]:
    """The keys that a run deletes; by its plan, not merely saved by the re-check."""
    before = set(world.box.live_keys())
    result = world.purge(*AS_OF, *options, "--json")
    gone = before - set(world.box.live_keys())
    summary = result.summary
    assert result.code == 0, result.err
    assert summary["deleted"]["expired"] + summary["deleted"]["orphan"] == len(gone)
    assert summary["planned"]["expired"] + summary["planned"]["orphan"] == len(gone) + retained
    assert summary["retained"] == retained
    return gone


# --- Keys are bytes -------------------------------------------------------------------------------

SPELLINGS = ["abc", "ABC", "Abc", "abc ", "abc  ", "àbc", "a", "straße", "strasse", "Straße"]
SPELLINGS += ["it's", "a\\b", 'a"b', "%", "a%", "_", "~", "?", "\ud7ff", "\ue000", "日本", "≒"]
SPELLINGS += ["жук", "ゃ", "や", "😀", "x" * 64]
# These are no job's.
STRANGERS = ["aBC", "abC ", "ÀBC", "STRASSE", "??", "ЖУК", "ヤ", "😁", "y" * 64, "y" * 65]


def spellable(name: str, table: str) -> bool:
    """Whether a row of that table can hold the name."""
    try:
        name.encode("cp1252" if table == "latin1" else "utf-8")
    except UnicodeEncodeError:
        return False
    return len(name) <= 64 and (table != "utf8mb3" or max(name) <= "\uffff")


@pytest.mark.parametrize("index", ["", ", KEY (sourceData)"], ids=["scan", "index"])
@pytest.mark.parametrize("table", TABLES)
def test_keys_that_only_a_collation_equates_are_different(world, proxy, table, index):
    """A third of the names has a remaining job, a third gets one after the plan, as do orphans. An
    orphan stays whose name the column cannot hold: a job's would stand there mangled, or cut."""
    names = [name for name in SPELLINGS if spellable(name, table)]
    orphans = [name for name in STRANGERS if spellable(name, table)]
    kept, late = names[1::3], [*names[2::3], *orphans[::2]]
    jobs = [("TRIAL", OLD, name) for name in names] + [("OFFICIAL", OLD, name) for name in kept]
    load(world, jobs, TABLES[table], more=index)
    strangers(world, *STRANGERS)

    def before(request: Request) -> None:
        if request.operation == "list" and proxy.count("list") == 1:
            with world.box.database.admin(database=DATABASE) as connection:
                rows = [(f"late{n}", name) for n, name in enumerate(late)]
                sql = f"INSERT INTO {TABLE} VALUES (%s, NULL, 'TRIAL', %s)"
                connection.cursor().executemany(sql, rows)

    proxy.before = before
    gone = deleted(world, "--orphans", retained=len(late))
    assert gone == {*names, *orphans} - {*kept, *late}


def test_a_prefix_is_put_before_every_name_and_bounds_the_listing(world):
    jobs = [("TRIAL", OLD, "a"), ("OFFICIAL", OLD, "b"), ("TRIAL", OLD, "../x")]
    load(world, jobs)
    strangers(world, "in/a", "in/b", "in/c", "in/../x", "x", "io", "im/z")
    assert deleted(world, "--prefix", "in/", "--orphans") == {"in/a", "in/c", "in/../x"}


# --- Which jobs are expired -----------------------------------------------------------------------

REMAINING = [
    *((kind, OLD) for kind in ("OFFICIAL", "trial", "TRIAL ", " TRIAL", "TRÎAL", "BETA", "", None)),
    *(("TRIAL", moment) for moment in (None, "0000-00-00 00:00:00", CUTOFF, NEW)),
]


def test_a_job_that_is_not_surely_expired_keeps_its_object(world):
    jobs: Any = [(*facts, f"kept for {facts}") for facts in REMAINING]
    jobs += [("TRIAL", OLD, key) for _, _, key in jobs]
    jobs += [("TRIAL", OLD, key) for key in ("", None)]  # these name nothing
    jobs += [("TRIAL", OLD, "gone"), ("TRIAL", JUST_BEFORE, "just gone")]
    load(world, jobs, TABLES["general_ci"])
    assert deleted(world) == {"gone", "just gone"}


def test_the_type_column_may_have_any_collation(world):
    for type_ in ("varchar(12) CHARACTER SET latin1", "enum('TRIAL','OFFICIAL')", "varbinary(12)"):
        load(world, [("TRIAL", OLD, "gone"), ("OFFICIAL", OLD, "kept")], type_=type_)
        assert deleted(world) == {"gone"}


# The reference model: the policy in three obvious lines.
TEXTS = st.text(st.sampled_from("aAàá bB\x01'\"%\\`жß😀"), min_size=1, max_size=3)
JOBS = st.lists(
    st.tuples(
        st.sampled_from(["TRIAL", "TRIAL", "OFFICIAL", "trial", "TRIAL ", None]),
        st.sampled_from([OLD, OLD, NEW, CUTOFF, None, "0000-00-00 00:00:00"]),
        TEXTS,
    ),
    max_size=60,
)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(jobs=JOBS, others=st.sets(TEXTS, max_size=8), orphans=st.booleans())
def test_random_tables_are_purged_as_the_model_says(world, jobs, others, orphans):
    jobs = [*jobs, ("OFFICIAL", OLD, "kept")]  # where no key is seen, orphans are refused
    load(world, jobs, TABLES["general_ci"])
    strangers(world, *others)
    named = {key for _, _, key in jobs}
    remaining = {key for type_, done, key in jobs if (type_, done) != ("TRIAL", OLD)}
    expected = (named - remaining) | ((others - named) if orphans else set())
    assert deleted(world, *(["--orphans"] if orphans else [])) == expected


# --- Settings of the server that must not decide --------------------------------------------------


SETTINGS = {
    "row_limit": ("sql_select_limit", 1),
    "sql_mode": ("sql_mode", "PAD_CHAR_TO_FULL_LENGTH,ANSI,NO_BACKSLASH_ESCAPES,TRADITIONAL"),
    "time_zone": ("time_zone", "+13:00"),
    "first_bytes": ("max_sort_length", 64),
}


@pytest.mark.parametrize(("name", "value"), SETTINGS.values(), ids=SETTINGS)
def test_a_setting_of_the_server_decides_nothing(world, name, value):
    long = "é" * 40  # 80 bytes
    jobs: Any = [("TRIAL", JUST_BEFORE, key) for key in ("gone", "a'\\b", f"{long}a")]
    kept: Any = [("TRIAL", CUTOFF, "kept"), ("OFFICIAL", OLD, f"{long}b")]
    load(world, jobs + kept, "char(64) CHARACTER SET utf8mb4")
    with world.box.database.admin() as connection, connection.cursor() as cursor:
        cursor.execute(f"SELECT @@GLOBAL.{name}")
        ((before,),) = cursor.fetchall()
        cursor.execute(f"SET GLOBAL {name} = %s", (value,))
        try:
            assert deleted(world, "--orphans") == {key for _, _, key in jobs}
        finally:
            cursor.execute(f"SET GLOBAL {name} = %s", (before,))


def test_a_row_deleted_by_a_transaction_that_is_still_open_is_still_there(world):
    with world.box.database.admin() as connection, connection.cursor() as cursor:
        cursor.execute("SET GLOBAL TRANSACTION ISOLATION LEVEL READ UNCOMMITTED")
        cursor.execute("BEGIN")
        cursor.execute(f"DELETE FROM {DATABASE}.{TABLE} WHERE type = 'OFFICIAL'")
        try:
            assert len(deleted(world, *EVERYTHING)) == 20
        finally:
            cursor.execute("ROLLBACK")
            cursor.execute("SET GLOBAL TRANSACTION ISOLATION LEVEL REPEATABLE READ")


def test_a_table_elsewhere_may_be_called_awkwardly_and_have_more_columns(world):
    table = "`old``jobs`.`a %s b`"
    world.box.sql(
        "CREATE OR REPLACE DATABASE `old``jobs`",
        f"GRANT SELECT ON `old``jobs`.* TO {USER}@'%'",
        f"CREATE TABLE {table} LIKE {TABLE}",
        f"INSERT INTO {table} SELECT * FROM {TABLE}",
        f"ALTER TABLE {table} ADD name int DEFAULT 1",  # not to be taken for the key
    )
    assert len(deleted(world, "--db-table", "old`jobs.a %s b")) == 17


# --- Login ----------------------------------------------------------------------------------------


def attempts(world: World) -> list[Any]:
    """What the server refused of each token, None for a login."""
    if world.box.password is not None:
        pytest.skip("no token is checked here")
    return [attempt["refused"] for attempt in world.box.token_attempts()]


OTHER_REGION = {"AWS_DEFAULT_REGION": "us-east-1"}
NO_HOST = {"RETENTION_PURGE_DB_HOST": "no-such-host.invalid"}
NOBODY = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}


@pytest.mark.parametrize(
    ("variables", "code", "says", "tokens"),
    [
        ({}, 0, "", [None]),
        ({"AWS_SECRET_ACCESS_KEY": "x"}, 1, "rds-db:connect", ["wrong signature"]),
        (OTHER_REGION, 1, "IAM authentication", ["another key, day, region or service"]),
        (NOBODY, 2, "credentials", []),
        (NO_HOST, 1, "Check --db-host", []),
        ({"RETENTION_PURGE_DB_PORT": "1"}, 1, "Check --db-host, --db-port", []),
    ],
    ids=["fresh token", "signature", "region", "no credentials", "no host", "no server"],
)
def test_the_login_is_a_token_that_the_server_checks_or_it_is_explained(
    world, variables, code, says, tokens
):
    before = len(attempts(world))
    result = world.purge(*AS_OF, AWS_EC2_METADATA_DISABLED="true", **variables)
    assert (result.code, says in result.err) == (code, True), result.err
    assert attempts(world)[before:] == tokens
    assert len(world.box.live_keys()) == (48 if code else 31)


def refused_before_any_secret(world: World, result: Result, cause: str) -> None:
    """The run failed for this cause, with nothing deleted."""
    assert (result.code, cause in result.error) == (1, True), result.err
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


@pytest.mark.parametrize("password", [None, "s3cret-passw0rd"], ids=["token", "password"])
def test_a_server_whose_certificate_another_ca_made_gets_no_secret(world, tmp_path, password):
    other = Certificates(tmp_path / "tls")
    with TcpProxy(world.box.database.port) as wire:
        way, secret = ("--db-port", str(wire.port)), {"RETENTION_PURGE_DB_PASSWORD": password}
        result = world.purge(*AS_OF, *way, "--ca-bundle", str(other.ca), **secret)
        refused_before_any_secret(world, result, "certificate was not accepted")
        assert wire.sent, "the purge never came this way"
        assert longest_tls_record(wire.sent) < 40, "more than an alert was sent"
        if world.box.password is None:  # the same wire with the right CA: a token passes
            del wire.sent[:]
            world.purge(*AS_OF, *way)
            assert longest_tls_record(wire.sent) > 200


def test_a_server_with_a_certificate_for_another_host_gets_no_secret(world):
    result = world.purge(*AS_OF, "--db-host", "127.0.0.1")
    refused_before_any_secret(world, result, "certificate is not valid for '127.0.0.1'")


def test_a_server_without_tls_gets_no_secret(world):
    with mariadb(world.box.home / "plain", "--skip-ssl") as server, TcpProxy(server.port) as wire:
        for password in (None, "s3cret-passw0rd"):
            way = {"RETENTION_PURGE_DB_PASSWORD": password}
            result = world.purge(*AS_OF, "--db-port", str(wire.port), **way)
            refused_before_any_secret(world, result, "offers no TLS")
        assert not wire.sent, "the client must not go past the server's greeting"


def test_a_password_without_a_ca_bundle_is_for_loopback_only(world):
    user = "local@'%'"
    world.box.sql(
        f"CREATE OR REPLACE USER {user} IDENTIFIED BY 'pässword'",
        f"GRANT SELECT ON {DATABASE}.* TO {user}",
    )
    login = {"RETENTION_PURGE_DB_PASSWORD": "pässword", "RETENTION_PURGE_CA_BUNDLE": None}
    for host, code in ("localhost", 0), ("10.0.0.1", 2), ("localhost.example.com", 2):
        result = world.purge(*AS_OF, "--db-user", "local", "--db-host", host, "-v", **login)
        assert (result.code, "No CA bundle" in result.err) == (code, code == 2), result.err
    assert len(world.box.live_keys()) == 31


@pytest.mark.parametrize("content", ["not given", "no file", "", "example"])
def test_without_a_ca_bundle_no_token_is_sent_and_the_error_says_where_to_get_one(
    world, tmp_path, content
):
    bundle = tmp_path / "bundle.pem"
    if content == "":
        bundle.touch()
    elif content == "example":
        bundle = SCRIPT.parent / "rds-ca-bundle.pem.example"
    given = {"RETENTION_PURGE_CA_BUNDLE": None if content == "not given" else str(bundle)}
    with TcpProxy(world.box.database.port) as wire:
        result = world.purge(*AS_OF, "--db-port", str(wire.port), **given)
        assert not wire.sent
    assert result.code == 2
    assert "truststore.pki.rds.amazonaws.com/global/global-bundle.pem" in result.error
