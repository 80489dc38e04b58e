"""The documentation's scenarios with an unmodified Python SDK against a live server.

    python scenarios.py <novita|e2b> [name...]

Prints one line a scenario, "ok <name> <ms>" or "not ok <name> <ms>" with the error
below it, indented. The lab's control server says what really arrived in the
small internet, and crashes and starts the server.
"""
import contextlib
import json
import os
import re
import ssl
import sys
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor

SDK = sys.argv[1]
ONLY = sys.argv[2:]
if SDK == "novita":
    from novita_sandbox.core import CommandExitException, Sandbox
else:
    from e2b import CommandExitException, Sandbox

LAB = json.loads(os.environ["LAB"])
ALL = ["0.0.0.0/0"]
ECONNREFUSED = 111


# ---- helpers


@contextlib.contextmanager
def sandbox(**opts):
    s = Sandbox.create(timeout=120, **opts)
    try:
        yield s
    finally:
        s.kill()


def run(s, cmd):
    """Runs a command; a non-zero exit is a result here, not an exception."""
    try:
        return s.commands.run(cmd, timeout=30)
    except CommandExitException as err:
        return err


def status(s, url, extra=""):
    """The status curl sees, or 0 when no response came."""
    r = run(s, f"curl -s -o /dev/null --max-time 8 {extra} -w '%{{http_code}}' '{url}'")
    return int(r.stdout)


def connect(s, ip, port):
    """Connects from inside, three times: the errno of the last (0 is success) and the
    milliseconds of the quickest, which a busy machine does not blur."""
    r = run(
        s,
        f'''python3 -c "
import socket, time
took = []
for _ in range(3):
    s = socket.socket(); s.settimeout(5)
    t = time.perf_counter()
    try:
        e = s.connect_ex(('{ip}', {port}))
    except TimeoutError:
        e = 110
    took.append((time.perf_counter() - t) * 1000)
    s.close()
print(e, min(took))"''',
    )
    errno, ms = r.stdout.split()
    return int(errno), float(ms)


def assert_refused(s, ip, port=443):
    errno, ms = connect(s, ip, port)
    assert errno == ECONNREFUSED, f"connect to {ip}:{port}: errno {errno}"
    assert ms < 50, f"refusal took {ms} ms"


def control(method, path):
    req = urllib.request.Request(LAB["control"] + path, method=method)
    with urllib.request.urlopen(req, timeout=60) as res:
        return json.load(res)


def mark():
    return control("POST", "/mark")["mark"]


def seen_text(since, text):
    return control("GET", f"/seen?mark={since}&text={urllib.parse.quote(text)}")["packets"]


def seen_addr(since, addr):
    return control("GET", f"/seen?mark={since}&addr={addr}")["packets"]


def fetch(url, headers=None):
    """Status and body of a request from this machine, as a user would make it."""
    context = ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])
    req = urllib.request.Request(url, headers=headers or {})
    try:
        with urllib.request.urlopen(req, timeout=20, context=context) as res:
            return res.status, res.read().decode()
    except urllib.error.HTTPError as err:
        return err.code, err.read().decode()


def set_network(s, **rules):
    if SDK == "novita":
        s.set_network(**rules) if rules else s.set_network()
    else:
        s.update_network(rules)


def serve(s, port, flags=""):
    proc = s.commands.run(f"python -m http.server {port} {flags}", background=True)
    until(lambda: connect(s, "127.0.0.1", port)[0] == 0)
    return proc


def until(ok, seconds=10):
    end = time.monotonic() + seconds
    while not ok():
        assert time.monotonic() < end, "not true in time"
        time.sleep(0.05)


def rejects(pattern, **opts):
    try:
        Sandbox.create(**opts).kill()
    except Exception as err:
        assert "400" in str(err), err
        assert re.search(pattern, str(err)), err
        return
    raise AssertionError(f"accepted: {opts}")


# ---- scenarios


