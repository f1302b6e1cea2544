#!/bin/sh
# Shows why an object goes or stays, a purge, and its undo, on a throwaway sandbox: 51 jobs and 48
# objects in a versioned bucket.
# usage: sh tests/demo.sh
set -u
if [ -z "${DEMO_IN_SANDBOX:-}" ]; then
    . "$(dirname "$0")/setup.sh"
    cd "$root" || exit 1
    export DEMO_IN_SANDBOX=1
    # The sandbox starts the servers, runs this script again inside, and stops them.
    exec "$python" tests/world/sandbox.py sh tests/demo.sh
fi

bold= plain=
if [ -t 1 ]; then bold=$(printf '\033[1m') plain=$(printf '\033[0m'); fi
say() { printf '\n%s# %s%s\n' "$bold" "$*" "$plain"; }
python=${DEMO_PYTHON:-.venv/bin/python}
folder=$(mktemp -d) && trap 'rm -r "$folder"' EXIT
# "..." stands for the options of the sandbox: RETENTION_PURGE_DB_HOST and others, --as-of.
purge() {
    printf '%s$ python retention_purge.py ... %s%s\n' "$bold" "$*" "$plain"
    "$python" retention_purge.py --as-of 2019-06-03T00:00:00Z "$@"
    printf '(exit code %s)\n' "$?"
}
objects() { "$python" tests/world/sandbox.py --list >"$folder/$1"; }
differences() { diff "$folder/before" "$folder/after" | grep '^[<>]' || echo "no difference"; }

say "One job row of each kind, and what a run would do with its object."
for key in incoming_000011 incoming_000012 incoming_000001 incoming_000010 incoming_000031 test; do
    purge --quiet --explain "$key"
done
say "A dry run: what would be deleted, and why. Nothing is changed."
purge --dry-run
objects before
say "The purge."
purge --audit-log "$folder/audit.jsonl"
objects after
say "What went (<). All else stayed."
differences
say "The undo."
printf '%s$ python retention_purge.py ... --undo %s%s\n' "$bold" "$folder/audit.jsonl" "$plain"
"$python" retention_purge.py --undo "$folder/audit.jsonl"
objects after
say "The bucket, before the purge and after the undo."
differences
