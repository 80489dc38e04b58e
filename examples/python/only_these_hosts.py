# Creates a sandbox that reaches two hosts and nothing else.
#
# It prints:
#   example.com: 200
#   api.github.com: 200
#   example.org: refused
from e2b import CommandExitException, Sandbox

sandbox = Sandbox.create(
    network={
        "deny_out": ["0.0.0.0/0"],  # nothing at all ...
        "allow_out": ["example.com", "*.github.com"],  # ... but these names, on ports 80 and 443
    }
)
try:
    for host in ["example.com", "api.github.com", "example.org"]:
        try:
            result = sandbox.commands.run(f"curl -s -o /dev/null -w '%{{http_code}}' https://{host}")
            print(f"{host}: {result.stdout}")
        except CommandExitException:
            # curl did not even get an address: other names are not resolved.
            print(f"{host}: refused")
finally:
    sandbox.kill()
