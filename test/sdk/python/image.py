"""What the ENV, USER and WORKDIR of an OCI image are in its sandboxes, with an unmodified SDK.

    python image.py <novita|e2b> [part of a name...]

Prints "ok <name> <ms>" or "not ok <name> <ms>" with the error below it.
"""
import re
import sys
import time
import traceback

SDK = sys.argv[1]
ONLY = sys.argv[2:]
if SDK == "novita":
    import novita_sandbox.core as package
else:
    import e2b as package

s = package.Sandbox.create("settings", timeout=120)


def run(cmd, **opts):
    return s.commands.run(cmd, **opts).stdout


def a_command_finds_programs_by_the_PATH_of_the_image():
    assert run("hi") == "hi from the tool\n"
    assert run("echo $PATH") == "/opt/tool/bin:/bin:/opt/more\n"
    assert run("echo $GREETING $LANG") == "a b C\n"


def a_PATH_given_for_one_command_holds():
    got = run("echo $PATH $GREETING", envs={"PATH": "/bin:/mine", "GREETING": "yours"})
    assert got == "/bin:/mine:/opt/more yours\n", got


def a_terminal_has_the_PATH_of_the_image():
    seen = b""

    def take(data):
        nonlocal seen
        seen += data

    pty = s.pty.create(size=package.PtySize(rows=24, cols=80), timeout=30)
    s.pty.send_stdin(pty.pid, b"hi; id -u; id -g; exit\n")
    pty.wait(on_pty=take)
    assert b"hi from the tool\r\n1001\r\n0\r\n" in seen, seen


def a_command_runs_as_the_user_of_the_image_in_its_directory_and_writes_there():
    got = run("id -u; id -g; echo $PWD; echo mine > made && cat made")
    assert got == "1001\n0\n/data\nmine\n", got
    s.files.write("/data/by-sdk", "text")
    got = run("cat by-sdk; echo more >> by-sdk; cat by-sdk")
    assert got == "texttextmore\n", got
    assert run("id -u", user="root") == "0\n"


failed = 0
for scenario in [
    a_command_finds_programs_by_the_PATH_of_the_image,
    a_PATH_given_for_one_command_holds,
    a_terminal_has_the_PATH_of_the_image,
    a_command_runs_as_the_user_of_the_image_in_its_directory_and_writes_there,
]:
    name = scenario.__name__.replace("_", " ")
    if ONLY and not any(o in name for o in ONLY):
        continue
    began = time.monotonic()
    try:
        scenario()
        print(f"ok {name} {(time.monotonic() - began) * 1000:.0f}", flush=True)
    except Exception:
        failed += 1
        print(f"not ok {name} {(time.monotonic() - began) * 1000:.0f}")
        print(re.sub("^", "    ", traceback.format_exc(), flags=re.M), flush=True)
s.kill()
sys.exit(1 if failed else 0)
