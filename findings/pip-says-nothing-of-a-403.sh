#!/bin/bash
# pip 26.3
#
# A package index that answers 403 Forbidden, with a reason phrase and a line of text that say why.
# Guess: pip prints the status, the phrase or the text, as it prints "403" for a denied file.
# Seen:  it prints none of them: "Could not find a version that satisfies the requirement", as for a
#        name with a typing error. The 403 shows with -vv, and not with -v.
set -eu
dir=$(mktemp -d)
trap 'kill ${server:-} 2>/dev/null || true; rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install --quiet --disable-pip-version-check pip==26.3
cat >server.py <<'PY'
from http.server import BaseHTTPRequestHandler, HTTPServer
class Denies(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(403, "Denied by policy")
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        self.wfile.write(b"this index may not be used here\n")
    def log_message(self, *args):
        pass
server = HTTPServer(("127.0.0.1", 0), Denies)
print(server.server_port, flush=True)
server.serve_forever()
PY
mkfifo port
python3 server.py >port &
server=$!
read -r port <port
url=http://127.0.0.1:$port/simple
if v/bin/pip download --disable-pip-version-check --no-cache-dir -i "$url" small >out 2>&1; then echo 'pip succeeded' >&2; exit 1; fi
cat out
if grep -qiE '403|forbidden|denied|may not' out; then echo 'changed: pip tells of the 403' >&2; exit 1; fi
grep -q "No matching distribution" out
v/bin/pip -vv download --disable-pip-version-check --no-cache-dir -i "$url" small >out 2>&1 || true
grep -q 403 out || { echo 'changed: -vv does not tell either' >&2; exit 1; }
