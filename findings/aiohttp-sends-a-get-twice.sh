#!/bin/bash
# aiohttp 3.14.5 (Python)
#
# One client.get() to a server that reads the request and then resets the connection, which is new.
# Guess: one request, then an error: the request may have had its effect, and nobody asked for a retry.
# Seen:  the server gets the request twice, on two connections, before ServerDisconnectedError or a reset is raised.
#        requests 2.34.2 sends it once.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check aiohttp==3.14.5 requests==2.34.2
cat >twice.py <<'P'
import asyncio, socket, struct, threading
import aiohttp, requests

seen = 0
listener = socket.create_server(("127.0.0.1", 0))
url = "http://127.0.0.1:%d/" % listener.getsockname()[1]


def serve():
    global seen
    while True:
        connection, _ = listener.accept()
        if b"GET / " in connection.recv(65536):
            seen += 1
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


async def ask():
    async with aiohttp.ClientSession() as session:
        try:
            await session.get(url)
        except aiohttp.ClientError as e:
            print("aiohttp:", type(e).__name__)


threading.Thread(target=serve, daemon=True).start()
asyncio.run(ask())
by_aiohttp = seen
try:
    requests.get(url, timeout=10)
except requests.RequestException as e:
    print("requests:", type(e).__name__)
print("requests seen: aiohttp", by_aiohttp, "requests", seen - by_aiohttp)
raise SystemExit(0 if (by_aiohttp, seen - by_aiohttp) == (2, 1) else "changed")
P
venv/bin/python twice.py
