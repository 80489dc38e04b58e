#!/bin/bash
# cargo 1.95.0
#
# cargo fetches from a sparse registry over http:// (config.json is its first request).
# Guess: HTTP/1.1 as ever, since HTTP/2 is spoken over TLS only.
# Seen:  the request carries "Upgrade: h2c" and "HTTP2-Settings", the offer of RFC 7540 (which RFC 9113 took out). A server,
#        or a filter on the way, that does not know it must leave it unanswered; with CARGO_HTTP_MULTIPLEXING=false it is not made.
set -eu
dir=$(mktemp -d)
trap 'kill ${server:-} 2>/dev/null || true; rm -rf "$dir"' EXIT
cd "$dir"
mkdir -p x/src home
echo '[package]
name = "x"
version = "0.1.0"
edition = "2021"
[dependencies]
small = { version = "1", registry = "here" }' >x/Cargo.toml
: >x/src/lib.rs
cat >server.py <<'P'
import http.server, sys


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        with open("seen", "a") as f:
            f.write("Upgrade: %s\nHTTP2-Settings: %s\n" % (self.headers.get("Upgrade"), self.headers.get("HTTP2-Settings")))
        self.send_error(404)

    def log_message(self, *args):
        pass


server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
P
mkfifo port
python3 server.py >port &
server=$!
read -r port <port
export CARGO_HOME=$dir/home CARGO_REGISTRIES_HERE_INDEX=sparse+http://127.0.0.1:$port/ CARGO_NET_RETRY=0
cargo --version
(cd x && cargo fetch) >/dev/null 2>&1 || true
sort seen | uniq -c
grep -q 'Upgrade: h2c' seen
rm seen
(cd x && CARGO_HTTP_MULTIPLEXING=false cargo fetch) >/dev/null 2>&1 || true
sort seen | uniq -c
! grep -q 'Upgrade: h2c' seen
