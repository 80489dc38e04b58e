"""Every public method of an unmodified Python SDK against a live server.

    python methods.py <novita|e2b> <sync|async> [part of a test's name or method...]

The tests are written once, for both of a package's classes: what a method
returns is awaited when it can be. Prints "method <name>" for each method the SDK
has, and for each test "ok <name> [<methods>] <file> <ms>" or "not ok ..." with the
error below it.
"""
import asyncio
import contextlib
import datetime
import inspect
import io
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

SDK, FLAVOUR, ONLY = sys.argv[1], sys.argv[2], sys.argv[3:]
if SDK == "novita":
    import novita_sandbox.core as package
else:
    import e2b as package
Sandbox = package.AsyncSandbox if FLAVOUR == "async" else package.Sandbox
CommandExit, NotFound, SandboxError = package.CommandExitException, package.NotFoundException, package.SandboxException
LAB = json.loads(os.environ["LAB"])
ALL = ["0.0.0.0/0"]

tests = []


def test(methods, only=None, flavour=None):
    """Registers a test that shows these methods to work; its docstring is its name."""

    def add(f):
        if only in (None, SDK) and flavour in (None, FLAVOUR):
            tests.append((methods.split(), f))
        return f

    return add


# ---- helpers


async def go(x):
    return await x if inspect.isawaitable(x) else x


@contextlib.asynccontextmanager
async def fresh(**opts):
    s = await go(Sandbox.create(**{"timeout": 120, **opts}))
    try:
        yield s
    finally:
        await go(Sandbox.kill(s.sandbox_id))


async def until(ok, seconds=15):
    end = time.monotonic() + seconds
    while True:
        v = await go(ok())
        if v:
            return v
        if time.monotonic() > end:
            raise AssertionError(f"not true in {seconds} s")
        await asyncio.sleep(0.05)


async def failure(call, kind=Exception):
    """The exception that a call ends with; none is a failure."""
    try:
        await go(call())
    except kind as err:
        return err
    raise AssertionError("no error")


async def sh(s, cmd, **opts):
    return (await go(s.commands.run(cmd, **opts))).stdout


def get(url, headers=None, data=None):
    request = urllib.request.Request(url, headers=headers or {}, data=data)
    try:
        with urllib.request.urlopen(request, timeout=15, context=ssl.create_default_context()) as r:
            return r.status, r.read()
    except urllib.error.HTTPError as err:
        return err.code, err.read()


async def fetch(url, headers=None, data=None):
    return await asyncio.to_thread(get, url, headers, data)


counter = iter(range(1, 1000))


def place(name=""):
    """A path nobody used before."""
    return f"/home/user/py-{next(counter)}" + (f"/{name}" if name else "")


# ---- commands


@test("commands.run")
async def command_output(s):
    "a command answers with its output, error output and exit code"
    r = await go(s.commands.run("echo out; echo err >&2"))
    assert (r.stdout, r.stderr, r.exit_code) == ("out\n", "err\n", 0), r


@test("commands.run")
async def command_failure(s):
    "a failing command is an error with everything in it"
    err = await failure(lambda: s.commands.run("echo out; exit 7"), CommandExit)
    assert (err.exit_code, err.stdout) == (7, "out\n")


@test("commands.run")
async def command_callbacks(s):
    "output is handed out as it comes"
    got = []
    r = await go(s.commands.run("echo one; echo two >&2", on_stdout=lambda d: got.append(d), on_stderr=lambda d: got.append(d)))
    assert sorted(got) == ["one\n", "two\n"], got
    assert r.exit_code == 0


@test("commands.run")
async def command_context(s):
    "environment, folder and user are the caller's"
    assert await sh(s, "echo $A; pwd; whoami", envs={"A": "x y"}, cwd="/tmp", user="root") == "x y\n/tmp\nroot\n"
    assert "cwd '/nowhere' does not exist" in str(await failure(lambda: s.commands.run("pwd", cwd="/nowhere")))
    assert "invalid username: 'nobody-here'" in str(await failure(lambda: s.commands.run("id", user="nobody-here")))


@test("commands.run")
async def command_deadline(s):
    "a command past its time is ended"
    await failure(lambda: s.commands.run("sleep 61", timeout=1), package.TimeoutException)
    await until(lambda: gone(s, "sleep 61"))


