#!/bin/bash
# npm 11.19.1
#
# npm install from a registry whose port is closed: every connection is refused at once.
# Guess: npm ends at once, or after some quick tries; "connection refused" is no passing trouble of the way.
# Seen:  it waits 10 seconds before the second try and 60 before the third, its default of two retries, and then says
#        ECONNREFUSED. With --fetch-retries=0 it ends in a second. Shown with one retry, to be quick.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
export npm_config_cache=$dir/cache npm_config_update_notifier=false npm_config_audit=false npm_config_fund=false
npm install --silent --prefix tool npm@11.19.1
echo '{"name":"x","version":"1.0.0"}' >package.json
took() {
  began=$(date +%s)
  if node tool/node_modules/npm/bin/npm-cli.js install --registry http://127.0.0.1:1/ "$@" small >out 2>&1; then echo 'npm succeeded' >&2; exit 1; fi
  grep -q ECONNREFUSED out
  echo $(($(date +%s) - began))
}
quick=$(took --fetch-retries=0)
slow=$(took --fetch-retries=1)
defaults=$(for key in fetch-retries fetch-retry-mintimeout fetch-retry-maxtimeout fetch-retry-factor; do
  NPM_CONFIG_USERCONFIG=/dev/null node tool/node_modules/npm/bin/npm-cli.js config get $key
done | tr '\n' ' ')
echo "no retry: $quick s; one: $slow s; defaults: $defaults"
[ "$slow" -ge $((quick + 9)) ] && [ "$defaults" = '2 10000 60000 10 ' ] || { echo 'changed' >&2; exit 1; }
