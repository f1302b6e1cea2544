"""README is true: its tables are the program's help, and its blocks are run, or checked, as they
stand, with the places and names of a sandbox put into them."""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections import deque
from itertools import islice
from pathlib import Path
from sysconfig import get_path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore import xform_name
from botocore.validate import ParamValidator
from conftest import AS_OF, OLD, SCRIPT, World, events, until_gone, version
from proxies import Answer, Request
from sandbox import BUCKET, COLUMNS, DATABASE, REGION, TABLE, Sandbox, fill, seed
from test_seed import ALL, EXPIRED

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


def test_it_is_short_and_its_contents_lead_to_every_section():
    text = re.sub(r"(?ms)^```.*?^```$|^\|.*?$", "", README)  # without commands and tables
    assert len(README.splitlines()) <= 320
    assert [line for line in text.splitlines() if len(line) > 100] == []
    sections = [title.lower() for title in re.findall(r"^##+ (.*)", text, re.MULTILINE)]
    links = [re.sub("[^a-z -]", "", title).replace(" ", "-") for title in sections]
    assert re.findall(r"\]\(#(.*?)\)", text) == links
    assert [
        each for each in re.findall(r"\]\(([^#].*?)\)", text) if not (ROOT / each).exists()
    ] == []


def test_its_options_defaults_and_exit_codes_are_those_of_the_program():
    shown, _, codes = run(sys.executable, str(SCRIPT), "--help").stdout.partition("Exit codes:")
    in_help = re.findall(r"^ +(\d[\d, ]*)  (.*?)(?:;.*)?$", codes, re.MULTILINE)
    of_shell = ["124, 137", "126, 127"]
    in_readme = [(code, meaning) for code, meaning, _ in rows_of_table("exit code")]
    assert [row for row in in_readme if row[0] not in of_shell] == in_help
    assert [code for code, _ in in_readme if code in of_shell] == of_shell
    parts = re.split(r"^  (?:-\w, )?(--[a-z-]+)", re.sub(r"-\n +", "-", shown), flags=re.MULTILINE)
    told = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(re.findall(r"(?<![\w-])--[a-z-]+(?=`)", README)) <= {*told}
    listed = {"--help", "--version"}
    for options, defaults, *_ in rows_of_table("option"):
        names, values = re.findall(r"--[a-z-]+", options), defaults.replace("`", "").split(", ")
        listed |= {*names}
        for name, default in zip(names, values * (len(names) // len(values)), strict=True):
            text = " ".join(told[name].split())
            marks = re.findall(r"\[(?:default: )?([^\]<>]*?)(?:; [^;]*)?\]", text)
            spelt = {"off": [], "none": [], "no limit": [], "empty": ['""']}.get(default, [default])
            assert marks == spelt, name
    assert listed == {*told}


def test_its_messages_are_those_of_the_program():
    nodes = ast.walk(ast.parse(SCRIPT.read_text()))
    texts = [str(node.value) for node in nodes if isinstance(node, ast.Constant)]
    texts += ["Access denied for user", "keys failed", "AccessDenied"]
    for message, _ in rows_of_table("message"):
        for words in map(str.strip, re.split("…|: ", message.strip("`"))):
            assert any(words in text for text in texts), words


def test_the_demo_tells_why_and_its_dry_run_is_the_picture_in_readme(box: Sandbox):
    fill(box)
    environment = box.environment | {"DEMO_IN_SANDBOX": "1", "DEMO_PYTHON": sys.executable}
    done = run("sh", "tests/demo.sh", cwd=ROOT, env=environment)
    assert (done.returncode, "\x1b" in done.stdout) == (0, False), done.stderr
    verdicts = re.findall(r"^verdict  (\w+).*?(?: is )?(\w+)$", done.stdout, re.MULTILINE)
    assert [kept for kept, _ in verdicts] == ["would", "kept", "kept", "kept", "kept", "kept"]
    assert [last for _, last in verdicts[1:3]] == ["OFFICIAL", "OFFICIAL"]
    gone = [key for key in EXPIRED if key != "incoming_000012"]
    assert re.findall(r"^< +21  (\S+)$", done.stdout, re.MULTILINE) == gone
    assert done.stdout.endswith("\nno difference\n"), "the undo brought all back"
    assert box.live_keys() == sorted(ALL)
    shown = iter(block("$ python retention_purge.py").splitlines())
    printed = iter(done.stdout.partition("--dry-run\n")[2].splitlines())
    for line in [*shown][1:]:
        if skipped := re.fullmatch(r"\[(\d+) lines\]", line):
            deque(islice(printed, int(skipped[1])), maxlen=0)
        else:
            assert line == next(printed).rstrip()


# --- Installed, every night, undone ---------------------------------------------------------------

PREFIX = "incoming data/"  # as in README's settings


class Host:
    """The tool installed as README says, in folders of its own, by and for root."""

    def __init__(self, box: Sandbox) -> None:
        self.box, self.home = box, box.home / "host"
        for place in ("opt", "var/lib", "var/log", "etc"):
            (self.home / place).mkdir(parents=True)
        self.log = self.path("/var/log/purge/audit.jsonl")
        script = self.here(re.sub(r"-([og]) purge\b", r"-\1 root", block("(set -e;")))
        script = re.sub(r"https://\S+\.pem", box.certificates.ca.as_uri(), script)
        # The packages are those of the tests: setup.sh has installed them from the same file.
        script = re.sub("(?m)^(id purge|.*/pip install) .*$", "", script)
        self.script = script.replace("/usr/bin/python3 ", f"{sys.executable} ")

    def install(self) -> subprocess.CompletedProcess[str]:
        """Paste README's commands into a shell."""
        return run("bash", "-c", self.script, cwd=ROOT)

    def here(self, text: str) -> str:
        return re.sub(r"(?=/(opt|var|etc)/\S*purge)", str(self.home), text)

    def path(self, place: str) -> Path:
        return Path(self.here(place))

    def settle(self, **changes: str) -> None:
        """README's settings file, and then the sandbox's values."""
        wanted = self.box.environment | {"RETENTION_PURGE_REGION": REGION} | changes
        wanted["PYTHONPATH"] = get_path("purelib")
        ours = [name for name in wanted if name.startswith(("RETENTION_PURGE_", "AWS_", "PYTHONP"))]
        text = "\n".join(f"{name}='{wanted[name]}'" for name in ours)
        settings = self.here(block("RETENTION_PURGE_DB_HOST="))
        self.path("/etc/retention_purge.env").write_text(settings + text)

    def command(self, command: str) -> list[str]:
        """As cron would run it: with `sh -c`, nothing in the environment. By root, not by purge."""
        command = self.here(command.replace("runuser -u purge -- ", ""))
        return ["/usr/bin/env", "-i", "/bin/sh", "-c", command]

    def shell(self, command: str) -> subprocess.CompletedProcess[str]:
        return run(*self.command(command), cwd=self.home)


@pytest.fixture(scope="module")
def host(box: Sandbox) -> Host:
    found = Host(box)
    assert found.install().stdout == "installed\n"
    return found


@pytest.fixture
def below_prefix(world: World) -> list[str]:
    """The seed's objects below README's prefix, in a versioned bucket."""
    jobs, objects = seed()
    world.box.load(jobs, [(PREFIX + key, size) for key, size in objects])
    version(world)
    return world.box.live_keys()


def test_the_install_stops_at_the_first_error_and_keeps_the_settings(host: Host):
    host.settle()
    settings, made = map(host.path, ("/etc/retention_purge.env", "/opt/purge/run"))
    before = settings.read_bytes()
    made.unlink()
    broken = run("bash", "-c", host.script.replace("file:///", "file:///nowhere/"), cwd=ROOT)
    assert (broken.returncode != 0, broken.stdout) == (True, "")
    assert (host.install().stdout, settings.read_bytes()) == ("installed\n", before)
    assert made.exists()


@pytest.mark.usefixtures("below_prefix")
def test_the_cron_line_purges_says_nothing_and_leaves_a_line_where_anything_fails(host: Host):
    places = "/opt/purge", "/var/lib/purge", "/var/log/purge", "/etc/retention_purge.env"
    modes = [host.path(place).stat().st_mode & 0o777 for place in places]
    assert modes == [0o755, 0o750, 0o750, 0o640]
    (line,) = re.findall(r"^(?:[\d*]+ ){5}purge ([^%]*)\n$", block("17 2 * * *"))
    syslog, success = host.home / "syslog", host.path("/var/lib/purge/last-success")
    (alarm,) = re.findall("`(find [^`]+)`", README)

    def night(code: int) -> None:
        success.unlink(missing_ok=True)
        result = host.shell(line.replace("logger -t retention_purge", f"cat >{syslog}"))
        assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)
        assert success.exists() == (code == 0) == (host.shell(alarm).returncode == 0)
        said = f".*failed, exit code {code}\n" if code else ""
        assert re.fullmatch(said, syslog.read_text(), re.DOTALL)

    host.settle(RETENTION_PURGE_AS_OF=AS_OF[1])
    night(0)
    os.utime(success, (0, time.time() - 2 * 86400 - 60))
    assert host.shell(alarm).returncode == 1
    assert len(host.box.live_keys()) == 31
    host.settle(RETENTION_PURGE_BUCKET="no-such-bucket")
    night(1)
    assert re.search("Error: .*no-such-bucket", syslog.read_text())
    assert [event["exit_code"] for event in events(host.log, "end")] == [0, 1]
    host.path(places[-1]).write_text("RETENTION_PURGE_PREFIX=incoming data/\n")  # without quotes
    night(127)
    size = sum(len(json.dumps(event)) + 1 for event in events(host.log, "delete", "deleted"))
    (told,) = re.findall(r"about (\d+) bytes a key", README)
    assert size / 17 == pytest.approx(int(told), rel=0.2)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_the_systemd_units_are_valid(host: Host, tmp_path: Path):
    for kind, start in {"service": "[Unit]", "timer": "[Timer]"}.items():
        unit = host.here(block(start)).replace("User=purge\n", "User=root\n")
        (tmp_path / f"retention-purge.{kind}").write_text(unit)
    verify = ["systemd-analyze", "verify", "--man=no", *map(str, tmp_path.iterdir())]
    done = run(*verify, env=os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"})
    assert "retention-purge" not in done.stderr


@pytest.mark.skipif(shutil.which("logrotate") is None, reason="no logrotate here")
def test_the_logrotate_stanza_keeps_every_line(host: Host, tmp_path: Path):
    stanza, conf = host.here(block("/var/log/purge/audit.jsonl {")), tmp_path / "conf"
    conf.write_text(stanza.replace("su purge purge", "su root root"))
    conf.chmod(0o644)
    host.log.write_text("lines\n")
    done = run("logrotate", "-f", "--state", str(tmp_path / "state"), str(conf))
    assert (done.returncode, "error" in done.stderr) == (0, False)
    assert host.log.with_name("audit.jsonl.1").read_text() == "lines\n"
    assert not host.log.exists()


MORE = """ADD note varbinary(9), ADD price decimal(30, 10), ADD share double, ADD made datetime(6),
    ADD remark text, ADD loud varchar(64) AS (UPPER(sourceData)) VIRTUAL"""
VALUES = """note = x'0027ff5c', price = 12345678901234567890.0123456789, share = 1 / 3e7,
    made = '2019-01-01 00:00:00.123456', remark = 'it''s \\\\ "é\U0001f600"\n'"""


@pytest.mark.parametrize("kind", ["varchar(64)", "bigint"])
def test_after_kill_9_the_undo_steps_bring_objects_and_whole_rows_back(host, may_delete, kind):
    """The first 200 rows are gone by then. The others are logged, and one of them is held. In a
    small table a DELETE would lock every row."""
    box, text = may_delete.box, "é'" * (kind != "bigint")
    jobs = [(f"{n}{text}", OLD, "TRIAL", f"k{n % 20}'é") for n in range(1001, 1401)]
    columns = COLUMNS.replace("jobId varchar(64)", f"jobId {kind}")
    columns = columns.replace("type varchar(12)", "type ENUM('TRIAL', 'OFFICIAL')")
    official = [(str(n), OLD, "OFFICIAL", f"official{n}") for n in range(2000, 5000)]
    box.load([*jobs, *official], [(f"{PREFIX}k{n}'é", 1) for n in range(20)], columns)
    box.sql(f"ALTER TABLE {TABLE} {MORE}", f"UPDATE {TABLE} SET {VALUES} WHERE sourceData > 'k11'")
    box.sql(f"ANALYZE TABLE {TABLE}")
    version(may_delete)
    host.settle(RETENTION_PURGE_MAX_PERCENT="100")
    host.log.unlink(missing_ok=True)
    schedule = host.path("/etc/cron.d/retention-purge")
    schedule.parent.mkdir(exist_ok=True)
    schedule.touch()

    def table() -> Any:
        return box.sql(f"CHECKSUM TABLE {TABLE}"), box.sql(f"SELECT * FROM {TABLE} ORDER BY jobId")

    before, keys = table(), box.live_keys()
    stop, wait, find, look, rows, load, keep, start = (
        re.sub(r" # \d\..*", "", line)
        for line in block("mv /etc/cron.d").splitlines()
        if not line.startswith("#")
    )
    with box.database.admin(database=DATABASE, autocommit=False) as holder:
        holder.cursor().execute(f'SELECT * FROM {TABLE} WHERE jobId = "{jobs[-1][0]}" FOR UPDATE')
        command = host.command("exec /opt/purge/run --delete-jobs")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as purge:
            while not host.log.exists() or host.log.read_text().count('"delete-job"') < 400:
                assert purge.poll() is None, purge.stderr.read()
                time.sleep(0.1)
            assert str(purge.pid) in host.shell(wait).stdout
            purge.kill()
        until_gone(box)
    os.truncate(host.log, host.log.stat().st_size - 30)  # as if killed while it wrote
    assert (box.live_keys(), len(box.job_ids())) == ([], 3200)

    assert (host.shell(stop).returncode, schedule.exists()) == (0, False)
    run_id = json.loads(host.shell(find).stdout.splitlines()[0])["run_id"]
    look, rows = look.replace("RUN-ID", run_id), rows.replace("RUN-ID", run_id)
    assert (host.shell(look).stdout.count("\t"), box.live_keys()) == (3 * 20, [])
    for _ in range(2):
        undone = host.shell(look.replace(" --dry-run", ""))
        assert (undone.returncode, "run the undo again after" in undone.stderr) == (4, True)
        assert box.live_keys() == keys
    assert host.shell(rows).returncode == 0
    (rights,) = re.findall(r"ADMIN needs ([A-Z, ]+) and ([A-Z]+) on the table", README)
    user = "CREATE OR REPLACE USER admin@'%' IDENTIFIED BY 'secret' REQUIRE SSL"
    box.sql(user, f"GRANT {', '.join(rights)} ON {DATABASE}.{TABLE} TO admin@'%'")
    login = f"--host=localhost --protocol=tcp --port={box.database.port} "
    login += "--user=admin --password=secret "
    load, keep = (
        re.sub("--host=DB-HOST --user=ADMIN --password ", login, each) for each in (load, keep)
    )
    for _ in range(2):
        done = host.shell(load)
        same = table() == before  # pytest would compare 3,400 rows for minutes
        assert (done.returncode, done.stderr, same) == (0, "", True)
    assert "Rows matched: 20 " in host.shell(keep.replace("NAME", "k7''é")).stdout
    assert (host.shell(start).returncode, schedule.exists()) == (0, True)
    assert host.shell("/opt/purge/run -q").returncode == 0
    assert box.live_keys() == [f"{PREFIX}k7'é"]


# --- Rights, and the CI of others -----------------------------------------------------------------


def needs(request: Request) -> list[str]:
    """What S3 would ask of the identity: action, resource and prefix."""
    arn, prefix = f"arn:aws:s3:::{BUCKET}", request.query.get("prefix", [""])[0]
    if request.operation == "delete":
        keys = re.findall(r"<Key>(.*?)</Key>(<VersionId>)?", request.body.decode())
        return [f"s3:DeleteObject{'Version' * bool(v)} {arn}/{key} " for key, v in keys]
    names = {"list": "ListBucket", "versioning": "GetBucketVersioning"}
    return [f"s3:{names.get(request.operation, 'ListBucketVersions')} {arn} {prefix}"]


def test_purge_and_undo_need_exactly_what_the_policy_grants(world, proxy, tmp_path, below_prefix):
    text, used = block('{"Version"').replace("BUCKET", BUCKET).replace("PREFIX", PREFIX), set()
    grants = [
        f"{action} {granted['Resource']} {condition['StringLike']['s3:prefix']}"
        for granted in json.loads(text)["Statement"]
        for condition in [granted.get("Condition", {"StringLike": {"s3:prefix": "*"}})]
        for action in re.findall(r"[\w-]+:\w+", str(granted["Action"]))
    ]

    def before(request: Request) -> Answer | None:
        for need in needs(request):
            matching = [grant for grant in grants if fnmatch.fnmatchcase(need, grant)]
            used.update(matching)
            if not matching:
                return Answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        return None

    proxy.before = before
    foreign = world.purge(*AS_OF, "--prefix", "incoming")
    assert (foreign.code, "s3:ListBucket" in foreign.err) == (1, True)
    log = str(tmp_path / "log")
    assert world.purge(*AS_OF, "--prefix", PREFIX, "--audit-log", log).code == 0
    assert len(world.box.live_keys()) == 31
    told = " ".join(README.split())
    for right, place in {"ListBucketVersions": "", "DeleteObjectVersion": "/PREFIX*"}.items():
        refused = world.purge("--undo", log)
        assert (refused.code, f"s3:{right}" in refused.err) == (1, True)
        assert f"`s3:{right}` on `BUCKET{place}`" in told
        grants.append(f"s3:{right} arn:aws:s3:::{BUCKET}{place.replace('PREFIX', PREFIX)} *")
    assert (world.purge("--undo", log).code, world.box.live_keys()) == (0, below_prefix)
    assert [grant for grant in grants if grant not in used] == grants[:1], "rds-db:connect"


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
        "moto_server -p 5000 & ": "",
        'host="127.0.0.1"': f'host="127.0.0.1", port={box.database.port}',
        "python retention_purge.py": f"python {SCRIPT} --db-port {box.database.port}",
    }.items():
        assert old in script
        script = script.replace(old, new)
    (tmp_path / "venv").symlink_to(sys.prefix)
    user = f"'{made['MYSQL_USER']}'@'%'"
    create = f"CREATE OR REPLACE USER {user} IDENTIFIED BY '{made['MYSQL_PASSWORD']}'"
    grant = f"GRANT ALL ON {made['MYSQL_DATABASE']}.* TO {user}"
    box.sql(f"DROP TABLE IF EXISTS {TABLE}", create, grant)
    environment = job["env"] | {"AWS_ENDPOINT_URL_S3": box.s3_url, "PATH": os.environ["PATH"]}
    done = run("bash", "-ec", script, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_policy_runs_in_process_too():
    program = block("from retention_purge import *") + "test_what_would_go()"
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "PYTHONPATH": str(ROOT)}
    assert run(sys.executable, "-c", program, env=os.environ | keys).returncode == 0


# --- Batch Operations -----------------------------------------------------------------------------


def test_the_aws_commands_are_those_that_aws_documents():
    text = README.replace("\\\n", " ").replace("\n`aws", " `aws")
    lines = re.findall(r"^aws .*", text, re.MULTILINE)
    lines += [" ".join(each.split()) for each in re.findall(r"`(aws [^`]+)`", text)]
    assert len(lines) == 7
    for line in lines:
        _, service, name, *words = shlex.split(line.partition(" >")[0])
        model = botocore.session.get_session().get_service_model(service.replace("s3api", "s3"))
        operations = {xform_name(each, "-"): each for each in model.operation_names}
        members = model.operation_model(operations[name]).input_shape.members
        names = {xform_name(member, "-"): member for member in members}
        for word, value in zip(words, [*words[1:], ""], strict=False):
            if word.startswith("--") and word not in ("--query", "--cli-input-json"):
                member = members[names[word[2:]]]
                if value.startswith("{"):
                    assert not ParamValidator().validate(json.loads(value), member).has_errors()


@pytest.mark.parametrize("rules", [[], [{"ID": "own", "Status": "Enabled", "Filter": {}}]])
def test_the_lifecycle_rule_is_added_to_those_of_the_bucket(tmp_path: Path, rules):
    """Its tag is the one that the job gives."""
    (program,) = re.findall(r"(?ms)^python3( - >new-rules.json.*?^END)$", README)
    (tmp_path / "rules.json").write_text(json.dumps({"Rules": rules}))
    assert run("sh", "-c", sys.executable + program, cwd=tmp_path).returncode == 0
    new = json.loads((tmp_path / "new-rules.json").read_text())["LifecycleConfiguration"]["Rules"]
    assert (new[:-1], new[-1]["ID"]) == (rules, "retention-purge")
    tag = new[-1]["Filter"]["Tag"]
    assert json.dumps({"S3PutObjectTagging": {"TagSet": [tag]}}) in README