async def gone(s, cmd):
    return not any(cmd in " ".join(p.args) for p in await go(s.commands.list()))


@test("commands.run")
async def command_unicode_and_size(s):
    "megabytes and text in every script arrive whole"
    assert await sh(s, "echo 'grüße 世界 🙂'") == "grüße 世界 🙂\n"
    assert len(await sh(s, "head -c 3000000 /dev/zero | tr '\\0' x")) == 3_000_000


@test("commands.run commandHandle.wait commandHandle.pid")
async def command_background(s):
    "a background command is waited for"
    h = await go(s.commands.run("echo out; sleep 0.3; exit 3", background=True))
    assert h.pid > 0
    err = await failure(h.wait, CommandExit)
    assert (err.exit_code, err.stdout) == (3, "out\n")


@test("commandHandle.stdout commandHandle.stderr commandHandle.exitCode commandHandle.error", flavour="async")
async def handle_state(s):
    "a handle knows what came so far"
    h = await s.commands.run("echo out; echo err >&2; exit 3", background=True)
    await failure(h.wait, CommandExit)
    assert (h.stdout, h.stderr, h.exit_code) == ("out\n", "err\n", 3)
    assert "exit status 3" in h.error


@test("commands.list commands.kill commandHandle.kill")
async def command_list_and_kill(s):
    "running commands are listed, and killed once"
    h = await go(s.commands.run("sleep 30", background=True, cwd="/tmp", envs={"MARK": "yes"}))
    [p] = [p for p in await go(s.commands.list()) if p.pid == h.pid]
    assert (p.cmd, p.args, p.cwd, p.envs["MARK"]) == ("/bin/bash", ["-l", "-c", "sleep 30"], "/tmp", "yes"), p
    assert await go(s.commands.kill(h.pid)) is True
    err = await failure(h.wait, CommandExit)
    assert err.exit_code == -1 and "signal: killed" in str(err.error), err
    assert await go(s.commands.kill(h.pid)) is False
    assert await go(h.kill()) is False


@test("commands.sendStdin")
async def command_input(s):
    "input reaches a command that asked for it, and no other"
    h = await go(s.commands.run("read a; echo got $a", background=True, stdin=True))
    await go(s.commands.send_stdin(h.pid, "word\n"))
    assert (await go(h.wait())).stdout == "got word\n"
    h = await go(s.commands.run("sleep 5", background=True))
    assert "stdin not enabled or closed" in str(await failure(lambda: s.commands.send_stdin(h.pid, "x")))
    await go(h.kill())


@test("commands.closeStdin commandHandle.sendStdin commandHandle.closeStdin", only="e2b")
async def command_input_end(s):
    "input ends when it is closed, by the handle or the process ID"
    for close in (lambda h: h.close_stdin(), lambda h: s.commands.close_stdin(h.pid)):
        h = await go(s.commands.run("cat", background=True, stdin=True))
        await go(h.send_stdin("hello"))
        await go(close(h))
        assert (await go(h.wait())).stdout == "hello"


@test("commands.streamInput", only="e2b")
async def command_stream_input(s):
    "input is streamed to a command"
    h = await go(s.commands.run("head -c 15", background=True, stdin=True))
    if FLAVOUR == "async":
        stream = await go(s.commands.stream_input(h.pid))
        for part in ("first ", b"second ", "third"):
            await stream.send(part)
        await stream.close()
    else:
        s.commands.stream_input(h.pid, iter(["first ", b"second ", "third"]))
    assert (await go(h.wait())).stdout == "first second th"


@test("commands.connect commandHandle.disconnect")
async def command_reconnect(s):
    "a command goes on without its client, and another connects to it"
    h = await go(s.commands.run("for i in $(seq 30); do echo $i; sleep 0.05; done", background=True))
    await go(h.disconnect())
    again = await go(s.commands.connect(h.pid))
    assert (await go(again.wait())).stdout.endswith("30\n")
    await failure(lambda: s.commands.connect(999_999), NotFound)


# ---- pty

size = package.PtySize if hasattr(package, "PtySize") else None


