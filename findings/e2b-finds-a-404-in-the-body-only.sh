#!/bin/bash
# e2b 2.51.0 and novita-sandbox 2.1.1 (npm), Node 20
#
# Sandbox.kill(id) documents: true if the sandbox was killed, false if it was not found. The API answers
# DELETE /sandboxes/{id} with 404, once with a JSON body, once with text, once without a body.
# Guess: the status says it, whatever the body: false three times.
# Seen:  only a body {"code":404} makes it false. With a body that is text, or none, both throw an error that says nothing of
#        "not found": a proxy that answers 404 by itself looks like a broken API.
set -eu
dir=$(mktemp -d)
trap 'kill ${server:-} 2>/dev/null || true; rm -rf "$dir"' EXIT
cd "$dir"
export npm_config_cache=$dir/cache
npm install --silent --no-audit --no-fund e2b@2.51.0 novita-sandbox@2.1.1
cat >server.mjs <<'JS'
import { createServer } from "node:http";
const bodies = {
  json: ["application/json", '{"code":404,"message":"not found"}'],
  text: ["text/plain", "not found"],
  none: [undefined, ""],
};
const server = createServer((req, res) => {
  const [type, body] = bodies[req.url.split("/").pop()];
  res.writeHead(404, type ? { "content-type": type } : {});
  res.end(body);
});
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
JS
cat >kill.mjs <<'JS'
const url = process.argv[2];
const seen = {};
for (const name of ["e2b", "novita-sandbox"]) {
  const { Sandbox } = await import(name);
  for (const body of ["json", "text", "none"]) {
    const opts = { apiKey: "e2b_" + "0".repeat(40), apiUrl: url };
    seen[`${name} ${body}`] = await Sandbox.kill(body, opts).then(String, () => "throws");
  }
}
console.log(JSON.stringify(seen, null, 1));
JS
mkfifo port
node server.mjs >port &
server=$!
read -r port <port
node kill.mjs "http://127.0.0.1:$port" | tee out
grep -q '"e2b json": "false"' out
grep -q '"e2b text": "throws"' out
grep -q '"e2b none": "throws"' out
grep -q '"novita-sandbox json": "false"' out
grep -q '"novita-sandbox text": "throws"' out
grep -q '"novita-sandbox none": "throws"' out
