#!/bin/bash
# @yarnpkg/cli-dist 4.18.1
#
# A registry whose document of a package has everything that an install needs, but no "time": the form that
# npm calls abbreviated metadata.
# Guess: yarn 4 installs the package, as npm, pnpm and yarn 1 do from the same registry.
# Seen:  "The version for tag "latest" is quarantined, and no lower version is available": without a time
#        every version is too young for npmMinimalAgeGate, which is on by default. npmMinimalAgeGate: 0 turns it off.
set -eu
dir=$(mktemp -d)
trap 'kill ${server:-} 2>/dev/null || true; rm -rf "$dir"' EXIT
cd "$dir"
export npm_config_cache=$dir/cache YARN_ENABLE_TELEMETRY=0 YARN_ENABLE_GLOBAL_CACHE=false YARN_UNSAFE_HTTP_WHITELIST=127.0.0.1 CI=
npm install --silent --no-audit --no-fund --prefix tool @yarnpkg/cli-dist@4.18.1
mkdir -p package
echo '{"name":"small","version":"1.0.0"}' >package/package.json
tar -czf small.tgz package
cat >server.mjs <<'JS'
import { createServer } from "node:http";
import { readFileSync } from "node:fs";
import { createHash } from "node:crypto";
const tgz = readFileSync("small.tgz");
const server = createServer((req, res) => {
  if (req.url.endsWith(".tgz")) return res.end(tgz);
  const integrity = "sha512-" + createHash("sha512").update(tgz).digest("base64");
  const dist = { tarball: `http://127.0.0.1:${server.address().port}/small/-/small-1.0.0.tgz`, integrity };
  res.setHeader("Content-Type", "application/json");
  res.end(JSON.stringify({ name: "small", "dist-tags": { latest: "1.0.0" }, versions: { "1.0.0": { name: "small", version: "1.0.0", dist } } }));
});
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
JS
mkfifo port
node server.mjs >port &
server=$!
read -r port <port
export YARN_NPM_REGISTRY_SERVER=http://127.0.0.1:$port
mkdir x
cd x
add() {
  echo '{"name":"x","version":"1.0.0"}' >package.json
  : >yarn.lock
  node ../tool/node_modules/@yarnpkg/cli-dist/bin/yarn.js add small
}
if add >../out 2>&1; then echo 'changed: yarn installs it' >&2; exit 1; fi
cat ../out
grep -q quarantined ../out
YARN_NPM_MINIMAL_AGE_GATE=0 add