class Terminal:
    """A terminal and what it has shown; the synchronous SDK shows it while it waits."""

    async def open(self, s, **opts):
        self.s, self.seen = s, b""
        if FLAVOUR == "async":
            opts["on_data"] = self.take
        self.handle = await go(s.pty.create(size=size(rows=24, cols=80), timeout=60, **opts))
        return self

    def take(self, data):
        self.seen += data

    async def type(self, text):
        await go(self.s.pty.send_stdin(self.handle.pid, text.encode()))

    async def end(self):
        with contextlib.suppress(CommandExit):
            if FLAVOUR == "async":
                await self.handle.wait()
            else:
                self.handle.wait(on_pty=self.take)
        return self.seen.decode(errors="replace")


@test("pty.create pty.sendStdin pty.resize")
async def terminal_works(s):
    "a terminal shows what a typed command prints, and is resized"
    t = await Terminal().open(s, envs={"ABC": "xyz"}, cwd="/tmp")
    await t.type("echo [$ABC] [$TERM] $(pwd); tput cols\n")
    await asyncio.sleep(0.5)
    await go(s.pty.resize(t.handle.pid, size(rows=33, cols=101)))
    await t.type("tput cols; tput lines; exit\n")
    seen = await t.end()
    assert "[xyz] [xterm-256color] /tmp\r\n80\r\n" in seen and "101\r\n33\r\n" in seen, seen


@test("pty.kill")
async def terminal_killed(s):
    "a killed terminal is gone"
    t = await Terminal().open(s)
    assert await go(s.pty.kill(t.handle.pid)) is True
    await t.end()
    assert await go(s.pty.kill(t.handle.pid)) is False


@test("pty.connect")
async def terminal_again(s):
    "a terminal is left and entered again"
    t = await Terminal().open(s)
    await t.type("KEPT=42\n")
    await go(t.handle.disconnect())
    opts = {"on_data": t.take} if FLAVOUR == "async" else {}
    t.handle = await go(s.pty.connect(t.handle.pid, **opts))
    await t.type('echo "<$KEPT>"; exit\n')
    assert "<42>" in await t.end()


@test("pty.streamInput", only="e2b")
async def terminal_stream(s):
    "typing is streamed to a terminal"
    t = await Terminal().open(s)
    if FLAVOUR == "async":
        stream = await go(s.pty.stream_input(t.handle.pid))
        await stream.send(b"echo $((40+2))\n")
        await stream.send(b"exit\n")
        await stream.close()
    else:
        s.pty.stream_input(t.handle.pid, iter([b"echo $((40+2))\n", b"exit\n"]))
    seen = await t.end()
    assert "\r42\r\n" in seen, repr(seen)


# ---- files


@test("files.write files.read")
async def file_text(s):
    "text is read as it was written, its folders are made"
    path = place("a/b/ü 世界.txt")
    info = await go(s.files.write(path, "grüße\n"))
    assert info.path == path
    assert await go(s.files.read(path)) == "grüße\n"
    assert await sh(s, f"stat -c '%U %a' '{path}'") == "user 644\n"


@test("files.write files.read")
async def file_bytes(s):
    "bytes and streams both ways"
    path, data = place("bin"), bytes(range(256)) * 300
    for put in (data, io.BytesIO(data)):
        await go(s.files.write(path, put))
        assert bytes(await go(s.files.read(path, format="bytes"))) == data
    stream, parts = await go(s.files.read(path, format="stream")), []
    if hasattr(stream, "__aiter__"):
        async for part in stream:
            parts.append(part)
    else:
        parts = list(stream)
    assert b"".join(parts) == data
    await go(s.files.write(path, "again and " * 1000, gzip=True, use_octet_stream=True))
    assert len(await go(s.files.read(path, gzip=True))) == 10_000


@test("files.write files.writeFiles")
async def file_several(s):
    "several files go up in one request"
    d = place()
    infos = await go(s.files.write_files([{"path": f"{d}/a", "data": "A"}, {"path": f"{d}/x/b", "data": b"B"}]))
    assert [i.path for i in infos] == [f"{d}/a", f"{d}/x/b"]
    assert await sh(s, f"cat {d}/a {d}/x/b") == "AB"


