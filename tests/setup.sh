# Sourced by demo.sh and run.sh: sets $root and $python, after making all that they need.
# A virtual environment of its own (.venv), pinned requirements, and MariaDB's server.
root=$(cd "$(dirname "$0")/.." && pwd)
python="$root/.venv/bin/python"

if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "Python 3.11 or later is needed: apt-get install python3 python3-venv" >&2
    exit 1
fi
if [ ! -x "$python" ] || ! "$python" -m pip --version >/dev/null 2>&1; then
    python3 -m venv --clear "$root/.venv" || {
        echo "python3-venv is needed: apt-get install python3-venv" >&2
        exit 1
    }
fi
stamp="$root/.venv/installed"
wanted=$(cat "$root/requirements.txt" "$root/tests/requirements.txt")
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing the pinned requirements into .venv ..." >&2
    # One after the other: hashes for one package would be asked of all in the same command.
    for file in requirements.txt tests/requirements.txt; do
        "$python" -m pip install -qq --disable-pip-version-check -r "$root/$file" || exit 1
    done
    echo "$wanted" >"$stamp"
fi
if ! command -v mariadbd >/dev/null 2>&1; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
        echo "MariaDB's server is needed: apt-get install mariadb-server" >&2
        exit 1
    fi
    echo "Installing mariadb-server ..." >&2
    apt-get update -qq >/dev/null || exit 1
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        mariadb-server >/dev/null || exit 1
fi
