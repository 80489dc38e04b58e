// Starts a web server in a sandbox and opens it from outside. Then does the same
// with a port that asks for a token.
//
// It prints:
//   https://3000-…
//   public: 200
//   private, without the token: 403
//   private, with the token: 200
import { Sandbox } from 'e2b'

const sandbox = await Sandbox.create()
try {
  await sandbox.commands.run('python3 -m http.server 3000', { background: true })

  // Every port of a sandbox has a URL of its own. Open it in a browser, too.
  const url = 'https://' + sandbox.getHost(3000)
  console.log(url)
  console.log('public:', (await fetch(url)).status)
} finally {
  await sandbox.kill()
}

const secret = await Sandbox.create({ network: { allowPublicTraffic: false } })
try {
  await secret.commands.run('python3 -m http.server 3000', { background: true })

  const url = 'https://' + secret.getHost(3000)
  console.log('private, without the token:', (await fetch(url)).status)
  const headers = { 'e2b-traffic-access-token': secret.trafficAccessToken }
  console.log('private, with the token:', (await fetch(url, { headers })).status)
} finally {
  await secret.kill()
}
