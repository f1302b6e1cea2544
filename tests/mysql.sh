#!/bin/sh
# Unpacks Debian unstable's MySQL server, with every library it needs, into .mysql/. Nothing is
# installed; Debian stable has MariaDB alone. usage: sh tests/mysql.sh
#
# Does nothing if it is there already, or if RETENTION_TEST_MYSQLD names a server to use instead.
# If it cannot be had, one line on stderr and in .mysql/missing says why; the tests that need it are
# skipped for that reason. To get a newer one, remove .mysql/.
set -eu
umask 022 # the server's user must be able to read it
export LC_ALL=C
home=$(cd "$(dirname "$0")/.." && pwd)/.mysql
if [ -n "${RETENTION_TEST_MYSQLD:-}" ] || [ -e "$home/unpacked" ]; then
    exit 0
fi
mkdir -p "$home"
missing() {
    echo "$1" >"$home/missing"
    echo "No MySQL, its tests are skipped: $1" >&2
    exit 0
}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
for tool in apt-get dpkg; do
    command -v "$tool" >/dev/null 2>&1 || missing "there is no $tool"
done
[ -e "$keyring" ] || missing "there is no $keyring"

work=$(mktemp -d "$home/work-XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mkdir -p "$work/state/lists/partial" "$work/cache/archives/partial" "$work/unpacked"
: >"$work/status" # of dpkg: nothing is installed, so every library is wanted
cat >"$work/apt.conf" <<END
Dir::State "$work/state";
Dir::State::status "$work/status";
Dir::Cache "$work/cache";
APT::Sandbox::User "root";
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Retries "1";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
END
apt() { apt-get -q -c "$work/apt.conf" "$@" 2>>"$work/log"; }
why() { sed -n 's/^E: //p' "$work/log" | head -n 1; }

# The machine's own mirrors of Debian, out of its sources in either format: where `update` would
# look for the releases.
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-stable}")
mirrors=$(apt update --print-uris |
    sed -n "s|^'\(.*\)/dists/\([^/']*\)/InRelease' .*|\2 \1|p" |
    awk -v codename="$codename" '
        BEGIN { split(codename " oldstable stable testing unstable sid", names)
                for (n in names) wanted[names[n]] }
        $1 in wanted && !seen[$2]++ { print $2 }')
[ -n "$mirrors" ] || missing "apt's sources name no mirror of Debian"

echo "Unpacking Debian unstable's MySQL server into .mysql ..." >&2
found=
for mirror in $mirrors; do
    echo "deb [signed-by=$keyring] $mirror sid main" >"$work/sources.list"
    printf '%s\n' "Dir::Etc::SourceList \"$work/sources.list\";" 'Dir::Etc::SourceParts "-";' \
        >>"$work/apt.conf"
    if apt update --error-on=any >>"$work/log"; then
        found=yes
        break
    fi
done
[ -n "$found" ] || missing "Debian unstable cannot be had: $(why)"
apt install --yes --download-only mysql-server-core >>"$work/log" || missing "$(why)"
for package in "$work"/cache/archives/*.deb; do
    dpkg -x "$package" "$work/unpacked"
done
rm -f "$home/missing"
mv -T "$work/unpacked" "$home/unpacked" || [ -e "$home/unpacked" ] # another run was faster
