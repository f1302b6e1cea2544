"""What the tool reads in a real database: the policy to the byte, whatever the table and the server
are set to; and whom it gives its secret. test_mysql.py runs it on MySQL again."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from conftest import AS_OF, EVERYTHING, OLD, SCRIPT, World, setting
from proxies import TcpProxy
from sandbox import DATABASE, TABLE, USER, Certificates, mariadb
from test_job_rows import during, open_change

CUTOFF = "2019-03-05 00:00:00"  # 90 days before AS_OF
JUST_BEFORE = "2019-03-04 23:59:59"


def load(world: World, jobs: Any, column: str = "varchar(64) COLLATE utf8mb4_general_ci") -> None:
    """Jobs as (type, completedAt, sourceData), in such a column, and an object for each key."""
    rows: Any = [(f"job{n}", done, type_, key) for n, (type_, done, key) in enumerate(jobs)]
    columns = f"completedAt timestamp NULL, type varchar(12), sourceData {column}"
    objects = [(key, 1) for _, _, key in jobs if key]
    world.box.load(rows, objects, f"(jobId varchar(64) PRIMARY KEY, {columns})")


def deleted(world: World, *options: str, retained: int = 0) -> set[str]:
    """The keys that a run deletes; by its plan, not merely saved by the re-check."""
    before = {*world.box.live_keys()}
    result = world.purge(*AS_OF, *options, "--json")
    assert result.code == 0, result.err
    gone, summary = before - {*world.box.live_keys()}, result.summary
    told = [summary[what]["expired"] + summary[what]["orphan"] for what in ("deleted", "planned")]
    assert [*told, summary["retained"]] == [len(gone), len(gone) + retained, retained]
    return gone


# --- Keys are bytes -------------------------------------------------------------------------------

SPELLINGS = ["abc", "ABC", "Abc", "abc ", "abc  ", "àbc", "a", "straße", "strasse", "Straße"]
SPELLINGS += ["it's", "a\\b", 'a"b', "%", "a%", "_", "~", "?", "\ud7ff", "\ue000", "日本", "≒"]
SPELLINGS += ["жук", "ゃ", "や", "😀", "x" * 64, "`", "a\\'"]
ORPHANS = ["aBC", "abC ", "ÀBC", "STRASSE", "??", "ЖУК", "ヤ", "😁", "y" * 64, "y" * 65]
COLLATIONS = ["utf8mb4_general_ci", "utf8mb4_bin", "utf8mb4_unicode_520_nopad_ci"]
COLLATIONS += ["utf8mb3_general_ci", "latin1_german1_ci"]
# The highest of these characters that a column of the character set can hold.
HIGHEST = {"utf8mb4": "\U0010ffff", "utf8mb3": "\uffff", "latin1": "\xff"}


@pytest.mark.parametrize("index", ["", ", KEY (sourceData)"], ids=["scan", "index"])
@pytest.mark.parametrize("collation", COLLATIONS)
def test_keys_that_only_a_collation_equates_are_different(world, proxy, collation, index):
    """A third of the names has a remaining job, a third gets one after the plan, as do orphans. An
    orphan stays whose name the column cannot hold: a job's would stand there mangled, or cut."""
    highest = HIGHEST[collation.partition("_")[0]]
    names = [name for name in SPELLINGS if max(name) <= highest]
    orphans = [name for name in ORPHANS if max(name) <= highest and len(name) <= 64]
    kept, late = names[1::3], [*names[2::3], *orphans[::2]]
    jobs = [("TRIAL", OLD, name) for name in names] + [("OFFICIAL", OLD, name) for name in kept]
    load(world, jobs, f"varchar(64) COLLATE {collation}{index}")
    for name in ORPHANS:
        world.box.put(name, age=timedelta(days=30))
    rows = [(f"late{n}", name) for n, name in enumerate(late)]
    with open_change(world, f"INSERT INTO {TABLE} VALUES (%s, NULL, 'TRIAL', %s)", rows) as other:
        during(proxy, "list", other.commit)
        gone = deleted(world, "--orphans", retained=len(late))
    assert gone == {*names, *orphans} - {*kept, *late}


# --- Which jobs are expired -----------------------------------------------------------------------

REMAINING = [
    *((kind, OLD) for kind in ("OFFICIAL", "trial", "TRIAL ", " TRIAL", "TRÎAL", "BETA", "", None)),
    *(("TRIAL", moment) for moment in (None, "0000-00-00 00:00:00", CUTOFF, "2019-05-01")),
]


def test_a_job_that_is_not_surely_expired_keeps_its_object(world):
    jobs: Any = [(*facts, f"kept for {facts}") for facts in REMAINING]
    jobs += [("TRIAL", OLD, key) for _, _, key in jobs]
    jobs += [("TRIAL", OLD, key) for key in ("", None)]  # these name nothing
    jobs += [("TRIAL", OLD, "gone"), ("TRIAL", JUST_BEFORE, "just gone")]
    load(world, jobs)
    assert deleted(world) == {"gone", "just gone"}


def test_a_date_with_a_zero_in_it_is_no_completion(world):
    jobs = [("1", "2019-00-10", "TRIAL", "kept"), ("2", "1960-01-01", "TRIAL", "gone")]
    columns = "completedAt datetime, type varchar(12), sourceData varchar(64)"
    world.box.load(jobs, [("kept", 1), ("gone", 1)], f"(jobId varchar(9) PRIMARY KEY, {columns})")
    assert deleted(world) == {"gone"}


