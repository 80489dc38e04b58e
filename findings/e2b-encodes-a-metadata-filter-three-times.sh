#!/bin/bash
# e2b 2.51.0 (npm), Node 20
#
# Sandbox.list({query: {metadata: {"a b": "c&d"}}}): the filter goes into the query of GET /v2/sandboxes.
# Guess: a server decodes the query once and splits "a b=c&d" or its escaped form: each key and value escaped
#        once, and the whole once more by the query.
# Seen:  metadata=a%252520b%3Dc%252526d: keys and values are escaped twice before the query escapes them again, so
#        that a server has to decode the query, then the whole, then each key and value.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
export npm_config_cache=$dir/cache
npm install --silent --no-audit --no-fund e2b@2.51.0
cat >list.mjs <<'JS'
import { createServer } from "node:http";
import { Sandbox } from "e2b";
let asked;
const server = createServer((req, res) => {
  asked = req.url;
  res.setHeader("Content-Type", "application/json");
  res.end("[]");
});
await new Promise((done) => server.listen(0, "127.0.0.1", done));
const pages = Sandbox.list({ query: { metadata: { "a b": "c&d" } }, apiKey: "e2b_" + "0".repeat(40), apiUrl: `http://127.0.0.1:${server.address().port}` });
await pages.nextItems();
console.log(asked);
process.exit(asked.includes("metadata=a%252520b%3Dc%252526d") ? 0 : 1);
JS
node list.mjs
