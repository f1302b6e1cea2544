"""README is true: its tables are the program's help, and its blocks are run, or checked, as they
stand, with the places and names of a sandbox put into them."""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore import xform_name
from botocore.validate import ParamValidator
from conftest import AS_OF, SCRIPT, World, events, version
from proxies import Answer, Request
from sandbox import BUCKET, REGION, TABLE, Sandbox, seed

ROOT = SCRIPT.parent
README = (ROOT / "README.md").read_text()
BLOCKS = [
    textwrap.dedent(text)
    for _, text in re.findall(r"^( *)```\w*\n(.*?)^\1```$", README, re.MULTILINE | re.DOTALL)
]


def block(start: str) -> str:
    """The one fenced block that begins so."""
    (found,) = [each for each in BLOCKS if each.startswith(start)]
    return found


def rows_of_table(head: str) -> list[list[str]]:
    """The cells of the rows of the table whose first column is called so."""
    table = README[README.index(f"| {head} |") :].split("\n\n")[0]
    return [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


# --- Words and numbers ----------------------------------------------------------------------------


@cache
def help_text() -> str:
    return run(sys.executable, str(SCRIPT), "--help").stdout


def test_it_is_short_and_tells_how_long_the_script_is():
    assert len(README.splitlines()) <= 300
    assert re.findall(r"(\d+) lines", README) == [str(len(SCRIPT.read_text().splitlines()))]


def test_its_options_and_defaults_are_those_of_the_program():
    joined = re.sub(r"-\n +", "-", help_text())
    parts = re.split(r"^  (?:-\w, )?(--[a-z-]+)", joined, flags=re.MULTILINE)[1:]
    told = {name: " ".join(text.split()) for name, text in zip(*[iter(parts)] * 2, strict=True)}
    assert set(re.findall(r"(?<![\w-])--[a-z-]+(?=`)", README)) <= {*told}
    listed = {"--help", "--version"}
    for options, defaults, *_ in rows_of_table("option"):
        names, values = re.findall(r"--[a-z-]+", options), defaults.replace("`", "").split(", ")
        listed |= {*names}
        for name, default in zip(names, values * (len(names) // len(values)), strict=True):
            marks = re.findall(r"\[(?:default: )?([^\]<>]*?)(?:; [^;]*)?\]", told[name])
            spelt = {"off": [], "none": [], "no limit": [], "empty": ['""']}.get(default, [default])
            assert marks == spelt, name
    assert listed == {*told}


def test_its_exit_codes_are_those_of_the_program():
    shown = help_text().partition("Exit codes:")[2]
    in_help = re.findall(r"^ +(\d[\d, ]*)  (.*?)(?:;.*)?$", shown, re.MULTILINE)
    assert [(code, meaning) for code, meaning, _ in rows_of_table("exit code")] == in_help


def test_its_messages_are_those_of_the_program():
    nodes = [n for n in ast.walk(ast.parse(SCRIPT.read_text())) if isinstance(n, ast.Constant)]
    of_servers = ("Access denied for user", "Can't connect to MySQL server", "AccessDenied")
    for message, _ in rows_of_table("message"):
        for words in map(str.strip, re.split("…|: ", message.strip("`"))):
            said = any(words in node.value for node in nodes if isinstance(node.value, str))
            assert said or words.startswith(of_servers), words


def test_its_transcript_is_what_the_program_prints(world: World):
    command, *shown = block("$ python retention_purge.py").splitlines()
    printed = world.purge(*shlex.split(command.partition(" ... ")[2])).out.splitlines()
    assert shown[1] == f"[{len(printed) - len(shown) + 1} more]"
    shown[1:2] = printed[1 : len(printed) - len(shown) + 2]
    varying = re.compile(r"\d{4}-\d\d-\d\dT[\d:+]+(?=\t)|(?<=^run id).*|(?<=^seconds).*")
    assert [varying.sub("", line) for line in printed] == [varying.sub("", line) for line in shown]


# --- Installed, every night, undone ---------------------------------------------------------------

PLACES = "/opt/purge", "/var/lib/purge", "/var/log/purge", "/etc/retention_purge.env"
PREFIX = "incoming data/"  # as in README's settings


class Host:
    """The tool installed as README says, in folders of its own, by and for root."""

    def __init__(self, box: Sandbox) -> None:
        self.box, self.home = box, box.home / "host"
        for place in ("opt", "var/lib", "var/log", "etc"):
            (self.home / place).mkdir(parents=True)
        self.log, self.settings = self.path("/var/log/purge/audit.jsonl"), self.path(PLACES[3])
        script = self.here(re.sub(r"-([og]) purge\b", r"-\1 root", block("useradd")))
        script = re.sub(r"https://\S+\.pem", box.certificates.ca.as_uri(), script)
        # The packages are those of the tests: setup.sh has installed them from the same file.
        packages = next(path for path in sys.path if path.endswith("site-packages"))
        own = self.here("/opt/purge/venv/lib/python3.*/site-packages")
        script = re.sub(r"(?m)^.*/pip install .*$", f"(cd {own} && echo {packages} >a.pth)", script)
        script = "useradd() { :; }\n" + script.replace("python3.11 ", f"{sys.executable} ")
        done = run("sh", "-e", "-c", script, cwd=ROOT)
        assert done.returncode == 0, done.stderr

    def here(self, text: str) -> str:
        for place in PLACES:
            text = text.replace(place, f"{self.home}{place}")
        return text

    def path(self, place: str) -> Path:
        return Path(self.here(place))

    def settle(self, **changes: str) -> None:
        """README's settings file with the sandbox's values in it."""
        wanted = self.box.environment | {"RETENTION_PURGE_REGION": REGION} | changes
        names = {name for name in wanted if name.startswith(("RETENTION_PURGE_", "AWS_"))}
        lines = self.here(block("RETENTION_PURGE_DB_HOST=")).splitlines()
        lines = [line for line in lines if line.partition("=")[0] not in names]
        self.settings.write_text("\n".join(lines + [f"{n}='{wanted[n]}'" for n in names]))

    def shell(self, command: str) -> subprocess.CompletedProcess[str]:
        """As cron would run it: with `sh -c`, nothing in the environment."""
        return run("/usr/bin/env", "-i", "/bin/sh", "-c", self.here(command), cwd="/")


@pytest.fixture(scope="module")
def host(box: Sandbox) -> Host:
    return Host(box)


@pytest.fixture
def below_prefix(world: World) -> list[str]:
    """The seed's objects below README's prefix, in a versioned bucket."""
    jobs, objects = seed()
    world.box.load(jobs, [(PREFIX + key, size) for key, size in objects])
    version(world)
    return world.box.live_keys()


@pytest.mark.usefixtures("below_prefix")
def test_the_cron_line_purges_says_nothing_and_leaves_a_line_where_anything_fails(host: Host):
    modes = [host.path(place).stat().st_mode & 0o777 for place in PLACES]
    assert modes == [0o755, 0o750, 0o750, 0o640]
    found = re.fullmatch(r"(?:[\d*]+ ){5}purge ([^%]*)\n", block("17 2 * * *"))
    assert found is not None
    syslog, success = host.home / "syslog", host.path("/var/lib/purge/last-success")
    line = found[1].replace("logger -t retention_purge", f"cat >{syslog}")

    def night(code: int) -> None:
        success.unlink(missing_ok=True)
        result = host.shell(line)
        assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)
        assert success.exists() == (code == 0)
        assert syslog.read_text().endswith(f"failed, exit code {code}\n" if code else "")

    host.settle(RETENTION_PURGE_AS_OF=AS_OF[1])
    night(0)
    assert len(host.box.live_keys()) == 31
    host.settle(RETENTION_PURGE_BUCKET="no-such-bucket")
    night(1)
    assert re.search("Error: .*no-such-bucket", syslog.read_text())
    assert [event["exit_code"] for event in events(host.log, "end")] == [0, 1]
    host.settings.write_text("RETENTION_PURGE_PREFIX=incoming data/\n")  # without quotes
    night(127)
    size = sum(len(json.dumps(event)) + 1 for event in events(host.log, "delete", "deleted"))
    (told,) = re.findall(r"some (\d+) bytes a key", README)
    assert size / 17 == pytest.approx(int(told), rel=0.2)


def test_the_systemd_units_are_valid(host: Host, tmp_path: Path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    parts = re.split(r"^# /etc/systemd/system/(\S+)\n", block("# /etc/systemd"), flags=re.MULTILINE)
    files = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(files) == ["retention-purge.service", "retention-purge.timer"]
    for name, text in files.items():
        (tmp_path / name).write_text(host.here(text).replace("User=purge\n", "User=root\n"))
    units = [str(tmp_path / name) for name in files]
    environment = os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
    done = run("systemd-analyze", "verify", "--man=no", *units, env=environment)
    assert "retention-purge" not in done.stderr
    calendar = re.findall(r"^OnCalendar=(.*)$", files["retention-purge.timer"], re.MULTILINE)
    assert run("systemd-analyze", "calendar", *calendar).returncode == 0


def test_the_logrotate_stanza_keeps_every_line(host: Host, tmp_path: Path):
    if shutil.which("logrotate") is None:
        pytest.skip("no logrotate here")
    stanza = host.here(block("/var/log/purge/audit.jsonl {"))
    (tmp_path / "conf").write_text(stanza.replace("su purge purge", "su root root"))
    (tmp_path / "conf").chmod(0o644)
    host.log.write_text("lines\n")
    command = ["logrotate", "--state", str(tmp_path / "state"), str(tmp_path / "conf")]
    dry = run(*command, "-d")
    assert (dry.returncode, "error" in dry.stderr) == (0, False)
    assert run(*command, "-f").returncode == 0
    rotated = host.log.with_name("audit.jsonl.1")
    assert (rotated.read_text(), host.log.exists()) == ("lines\n", False)
    rotated.unlink()


@pytest.mark.usefixtures("may_delete")
def test_the_undo_steps_bring_objects_and_rows_back(host: Host, below_prefix: list[str]):
    box = host.box
    host.log.unlink(missing_ok=True)
    host.settle(RETENTION_PURGE_AS_OF=AS_OF[1])
    rows = box.sql(f"SELECT * FROM {TABLE} ORDER BY jobId")
    run_id = json.loads(host.shell("/opt/purge/run --delete-jobs --json").stdout)["run_id"]
    assert (len(box.live_keys()), len(box.job_ids())) == (31, 28)

    text = README.partition("## Undo\n")[2].partition("\n## ")[0]
    commands = [
        [" ".join(each.split()) for each in re.findall(r"(?<!`)`([^`]+)`(?!`)", step)]
        for step in re.split(r"^\d\. ", text, flags=re.MULTILINE)[1:]
    ]
    assert run_id in host.shell(commands[1][0]).stdout
    look = commands[2][-1].replace("RUN-ID", run_id)
    shown = host.shell(look).stdout
    assert (shown.count("\t"), len(box.live_keys())) == (3 * 17, 31)
    for _ in range(2):
        assert host.shell(look.replace(" --dry-run", "")).returncode == 0
        assert box.live_keys() == below_prefix
    program = host.here(block("python3 - /var/log/purge")).replace("RUN-ID", run_id)
    box.sql(*run("sh", "-c", program).stdout.splitlines())
    assert box.sql(f"SELECT * FROM {TABLE} ORDER BY jobId") == rows
    stays, *others = [event["key"] for event in events(host.log, "delete")[:17]]
    box.sql(commands[4][0].replace("NAME", stays.removeprefix(PREFIX)))
    assert host.shell("/opt/purge/run -q").returncode == 0
    assert sorted({*below_prefix} - {*box.live_keys()}) == others


# --- Rights, and the CI of others -----------------------------------------------------------------


def needs(request: Request) -> list[tuple[str, str]]:
    """The actions that S3 would ask of the identity, each with its resource."""
    arn = f"arn:aws:s3:::{BUCKET}"
    if request.operation == "delete":
        keys = re.findall(r"<Key>(.*?)</Key>(<VersionId>)?", request.body.decode())
        return [(f"s3:DeleteObject{'Version' * bool(v)}", f"{arn}/{key}") for key, v in keys]
    names = {"list": "ListBucket", "versioning": "GetBucketVersioning"}
    return [(f"s3:{names.get(request.operation, 'ListBucketVersions')}", arn)]


def test_purge_and_undo_work_with_exactly_what_the_policy_grants(
    world, proxy, tmp_path, below_prefix
):
    used = set()
    text = block('{"Version"').replace("BUCKET", BUCKET).replace("PREFIX", PREFIX)
    grants = [
        (action, s["Resource"], s.get("Condition", {"StringLike": {"s3:prefix": "*"}}))
        for s in json.loads(text)["Statement"]
        for action in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])
    ]

    def guard(request: Request) -> Answer | None:
        prefix = request.query.get("prefix", [""])[0]
        for action, resource in needs(request):
            used.add(action)
            if not any(
                action == granted
                and fnmatch.fnmatchcase(resource, place)
                and fnmatch.fnmatchcase(prefix, condition["StringLike"]["s3:prefix"])
                for granted, place, condition in grants
            ):
                return Answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        return None

    proxy.before = guard
    foreign = world.purge(*AS_OF, "--prefix", "incoming")
    assert (foreign.code, "s3:ListBucket" in foreign.err) == (1, True)
    undo = ("--prefix", PREFIX, "--undo", str(tmp_path / "log"))
    assert world.purge(*AS_OF, "--prefix", PREFIX, "--audit-log", undo[-1]).code == 0
    assert len(world.box.live_keys()) == 31
    refused = world.purge(*undo)
    assert (refused.code, "s3:DeleteObjectVersion" in refused.err) == (1, True)
    assert "`s3:DeleteObjectVersion` on `BUCKET/PREFIX*`" in README
    grants.append(("s3:DeleteObjectVersion", f"arn:aws:s3:::{BUCKET}/{PREFIX}*", grants[0][2]))
    assert world.purge(*undo).code == 0
    assert world.box.live_keys() == below_prefix
    assert used == {action for action, *_ in grants} - {"rds-db:connect"}


def test_the_mysql_grants_are_enough(world: World):
    text = block("CREATE USER").replace("SELECT ON", "SELECT, DELETE ON")
    assert "for --delete-jobs: SELECT, DELETE" in text
    password = text.replace("WITH AWSAuthenticationPlugin AS 'RDS'", "BY 'secret'")
    statements = [each.strip() for each in re.sub("--.*", "", password).split(";")]
    world.box.sql("DROP USER IF EXISTS 'purge'@'%'", *filter(None, statements))
    login = {"RETENTION_PURGE_DB_USER": "purge", "RETENTION_PURGE_DB_PASSWORD": "secret"}
    summary = world.purge(*AS_OF, "--delete-jobs", "--json", **login).summary
    assert (summary["deleted"]["expired"], summary["jobs_deleted"]) == (17, 22)


def test_the_ci_job_runs_as_it_stands(box: Sandbox, tmp_path: Path):
    """But with the sandbox's servers."""
    (job,) = yaml.safe_load(block("retention-purge:")).values()
    made, script = job["services"]["db"]["env"], job["steps"][-1]["run"]
    for old, new in {
        "moto_server -p 5000 &\n": "",
        'host="127.0.0.1"': f'host="127.0.0.1", port={box.database.port}',
        "python retention_purge.py": f"python {SCRIPT}",
    }.items():
        assert old in script
        script = script.replace(old, new)
    environment = job["env"] | {"AWS_ENDPOINT_URL_S3": box.s3_url, "PATH": os.environ["PATH"]}
    environment |= {"RETENTION_PURGE_DB_PORT": str(box.database.port)}
    (tmp_path / "venv").symlink_to(sys.prefix)
    user = f"'{made['MYSQL_USER']}'@'%'"
    box.sql(
        f"DROP TABLE IF EXISTS {TABLE}",
        f"CREATE OR REPLACE USER {user} IDENTIFIED BY '{made['MYSQL_PASSWORD']}'",
        f"GRANT ALL ON {made['MYSQL_DATABASE']}.* TO {user}",
    )
    done = run("bash", "-e", "-c", script, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_policy_runs_in_process_too():
    program = block("from retention_purge import *") + "test_what_would_go()"
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "PYTHONPATH": str(ROOT)}
    assert run(sys.executable, "-c", program, env=os.environ | keys).returncode == 0


# --- Batch Operations, supply chain ---------------------------------------------------------------


def aws_commands() -> list[list[str]]:
    """Each `aws SERVICE OPERATION ...` of README, taken apart as a shell would."""
    lines = re.findall(r"^aws .*", README.replace("\\\n", " "), re.MULTILINE)
    lines += [" ".join(each.split()) for each in re.findall(r"`(aws [^`]+)`", README)]
    return [shlex.split(re.sub(r" >\S+", "", line)) for line in lines]


def test_the_aws_commands_are_those_that_aws_documents():
    found = set()
    for _, service, name, *words in aws_commands():
        model = botocore.session.get_session().get_service_model(service.replace("s3api", "s3"))
        operations = {xform_name(each, "-"): each for each in model.operation_names}
        members = model.operation_model(operations[name]).input_shape.members
        names = {xform_name(member, "-"): member for member in members}
        found.add(name)
        for word, value in zip(words, [*words[1:], ""], strict=False):
            if word.startswith("--") and word not in ("--query", "--cli-input-json"):
                member = members[names[word[2:]]]
                if value.startswith("{"):
                    assert not ParamValidator().validate(json.loads(value), member).has_errors()
    assert {"describe-db-instances", "create-job", "get-object-tagging"} <= found


def test_the_lifecycle_rule_is_added_to_those_of_the_bucket(tmp_path: Path):
    program = re.search(r"python3 - >new-rules.json.*?^END$", README, re.MULTILINE | re.DOTALL)
    assert program is not None
    own = {"ID": "own", "Status": "Enabled", "Filter": {"Prefix": "x"}, "Expiration": {"Days": 9}}
    for rules in ([], [own]):
        (tmp_path / "rules.json").write_text(json.dumps({"Rules": rules}))
        script = program[0].replace("python3", sys.executable, 1)
        assert run("sh", "-c", script, cwd=tmp_path).returncode == 0
        new = json.loads((tmp_path / "new-rules.json").read_text())
        new = new["LifecycleConfiguration"]["Rules"]
        assert [rule["ID"] for rule in new] == [rule["ID"] for rule in rules] + ["retention-purge"]
        (create,) = [words for words in aws_commands() if "create-job" in words]
        operation = json.loads(create[create.index("--operation") + 1])
        (tag,) = operation["S3PutObjectTagging"]["TagSet"]
        assert new[-1]["Filter"]["Tag"] == tag


def test_every_package_that_is_installed_is_pinned_with_its_hash():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [re.fullmatch(r"(\S+)==(\S+)( --hash=sha256:[0-9a-f]{64})+", line) for line in lines[2:]]
    versions = {pin[1]: pin[2] for pin in pins if pin}
    assert len(versions) == len(pins)
    assert {name: importlib.metadata.version(name) for name in versions} == versions
    assert list(versions)[:3] == ["boto3", "click", "PyMySQL"]
    for name in versions:
        needed = [
            each for each in importlib.metadata.requires(name) or [] if "extra ==" not in each
        ]
        assert {re.split(r"[^\w.-]", each)[0] for each in needed} - {"colorama"} <= {*versions}