# --- Settings of the server that must not decide --------------------------------------------------

SETTINGS = {
    "row_limit": ("sql_select_limit", 1),
    "sql_mode": ("sql_mode", "PAD_CHAR_TO_FULL_LENGTH,ANSI,NO_BACKSLASH_ESCAPES,TRADITIONAL"),
    "time_zone": ("time_zone", "+13:00"),
    "first_bytes": ("max_sort_length", 64),
    "login": ("init_connect", "SET time_zone = '+13:00', sql_mode = 'ANSI', autocommit = 0"),
}


@pytest.mark.parametrize(("name", "value"), SETTINGS.values(), ids=SETTINGS)
def test_a_setting_of_the_server_decides_nothing(world, name, value):
    long = "é" * 40  # 80 bytes
    gone = ["gone", "a'\\b", f"{long}a"]
    jobs = [*(("TRIAL", JUST_BEFORE, key) for key in gone), ("TRIAL", CUTOFF, "kept")]
    load(world, [*jobs, ("OFFICIAL", OLD, f"{long}b")], "char(64) CHARACTER SET utf8mb4")
    with setting(world.box, name, value):
        assert deleted(world, "--orphans") == {*gone}


def test_a_row_deleted_by_a_transaction_that_is_still_open_is_still_there(world):
    level = "SET GLOBAL TRANSACTION ISOLATION LEVEL"
    world.box.sql(f"{level} READ UNCOMMITTED")
    try:
        with open_change(world, f"DELETE FROM {TABLE} WHERE type = 'OFFICIAL'"):
            assert len(deleted(world, *EVERYTHING)) == 20
    finally:
        world.box.sql(f"{level} REPEATABLE READ")


def test_a_table_elsewhere_may_be_called_awkwardly_and_have_more_columns(world):
    old = "`old``jobs`"
    copy = f"CREATE TABLE {old}.`a %s b` (name int) SELECT * FROM {TABLE}"  # no key is called so
    world.box.sql(f"DROP DATABASE IF EXISTS {old}", f"CREATE DATABASE {old}", copy)
    world.box.sql(f"GRANT SELECT ON {old}.* TO {USER}@'%'")
    assert len(deleted(world, "--db-table", "old`jobs.a %s b")) == 17


# --- Login ----------------------------------------------------------------------------------------

TOKEN = {"RETENTION_PURGE_DB_PASSWORD": None}


def test_a_login_that_fails_is_explained(world):
    nobody = dict.fromkeys(["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
    stranger = {"AWS_SECRET_ACCESS_KEY": "x"}  # whose token the server checks
    for variables, code, says in (stranger, 1, "rds-db:connect"), (nobody, 2, "credentials"):
        result = world.purge(*AS_OF, AWS_EC2_METADATA_DISABLED="true", **TOKEN, **variables)
        assert (result.code, says in result.error) == (code, True), result.err


def test_a_server_without_tls_of_another_ca_or_for_another_host_gets_no_secret(world, tmp_path):
    with mariadb(world.box.home / "plain", "--skip-ssl") as server, TcpProxy(server.port) as wire:
        others = [("--db-port", str(wire.port), "offers no TLS")]
        others += [("--ca-bundle", str(Certificates(tmp_path / "tls").ca), "was not accepted")]
        others += [("--db-host", "127.0.0.1", "certificate is not valid for '127.0.0.1'")]
        for secret in TOKEN, dict.fromkeys(TOKEN, "s3cret-passw0rd"):
            before = len(world.box.token_attempts())
            for option, value, cause in others:
                error = world.purge(*AS_OF, option, value, **secret).error
                assert (cause in error, "No secret was sent" in error) == (True, True), error
            assert len(world.box.token_attempts()) == before
            world.purge("-n", **secret)
            if world.box.tokens and secret is TOKEN:
                assert len(world.box.token_attempts()) == before + 1, "the right server gets it"
        assert not wire.sent, "the client must not go past the greeting of a server without TLS"
    assert len(world.box.live_keys()) == 48


def test_a_password_without_a_ca_bundle_is_for_loopback_only(world):
    create = "CREATE USER local@'%' IDENTIFIED BY 'pässword'"
    grant = f"GRANT SELECT ON {DATABASE}.* TO local@'%'"
    world.box.sql("DROP USER IF EXISTS local@'%'", create, grant)
    login = {"RETENTION_PURGE_DB_PASSWORD": "pässword", "RETENTION_PURGE_CA_BUNDLE": None}
    for host, code in ("localhost", 0), ("10.0.0.1", 2), ("localhost.example.com", 2):
        result = world.purge(*AS_OF, "--db-user", "local", "--db-host", host, **login)
        assert (result.code, "No CA bundle" in result.err) == (code, code == 2), result.err
    assert len(world.box.live_keys()) == 31


def test_without_a_ca_bundle_no_token_is_sent_and_the_error_says_where_to_get_one(world):
    for bundle in None, "/no/file", "/dev/null", f"{SCRIPT.parent}/rds-ca-bundle.pem.example":
        result = world.purge("--db-port", "1", **TOKEN, RETENTION_PURGE_CA_BUNDLE=bundle)
        assert result.code == 2, "nobody listens at that port"
        assert "truststore.pki.rds.amazonaws.com/global/global-bundle.pem" in result.error
