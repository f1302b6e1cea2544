"""README: what it says is what the program does. Each block is run, or checked, from its text."""

from __future__ import annotations

import ast
import csv
import fnmatch
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import boto3
import botocore.session
import moto
import pymysql
import pytest
import yaml
from botocore import xform_name
from botocore.validate import ParamValidator
from conftest import AS_OF, SCRIPT, World
from proxies import Answer, Request, S3Proxy
from sandbox import BUCKET, DATABASE, REGION, TABLE, USER, Sandbox, as_user, seed, servers_user

ROOT = SCRIPT.parent
README = (ROOT / "README.md").read_text()
BLOCKS = [
    textwrap.dedent(found)
    for found in re.findall(r"^( *)```\w*\n(.*?)^\1```$", README, re.MULTILINE | re.DOTALL)
    for found in found[1:]
]
HOST_PLACES = ("/opt/purge", "/var/lib/purge", "/var/log/purge", "/etc/retention_purge.env")


def block(start: str) -> str:
    """The one fenced block that begins so."""
    (found,) = [each for each in BLOCKS if each.startswith(start)]
    return found


def rows_of_table(head: str) -> list[list[str]]:
    """The cells of the rows of the table whose first column is called so."""
    table = README[README.index(f"| {head} |") :].split("\n\n")[0]
    return [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]