@test("files.write files.read")
async def file_user(s):
    "a user sees and owns what is theirs, a missing file is told"
    await go(s.files.write("/root/secret", "x", user="root"))
    assert await go(s.files.read("/root/secret", user="root")) == "x"
    assert await go(s.files.read("/root/secret")) == "x"  # files are reached with root's rights
    await failure(lambda: s.files.read("/nowhere"), NotFound)


@test("files.list")
async def file_list(s):
    "a folder is listed to the depth asked for"
    d = place()
    await go(s.files.write_files([{"path": f"{d}/a", "data": "1"}, {"path": f"{d}/d/b", "data": "22"}]))
    assert [e.name for e in await go(s.files.list(d))] == ["a", "d"]
    assert [e.path for e in await go(s.files.list(d, depth=2))] == [f"{d}/a", f"{d}/d", f"{d}/d/b"]
    await failure(lambda: s.files.list("/nowhere"), NotFound)


@test("files.getInfo files.exists")
async def file_info(s):
    "a file's facts are the file system's"
    path = place("f")
    await go(s.files.write(path, "hello"))
    await sh(s, f"chmod 751 {path}; ln -s {path} {path}.link")
    i = await go(s.files.get_info(path))
    assert (i.name, i.path, i.size, i.mode, i.permissions, i.owner, i.group) == ("f", path, 5, 0o751, "-rwxr-x--x", "user", "user"), i
    assert (await go(s.files.get_info(path + ".link"))).symlink_target == path
    assert await go(s.files.exists(path)) is True
    assert await go(s.files.exists("/tmp/none")) is False


@test("files.makeDir files.rename files.remove")
async def file_tree(s):
    "folders are made, moved and removed"
    d = place("x/y")
    assert await go(s.files.make_dir(d)) is True
    assert await go(s.files.make_dir(d)) is False
    await go(s.files.write(d + "/a", "A"))
    moved = await go(s.files.rename(d + "/a", d + "/new/b"))
    assert (moved.name, moved.path) == ("b", d + "/new/b")
    assert await go(s.files.read(d + "/new/b")) == "A"
    await go(s.files.remove(d))
    assert await go(s.files.exists(d)) is False
    await failure(lambda: s.files.rename(d, d + "2"), NotFound)


@test("files.write files.getInfo", only="e2b")
async def file_metadata(s):
    "metadata stays with the file"
    path = place("f")
    await go(s.files.write(path, "x", metadata={"purpose": "test"}))
    assert (await go(s.files.get_info(path))).metadata == {"purpose": "test"}


@test("files.watchDir watchHandle.stop")
async def watch(s):
    "changes in a folder are told, until it is stopped"
    d, events = place(), []
    await go(s.files.make_dir(d))
    if FLAVOUR == "async":
        w = await s.files.watch_dir(d, on_event=events.append, recursive=True)
    else:
        w = s.files.watch_dir(d, recursive=True)
    await sh(s, f"mkdir -p {d}/new/deep && echo x > {d}/new/deep/f; rm {d}/new/deep/f")

    def seen():
        if FLAVOUR != "async":
            events.extend(w.get_new_events())
        return any(e.name == "new/deep/f" and e.type.value == "remove" for e in events)

    await until(seen)
    assert any(e.name == "new/deep/f" and e.type.value == "create" for e in events), events
    await go(w.stop())


@test("watchHandle.getNewEvents", flavour="sync")
async def watch_polled(s):
    "events are told once, and none after the watcher is gone"
    d = place()
    s.files.make_dir(d)
    w = s.files.watch_dir(d)
    s.files.write(d + "/a", "x")
    await until(lambda: any(e.name == "a" for e in w.get_new_events()))
    await until(lambda: w.get_new_events() == [])
    w.stop()
    await failure(w.get_new_events)


@test("sandbox.downloadUrl sandbox.uploadUrl")
async def signed_links(s):
    "signed links work, for their file only"
    path = place("up.txt")
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="up.txt"\r\n\r\nby link\r\n--b--\r\n'
    up = s.upload_url(path, use_signature_expiration=60)
    assert (await fetch(up, {"Content-Type": "multipart/form-data; boundary=b"}, body))[0] == 200
    down = s.download_url(path, use_signature_expiration=60)
    assert await fetch(down) == (200, b"by link")
    assert (await fetch(re.sub("path=[^&]+", "path=/etc/passwd", down)))[0] == 401


