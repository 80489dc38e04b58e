# Gives a sandbox other rules while it runs: first everything to install what it
# needs, then only what untrusted code may reach.
#
# It prints:
#   before: 200
#   after: refused
#   still allowed: 200
from e2b import CommandExitException, Sandbox

sandbox = Sandbox.create()


def get(host):
    try:
        return sandbox.commands.run(f"curl -s -o /dev/null -w '%{{http_code}}' https://{host}").stdout
    except CommandExitException:
        return "refused"


try:
    print("before:", get("example.com"))

    # When the call returns the new rules are in force. Connections that they do
    # not allow are cut, also those that are open.
    sandbox.update_network({"deny_out": ["0.0.0.0/0"], "allow_out": ["api.github.com"]})

    print("after:", get("example.com"))
    print("still allowed:", get("api.github.com"))
finally:
    sandbox.kill()
