#!/bin/bash
# apt 2.6.1 (Debian 12; the machine's own)
#
# apt-get update with one repository, whose server refuses the connection.
# Guess: it exits with a failure, since it could update nothing.
# Seen:  it retries for seconds, prints "Some index files failed to download" as a warning, and exits 0. With
#        -o APT::Update::Error-Mode=any it exits 100.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
mkdir -p r/lists/partial r/archives/partial r/etc
touch r/status
echo 'deb [trusted=yes] http://127.0.0.1:1/debian stable main' >r/list
update() {
  apt-get -o Dir::State="$PWD/r" -o Dir::State::status="$PWD/r/status" -o Dir::Cache="$PWD/r" -o Dir::Etc="$PWD/r/etc" \
    -o Dir::Etc::sourcelist="$PWD/r/list" -o Debug::NoLocking=1 "$@" update
}
update || { echo 'changed: apt-get update fails' >&2; exit 1; }
code=0
update -o APT::Update::Error-Mode=any || code=$?
[ $code = 100 ] || { echo "changed: with Error-Mode=any the exit status is $code" >&2; exit 1; }
