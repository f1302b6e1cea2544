#!/bin/sh
# Runs the main job on a throwaway sandbox: the original system's 50 jobs and 48 objects.
# usage: sh tests/demo.sh
set -u
if [ -z "${DEMO_IN_SANDBOX:-}" ]; then
    . "$(dirname "$0")/setup.sh"
    cd "$root" || exit 1
    export DEMO_IN_SANDBOX=1
    # The sandbox starts the servers, runs this script again inside, and stops them.
    exec "$python" tests/world/sandbox.py sh tests/demo.sh
fi

say() { printf '\n\033[1m# %s\033[0m\n' "$*"; }
run() {
    printf '\033[1m$ %s\033[0m\n' "$*"
    "$@"
    printf '(exit code %s)\n' "$?"
}
PATH="$PWD/.venv/bin:$PATH"
host=$RETENTION_PURGE_DB_HOST port=$RETENTION_PURGE_DB_PORT ca=$RETENTION_PURGE_CA_BUNDLE
bucket=$RETENTION_PURGE_BUCKET user=$RETENTION_PURGE_DB_USER name=$RETENTION_PURGE_DB_NAME
for variable in $(env | sed -n 's/^\(RETENTION_PURGE_[A-Z_]*\)=.*/\1/p'); do unset "$variable"; done

purge() {
    run python retention_purge.py --db-host "$host" --db-port "$port" --db-user "$user" \
        --db-name "$name" --ca-bundle "$ca" --bucket "$bucket" \
        --as-of 2019-06-03T00:00:00Z "$@"
}

say "A dry run: what would be deleted, and why. Nothing is changed."
purge --dry-run
say "The purge."
purge
say "What is left in the bucket."
run python tests/world/sandbox.py --list
say "The same again: nothing to do."
purge --quiet
