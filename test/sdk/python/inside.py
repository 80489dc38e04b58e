"""What a program in a sandbox and its files look like from outside, with an
unmodified Python SDK against a live server.

    python inside.py <novita|e2b> [name...]

Prints one line a scenario, as scenarios.py does.
"""
import contextlib
import http.client
import re
import sys
import time
import traceback
import urllib.parse
import urllib.request

SDK = sys.argv[1]
ONLY = sys.argv[2:]
if SDK == "novita":
    from novita_sandbox.core import CommandExitException, PtySize, Sandbox
else:
    from e2b import CommandExitException, PtySize, Sandbox

scenarios = []


def scenario(f):
    scenarios.append(f)
    return f


@contextlib.contextmanager
def sandbox():
    s = Sandbox.create(timeout=120)
    try:
        yield s
    finally:
        s.kill()


def run(s, cmd):
    """Runs a command; a non-zero exit is a result here, not an exception."""
    try:
        return s.commands.run(cmd)
    except CommandExitException as err:
        return err


def until(ok, seconds=20):
    end = time.monotonic() + seconds
    while not ok():
        assert time.monotonic() < end, "not true in time"
        time.sleep(0.05)


def break_off(url, part):
    """Posts a part of a form to a URL and breaks off."""
    u = urllib.parse.urlsplit(url)
    c = http.client.HTTPSConnection(u.hostname, u.port or 443)
    c.putrequest("POST", f"{u.path}?{u.query}")
    c.putheader("Content-Type", "multipart/form-data; boundary=b")
    c.putheader("Content-Length", str(5 << 20))
    c.endheaders()
    c.send(b'--b\r\nContent-Disposition: form-data; name="file"; filename="k"\r\n\r\n' + part)
    time.sleep(0.3)
    c.close()


@scenario
def an_upload_that_breaks_off_leaves_the_old_file_whole():
    with sandbox() as s:
        s.files.write("k", "a" * (5 << 20))
        break_off(s.upload_url("k"), b"b" * (3 << 20))
        time.sleep(0.5)
        got = s.files.read("k")
        assert len(got) == 5 << 20 and "b" not in got, (len(got), got.count("b"))
        assert not [e.name for e in s.files.list(".") if "cordon" in e.name]


@scenario
def output_is_cut_between_characters():
    with sandbox() as s:
        for to in ("stdout", "stderr"):
            pieces = []
            r = s.commands.run(
                f"python3 -c \"import sys; print('漢'*100000, file=sys.{to})\"",
                on_stdout=pieces.append,
                on_stderr=pieces.append,
            )
            assert len(getattr(r, to)) == 100001, (to, len(getattr(r, to)))
            assert "\ufffd" not in getattr(r, to) and "\ufffd" not in "".join(pieces)
            r = s.commands.run(
                f'python3 -c "import sys, time; [(sys.{to}.buffer.write(bytes([b])), sys.{to}.flush(), time.sleep(0.05))'
                " for b in '漢é🙂'.encode()]\""
            )
            assert getattr(r, to) == "漢é🙂", (to, getattr(r, to))
        assert s.commands.run("printf 'a\\346'").stdout == "a\ufffd"


@scenario
def a_command_ends_when_its_first_process_does():
    with sandbox() as s:
        began = time.monotonic()
        assert s.commands.run("sleep 300 & echo ok").stdout == "ok\n"
        assert time.monotonic() - began < 1.5, time.monotonic() - began
        assert s.commands.run("pgrep -c sleep").stdout == "1\n"

        pty = s.pty.create(size=PtySize(rows=24, cols=80))
        s.pty.send_stdin(pty.pid, b"sleep 300 &\n")
        s.pty.send_stdin(pty.pid, b"exit 7\n")
        until(lambda: run(s, f"kill -0 {pty.pid}").exit_code != 0)
        began = time.monotonic()
        try:
            code = pty.wait().exit_code
        except CommandExitException as err:
            code = err.exit_code
        assert code == 7, code
        assert time.monotonic() - began < 1.5, time.monotonic() - began