# ---- git


async def repository(s):
    """A repository with one commit on main, and an empty bare one for its origin."""
    base = place()
    path = base + "/work"
    await sh(s, f"git init -q --bare {base}/origin.git -b main")
    await go(s.git.init(path, initial_branch="main"))
    await go(s.git.configure_user("Ada", "ada@example.com", scope="local", path=path))
    await go(s.files.write(path + "/a.txt", "one\n"))
    await go(s.git.add(path))
    await go(s.git.commit(path, "first"))
    return path, f"{base}/origin.git", base


@test("git.init git.add git.commit git.configureUser git.status git.reset git.restore")
async def git_changes(s):
    "a repository has a commit, changes are told and taken back"
    path, _, _ = await repository(s)
    assert (await go(s.git.status(path))).is_clean
    await go(s.files.write(path + "/a.txt", "spoilt\n"))
    await go(s.git.add(path))
    assert (await go(s.git.status(path))).has_staged
    await go(s.git.reset(path, mode="mixed", target="HEAD"))
    assert not (await go(s.git.status(path))).has_staged
    await go(s.git.restore(path, paths=["a.txt"]))
    assert await go(s.files.read(path + "/a.txt")) == "one\n"


@test("git.branches git.createBranch git.checkoutBranch git.deleteBranch")
async def git_branches(s):
    "branches come and go"
    path, _, _ = await repository(s)
    await go(s.git.create_branch(path, "side"))
    await go(s.git.checkout_branch(path, "main"))
    b = await go(s.git.branches(path))
    assert (b.current_branch, sorted(b.branches)) == ("main", ["main", "side"])
    await go(s.git.delete_branch(path, "side"))
    assert (await go(s.git.branches(path))).branches == ["main"]


@test("git.remoteAdd git.remoteGet git.push git.clone git.pull")
async def git_remote(s):
    "work goes to a remote, to a clone and back"
    path, origin, base = await repository(s)
    await go(s.git.remote_add(path, "origin", origin))
    assert await go(s.git.remote_get(path, "origin")) == origin
    await go(s.git.push(path, remote="origin", branch="main", set_upstream=True))
    await go(s.git.clone("file://" + origin, path=base + "/clone"))
    await go(s.files.write(path + "/a.txt", "two\n"))
    await go(s.git.add(path, files=["a.txt"]))
    await go(s.git.commit(path, "second"))
    await go(s.git.push(path))
    await go(s.git.pull(base + "/clone"))
    assert await go(s.files.read(base + "/clone/a.txt")) == "two\n"


@test("git.setConfig git.getConfig git.dangerouslyAuthenticate")
async def git_config(s):
    "settings and credentials are kept where they are put"
    path, _, _ = await repository(s)
    await go(s.git.set_config("core.editor", "true", scope="local", path=path))
    assert await go(s.git.get_config("core.editor", scope="local", path=path)) == "true"
    await go(s.git.dangerously_authenticate("ada", "word", host="git.test", protocol="https"))
    assert "https://ada:word@git.test" in await sh(s, "cat ~/.git-credentials")


# ---- lifecycle


def left(info):
    return (info.end_at - datetime.datetime.now(datetime.timezone.utc)).total_seconds()


@test("Sandbox.create sandbox.getInfo Sandbox.getInfo sandbox.kill Sandbox.kill sandbox.isRunning")
async def life(_):
    "a sandbox is made as asked, told about, and killed once"
    s = await go(Sandbox.create(timeout=60, metadata={"owner": "ada", "a b": "c&d"}, envs={"A": "1"}))
    i = await go(s.get_info())
    assert (i.sandbox_id, i.metadata, i.state.value) == (s.sandbox_id, {"owner": "ada", "a b": "c&d"}, "running"), i
    assert 50 < left(i) < 61
    assert await go(s.is_running())
    await go(s.kill())
    assert not await go(s.is_running())
    assert await go(Sandbox.kill(s.sandbox_id)) is False
    await failure(lambda: Sandbox.get_info(s.sandbox_id), NotFound)


