"""A throwaway copy of the world that the purge works in: MariaDB with IAM login over TLS, and S3.

    python tests/world/sandbox.py COMMAND [ARGUMENT ...]
    python tests/world/sandbox.py --list

starts both servers, loads the original system's 50 jobs and 48 objects, runs the command with the
environment that leads it there, stops everything, and exits with the command's code. `--list`,
used inside, prints what the bucket holds.

The database is a private `mariadbd`: own data directory, free port, certificates made for the run.
Its user `dataops` logs in with an IAM token, checked on the server's side (`check_token.py`, called
by PAM). S3 is moto's server. `retention_purge.py` knows nothing of all this.

`mysql_sandbox()`, for the tests alone, is the same with a real MySQL (`mysql.sh` gets it) in place
of MariaDB, and a password in place of the token.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import logging
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import boto3
import pymysql
import trustme
from moto.s3.models import FakeKey, s3_backends
from moto.server import ThreadedMotoServer

HERE = Path(__file__).resolve().parent
MYSQL = HERE.parent.parent / ".mysql"
REGION = "eu-west-1"
BUCKET = "incoming-data"
DATABASE = "ndvr"
USER = "dataops"
TABLE = "ndvr_job_status"
PASSWORD = "s3cret-passw0rd"  # on MySQL, which has no stand-in for IAM
COLUMNS = """(
    jobId varchar(64) PRIMARY KEY, completedAt timestamp NULL, type varchar(12),
    sourceData varchar(64) NOT NULL) CHARSET utf8mb4 COLLATE utf8mb4_general_ci"""

Job = tuple[str, str | None, str | None, str]


# A collation that takes 'a' and 'A' for the same, but not 'a' and 'a '.
NOPAD = {"mariadb": "utf8mb4_unicode_520_nopad_ci", "mysql": "utf8mb4_0900_ai_ci"}


@dataclass
class Server:
    """A running private MariaDB or MySQL. `admin()` is its root, over the Unix socket."""

    kind: Literal["mariadb", "mysql"]
    home: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def version(self) -> str:
        """As `9.7.4-2` or `10.11.19-MariaDB-0+deb12u1`."""
        with self.admin() as connection, connection.cursor() as cursor:
            cursor.execute("SELECT VERSION()")
            return str(cursor.fetchall()[0][0])

    def admin(self, **options: Any) -> pymysql.Connection[Any]:
        return pymysql.connect(
            unix_socket=str(self.home / "socket"), user="root", autocommit=True, **options
        )

    @property
    def time_limit(self) -> str:
        """The variable that limits a statement's time: seconds on MariaDB, ms on MySQL. 0: none."""
        return "max_statement_time" if self.kind == "mariadb" else "max_execution_time"

    def wait(self, seconds: float = 60) -> None:
        """Until the server answers; raises with its log when it does not."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.admin().close()
            except pymysql.Error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((self.home / "log").read_text()) from None
                time.sleep(0.05)


@contextmanager
def serving(
    kind: Literal["mariadb", "mysql"], home: Path, command: list[str], *options: str
) -> Iterator[Server]:
    """A server, from its start until it has stopped. `home` holds its `data`.

    Should this process be killed with SIGKILL, the kernel sends the server SIGTERM (--pdeathsig).
    """
    port = free_port()
    command = ["setpriv", "--pdeathsig=TERM", *as_user(), *command]
    command += [f"--datadir={home / 'data'}", f"--socket={home / 'socket'}"]
    command += ["--bind-address=127.0.0.1", f"--port={port}", "--skip-name-resolve"]
    command += [f"--tmpdir={home}"]  # a starting server clears the temporary tables in its own
    command += ["--innodb-flush-log-at-trx-commit=0", *options]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        server = Server(kind, home, port, process)
        server.wait()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def servers_user() -> str | None:
    """Whom the servers run as. None if we are not root: as we are."""
    if os.geteuid() != 0:
        return None
    return "mysql" if "mysql" in {entry.pw_name for entry in pwd.getpwall()} else "nobody"


def as_user() -> list[str]:
    """That user, as options of setpriv."""
    user = servers_user()
    if user is None:
        return []
    entry = pwd.getpwnam(user)
    return [f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]


def give_away(path: Path) -> None:
    """Make that user its owner."""
    user = servers_user()
    if user is not None:
        entry = pwd.getpwnam(user)
        os.chown(path, entry.pw_uid, entry.pw_gid)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def mariadb(home: Path, *options: str) -> Iterator[Server]:
    """A private `mariadbd` in `home`."""
    if os.geteuid() != 0:
        sys.exit("The sandbox adds a PAM service to /etc/pam.d: run this as root (sudo).")
    home.mkdir(mode=0o755)
    give_away(home)
    subprocess.run(
        f"mariadb-install-db --no-defaults --user=mysql --datadir={home / 'data'} --tmpdir={home}"
        " --skip-test-db --auth-root-authentication-method=normal"
        " --innodb-log-file-size=8M".split(),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    command = ["mariadbd", "--no-defaults", "--innodb-log-file-size=8M"]
    with serving("mariadb", home, command, *options) as server:
        yield server


# --- MySQL ----------------------------------------------------------------------------------------


# loose: a version that lacks the option starts all the same.
MYSQL_OPTIONS = (
    "--secure-file-priv=",
    "--loose-mysqlx=OFF",
    "--skip-log-bin",
    "--innodb-buffer-pool-size=32M",
    "--loose-innodb-redo-log-capacity=8M",
    "--innodb-doublewrite=OFF",
    "--performance-schema=OFF",  # as RDS has it
    "--loose-auto-generate-certs=OFF",
)


def mysqld() -> list[str]:
    """The command of `mysqld`: RETENTION_TEST_MYSQLD, or what `mysql.sh` unpacked.

    The unpacked one runs on libraries of its own, by their loader. Raises LookupError, with the
    reason, if there is none.
    """
    own = os.environ.get("RETENTION_TEST_MYSQLD")
    if own:
        return [own, "--no-defaults"]
    there = MYSQL / "unpacked/usr"
    loaders = sorted(there.glob("lib/*/ld-linux-*.so.*"))
    if not loaders:
        missing = MYSQL / "missing"
        raise LookupError(
            f"no MySQL: {missing.read_text().strip()}"
            if missing.exists()
            else "no MySQL: sh tests/mysql.sh gets it"
        )
    return [
        *(str(loaders[0]), "--library-path", str(loaders[0].parent)),
        *(str(there / "sbin/mysqld"), "--no-defaults"),
        f"--basedir={there}",
        f"--plugin-dir={there / 'lib/mysql/plugin'}",
        f"--lc-messages-dir={there / 'share/mysql'}",
        f"--character-sets-dir={there / 'share/mysql/charsets'}",
    ]


def new_mysql_data(data: Path) -> None:
    """A fresh data directory: a copy of one that is made once, as that takes seconds."""
    command = [*mysqld(), *MYSQL_OPTIONS]
    program = command[command.index("--no-defaults") - 1]
    made_by = f"{command} {os.stat(program).st_mtime_ns} {servers_user()}"
    template = MYSQL / f"data-{hashlib.sha256(made_by.encode()).hexdigest()[:12]}"
    MYSQL.mkdir(exist_ok=True)
    with (MYSQL / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not template.exists():
            for old in MYSQL.glob("data-*"):
                shutil.rmtree(old)
            with tempfile.TemporaryDirectory(prefix="purge-mysql-", dir=MYSQL) as made:
                make_mysql_data(Path(made), command)
                (Path(made) / "data").rename(template)
        subprocess.run(["cp", "-a", template, data], check=True)


def make_mysql_data(home: Path, command: list[str]) -> None:
    """`data` in `home`, as a new server has it, with a root that needs no password."""
    give_away(home)
    start = ["setpriv", "--pdeathsig=TERM", *as_user(), *command]
    made = subprocess.run(
        [*start, "--initialize-insecure", f"--datadir={home / 'data'}", f"--tmpdir={home}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if made.returncode:
        raise RuntimeError(made.stdout)


@contextmanager
def mysql(home: Path, *options: str) -> Iterator[Server]:
    """A private `mysqld` in `home`. Raises LookupError if there is none on this machine."""
    command = [*mysqld(), *MYSQL_OPTIONS, "--innodb-fast-shutdown=2"]
    home.mkdir(mode=0o755)
    give_away(home)
    new_mysql_data(home / "data")
    with serving("mysql", home, command, *options) as server:
        yield server


class Certificates:
    """A private CA, and a certificate that it made for one host name."""

    def __init__(self, home: Path, host: str = "localhost", **issue: Any) -> None:
        home.mkdir(mode=0o755)
        self.authority = trustme.CA()
        self.ca, self.cert, self.key = home / "ca.pem", home / "cert.pem", home / "key.pem"
        issued = self.authority.issue_cert(host, **issue)
        self.authority.cert_pem.write_to_path(str(self.ca))
        issued.private_key_pem.write_to_path(str(self.key))
        self.cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        give_away(self.key)

    @property
    def server_options(self) -> tuple[str, ...]:
        return f"--ssl-cert={self.cert}", f"--ssl-key={self.key}", f"--ssl-ca={self.ca}"


@contextmanager
def token_login(home: Path) -> Iterator[tuple[str, Path, Path]]:
    """A PAM service that asks `check_token.py`. Yields its name, its settings and its log."""
    service, settings, log = f"retention-purge-{home.name}", home / "iam.json", home / "iam.log"
    log.touch()
    checker = f"{sys.executable} {HERE / 'check_token.py'} {settings}"
    pam = Path("/etc/pam.d") / service
    pam.write_text(
        f"auth required pam_exec.so expose_authtok seteuid quiet {checker}\n"
        "account required pam_permit.so\n"
    )
    try:
        yield service, settings, log
    finally:
        pam.unlink()


@dataclass
class Sandbox:
    """Both servers, running. `environment` leads a purge to them.

    `password` is that of the purge's user; None: it logs in with a token, logged in `token_log`.
    """

    home: Path
    database: Server
    certificates: Certificates
    s3_url: str
    token_log: Path
    credentials: dict[str, str]
    password: str | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What `retention_purge.py` reads; nothing of the caller's own AWS or purge settings."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AWS_", "RETENTION_PURGE_"))
        }
        secret = {} if self.password is None else {"RETENTION_PURGE_DB_PASSWORD": self.password}
        return kept | {
            "AWS_ACCESS_KEY_ID": self.credentials["access_key"],
            "AWS_SECRET_ACCESS_KEY": self.credentials["secret_key"],
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL_S3": self.s3_url,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "RETENTION_PURGE_DB_HOST": "localhost",
            "RETENTION_PURGE_DB_PORT": str(self.database.port),
            "RETENTION_PURGE_DB_USER": USER,
            "RETENTION_PURGE_DB_NAME": DATABASE,
            "RETENTION_PURGE_CA_BUNDLE": str(self.certificates.ca),
            "RETENTION_PURGE_BUCKET": BUCKET,
            **secret,
        }

    def s3(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.s3_url,
            region_name=REGION,
            aws_access_key_id=self.credentials["access_key"],
            aws_secret_access_key=self.credentials["secret_key"],
        )

    def load(
        self, jobs: Iterable[Job], objects: Iterable[tuple[str, int]], columns: str = COLUMNS
    ) -> None:
        """Make the job table and the bucket hold exactly this."""
        columns = columns.replace(NOPAD["mariadb"], NOPAD[self.database.kind])
        with self.database.admin(database=DATABASE) as connection:
            cursor = connection.cursor()
            cursor.execute("SET time_zone = '+00:00', sql_mode = ''")  # zero dates are allowed
            cursor.execute(f"DROP TABLE IF EXISTS {TABLE}")
            cursor.execute(f"CREATE TABLE {TABLE} {columns}")
            rows = list(jobs)
            if rows:
                cursor.executemany(f"INSERT INTO {TABLE} VALUES (%s, %s, %s, %s)", rows)
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
        """An object of `size` bytes, last modified `age` ago."""
        stored = self.backend.put_object(BUCKET, key, bytes(size))
        # S3 keeps whole seconds.
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

    def token_attempts(self) -> list[dict[str, Any]]:
        """What arrived at the server as a password of `dataops`, one entry per login attempt."""
        return [json.loads(line) for line in self.token_log.read_text().splitlines()]


def seed() -> tuple[list[Job], list[tuple[str, int]]]:
    """The original system's data: 50 jobs, 48 objects."""
    with (HERE / "jobs.csv").open(newline="") as file:
        jobs = [
            (row["jobId"], row["completedAt"] or None, row["type"], row["sourceData"])
            for row in csv.DictReader(file)
        ]
    with (HERE / "objects.csv").open(newline="") as file:
        objects = [(row["key"], int(row["size"])) for row in csv.DictReader(file)]
    return jobs, objects


