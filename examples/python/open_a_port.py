# Starts a web server in a sandbox and opens it from outside. Then does the same
# with a port that asks for a token.
#
# It prints:
#   https://3000-…
#   public: 200
#   private, without the token: 403
#   private, with the token: 200
import urllib.error
import urllib.request

from e2b import Sandbox


def status(url, headers={}):
    """The HTTP status of a GET."""
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers)).status
    except urllib.error.HTTPError as err:
        return err.code


sandbox = Sandbox.create()
try:
    # While the handle is kept, the request below waits for the server to open its port.
    server = sandbox.commands.run("python3 -m http.server 3000", background=True)

    # Every port of a sandbox has a URL of its own. Open it in a browser, too.
    url = "https://" + sandbox.get_host(3000)
    print(url)
    print("public:", status(url))
finally:
    sandbox.kill()

secret = Sandbox.create(network={"allow_public_traffic": False})
try:
    server = secret.commands.run("python3 -m http.server 3000", background=True)

    url = "https://" + secret.get_host(3000)
    print("private, without the token:", status(url))
    token = {"e2b-traffic-access-token": secret.traffic_access_token}
    print("private, with the token:", status(url, token))
finally:
    secret.kill()
