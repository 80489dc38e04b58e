// Plays the demo's acts with the published SDK. What stands between "show" and
// "end" is what the demo prints, and what it runs. What must come of it stands in
// the story, in story.go: this program only reports what it saw.
import { Sandbox as Published } from 'novita-sandbox'

const demo = JSON.parse(process.env.CORDON_DEMO) // { stage, template, commands }
class Sandbox extends Published {
  static defaultTemplate = demo.template
}

let act, began, current

async function tell(path, what) {
  const res = await fetch(demo.stage + path, { method: 'POST', body: JSON.stringify(what) })
  if (!res.ok) throw new Error(await res.text())
}

const saw = (fact, value, ms) => tell('/saw', { fact, value: String(value), ms, sandbox: current.sandboxId })

/** Reports a sandbox that was created: this long after the act began. */
async function created(sandbox) {
  current = sandbox
  await saw('created', 'running', performance.now() - began)
}

/** Runs the story's commands in the sandbox; each prints the seconds it took and what it saw. */
async function see(...facts) {
  for (const fact of facts) {
    const { stdout } = await current.commands.run(demo.commands[act][fact])
    const [seconds, ...value] = stdout.trim().split(' ')
    await saw(fact, value.join(' '), seconds * 1000)
  }
}

/** Fetches from outside, as a browser would, and reports what read makes of the response. */
async function open(fact, url, read = (res) => res.status, headers = {}) {
  const start = performance.now()
  const value = await read(await fetch(url, { headers }))
  await saw(fact, value, performance.now() - start)
}

/** Waits until a service that was just started in the sandbox listens. */
async function listens(port) {
  await current.commands.run(`for i in $(seq 200); do (: </dev/tcp/127.0.0.1/${port}) 2>/dev/null && exit; sleep 0.02; done; exit 1`)
}

const acts = {
  async hello() {
    // show
    const sandbox = await Sandbox.create()
    // end
    await created(sandbox)
    await see('web', 'metadata')
  },

  async offline() {
    // show
    const sandbox = await Sandbox.create({ allowInternetAccess: false })
    // end
    await created(sandbox)
    await see('connect', 'name')
  },

  async addresses() {
    // show
    const sandbox = await Sandbox.create({
      network: { denyOut: ['0.0.0.0/0'], allowOut: ['1.1.1.1', '8.8.8.0/24'] },
    })
    // end
    await created(sandbox)
    await see('address', 'range', 'denied')
  },

  async names() {
    // show
    const sandbox = await Sandbox.create({
      network: { denyOut: ['0.0.0.0/0'], allowOut: ['example.com', '*.github.com'] },
    })
    // end
    await created(sandbox)
    await see('name', 'wildcard', 'sni', 'host', 'lookup')
  },

  async forged() {
    // show
    const sandbox = await Sandbox.create({
      network: { denyOut: ['0.0.0.0/0'], allowOut: ['example.com'] },
    })
    // end
    await created(sandbox)
    // show
    await sandbox.commands.run("echo '198.51.100.66 example.com' | sudo tee -a /etc/hosts")
    // end
    await see('owner')
  },

  async live() {
    // show
    const sandbox = await Sandbox.create()
    // end
    await created(sandbox)
    // show
    const download = await sandbox.commands.run("curl -sN 'https://example.com/slow?n=300&every=50ms'", { background: true })
    // end
    for (let i = 0; i < 500 && !download.stdout; i++) await new Promise((r) => setTimeout(r, 20)) // it has begun
    const start = performance.now()
    // show
    await sandbox.setNetwork({ denyOut: ['0.0.0.0/0'], allowOut: ['1.1.1.1'] })
    // end
    await saw('set', 'in force', performance.now() - start)
    const ended = await download.wait().catch((err) => err)
    await saw('cut', `curl ended with ${ended.exitCode}`, performance.now() - start)
    await see('after', 'allowed')
  },

  async url() {
    // show
    const sandbox = await Sandbox.create()
    // end
    await created(sandbox)
    // show
    await sandbox.commands.run('python -m http.server 3000', { background: true })
    const url = 'https://' + sandbox.getHost(3000)
    // end
    await listens(3000)
    await saw('url', url, 0)
    await open('open', url)
    await open('closed', 'https://' + sandbox.getHost(3001), async (res) => `${res.status} ${(await res.json()).message}`)
  },

  async mask() {
    // show
    const sandbox = await Sandbox.create({ network: { maskRequestHost: 'localhost:${PORT}' } })
    // end
    await created(sandbox)
    await sandbox.commands.run(demo.commands[act].host, { background: true })
    await listens(3000)
    await open('host', 'https://' + sandbox.getHost(3000), (res) => res.text())
  },

  async private() {
    // show
    const sandbox = await Sandbox.create({ network: { allowPublicTraffic: false } })
    // end
    await created(sandbox)
    // show
    await sandbox.commands.run('python -m http.server 3000', { background: true })
    const headers = { 'e2b-traffic-access-token': sandbox.trafficAccessToken }
    // end
    await listens(3000)
    const url = 'https://' + sandbox.getHost(3000)
    await open('without', url)
    await open('with', url, undefined, headers)
  },

  async kill() {
    // show
    const sandbox = await Sandbox.create()
    // end
    await created(sandbox)
    // show
    await sandbox.kill()
    // end
    await open('gone', 'https://' + sandbox.getHost(3000), async (res) => `${res.status} ${(await res.json()).message}`)
  },
}

for (const [name, play] of Object.entries(acts)) {
  await tell('/act', { act: name })
  act = name
  began = performance.now()
  try {
    await play()
  } finally {
    await current?.kill()
    current = undefined
  }
}