@test("Sandbox.create")
async def create_refused(_):
    "a wrong key and an unknown template are refused"
    await failure(lambda: Sandbox.create(api_key="e2b_" + "0" * 40), package.AuthenticationException)
    assert "no-such-template" in str(await failure(lambda: Sandbox.create("no-such-template")))


@test("Sandbox.list sandboxPaginator.nextItems sandboxPaginator.hasNext sandboxPaginator.nextToken")
async def listing(_):
    "a list comes page by page"
    mark = f"py-{time.time()}"
    query = package.SandboxQuery(metadata={"mark": mark})
    async with fresh(metadata={"mark": mark}) as a, fresh(metadata={"mark": mark}) as b:
        pages, found = Sandbox.list(query=query, limit=1), []
        while pages.has_next:
            found += await go(pages.next_items())
            assert len(found) <= 2 and (pages.next_token or not pages.has_next)
        assert sorted(x.sandbox_id for x in found) == sorted([a.sandbox_id, b.sandbox_id])


@test("sandbox.setTimeout Sandbox.setTimeout sandbox.connect Sandbox.connect")
async def timeouts(_):
    "the time left is set, connecting never shortens it, and the sandbox ends then"
    async with fresh(timeout=200) as s:
        await go(s.connect(timeout=10))
        assert left(await go(s.get_info())) > 150
        other = await go(Sandbox.connect(s.sandbox_id, timeout=300))
        assert left(await go(other.get_info())) > 250
        await go(s.set_timeout(60))
        assert left(await go(s.get_info())) < 61
        await go(Sandbox.set_timeout(s.sandbox_id, 1))
        await until(lambda: stopped(s), 20)
    await failure(lambda: Sandbox.connect("i00000000000000000000"), NotFound)


async def stopped(s):
    return not await go(s.is_running())


@test("sandbox.pause Sandbox.pause sandbox.connect Sandbox.connect sandbox.betaPause Sandbox.betaPause")
async def pausing(_):
    "a paused sandbox goes on where it stopped"
    async with fresh(envs={"E": "kept"}) as s:
        h = await go(s.commands.run("sleep 1000", background=True, timeout=0))
        await go(s.pause())
        assert (await go(Sandbox.get_info(s.sandbox_id))).state.value == "paused"
        again = await go(Sandbox.connect(s.sandbox_id))
        assert await sh(again, f"kill -0 {h.pid} && echo $E") == "kept\n"
        await go(again.beta_pause())
        again = await go(again.connect()) or again
        await go(Sandbox.pause(s.sandbox_id))
        await go(Sandbox.connect(s.sandbox_id))
        await go(Sandbox.beta_pause(s.sandbox_id))
        await go(s.connect())
        assert await sh(s, f"kill -0 {h.pid} && echo alive") == "alive\n"


@test("Sandbox.betaCreate", only="novita")
async def auto_pause(_):
    "auto-pause keeps a sandbox whose time is over"
    s = await go(Sandbox.beta_create(timeout=2, auto_pause=True))
    try:
        await until(lambda: in_state(s, "paused"), 20)
    finally:
        await go(Sandbox.kill(s.sandbox_id))


async def in_state(s, state):
    return (await go(Sandbox.get_info(s.sandbox_id))).state.value == state


@test("sandbox.getMetrics Sandbox.getMetrics")
async def metrics(s):
    "use of the machine is measured"
    m = (await until(lambda: s.get_metrics(), 30))[-1]
    assert m.cpu_count > 0 and m.mem_total > m.mem_used > 0 and m.disk_total > 0, m
    assert await go(Sandbox.get_metrics(s.sandbox_id))


@test("Sandbox.getQuota Sandbox.getEvents", only="novita")
async def quota_and_events(s):
    "limits, use and what happened are told"
    q = await go(Sandbox.get_quota())
    assert q.limit.concurrent_instances >= q.usage.concurrent_instances >= 1, q
    e = await go(Sandbox.get_events(int(time.time()) - 3600, sandbox_id=s.sandbox_id))
    assert any("create" in x.event_name for x in e.items), e