def create_with_defaults_reaches_a_site_over_https():
    with sandbox() as s:
        assert status(s, f"https://{LAB['allowed']}/") == 200
        hello = s.commands.run("echo hello")
        assert (hello.stdout, hello.exit_code) == ("hello\n", 0)


def allow_internet_access_false_reaches_nothing():
    with sandbox(allow_internet_access=False) as s:
        since = mark()
        assert status(s, f"https://{LAB['allowed']}/") == 0
        assert_refused(s, "1.1.1.1")
        assert_refused(s, "8.8.8.8", 53)
        assert seen_addr(since, "1.1.1.1") == 0
        assert seen_text(since, LAB["allowed"]) == 0


def allowed_addresses_answer_others_are_refused_at_once():
    with sandbox(network={"deny_out": ALL, "allow_out": ["1.1.1.1", "8.8.8.0/24"]}) as s:
        since = mark()
        assert status(s, "https://1.1.1.1", "-k") == 301
        assert status(s, "https://8.8.8.8", "-k") == 302
        assert_refused(s, LAB["deniedIP"])
        assert seen_addr(since, LAB["deniedIP"]) == 0


def a_denied_address_is_refused_the_rest_works():
    with sandbox(network={"deny_out": ["8.8.8.8"]}) as s:
        assert_refused(s, "8.8.8.8")
        assert status(s, "https://1.1.1.1", "-k") == 301
        assert status(s, f"https://{LAB['allowed']}/") == 200


def allow_beats_deny():
    rules = {"deny_out": ["8.8.8.0/24", "1.1.1.1"], "allow_out": ["8.8.8.8", "1.1.1.0/24"]}
    with sandbox(network=rules) as s:
        assert status(s, "https://8.8.8.8", "-k") == 302
        assert status(s, "https://1.1.1.1", "-k") == 301
        assert_refused(s, LAB["neighbour"])


def an_allowed_name_on_80_and_443_a_denied_name_on_the_same_address_gets_no_byte_through():
    a, b, ip = LAB["sharedA"], LAB["sharedB"], LAB["sharedIP"]
    with sandbox(network={"deny_out": ALL, "allow_out": [a]}) as s:
        assert status(s, f"https://{a}/") == 200
        assert status(s, f"http://{a}/") == 200
        since = mark()
        assert status(s, f"https://{b}/", f"--resolve {b}:443:{ip}") == 0
        assert status(s, f"http://{b}/", f"--resolve {b}:80:{ip}") == 403  # ours
        assert status(s, f"http://{b}/") == 0
        assert seen_text(since, b) == 0
        assert seen_addr(since, ip) == 0


def a_wildcard_allows_every_depth_and_not_the_apex():
    w = LAB["wildcard"]
    with sandbox(network={"deny_out": ALL, "allow_out": ["*." + w]}) as s:
        assert status(s, f"https://x.{w}/") == 200
        assert status(s, f"http://a.b.{w}/") == 200
        assert status(s, f"https://{w}/") == 0


def names_addresses_and_ranges_mix():
    with sandbox(network={"deny_out": ALL, "allow_out": [LAB["sharedA"], "1.1.1.1", "8.8.8.0/24"]}) as s:
        assert status(s, f"https://{LAB['sharedA']}/") == 200
        assert status(s, "https://1.1.1.1", "-k") == 301
        assert status(s, "https://8.8.8.8", "-k") == 302
        assert status(s, f"https://{LAB['sharedB']}/") == 0


def wrong_rules_are_refused_in_the_known_words():
    rejects("you must include 'ALL_TRAFFIC' in deny out to block all other traffic", network={"allow_out": [LAB["sharedA"]]})
    rejects("invalid denied CIDR", network={"deny_out": [LAB["sharedA"]]})
    rejects("invalid allowed address", network={"deny_out": ALL, "allow_out": ["https://x.test/"]})
    rejects("mask request host is not valid", network={"mask_request_host": "a b"})


