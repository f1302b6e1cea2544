"""A throwaway copy of the world that the purge works in: MariaDB with IAM login over TLS, and S3.

    python tests/sandbox.py COMMAND [ARGUMENT ...]
    python tests/sandbox.py --list

starts both servers, loads the original system's 50 jobs and 48 objects, runs the command with the
environment that leads it there, stops everything, and exits with the command's code. `--list`,
used inside, prints what the bucket holds.

The database is a private `mariadbd`: own data directory, free port, certificates made for the run.
Its user `dataops` logs in with an IAM token, checked on the server's side (`check_token.py`, called
by PAM). S3 is moto's server. `retention_purge.py` knows nothing of all this.
"""

from __future__ import annotations

import csv
import json
import logging
import os
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
from typing import Any

import boto3
import pymysql
import trustme
from moto.s3.models import FakeKey, s3_backends
from moto.server import ThreadedMotoServer

HERE = Path(__file__).resolve().parent
REGION = "eu-west-1"
BUCKET = "incoming-data"
DATABASE = "ndvr"
USER = "dataops"
TABLE = "ndvr_job_status"
COLUMNS = """(
    jobId varchar(64) PRIMARY KEY, completedAt timestamp NULL, type varchar(12),
    sourceData varchar(64) NOT NULL) CHARSET utf8mb4 COLLATE utf8mb4_general_ci"""

Job = tuple[str, str | None, str | None, str]


@dataclass
class MariaDB:
    """A running private server. `admin()` is its root, over the Unix socket."""

    home: Path
    port: int
    process: subprocess.Popen[bytes]

    def admin(self, **options: Any) -> pymysql.Connection[Any]:
        return pymysql.connect(
            unix_socket=str(self.home / "socket"), user="root", autocommit=True, **options
        )

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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def mariadb(home: Path, *options: str) -> Iterator[MariaDB]:
    """Start a private `mariadbd` in `home`, and stop it, as the Debian package's user `mysql`.

    Should this process be killed with SIGKILL, the kernel sends the server SIGTERM (--pdeathsig).
    """
    if os.geteuid() != 0:
        sys.exit("The sandbox adds a PAM service to /etc/pam.d: run this as root (sudo).")
    home.mkdir(mode=0o755)
    shutil.chown(home, "mysql", "mysql")
    data = home / "data"
    subprocess.run(
        f"mariadb-install-db --no-defaults --user=mysql --datadir={data} --tmpdir={home}"
        " --skip-test-db --auth-root-authentication-method=normal"
        " --innodb-log-file-size=8M".split(),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    port = free_port()
    command = ["setpriv", "--reuid=mysql", "--regid=mysql", "--clear-groups", "--pdeathsig=TERM"]
    command += ["mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={home / 'socket'}"]
    command += ["--bind-address=127.0.0.1", f"--port={port}", "--skip-name-resolve"]
    command += [f"--tmpdir={home}"]  # a starting server clears the temporary tables in its own
    command += ["--innodb-log-file-size=8M", "--innodb-flush-log-at-trx-commit=0", *options]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        server = MariaDB(home, port, process)
        server.wait()
        yield server
    finally:
        process.terminate()
        process.wait()


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
        shutil.chown(self.key, "mysql", "mysql")

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
    """Both servers, running. `environment` leads a purge to them."""

    home: Path
    database: MariaDB
    certificates: Certificates
    s3_url: str
    token_log: Path
    credentials: dict[str, str]

    @property
    def environment(self) -> dict[str, str]:
        """What `retention_purge.py` reads; nothing of the caller's own AWS or purge settings."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AWS_", "RETENTION_PURGE_"))
        }
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
        with self.database.admin(database=DATABASE) as connection:
            cursor = connection.cursor()
            cursor.execute(f"DROP TABLE IF EXISTS {TABLE}")
            cursor.execute(f"CREATE TABLE {TABLE} {columns}")
            cursor.execute("SET time_zone = '+00:00', sql_mode = ''")  # zero dates are allowed
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

    def job_ids(self) -> list[str]:
        with self.database.admin(database=DATABASE) as connection:
            cursor = connection.cursor()
            cursor.execute(f"SELECT jobId FROM {TABLE} ORDER BY jobId")
            return [row[0] for row in cursor.fetchall()]

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
def sandbox() -> Iterator[Sandbox]:
    """Start everything; stop and remove everything, whatever happens."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="purge-sandbox-")))
        home.chmod(0o755)
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
        credentials = {"access_key": "AKIASANDBOX", "secret_key": secrets.token_urlsafe(30)}
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
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request otherwise
        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        stack.callback(moto.stop)
        host, port = moto.get_host_and_port()
        yield Sandbox(home, server, certificates, f"http://{host}:{port}", log, credentials)


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