def program_help() -> str:
    command = [sys.executable, str(SCRIPT), "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# --- Words and numbers ----------------------------------------------------------------------------


def test_it_is_short_and_tells_how_long_the_script_is():
    assert len(README.splitlines()) <= 300
    lines = len(SCRIPT.read_text().splitlines())
    assert re.findall(r"(\d+) lines", README) == [str(lines)]


def test_it_lists_exactly_the_options_of_the_program():
    in_help = re.findall(r"^  (?:-\w, )?(--[a-z-]+)", program_help(), re.MULTILINE)
    in_table = re.findall(r"`(--[a-z-]+)`", " ".join(row[0] for row in rows_of_table("option")))
    told = [name for name in ("--help", "--version") if f"`{name}`" in README]
    assert sorted(in_help) == sorted(in_table + told)
    assert set(re.findall(r"(?<![\w-])--[a-z-]+(?=`)", README)) <= {*in_help}


def test_it_gives_the_defaults_of_the_program():
    shown = re.sub(r"-\n +", "-", program_help())
    parts = re.split(r"^  (?:-\w, )?(--[a-z-]+)", shown, flags=re.MULTILINE)
    told = {name: " ".join(text.split()) for name, text in pairwise(parts)}
    for options, defaults, *_ in rows_of_table("option"):
        names, values = re.findall(r"--[a-z-]+", options), defaults.replace("`", "").split(", ")
        for name, default in zip(names, values * (len(names) // len(values)), strict=True):
            marks = re.findall(r"\[(?:default: )?([^\]<>]*?)(?:; [^;]*)?\]", told[name])
            spelt = {"off": [], "none": [], "no limit": [], "empty": ['""']}.get(default, [default])
            assert marks == spelt, name


def test_its_exit_codes_are_those_of_the_program():
    shown = program_help().partition("Exit codes:")[2]
    in_help = re.findall(r"^ +(\d[\d, ]*)  (.*?)(?:;.*)?$", shown, re.MULTILINE)
    assert [(code, meaning) for code, meaning, _ in rows_of_table("exit code")] == in_help


def test_its_messages_are_those_of_the_program():
    strings = [
        node.value
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    for message, _ in rows_of_table("message"):
        for words in re.split("…|: ", message.strip("`")):
            of_servers = ("Access denied for user", "Can't connect to MySQL server", "AccessDenied")
            if not words.strip().startswith(of_servers):
                assert any(words.strip() in each for each in strings), words
    assert len(rows_of_table("message")) >= 10


def test_its_transcript_is_what_the_program_prints(world: World):
    command, *shown = block("$ python retention_purge.py").splitlines()
    options = shlex.split(command.partition(" ... ")[2])
    printed = world.purge(*options).out.splitlines()
    more = re.compile(r"\[(\d+) more\]")
    (place,) = [n for n, line in enumerate(shown) if more.fullmatch(line)]
    left_out = int(more.findall(shown[place])[0])
    assert len(printed) == len(shown) - 1 + left_out
    printed[place : place + left_out] = [shown[place]]
    varying = re.compile(r"\d{4}-\d\d-\d\dT[\d:+]+(?=\t)|(?<=^run id).*|(?<=^seconds).*")
    assert [varying.sub("", line) for line in printed] == [varying.sub("", line) for line in shown]


# --- Installed, every night -----------------------------------------------------------------------


@dataclass
class Host:
    """The tool installed after README in folders of its own, with the user of the servers as its
    own; README's texts are for it once `here` has put its places into them."""

    home: Path
    user: str
    become: list[str]
    box: Sandbox

    def here(self, text: str) -> str:
        for place in HOST_PLACES:
            text = text.replace(place, f"{self.home}{place}")
        return text

    def path(self, place: str) -> Path:
        return Path(self.here(place))

    def settle(self, **changes: str) -> None:
        """README's settings file, with the sandbox's values in it and what a host with a role does
        not need."""
        wanted = self.box.environment | {"RETENTION_PURGE_REGION": REGION} | changes
        text = self.here(block("RETENTION_PURGE_DB_HOST="))
        for name, value in wanted.items():
            line = f"{name}='{value}'"
            if name.startswith(("RETENTION_PURGE_", "AWS_")):
                text, found = re.subn(f"^{name}='.*'$", line, text, flags=re.MULTILINE)
                text += "" if found else f"{line}\n"
        self.path("/etc/retention_purge.env").write_text(text)

    def shell(self, command: str) -> subprocess.CompletedProcess[str]:
        """As cron would run it: with `sh -c`, nothing in the environment, as the tool's user."""
        return subprocess.run(
            [*self.become, "/usr/bin/env", "-i", "/bin/sh", "-c", command],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        lines = self.path("/var/log/purge/audit.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] in kinds]


PREFIX = "incoming data/"  # as in README's settings


def load_below_prefix(box: Sandbox) -> None:
    jobs, objects = seed()
    box.load(jobs, [(PREFIX + key, size) for key, size in objects])


@pytest.fixture(scope="module")
def host(box: Sandbox) -> Host:
    home = box.home / "host"
    for place in ("opt", "var/lib", "var/log", "etc"):
        (home / place).mkdir(parents=True)
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    become, python = some_python(packages)
    host = Host(home, (servers_user() if len(become) > 1 else None) or "root", become, box)
    script = host.here(block("useradd"))
    script = re.sub(r"-([og]) purge\b", rf"-\1 {host.user}", script)
    url = re.search(r"https://\S+\.pem", script)
    assert url is not None
    assert url[0] in SCRIPT.read_text()
    script = script.replace(url[0], box.certificates.ca.as_uri())
    assert "python3.11 -m venv" in script
    script = script.replace("python3.11", python)
    # The packages are those of the tests: setup.sh has installed them from the same file.
    pip = re.search(r"^\S+/pip (.*)\n", script, re.MULTILINE)
    assert pip is not None
    assert pip[1].endswith(f"--require-hashes -r {host.path('/opt/purge')}/requirements.txt")
    own = f"{host.path('/opt/purge')}/venv/lib/python3.*/site-packages"
    script = script.replace(pip[0], f"echo {packages} | tee {own}/tests.pth >/dev/null\n")
    script = script.replace(f"| tee {own}/tests.pth", f"| (cd {own} && cat >tests.pth)")
    done = subprocess.run(
        ["sh", "-e", "-c", f"useradd() {{ :; }}\n{script}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return host


def some_python(packages: str) -> tuple[list[str], str]:
    """How to become the tool's user, and a Python that this user can run; else we stay root."""
    become = ["setpriv", *as_user()]
    can = f"import ensurepip, sys; sys.path.append('{packages}'); import boto3; sys.version_info[1]"
    for python in (sys.executable, "/usr/bin/python3.11", "/usr/bin/python3"):
        command = [*become, "sh", "-c", '"$0" -c "$1"', python, f"{can} > 10 or sys.exit(1)"]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return become, python
    return ["setpriv"], sys.executable


def test_the_modes_keep_others_out(host: Host):
    modes = {place: host.path(place).stat().st_mode & 0o777 for place in HOST_PLACES}
    assert list(modes.values()) == [0o755, 0o750, 0o750, 0o640]
    assert host.path("/opt/purge/run").stat().st_mode & 0o777 == 0o755


@pytest.fixture
def syslog(tmp_path: Path) -> Iterator[Any]:
    """A socket like /dev/log; called, it gives the lines that came since."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        path = Path(f"/tmp/purge-log-{os.getpid()}")
        log.bind(str(path))
        path.chmod(0o666)
        log.settimeout(0.3)

        def lines() -> list[str]:
            found = []
            while True:
                try:
                    found.append(log.recv(65536).decode())
                except TimeoutError:
                    return found

        lines.path = path  # type: ignore[attr-defined]
        yield lines
        path.unlink()


def test_the_cron_line_purges_then_says_nothing_and_leaves_a_line_where_it_fails(
    host: Host, syslog: Any
):
    found = re.fullmatch(r"(?:[\d*]+ ){5}purge (.*)\n", block("17 2 * * *"))
    assert found is not None
    assert "%" not in found[1]  # cron would take it for a newline
    line = host.here(found[1]).replace("logger ", f"logger -u {syslog.path} ")
    success = host.path("/var/lib/purge/last-success")
    load_below_prefix(host.box)
    as_of = {"RETENTION_PURGE_AS_OF": AS_OF[1]}
    nights = [as_of, as_of, as_of | {"RETENTION_PURGE_BUCKET": "no-such-bucket"}]
    for night, settings in enumerate(nights):
        host.settle(**settings)
        success.unlink(missing_ok=True)
        result = host.shell(line)
        assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)
        assert success.exists() == (night < 2)
        lines = syslog()
        assert bool(lines) == (night == 2), lines
    assert len(host.box.live_keys()) == 31
    assert all("retention_purge" in line for line in lines)
    assert any("Error: " in line and "no-such-bucket" in line for line in lines)
    assert lines[-1].endswith("failed, exit code 1")
    codes = [event["exit_code"] for event in host.events("end")]
    assert codes == [0, 0, 1]
    size = sum(len(json.dumps(event)) + 1 for event in host.events("delete", "deleted"))
    assert size / 17 == pytest.approx(
        int(re.findall(r"some (\d+) bytes a key", README)[0]), rel=0.2
    )


def test_what_stands_before_the_tool_fails_into_syslog_too(host: Host, syslog: Any):
    line = block("17 2 * * *").partition("purge ")[2]
    line = host.here(line).replace("logger ", f"logger -u {syslog.path} ")
    for text in ("RETENTION_PURGE_PREFIX=incoming data/\n", None):
        settings = host.path("/etc/retention_purge.env")
        if text is None:
            settings.unlink()
        else:
            settings.write_text(text)
        assert host.shell(line).stderr == ""
        assert re.search(r"failed, exit code [1-9]", syslog()[-1])
    settings.touch()


def test_the_systemd_units_are_valid(host: Host, tmp_path: Path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    parts = re.split(r"^# /etc/systemd/system/(\S+)\n", block("# /etc/systemd"), flags=re.MULTILINE)
    files = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(files) == ["retention-purge.service", "retention-purge.timer"]
    for name, text in files.items():
        here = re.sub(r"^User=purge$", f"User={host.user}", host.here(text), flags=re.MULTILINE)
        (tmp_path / name).write_text(here)
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in files)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    mine = [line for line in result.stderr.splitlines() if "retention-purge" in line]
    assert not mine
    calendar = re.findall(r"^OnCalendar=(.*)$", files["retention-purge.timer"], re.MULTILINE)
    assert subprocess.call(["systemd-analyze", "calendar", *calendar], stdout=subprocess.PIPE) == 0


def test_the_logrotate_stanza_keeps_every_line(host: Host, tmp_path: Path):
    if shutil.which("logrotate") is None:
        pytest.skip("no logrotate here")
    stanza = host.here(block("/var/log/purge/audit.jsonl {"))
    conf, log = tmp_path / "conf", host.path("/var/log/purge/audit.jsonl")
    conf.write_text(stanza.replace("su purge purge", f"su {host.user} {host.user}"))
    conf.chmod(0o644)
    log.write_text("lines\n")
    if host.user != "root":
        shutil.chown(log, host.user, host.user)
    command = ["logrotate", "--state", str(tmp_path / "state"), str(conf)]
    checked = subprocess.run([*command, "-d"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0
    assert "error" not in checked.stderr
    subprocess.run([*command, "-f"], check=True)
    assert not log.exists()
    rotated = log.with_name("audit.jsonl.1")
    assert rotated.read_text() == "lines\n"
    rotated.unlink()


# --- Undo -----------------------------------------------------------------------------------------


def steps() -> list[str]:
    text = README.partition("## Undo\n")[2].partition("\n## ")[0]
    return re.split(r"^\d\. ", text, flags=re.MULTILINE)[1:]


def commands(text: str) -> list[str]:
    return [" ".join(each.split()) for each in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def test_the_undo_steps_bring_objects_and_rows_back(host: Host):
    box, log = host.box, host.path("/var/log/purge/audit.jsonl")
    log.unlink(missing_ok=True)
    load_below_prefix(box)
    box.s3().put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    before, rows = box.live_keys(), box.sql(f"SELECT * FROM {TABLE} ORDER BY jobId")
    host.settle(RETENTION_PURGE_AS_OF=AS_OF[1])
    run = host.here("/opt/purge/run")
    with granted(box, "DELETE", USER):
        purged = host.shell(f"{run} --delete-jobs --json")
    assert purged.returncode == 0, purged.stderr
    run_id = json.loads(purged.stdout)["run_id"]
    assert len(box.live_keys()) == 31
    assert len(box.job_ids()) < len(rows)

    stop, find, dry, undo, keep, script = steps()
    assert commands(stop) == [
        "rm /etc/cron.d/retention-purge",
        "systemctl disable --now retention-purge.timer",
    ]
    assert run_id in host.shell(host.here(commands(find)[0])).stdout
    look = host.here(commands(dry)[-1]).replace("RUN-ID", run_id)
    shown = host.shell(look)
    assert shown.returncode == 0
    assert len(re.findall("\t", shown.stdout)) == 3 * 17
    assert len(box.live_keys()) == 31
    assert commands(undo) == ["--dry-run"]
    for _ in range(2):
        assert host.shell(look.replace(" --dry-run", "")).returncode == 0
        assert box.live_keys() == before
    (program,) = [each for each in BLOCKS if '"delete-job"' in each]
    assert program.splitlines()[-1] in script
    program = host.here(program).replace("RUN-ID", run_id).replace("python3", sys.executable, 1)
    made = subprocess.run(["sh", "-c", program], capture_output=True, text=True, check=True).stdout
    box.sql(*made.splitlines())
    assert box.sql(f"SELECT * FROM {TABLE} ORDER BY jobId") == rows
    name = host.events("delete")[0]["key"].removeprefix(PREFIX)
    box.sql(commands(keep)[0].replace("NAME", name))
    assert host.shell(f"{run} -q").returncode == 0
    assert sorted({*before} - {*box.live_keys()}) == [
        event["key"] for event in host.events("delete")[1:17]
    ]


@contextmanager
def granted(box: Sandbox, right: str, user: str) -> Iterator[None]:
    """A right on the schema, for a while."""
    box.sql(f"GRANT {right} ON {DATABASE}.* TO '{user}'@'%'")
    yield
    box.sql(f"REVOKE {right} ON {DATABASE}.* FROM '{user}'@'%'")


# --- Rights ---------------------------------------------------------------------------------------


def policy() -> list[dict[str, Any]]:
    text = block('{"Version"').replace("BUCKET", BUCKET).replace("PREFIX", PREFIX)
    statements: list[dict[str, Any]] = json.loads(text)["Statement"]
    return statements


def matches(pattern: str, text: str) -> bool:
    """As IAM compares: `*` is any text; nothing else in these patterns is special."""
    return fnmatch.fnmatchcase(text, pattern.replace("[", "[[]"))


def needs(request: Request) -> list[tuple[str, str]]:
    """The actions that S3 would ask of the identity, each with its resource."""
    arn = f"arn:aws:s3:::{BUCKET}"
    if request.operation in ("list", "versioning"):
        names = {"list": "s3:ListBucket", "versioning": "s3:GetBucketVersioning"}
        return [(names[request.operation], arn)]
    if "versions" in request.query:
        return [("s3:ListBucketVersions", arn)]
    if request.operation == "delete":
        keys = re.findall(r"<Key>(.*?)</Key>(<VersionId>)?", request.body.decode())
        return [(f"s3:DeleteObject{'Version' * bool(v)}", f"{arn}/{key}") for key, v in keys]
    raise AssertionError(request.path)


class Guard:
    """Answers in S3's place where the policy does not grant what the request needs."""

    def __init__(self, statements: list[dict[str, Any]]) -> None:
        self.statements, self.used = statements, set[str]()

    def __call__(self, request: Request) -> Answer | None:
        wanted = needs(request)
        self.used |= {action for action, _ in wanted}
        prefix = request.query.get("prefix", [""])[0]
        if all(self.grants(action, resource, prefix) for action, resource in wanted):
            return None
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        return Answer(403, body)

    def grants(self, action: str, resource: str, prefix: str) -> bool:
        for statement in self.statements:
            actions = statement["Action"]
            condition = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix", "*")
            if (
                action in ([actions] if isinstance(actions, str) else actions)
                and matches(statement["Resource"], resource)
                and matches(condition, prefix)
            ):
                return True
        return False


def test_purge_and_undo_work_with_exactly_what_the_policy_grants(
    world: World, proxy: S3Proxy, tmp_path: Path
):
    load_below_prefix(world.box)
    world.box.s3().put_bucket_versioning(
        Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"}
    )
    before, log = world.box.live_keys(), str(tmp_path / "log")
    place = ("--prefix", PREFIX, "--audit-log", log)
    proxy.before = guard = Guard(policy())
    foreign = world.purge(*AS_OF, "--prefix", "incoming")
    assert (foreign.code, "s3:ListBucket" in foreign.err) == (1, True)
    assert world.purge(*AS_OF, *place).code == 0
    assert len(world.box.live_keys()) == 31
    undo = (*place, "--undo", log)
    refused = world.purge(*undo)
    assert refused.code == 1
    assert "s3:DeleteObjectVersion" in refused.err
    assert "s3:DeleteObjectVersion" in README
    more = {"Action": "s3:DeleteObjectVersion", "Resource": f"arn:aws:s3:::{BUCKET}/{PREFIX}*"}
    guard.statements.append(more)
    assert world.purge(*undo).code == 0
    assert world.box.live_keys() == before
    named = {
        name for each in guard.statements for name in [each["Action"]] if isinstance(name, str)
    }
    named |= {
        name
        for each in guard.statements
        if isinstance(each["Action"], list)
        for name in each["Action"]
    }
    assert guard.used == named - {"rds-db:connect"}


def test_the_mysql_grants_are_enough(world: World):
    text = block("CREATE USER")
    statements = [each.strip() for each in re.sub("--.*", "", text).split(";") if each.strip()]
    iam = "IDENTIFIED WITH AWSAuthenticationPlugin AS 'RDS'"
    assert iam in statements[0]
    with pytest.raises(pymysql.Error) as missing:  # the plugin is, the syntax is not wrong
        world.box.sql(statements[0])
    assert missing.value.args[0] == 1524
    world.box.sql(statements[0].replace(iam, "IDENTIFIED BY 'secret'"), *statements[1:])
    try:
        settings = {"RETENTION_PURGE_DB_USER": "purge", "RETENTION_PURGE_DB_PASSWORD": "secret"}
        assert world.purge(*AS_OF, "--json", **settings).summary["deleted"]["expired"] == 17
        refused = world.purge(*AS_OF, "--json", "--delete-jobs", **settings)
        assert refused.code == 3
        assert "SELECT, DELETE" in text
        world.box.sql(f"GRANT SELECT, DELETE ON {DATABASE}.{TABLE} TO 'purge'@'%'")
        assert world.purge(*AS_OF, "--json", "--delete-jobs", **settings).summary["jobs_deleted"]
    finally:
        world.box.sql("DROP USER 'purge'@'%'")


# --- Batch Operations -----------------------------------------------------------------------------


def aws_commands() -> list[list[str]]:
    """Each `aws SERVICE OPERATION ...` of README, taken apart as a shell would."""
    joined = README.replace("\\\n", " ")
    lines = re.findall(r"^aws .*", joined, re.MULTILINE)
    lines += [" ".join(each.split()) for each in re.findall(r"`(aws [^`]+)`", joined)]
    return [shlex.split(re.sub(r" >\S+", "", line)) for line in lines]


def test_the_aws_commands_are_those_that_aws_documents():
    found = set()
    for _, service, name, *words in aws_commands():
        model = botocore.session.get_session().get_service_model(service.replace("s3api", "s3"))
        operations = {xform_name(each, "-"): each for each in model.operation_names}
        members = model.operation_model(operations[name]).input_shape.members
        names = {xform_name(member, "-"): member for member in members}
        found.add(name)
        for place, word in enumerate(words):
            if word.startswith("--") and word not in ("--query", "--cli-input-json"):
                member = names[word[2:]]
                value = words[place + 1] if place + 1 < len(words) else ""
                if value.startswith("{"):
                    report = ParamValidator().validate(json.loads(value), members[member])
                    assert not report.has_errors(), report.generate_report()
    assert {"describe-db-instances", "create-job", "get-object-tagging"} <= found


def test_the_lifecycle_rule_is_added_to_those_of_the_bucket(tmp_path: Path):
    program = re.search(r"python3 - >new-rules.json.*?^END$", README, re.MULTILINE | re.DOTALL)
    assert program is not None
    own = {"ID": "own", "Status": "Enabled", "Filter": {"Prefix": "x"}, "Expiration": {"Days": 9}}
    for rules in ([], [own]):
        old = {"Rules": rules, "TransitionDefaultMinimumObjectSize": "varies_by_storage_class"}
        (tmp_path / "rules.json").write_text(json.dumps(old))
        script = program[0].replace("python3", sys.executable, 1)
        subprocess.run(["sh", "-c", script], cwd=tmp_path, check=True)
        new = json.loads((tmp_path / "new-rules.json").read_text().replace("BUCKET", "bucket"))
        assert new["TransitionDefaultMinimumObjectSize"] == "varies_by_storage_class"
        with moto.mock_aws():
            s3 = boto3.client("s3", region_name="us-east-1")
            s3.create_bucket(Bucket="bucket")
            s3.put_bucket_lifecycle_configuration(**new)
            kept = s3.get_bucket_lifecycle_configuration(Bucket="bucket")["Rules"]
        assert [rule["ID"] for rule in kept] == [rule["ID"] for rule in rules] + ["retention-purge"]
        (create,) = [words for words in aws_commands() if "create-job" in words]
        operation = json.loads(create[create.index("--operation") + 1])
        (tag,) = operation["S3PutObjectTagging"]["TagSet"]
        assert kept[-1]["Filter"]["Tag"] == tag


def test_the_manifest_is_what_batch_operations_reads(world: World, tmp_path: Path):
    """ "Bucket,Key" on each line, no header, keys URL-encoded (S3 user guide, "Specifying a
    manifest"; JobManifestSpec in the S3 Control API reference)."""
    keys = ["a,b", 'say "x"', "100%", "a+b c/d", "é\U0001f600", " lead", "tab\there", "new\nline"]
    old = "2019-01-01 00:00:00"
    jobs = [(str(n), old, "TRIAL", key) for n, key in enumerate(keys)]
    world.box.load(jobs, [(key, 1) for key in keys])
    path = tmp_path / "manifest.csv"
    assert world.purge("-n", "--manifest", str(path)).code == 0
    text = path.read_bytes().decode("ascii")
    assert '"' not in text
    assert text.endswith("\n")
    rows = list(csv.reader(text.splitlines()))
    (create,) = [words for words in aws_commands() if "create-job" in words]
    spec = json.loads(create[create.index("--manifest") + 1])["Spec"]
    assert spec == {"Format": "S3BatchOperations_CSV_20180820", "Fields": ["Bucket", "Key"]}
    assert all(re.fullmatch(r"[\w.~/%-]+", key, re.ASCII) for _, key in rows)
    assert [(bucket, unquote(key)) for bucket, key in rows] == [
        (BUCKET, key) for key in sorted(keys)
    ]


# --- In the CI of others --------------------------------------------------------------------------

# Inside network and process namespaces of their own, so that the ports are free whatever runs on
# this machine, and nothing is left running: forwards the port of the database service to a socket.
INSIDE = """
import socket, subprocess, sys, threading
def pump(source, target):
    while data := source.recv(65536):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)
def serve():
    while True:
        client, server = listener.accept()[0], socket.socket(socket.AF_UNIX)
        server.connect(sys.argv[2])
        for pair in ((client, server), (server, client)):
            threading.Thread(target=pump, args=pair, daemon=True).start()
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
threading.Thread(target=serve, daemon=True).start()
sys.exit(subprocess.run(["bash", "-e", "-c", sys.argv[3]]).returncode)
"""


def test_the_ci_job_runs_as_it_stands(box: Sandbox, tmp_path: Path):
    namespaces = ["unshare", "--net", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*namespaces, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces can be made here (unshare)")
    for tool in ("ip", "bash", "curl"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here")
    (job,) = yaml.safe_load(block("retention-purge:")).values()
    service = job["services"]["db"]
    _, install, smoke = job["steps"]
    assert "-r requirements.txt" in install["run"]
    (tmp_path / "venv").symlink_to(sys.prefix)
    shutil.copy(SCRIPT, tmp_path)
    (port,) = (each.split(":")[1] for each in service["ports"])
    made = service["env"]  # what the image makes of them at its start
    user = f"'{made['MYSQL_USER']}'@'%'"
    box.sql(
        f"DROP TABLE IF EXISTS {TABLE}",
        f"CREATE USER {user} IDENTIFIED BY '{made['MYSQL_PASSWORD']}'",
        f"GRANT ALL ON {made['MYSQL_DATABASE']}.* TO {user}",
    )
    database = ("-c", INSIDE, port, str(box.database.home / "socket"))
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    try:
        result = subprocess.run(
            [*namespaces, sys.executable, *database, smoke["run"]],
            cwd=tmp_path,
            env=kept | job["env"],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    finally:
        box.sql(f"DROP USER {user}", f"DROP TABLE IF EXISTS {TABLE}")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^deleted +1 expired", result.stdout, re.MULTILINE)


def test_the_policy_runs_in_process_too():
    text = block("from retention_purge import *")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "AWS_ACCESS_KEY_ID": "x"}
    environment |= {"AWS_SECRET_ACCESS_KEY": "x"}
    program = f"{text}\ntest_what_would_go()"
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


# --- Supply chain ---------------------------------------------------------------------------------


def test_every_package_that_is_installed_is_pinned_with_its_hash():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [re.fullmatch(r"(\S+)==(\S+)( --hash=sha256:[0-9a-f]{64})+", line) for line in lines[2:]]
    versions = {pin[1]: pin[2] for pin in pins if pin}
    assert len(versions) == len(pins)
    assert {name: importlib.metadata.version(name) for name in versions} == versions
    direct = list(versions)[:3]
    assert direct == ["boto3", "click", "PyMySQL"]
    wanted, found = set(direct), set[str]()
    while wanted:
        name = wanted.pop()
        found.add(name)
        needed = importlib.metadata.requires(name) or []
        wanted |= {re.split(r"[^\w.-]", each)[0] for each in needed if "extra ==" not in each}
        wanted -= found
    assert found - {"colorama"} == {*versions}  # colorama: click on Windows
