# Shows what a sandbox tried to reach and which rule decided.
#
# It prints:
#   deny dns example.org by dns
import json
import os
import urllib.request

from e2b import Sandbox

sandbox = Sandbox.create(network={"deny_out": ["0.0.0.0/0"], "allow_out": ["example.com"]})
try:
    sandbox.commands.run("curl -s https://example.com")
    sandbox.commands.run("curl -s https://example.org || true")  # || true: it will fail

    # The SDKs have no call for the flow log; it is one GET. "cordon flows <id>"
    # prints the same. Without ?verdict=deny it has what was allowed as well.
    url = f"{os.environ['E2B_API_URL']}/sandboxes/{sandbox.sandbox_id}/network/events?verdict=deny"
    request = urllib.request.Request(url, headers={"X-API-KEY": os.environ["E2B_API_KEY"]})
    for e in json.load(urllib.request.urlopen(request)):
        print(e["verdict"], e["protocol"], e.get("name") or e["destination"], "by", e["rule"]["id"])
finally:
    sandbox.kill()
