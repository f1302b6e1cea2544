"""Prints requirements.txt: the three packages that the script imports, and all that they install,
pinned, with the hash of the file that pip chooses (a wheel for every platform).

    .venv/bin/python tests/requirements.py [NAME==VERSION ...] >requirements.txt

takes the newest versions, but for those that are named.
"""

import json
import subprocess
import sys

DIRECT = ("boto3", "click", "PyMySQL")
command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
command += ["--dry-run", "--ignore-installed", "--only-binary=:all:", "--report", "-"]
report = subprocess.check_output([*command, *DIRECT, *sys.argv[1:]])
lines = {
    item["metadata"]["name"]: f"{item['metadata']['name']}=={item['metadata']['version']} "
    f"--hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}"
    for item in json.loads(report)["install"]
}
print("# Every package that is installed, the three that the script imports first.")
print("# To renew: .venv/bin/python tests/requirements.py >requirements.txt")
print(*map(lines.pop, DIRECT), *sorted(lines.values(), key=str.lower), sep="\n")