def a_forged_hosts_file_still_reaches_the_real_owner_of_the_name():
    a = LAB["sharedA"]
    with sandbox(network={"deny_out": ALL, "allow_out": [a]}) as s:
        since = mark()
        s.commands.run(f"echo '{LAB['deniedIP']} {a}' | sudo tee -a /etc/hosts")
        r = run(s, f"curl -s --max-time 8 https://{a}/")
        assert r.exit_code == 0, r.stderr
        assert a in r.stdout, r.stdout
        assert seen_addr(since, LAB["deniedIP"]) == 0


def rules_can_be_replaced_while_it_runs():
    with sandbox() as s:
        assert status(s, "https://1.1.1.1", "-k") == 301
        set_network(s, deny_out=ALL, allow_out=["8.8.8.8"])
        assert_refused(s, "1.1.1.1")
        assert status(s, "https://8.8.8.8", "-k") == 302
        set_network(s)
        assert status(s, "https://1.1.1.1", "-k") == 301


def a_port_is_public_at_its_host_name_until_its_process_is_killed():
    with sandbox() as s:
        url = "https://" + s.get_host(3000)
        proc = serve(s, 3000)
        code, body = fetch(url)
        assert code == 200 and "Directory listing for" in body, (code, body)
        proc.kill()
        until(lambda: fetch(url)[0] == 502)
        assert json.loads(fetch(url)[1]) == {
            "sandboxId": s.sandbox_id,
            "message": "The sandbox is running but port is not open",
            "port": 3000,
            "code": 502,
        }


def the_service_sees_the_masked_host():
    with sandbox(network={"mask_request_host": "localhost:${PORT}"}) as s:
        s.files.write(
            "/tmp/echo.py",
            """
from http.server import BaseHTTPRequestHandler, HTTPServer
class Echo(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write((self.headers['Host'] + ' ' + self.headers.get('X-Forwarded-Host', '')).encode())
HTTPServer(('', 3000), Echo).serve_forever()
""",
        )
        s.commands.run("python /tmp/echo.py", background=True)
        until(lambda: connect(s, "127.0.0.1", 3000)[0] == 0)
        host = s.get_host(3000)
        assert fetch("https://" + host)[1] == f"localhost:3000 {host}"


def a_private_port_needs_its_traffic_token():
    with sandbox(network={"allow_public_traffic": False}) as s:
        serve(s, 3000)
        url = "https://" + s.get_host(3000)
        code, body = fetch(url)
        assert code == 403 and "Token header 'e2b-traffic-access-token' is missing" in body, body
        code, body = fetch(url, {"e2b-traffic-access-token": "x"})
        assert code == 403 and "is invalid" in body, body
        assert fetch(url, {"e2b-traffic-access-token": s.traffic_access_token})[0] == 200


def a_server_is_asked_in_the_same_breath_as_it_is_started():
    with sandbox() as s:
        codes, kept = [], []  # a handle that is dropped closes its stream: nobody waits for such a command
        for port in range(3001, 3005):  # a busy machine may be too slow for it, now and then
            kept.append(s.commands.run(f"python3 -m http.server {port}", background=True, cwd="/tmp"))
            codes.append(fetch("https://" + s.get_host(port))[0])
            if codes[-1] == 200:
                return
        raise AssertionError(codes)


def kill_ends_it_once():
    s = Sandbox.create()
    url = "https://" + s.get_host(3000)
    assert s.is_running() is True
    assert s.kill() is True
    assert Sandbox.kill(s.sandbox_id) is False
    assert s.is_running() is False
    code, body = fetch(url)
    assert code == 502
    assert json.loads(body) == {"sandboxId": s.sandbox_id, "message": "The sandbox was not found", "code": 502}


