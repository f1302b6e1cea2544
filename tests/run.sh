#!/bin/sh
# Runs all checks and all tests. usage: sh tests/run.sh [PYTEST ARGUMENT ...]
set -eu
sh "$(dirname "$0")/mysql.sh" & # it mostly waits for the network
. "$(dirname "$0")/setup.sh"
cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy --strict retention_purge.py
wait
exec "$python" -m pytest -p no:cacheprovider -rs --durations=15 -n 4 -c tests/pytest.ini "$@"
