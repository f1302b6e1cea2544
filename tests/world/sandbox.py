"""A throwaway copy of the world that the purge works in: MariaDB with IAM login over TLS, and S3.

    python tests/world/sandbox.py COMMAND [ARGUMENT ...]

starts both, fills them (see `fill`), runs the command with the environment that leads it there, and
stops everything. `--list`, inside, is what the bucket holds.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import pymysql
import trustme
from moto.s3.models import FakeDeleteMarker, FakeKey, s3_backends
from moto.server import ThreadedMotoServer

HERE = Path(__file__).resolve().parent
MYSQL = HERE.parent.parent / ".mysql"
REGION, BUCKET = "eu-west-1", "incoming-data"
DATABASE, TABLE = "ndvr", "ndvr_job_status"
USER, PASSWORD = "dataops", "s3cret-passw0rd"
KEYS = "AKIASANDBOX", "s3cret-of-the-sandbox"  # of AWS
COLUMNS = """(
    jobId varchar(64) PRIMARY KEY, completedAt timestamp NULL, type varchar(12),
    sourceData varchar(64) NOT NULL) CHARSET utf8mb4 COLLATE utf8mb4_general_ci"""
# Collations that take 'a' and 'A' for the same, but not 'a' and 'a ': MariaDB's, MySQL's.
NOPAD = "utf8mb4_unicode_520_nopad_ci", "utf8mb4_0900_ai_ci"

Job = tuple[str, str | None, str | None, str]
Object = tuple[str, int]  # key and bytes


def copied(version: Any, _memo: Any) -> Any:
    copy = object.__new__(type(version))
    copy.__dict__ |= version.__dict__
    return copy


# moto copies all versions in the bucket, whole, for each listing: nine tenths of its time. The copy
# shares the body, so its end must not close it.
FakeKey.__del__ = lambda _: None
for kind in (FakeKey, FakeDeleteMarker):
    kind.__deepcopy__ = copied


@dataclass
class Server:
    """A running private MariaDB or MySQL. `admin()` is its root, over the Unix socket."""

    kind: str  # mariadb or mysql
    home: Path
    port: int
    process: subprocess.Popen[bytes]

    def admin(self, **options: Any) -> pymysql.Connection:
        limit = "max_statement_time" if self.kind == "mariadb" else "max_execution_time"
        own = f"SET {limit} = 0, wait_timeout = 28800"  # the server's may be short
        # TLS would read all certificates of the machine for each connection.
        options = {"init_command": own, "autocommit": True, "ssl_disabled": True} | options
        return pymysql.connect(unix_socket=str(self.home / "socket"), user="root", **options)

    @property
    def version(self) -> str:
        """As `9.7.4-2` or `10.11.19-MariaDB-0+deb12u1`."""
        return str(self.admin().get_server_info())

    def wait(self) -> None:
        """Until the server answers; raises with its log when it does not."""
        deadline = time.monotonic() + 180
        while True:
            with suppress(pymysql.Error):
                return self.admin().close()
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.home / "log").read_text())
            time.sleep(0.05)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def mysqld() -> list[str]:
    """The command of `mysqld`: RETENTION_TEST_MYSQLD, or what `mysql.sh` unpacked, which runs on
    libraries of its own, by their loader. Raises LookupError, with the reason, if there is none."""
    if own := os.environ.get("RETENTION_TEST_MYSQLD"):
        return [own, "--no-defaults"]
    base, missing = MYSQL / "unpacked/usr", MYSQL / "missing"
    loaders = sorted(base.glob("lib/*/ld-linux-*.so.*"))
    if not loaders:
        reason = missing.read_text().strip() if missing.exists() else "sh tests/mysql.sh gets it"
        raise LookupError(f"no MySQL: {reason}")
    command = [loaders[0], "--library-path", loaders[0].parent, base / "sbin/mysqld"]
    return [*map(str, command), "--no-defaults", f"--basedir={base}"]


def commands(kind: str) -> tuple[list[str], list[str]]:
    """What makes a data directory whose root needs no password, and what serves it."""
    if kind == "mariadb":
        options = ["--no-defaults", "--innodb-log-file-size=8M"]
        # --rpm leaves the PAM module's folder to the MariaDB that is installed.
        made = ["--rpm", "--skip-test-db", "--auth-root-authentication-method=normal"]
        return ["mariadb-install-db", *options, *made], ["mariadbd", *options]
    # loose: a version that lacks the option starts all the same. RDS has no performance schema.
    command = [*mysqld(), "--skip-log-bin", "--innodb-doublewrite=OFF", "--performance-schema=OFF"]
    command += ["--secure-file-priv=", "--innodb-buffer-pool-size=32M", "--loose-mysqlx=OFF"]
    command += ["--loose-innodb-redo-log-capacity=8M", "--loose-auto-generate-certs=OFF"]
    return [*command, "--initialize-insecure"], [*command, "--innodb-fast-shutdown=2"]


@contextmanager
def server(kind: str, home: Path, *options: str) -> Iterator[Server]:
    """A private server in `home`, until it has stopped, which --pdeathsig sees to at the latest."""
    install, serve = commands(kind)
    home.mkdir()
    start, port = ["setpriv", "--pdeathsig=TERM"], free_port()
    # A starting server clears the temporary tables in its own --tmpdir. Root must say that it is.
    place = [f"--datadir={home / 'data'}", f"--tmpdir={home}"]
    place += ["--user=root"] if os.geteuid() == 0 else []
    made = subprocess.run([*start, *install, *place], capture_output=True, text=True, check=False)
    if made.returncode:
        raise RuntimeError(made.stdout + made.stderr)
    place += [f"--socket={home / 'socket'}", f"--port={port}", "--bind-address=127.0.0.1"]
    place += ["--skip-name-resolve", "--innodb-flush-log-at-trx-commit=0"]
    command = [*start, *serve, *place, *options]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        running = Server(kind, home, port, process)
        running.wait()
        yield running
    finally:
        process.terminate()
        process.wait(180)


mariadb = partial(server, "mariadb")


class Certificates:
    """A private CA, and a certificate that it made for localhost."""

    def __init__(self, home: Path) -> None:
        home.mkdir()
        self.ca, own, authority = home / "ca.pem", home / "own.pem", trustme.CA()
        authority.cert_pem.write_to_path(str(self.ca))
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(own))
        self.server_options = f"--ssl-cert={own}", f"--ssl-key={own}", f"--ssl-ca={self.ca}"


@dataclass
class Sandbox:
    """Both servers, running. The purge logs in with `password`; None: with a token. `tokens` says
    whether the server takes tokens, too: it checks each in a process of its own, which is slow."""

    home: Path
    database: Server
    certificates: Certificates
    s3_url: str
    password: str | None
    tokens: bool = False

    @property
    def environment(self) -> dict[str, str]:
        """What `retention_purge.py` reads; nothing of the caller's own AWS or purge settings."""
        own = ("AWS_", "RETENTION_PURGE_")
        kept = {name: text for name, text in os.environ.items() if not name.startswith(own)}
        port, ca = str(self.database.port), str(self.certificates.ca)
        purge = {"DB_HOST": "localhost", "DB_PORT": port, "DB_USER": USER, "DB_NAME": DATABASE}
        purge |= {"DB_PASSWORD": self.password, "CA_BUNDLE": ca, "BUCKET": BUCKET}
        aws = {"ACCESS_KEY_ID": KEYS[0], "SECRET_ACCESS_KEY": KEYS[1]}
        aws |= {"DEFAULT_REGION": REGION, "ENDPOINT_URL_S3": self.s3_url}
        aws |= dict.fromkeys(("CONFIG_FILE", "SHARED_CREDENTIALS_FILE"), os.devnull)
        kept |= {f"AWS_{name}": value for name, value in aws.items()}
        return kept | {f"RETENTION_PURGE_{name}": value for name, value in purge.items() if value}

    def s3(self) -> Any:
        return boto3.Session(*KEYS, region_name=REGION).client("s3", endpoint_url=self.s3_url)

    def load(self, jobs: Iterable[Job], objects: Iterable[Object], columns: str = COLUMNS) -> None:
        """Make the job table and the bucket hold exactly this."""
        columns = columns.replace(*NOPAD) if self.database.kind == "mysql" else columns
        zero_dates = "SET time_zone = '+00:00', sql_mode = '', wait_timeout = 28800"  # are allowed
        self.sql(f"DROP TABLE IF EXISTS {TABLE}", f"CREATE TABLE {TABLE} {columns}")
        with self.database.admin(database=DATABASE, init_command=zero_dates) as connection:
            connection.cursor().executemany(f"INSERT INTO {TABLE} VALUES (%s, %s, %s, %s)", [*jobs])
        self.backend.buckets.pop(BUCKET, None)
        s3_backends.bucket_accounts.pop(BUCKET, None)
        self.backend.create_bucket(BUCKET, REGION)
        for key, size in objects:
            self.put(key, size)

    @property
    def backend(self) -> Any:
        """moto's own store. Its server cannot PUT every key that S3 allows, this can."""
        return s3_backends["123456789012"]["aws"]

    def put(self, key: str, size: int = 21, age: timedelta = timedelta()) -> None:
        """An object of `size` bytes, last modified `age` ago: in whole seconds, as S3 has them."""
        stored = self.backend.put_object(BUCKET, key, bytes(size))
        stored.last_modified = (datetime.now(UTC) - age).replace(microsecond=0, tzinfo=None)

    def live_keys(self) -> list[str]:
        """The live keys in the bucket, in the order of their bytes."""
        bucket = self.backend.buckets[BUCKET].keys
        return sorted(key for key, last in bucket.items() if isinstance(last, FakeKey))

    def sql(self, *statements: str) -> Any:
        """Run statements as the server's root; the rows of the last one."""
        with self.database.admin(database=DATABASE) as connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
            return cursor.fetchall()

    def job_ids(self) -> list[str]:
        return [row[0] for row in self.sql(f"SELECT jobId FROM {TABLE} ORDER BY jobId")]

    def token_attempts(self) -> list[str]:
        """What arrived at the server as a password of `dataops`, one entry per login attempt."""
        return (self.home / "tokens").read_text().splitlines()