def the_end_of_its_time_is_the_end_of_it():
    s = Sandbox.create(timeout=2)
    until(lambda: not s.is_running(), 20)
    code, body = fetch("https://" + s.get_host(3000))
    assert code == 502
    assert json.loads(body) == {"sandboxId": s.sandbox_id, "message": "The sandbox was not found", "code": 502}
    assert Sandbox.kill(s.sandbox_id) is False


def files_environment_input_and_exit_codes():
    with sandbox(envs={"GREETING": "moin"}, metadata={"run": SDK + "-python"}) as s:
        s.files.write("/home/user/dir/a.txt", "text")
        assert s.files.read("/home/user/dir/a.txt") == "text"
        assert [e.name for e in s.files.list("/home/user/dir")] == ["a.txt"]
        assert s.files.exists("/nowhere") is False
        assert s.commands.run("echo $GREETING; whoami; pwd").stdout == "moin\nuser\n/home/user\n"
        assert run(s, "exit 3").exit_code == 3
        assert s.commands.run("sudo id -u").stdout == "0\n"
        assert s.get_info().metadata["run"] == SDK + "-python"
        assert Sandbox.connect(s.sandbox_id).commands.run("cat dir/a.txt").stdout == "text"


def a_server_that_dies_and_returns_changes_nothing_for_a_sandbox():
    with sandbox(network={"deny_out": ALL, "allow_out": ["1.1.1.1", LAB["sharedA"]]}) as s:
        serve(s, 3000)
        since = mark()
        control("POST", "/server/crash")
        control("POST", "/server/start")
        assert s.commands.run("echo back").stdout == "back\n"
        assert fetch("https://" + s.get_host(3000))[0] == 200
        assert status(s, f"https://{LAB['sharedA']}/") == 200
        assert status(s, f"https://{LAB['sharedB']}/") == 0
        assert_refused(s, LAB["deniedIP"], 8443)
        assert seen_addr(since, LAB["deniedIP"]) == 0


def twenty_at_once_each_under_its_own_rules():
    count = 20

    def one(i):
        yes, no = ("1.1.1.1", "8.8.8.8") if i % 2 else ("8.8.8.8", "1.1.1.1")
        with sandbox(network={"deny_out": ALL, "allow_out": [yes]}) as s:
            assert connect(s, yes, 443)[0] == 0, f"sandbox {i} to {yes}"
            assert connect(s, no, 443)[0] == ECONNREFUSED, f"sandbox {i} to {no}"
            return s.sandbox_id

    with ThreadPoolExecutor(count) as pool:
        assert len(set(pool.map(one, range(count)))) == count


def one_sandbox_opens_the_public_url_of_another_and_nothing_else_of_it():
    with sandbox() as server:
        serve(server, 3000)
        url = "https://" + server.get_host(3000)
        ip = server.commands.run("hostname -I").stdout.split()[0]
        with sandbox() as s:
            assert status(s, url) == 200
            assert_refused(s, ip, 3000)
            assert_refused(s, ip, 49983)
            assert_refused(s, LAB["hostIP"], 443)
        with sandbox(allow_internet_access=False) as s:
            assert status(s, url) == 0


# ---- run


def main():
    failed = 0
    here = sys.modules[__name__]
    scenarios = [f for f in vars(here).values() if callable(f) and getattr(f, "__module__", "") == __name__]
    helpers = {sandbox, run, status, connect, assert_refused, control, mark, seen_text, seen_addr, fetch, set_network, serve, until, rejects, main}
    for scenario in scenarios:
        name = scenario.__name__.replace("_", " ")
        if scenario in helpers or ONLY and not any(o in name for o in ONLY):
            continue
        began = time.monotonic()
        try:
            scenario()
            print(f"ok {name} {(time.monotonic() - began) * 1000:.0f}", flush=True)
        except Exception:
            failed += 1
            print(f"not ok {name} {(time.monotonic() - began) * 1000:.0f}")
            print(re.sub("^", "    ", traceback.format_exc(), flags=re.M), flush=True)
    sys.exit(1 if failed else 0)


main()
