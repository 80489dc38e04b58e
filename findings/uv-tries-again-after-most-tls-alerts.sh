#!/bin/bash
# uv 0.13.9 (PyPI)
#
# An index whose server answers every ClientHello with a fatal TLS alert: 40 (handshake_failure), 112
# (unrecognized_name), 49 (access_denied).
# Guess: a fatal alert is an answer, so each is the end of one try.
# Seen:  uv connects four times over some seconds for 40 and for 112, and once for 49.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check uv==0.13.9
cat >alerts.py <<'P'
import os, socket, subprocess, threading, time

alert, tries = 0, 0
listener = socket.create_server(("127.0.0.1", 0))
port = listener.getsockname()[1]


def serve():
    global tries
    while True:
        connection, _ = listener.accept()
        tries += 1
        connection.recv(65536)
        connection.sendall(bytes([21, 3, 3, 0, 2, 2, alert]))
        connection.settimeout(5)
        try:
            while connection.recv(65536):
                pass
        except OSError:
            pass
        connection.close()


threading.Thread(target=serve, daemon=True).start()
env = dict(os.environ, UV_CACHE_DIR="cache", UV_NO_PROGRESS="1")
seen = {}
for alert in (40, 112, 49):
    tries, began = 0, time.time()
    code = subprocess.run(["venv/bin/uv", "pip", "install", "--target", "lib", "--index-url", f"https://127.0.0.1:{port}/simple", "small"],
                          env=env, capture_output=True).returncode
    seen[alert] = tries
    print(f"alert {alert}: {tries} connections, {time.time() - began:.1f} s, exit code {code}")
raise SystemExit(0 if seen == {40: 4, 112: 4, 49: 1} else "changed")
P
venv/bin/python alerts.py