def seed() -> tuple[list[Job], list[Object]]:
    """The original system's data: 50 jobs, 48 objects."""
    files = HERE / "jobs.csv", HERE / "objects.csv"
    lines = (file.read_text().splitlines()[1:] for file in files)
    jobs, objects = ([line.split(",") for line in found] for found in lines)
    rows = [(job, completed or None, kind, name) for job, completed, kind, name in jobs]
    return rows, [(key, int(size)) for key, size in objects]


@contextmanager
def sandbox(kind: str = "mariadb") -> Iterator[Sandbox]:
    """Start everything; stop and remove everything, whatever happens. The purge's user has a
    password, and on MariaDB also tokens, which the server has checked by PAM; only root may add a
    PAM service. Raises LookupError if there is no MySQL on this machine."""
    tokens = kind == "mariadb" and os.geteuid() == 0
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="purge-sandbox-")))
        (home / "tokens").touch()
        certificates, login = Certificates(home / "tls"), f"BY '{PASSWORD}'"
        options = ["--plugin-load-add=auth_pam", "--pam-use-cleartext-plugin=ON"] if tokens else []
        options += certificates.server_options
        database = stack.enter_context(server(kind, home / kind, *options))
        if tokens:
            pam = Path("/etc/pam.d") / f"retention-{home.name}"
            checker = [sys.executable, HERE / "check_token.py", home / "tokens"]
            checker += [f"localhost:{database.port}", REGION, *KEYS]
            asked = f"pam_exec.so expose_authtok seteuid quiet {' '.join(map(str, checker))}"
            pam.write_text(f"auth required {asked}\naccount required pam_permit.so\n")
            stack.callback(pam.unlink)
            native = f"mysql_native_password USING PASSWORD('{PASSWORD}')"
            login = f"VIA {native} OR pam USING '{pam.name}'"
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request otherwise
        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        stack.callback(moto.stop)
        s3_url = "http://{}:{}".format(*moto.get_host_and_port())
        database.admin().cursor().execute(f"CREATE DATABASE {DATABASE}")
        box = Sandbox(home, database, certificates, s3_url, PASSWORD, tokens)
        create = f"CREATE USER {USER}@'%' IDENTIFIED {login} REQUIRE SSL"
        box.sql(create, f"GRANT SELECT ON {DATABASE}.* TO {USER}@'%'")
        yield box


mysql_sandbox = partial(sandbox, "mysql")


def fill(box: Sandbox) -> None:
    """The seed, with an OFFICIAL job more for the object of an expired one, in a versioned bucket.
    The objects are of the last months of 2018."""
    jobs, objects = seed()
    box.load([*jobs, ("upgraded", "2019-05-20 09:00:00", "OFFICIAL", "incoming_000012")], [])
    box.s3().put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    for number, (key, size) in enumerate(objects):
        day = datetime(2018, 10, 1, 9, tzinfo=UTC) + timedelta(days=2 * number)
        box.put(key, size, datetime.now(UTC) - day)


def main() -> int:
    if sys.argv[1:] == ["--list"]:
        objects = boto3.client("s3").list_objects_v2(Bucket=BUCKET).get("Contents", [])
        lines = [f"{item['Size']:>4}  {item['Key']}" for item in objects]
        print(*lines, f"{len(objects)} objects", sep="\n")
        return 0
    # These must unwind the stack that stops the servers.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))
    with sandbox() as box:
        fill(box)
        box.password = None if box.tokens else PASSWORD
        return subprocess.run(sys.argv[1:], env=box.environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