@contextmanager
def new_home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="purge-sandbox-") as home:
        os.chmod(home, 0o755)
        yield Path(home)


@contextmanager
def s3_server() -> Iterator[str]:
    """moto's server; its URL. All of them in one process have the same buckets."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request otherwise
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        moto.stop()


def new_credentials() -> dict[str, str]:
    return {"access_key": "AKIASANDBOX", "secret_key": secrets.token_urlsafe(30)}


@contextmanager
def sandbox() -> Iterator[Sandbox]:
    """Start everything; stop and remove everything, whatever happens."""
    with ExitStack() as stack:
        home = stack.enter_context(new_home())
        service, settings, log = stack.enter_context(token_login(home))
        certificates = Certificates(home / "tls")
        server = stack.enter_context(
            mariadb(
                home / "mariadb",
                *certificates.server_options,
                "--plugin-load-add=auth_pam",
                "--pam-use-cleartext-plugin=ON",
            )
        )
        credentials = new_credentials()
        settings.write_text(
            json.dumps(
                credentials
                | {"host": "localhost", "port": server.port, "region": REGION, "log": str(log)}
            )
        )
        with server.admin() as connection:
            cursor = connection.cursor()
            cursor.execute(f"CREATE DATABASE {DATABASE}")
            cursor.execute(
                f"CREATE USER {USER}@'%' IDENTIFIED VIA pam USING '{service}' REQUIRE SSL"
            )
            cursor.execute(f"GRANT SELECT ON {DATABASE}.* TO {USER}@'%'")
        s3_url = stack.enter_context(s3_server())
        yield Sandbox(home, server, certificates, s3_url, log, credentials)


@contextmanager
def mysql_sandbox() -> Iterator[Sandbox]:
    """The same with MySQL. Its user may also delete rows, and logs in with a password.

    Raises LookupError if there is no MySQL on this machine.
    """
    with ExitStack() as stack:
        home = stack.enter_context(new_home())
        certificates = Certificates(home / "tls")
        server = stack.enter_context(mysql(home / "mysql", *certificates.server_options))
        with server.admin() as connection:
            cursor = connection.cursor()
            cursor.execute(f"CREATE DATABASE {DATABASE}")
            cursor.execute(f"CREATE USER {USER}@'%%' IDENTIFIED BY %s REQUIRE SSL", (PASSWORD,))
            cursor.execute(f"GRANT SELECT, DELETE ON {DATABASE}.* TO {USER}@'%'")
        s3_url = stack.enter_context(s3_server())
        log = home / "iam.log"
        log.touch()
        yield Sandbox(home, server, certificates, s3_url, log, new_credentials(), PASSWORD)


def main() -> int:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if sys.argv[1] == "--list":
        objects = boto3.client("s3").list_objects_v2(Bucket=BUCKET).get("Contents", [])
        print(*(f"{item['Size']:>4}  {item['Key']}" for item in objects), sep="\n")
        print(f"{len(objects)} objects")
        return 0
    # SIGTERM, like Ctrl-C, must unwind the stack that stops the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with sandbox() as box:
            box.load(*seed())
            return subprocess.run(sys.argv[1:], env=box.environment, check=False).returncode
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