@test("sandbox.getHost sandbox.trafficAccessToken")
async def private_port(_):
    "a private port opens with its token"
    async with fresh(network={"allow_public_traffic": False}) as s:
        await go(s.commands.run("python3 -m http.server 3000", background=True))
        url = "https://" + s.get_host(3000)
        assert f"3000-{s.sandbox_id}." in url

        async def opened():
            return (await fetch(url, {"e2b-traffic-access-token": s.traffic_access_token}))[0] == 200

        await until(opened)
        assert (await fetch(url))[0] == 403


async def curl(s, url):
    return int(await sh(s, f"curl -sk -o /dev/null --max-time 5 -w '%{{http_code}}' {url} || true"))


UPDATE = {"novita": "setNetwork", "e2b": "updateNetwork"}[SDK]


@test(f"Sandbox.create sandbox.{UPDATE} Sandbox.{UPDATE}")
async def network(_):
    "rules apply from the first packet and are replaced while it runs"

    async def answers(s):
        return await curl(s, "https://1.1.1.1"), await curl(s, "https://8.8.8.8")

    async def replace(target, *first, allow, deny):
        if SDK == "novita":
            return await go(target.set_network(*first, allow_out=allow, deny_out=deny))
        return await go(target.update_network(*first, {"allow_out": allow, "deny_out": deny} if deny else {}))

    async with fresh(network={"deny_out": ALL, "allow_out": ["1.1.1.1"]}) as s:
        assert await answers(s) == (301, 0)
        await replace(s, allow=["8.8.8.8"], deny=ALL)
        assert await answers(s) == (0, 302)
        await replace(Sandbox, s.sandbox_id, allow=None, deny=None)
        assert await answers(s) == (301, 302)


# ---- snapshots


@test("sandbox.createSnapshot Sandbox.createSnapshot Sandbox.deleteSnapshot sandbox.listSnapshots Sandbox.listSnapshots "
      "snapshotPaginator.nextItems snapshotPaginator.hasNext snapshotPaginator.nextToken")
async def snapshots(s):
    "sandboxes are made from a snapshot, with its files and processes"
    await go(s.files.write("/home/user/state", "one"))
    h = await go(s.commands.run("sleep 1000", background=True, timeout=0))
    made = [await go(s.create_snapshot()), await go(Sandbox.create_snapshot(s.sandbox_id))]
    await go(s.files.write("/home/user/state", "two"))
    try:
        pages = s.list_snapshots(limit=1)
        assert len(await go(pages.next_items())) == 1 and pages.has_next and pages.next_token
        everything = [x.snapshot_id for x in await go(Sandbox.list_snapshots().next_items())]
        assert all(m.snapshot_id in everything for m in made)
        copy = await go(Sandbox.create(made[0].snapshot_id, timeout=60))
        try:
            assert await go(copy.files.read("/home/user/state")) == "one"
            assert await sh(copy, f"kill -0 {h.pid} && echo alive") == "alive\n"
            assert await go(s.files.read("/home/user/state")) == "two"
        finally:
            await go(copy.kill())
    finally:
        for m in made:
            assert await go(Sandbox.delete_snapshot(m.snapshot_id)) is True
    assert await go(Sandbox.delete_snapshot(made[0].snapshot_id)) is False


async def assert_copies(original, copies):
    """Each copy has an address and randomness of its own and shares the files."""
    everyone = [original, *copies]
    facts = [(await sh(x, "hostname -I; cat /proc/sys/kernel/random/uuid; cat ~/mark")).split("\n") for x in everyone]
    for i in (0, 1):
        assert len({f[i] for f in facts}) == len(everyone), facts
    assert {f[2] for f in facts} == {"shared"}
    await go(copies[0].files.write("/home/user/mark", "own"))
    assert await go(original.files.read("/home/user/mark")) == "shared"


@test("sandbox.fork Sandbox.fork", only="e2b")
async def forks(_):
    "copies of a running sandbox, each its own"
    async with fresh() as s:
        await go(s.files.write("/home/user/mark", "shared"))
        outcomes = [*await go(s.fork(count=1)), *await go(Sandbox.fork(s.sandbox_id, count=1))]
        copies = [getattr(o, "sandbox", o) for o in outcomes]
        try:
            await assert_copies(s, copies)
        finally:
            for c in copies:
                await go(c.kill())