@scenario
def killing_a_terminal_ends_its_session_not_a_daemon():
    with sandbox() as s:
        pty = s.pty.create(size=PtySize(rows=24, cols=80))
        s.pty.send_stdin(pty.pid, b"setsid sleep 500 </dev/null >/dev/null 2>&1 &\n")
        s.pty.send_stdin(pty.pid, b"python3 -m http.server 8080\n")
        serves = "curl -s -o /dev/null http://127.0.0.1:8080/"
        until(lambda: run(s, serves).exit_code == 0)
        assert pty.kill()
        assert run(s, "sleep 0.5; " + serves).exit_code == 7
        again = s.commands.run("python3 -m http.server 8080", background=True)
        until(lambda: run(s, serves).exit_code == 0)
        assert again.kill()
        assert int(s.commands.run("pgrep -cf 'sleep 500'").stdout) >= 1


@scenario
def files_go_where_the_user_has_no_rights_and_become_his():
    with sandbox() as s:
        for path in ("/app/x.txt", "/workspace/deep/x.txt", "/data/x", "/etc/x", "/opt/x"):
            s.files.write(path, "one")
            s.files.write(path, "two")
            assert s.files.read(path) == "two"
            assert run(s, f"stat -c %U {path} && echo more >>{path}").stdout == "user\n", path
        assert s.files.make_dir("/srv/a/b")
        assert run(s, "stat -c %U /srv/a /srv/a/b").stdout == "user\nuser\n"
        s.files.rename("/app/x.txt", "/srv/y")
        s.files.remove("/srv/y")
        assert "root:" in s.files.read("/etc/shadow")

        watch = s.files.watch_dir("/app")
        s.files.write("/app/new", "small")
        events = []

        def told():
            events.extend(watch.get_new_events())
            return len(events) >= 3

        until(told)
        time.sleep(0.3)
        told()
        watch.stop()
        got = [f"{e.type.value if hasattr(e.type, 'value') else e.type} {e.name}" for e in events]
        assert got == ["create new", "chmod new", "write new"], got


@scenario
def a_download_has_its_name():
    with sandbox() as s:
        for name, want in (
            ("report.pdf", 'inline; filename="report.pdf"'),
            ("Übersicht.pdf", "inline; filename=\"_bersicht.pdf\"; filename*=UTF-8''%C3%9Cbersicht.pdf"),
        ):
            s.files.write(name, "x")
            with urllib.request.urlopen(s.download_url(name)) as res:
                assert res.headers["Content-Disposition"] == want, res.headers["Content-Disposition"]
                assert res.read() == b"x"


@scenario
def a_server_keeps_its_address_over_a_pause():
    with sandbox() as s:
        own = s.commands.run("hostname -I").stdout.split()[0]
        s.commands.run(f"python3 -m http.server 8080 --bind {own}", background=True)

        def works():
            try:
                with urllib.request.urlopen(f"https://{s.get_host(8080)}/") as res:
                    return res.status == 200
            except OSError:
                return False

        until(works)
        (s.pause if hasattr(s, "pause") else s.beta_pause)()
        other = Sandbox.create(timeout=60)  # may get its place in the network
        s.connect()
        until(works)
        assert run(s, f"curl -sf -o /dev/null http://{own}:8080/").exit_code == 0
        other.kill()


def main():
    failed = 0
    for f in scenarios:
        name = f.__name__.replace("_", " ")
        if ONLY and not any(o in name for o in ONLY):
            continue
        began = time.monotonic()
        try:
            f()
            print(f"ok {name} {(time.monotonic() - began) * 1000:.0f}", flush=True)
        except Exception:
            failed += 1
            print(f"not ok {name} {(time.monotonic() - began) * 1000:.0f}")
            print(re.sub("^", "    ", traceback.format_exc(), flags=re.M), flush=True)
    sys.exit(1 if failed else 0)


main()