@test("Sandbox.clone", only="novita")
async def clones(_):
    "clones of a running sandbox, each its own"
    async with fresh() as s:
        await go(s.files.write("/home/user/mark", "shared"))
        copies = (await go(Sandbox.clone(s.sandbox_id, count=2))).sandboxes
        try:
            await assert_copies(s, copies)
        finally:
            for c in copies:
                await go(c.kill())


@test("sandbox.reset Sandbox.reset", only="novita")
async def resetting(_):
    "a reset sandbox starts over under its own name"
    async with fresh(envs={"E": "kept"}) as s:
        await go(s.files.write("/home/user/gone", "x"))
        assert await go(s.reset(resume=True))
        assert await go(s.files.exists("/home/user/gone")) is False
        assert await sh(s, "echo $E") == "kept\n"
        assert await go(Sandbox.reset(s.sandbox_id, resume=True))


# ---- what is not there yet


async def refused(call):
    err = await failure(call)
    assert re.search("501|not supported|does not support", str(err)), repr(err)


@test("sandbox.mountVolume sandbox.unmountVolume sandbox.hotplugMemory sandbox.resize", only="novita")
async def no_hot_changes(s):
    "volumes and another size for a running sandbox are refused"
    await refused(lambda: s.mount_volume("data", "/data"))
    await refused(lambda: s.unmount_volume("/data"))
    await refused(lambda: s.hotplug_memory(2048))
    await refused(lambda: s.resize(memory_mib=2048))


@test("")
async def no_volumes(_):
    "volumes are refused"
    await refused(lambda: (package.AsyncVolume if FLAVOUR == "async" else package.Volume).create("data"))


@test("sandbox.getMcpUrl sandbox.getMcpToken")
async def no_mcp(s):
    "a sandbox without the MCP gateway has no token for one"
    assert "50005-" in s.get_mcp_url()
    try:
        assert not await go(s.get_mcp_token())
    except NotFound:
        pass


# ---- run

# Helpers, settings and what a constructor fills in: not what a server serves.
HIDDEN = {"connection_config", "envd_api_url", "envd_direct_url", "sandbox_domain", "sandbox_id", "files", "commands", "pty", "git"}


def camel(name):
    head, *rest = name.split("_")
    return head + "".join(w.capitalize() for w in rest)


def inventory(holders):
    for prefix, kind in holders.items():
        for name, what in inspect.getmembers_static(kind):
            if name.startswith("_") or name in HIDDEN or not (callable(what) or isinstance(what, (classmethod, staticmethod, property)) or hasattr(what, "__get__")):
                continue
            variant = type(what).__name__ == "class_method_variant"
            static = isinstance(what, (classmethod, staticmethod))
            if prefix == "sandbox" and (variant or static):
                print(f"method Sandbox.{camel(name)}")
            if not (prefix == "sandbox" and static):
                print(f"method {prefix}.{camel(name)}")


async def run_one(methods, f, s):
    began = time.monotonic()
    head = f"{f.__doc__} [{' '.join(methods)}] python/methods.py"
    try:
        await asyncio.wait_for(f(s), 90)
        print(f"ok {head} {(time.monotonic() - began) * 1000:.0f}", flush=True)
        return 0
    except Exception:
        print(f"not ok {head} {(time.monotonic() - began) * 1000:.0f}")
        print(re.sub("^", "    ", traceback.format_exc(), flags=re.M), flush=True)
        return 1


async def main():
    failed = 0
    s = await go(Sandbox.create(timeout=300))
    try:
        for methods, f in tests:
            if not ONLY or any(o in f.__doc__ or any(o in m for m in methods) for o in ONLY):
                failed += await run_one(methods, f, s)
        handle = await go(s.commands.run("true", background=True))
        opts = {"on_event": print} if FLAVOUR == "async" else {}
        watcher = await go(s.files.watch_dir("/home", **opts))
        inventory({
            "sandbox": Sandbox, "commands": type(s.commands), "commandHandle": type(handle), "pty": type(s.pty), "files": type(s.files),
            "watchHandle": type(watcher), "git": type(s.git), "sandboxPaginator": type(Sandbox.list()), "snapshotPaginator": type(Sandbox.list_snapshots()),
        })
        await go(watcher.stop())
    finally:
        await go(s.kill())
    sys.exit(1 if failed else 0)


asyncio.run(main())
