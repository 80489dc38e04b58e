// The documentation's scenarios with an unmodified SDK against a live server.
//
//   node scenarios.mjs <novita|e2b> [name...]
//
// Prints one line a scenario: "ok <name> <ms>" or "not ok <name> <ms>" with the
// error below it, indented. The lab's control server (LAB_CONTROL) says what
// really arrived in the small internet, and crashes and starts the server.
import assert from 'node:assert/strict'

const sdk = process.argv[2]
const only = process.argv.slice(3)
const { Sandbox } = await import({ novita: 'novita-sandbox', e2b: 'e2b' }[sdk])
const lab = JSON.parse(process.env.LAB)

// ---- helpers

async function withSandbox(opts, use) {
  const sandbox = await Sandbox.create({ timeoutMs: 120_000, ...opts })
  try {
    return await use(sandbox)
  } finally {
    await sandbox.kill()
  }
}

/** Runs a command; a non-zero exit is a result here, not an exception. */
async function run(sandbox, cmd) {
  try {
    return await sandbox.commands.run(cmd, { timeoutMs: 30_000 })
  } catch (err) {
    if (err.exitCode === undefined) throw err
    return err
  }
}

/** The status curl sees, or 0 when no response came. */
async function status(sandbox, url, extra = '') {
  const r = await run(sandbox, `curl -s -o /dev/null --max-time 8 ${extra} -w '%{http_code}' '${url}'`)
  return Number(r.stdout)
}

/**
 * Connects from inside, three times: the errno of the last (0 is success) and the
 * milliseconds of the quickest, which a busy machine does not blur.
 */
async function connect(sandbox, ip, port) {
  const family = ip.includes(':') ? 'AF_INET6' : 'AF_INET'
  const r = await run(sandbox, `python3 -c "
import socket, time
took = []
for _ in range(3):
    s = socket.socket(socket.${family}); s.settimeout(5)
    t = time.perf_counter()
    try:
        e = s.connect_ex(('${ip}', ${port}))
    except TimeoutError:
        e = 110
    took.append((time.perf_counter() - t) * 1000)
    s.close()
print(e, min(took))"`)
  const [errno, ms] = r.stdout.trim().split(' ').map(Number)
  return { errno, ms }
}

const ECONNREFUSED = 111

async function assertRefused(sandbox, ip, port = 443) {
  const { errno, ms } = await connect(sandbox, ip, port)
  assert.equal(errno, ECONNREFUSED, `connect to ${ip}:${port}: errno`)
  assert.ok(ms < 50, `refusal took ${ms} ms`)
}

async function control(method, path) {
  const res = await fetch(lab.control + path, { method })
  assert.equal(res.status, 200, `${method} ${path}: ${await res.clone().text()}`)
  return res.json()
}

const mark = async () => (await control('POST', '/mark')).mark
const seenText = async (since, text) => (await control('GET', `/seen?mark=${since}&text=${encodeURIComponent(text)}`)).packets
const seenAddr = async (since, addr) => (await control('GET', `/seen?mark=${since}&addr=${addr}`)).packets

function setNetwork(sandbox, rules) {
  return sandbox.updateNetwork ? sandbox.updateNetwork(rules) : sandbox.setNetwork(rules)
}

async function rejects(opts, pattern) {
  await assert.rejects(
    async () => {
      const s = await Sandbox.create(opts)
      await s.kill()
    },
    (err) => {
      assert.match(String(err.message), /400/)
      assert.match(String(err.message), pattern)
      return true
    },
  )
}

async function serve(sandbox, port, flags = '') {
  const proc = await sandbox.commands.run(`python -m http.server ${port} ${flags}`, { background: true })
  await until(async () => (await connect(sandbox, '127.0.0.1', port)).errno === 0)
  return proc
}

async function until(ok, ms = 10_000) {
  const end = Date.now() + ms
  for (;;) {
    if (await ok()) return
    if (Date.now() > end) throw new Error('not true in time')
    await new Promise((r) => setTimeout(r, 50))
  }
}

const all = ['0.0.0.0/0']

// ---- scenarios

const scenarios = {
  async 'create with defaults reaches a site over https'() {
    await withSandbox({}, async (s) => {
      assert.equal(await status(s, `https://${lab.allowed}/`), 200)
      const hello = await s.commands.run('echo hello')
      assert.equal(hello.stdout, 'hello\n')
      assert.equal(hello.exitCode, 0)
    })
  },

  async 'allowInternetAccess false reaches nothing'() {
    await withSandbox({ allowInternetAccess: false }, async (s) => {
      const since = await mark()
      assert.equal(await status(s, `https://${lab.allowed}/`), 0)
      await assertRefused(s, '1.1.1.1')
      await assertRefused(s, '8.8.8.8', 53)
      assert.equal(await seenAddr(since, '1.1.1.1'), 0)
      assert.equal(await seenText(since, lab.allowed), 0)
    })
  },

  async 'allowed addresses answer, others are refused at once'() {
    await withSandbox({ network: { denyOut: all, allowOut: ['1.1.1.1', '8.8.8.0/24'] } }, async (s) => {
      const since = await mark()
      assert.equal(await status(s, 'https://1.1.1.1', '-k'), 301)
      assert.equal(await status(s, 'https://8.8.8.8', '-k'), 302)
      await assertRefused(s, lab.deniedIP)
      await assertRefused(s, '8.8.4.4')
      assert.equal(await seenAddr(since, lab.deniedIP), 0)
    })
  },

  async 'a denied address is refused, the rest works'() {
    await withSandbox({ network: { denyOut: ['8.8.8.8'] } }, async (s) => {
      await assertRefused(s, '8.8.8.8')
      assert.equal(await status(s, 'https://1.1.1.1', '-k'), 301)
      assert.equal(await status(s, `https://${lab.allowed}/`), 200)
    })
  },

  async 'allow beats deny'() {
    await withSandbox({ network: { denyOut: ['8.8.8.0/24', '1.1.1.1'], allowOut: ['8.8.8.8', '1.1.1.0/24'] } }, async (s) => {
      assert.equal(await status(s, 'https://8.8.8.8', '-k'), 302)
      assert.equal(await status(s, 'https://1.1.1.1', '-k'), 301)
      await assertRefused(s, lab.neighbour) // in 8.8.8.0/24
    })
  },

  async 'an allowed name on 80 and 443, a denied name on the same address gets no byte through'() {
    await withSandbox({ network: { denyOut: all, allowOut: [lab.sharedA] } }, async (s) => {
      assert.equal(await status(s, `https://${lab.sharedA}/`), 200)
      assert.equal(await status(s, `http://${lab.sharedA}/`), 200)
      const since = await mark()
      const ip = lab.sharedIP
      assert.equal(await status(s, `https://${lab.sharedB}/`, `--resolve ${lab.sharedB}:443:${ip}`), 0)
      assert.equal(await status(s, `http://${lab.sharedB}/`, `--resolve ${lab.sharedB}:80:${ip}`), 403) // ours
      assert.equal(await status(s, `http://${lab.sharedB}/`), 0)
      assert.equal(await seenText(since, lab.sharedB), 0)
      assert.equal(await seenAddr(since, ip), 0)
    })
  },

  async 'a wildcard allows every depth and not the apex'() {
    await withSandbox({ network: { denyOut: all, allowOut: ['*.' + lab.wildcard] } }, async (s) => {
      assert.equal(await status(s, `https://x.${lab.wildcard}/`), 200)
      assert.equal(await status(s, `http://a.b.${lab.wildcard}/`), 200)
      assert.equal(await status(s, `https://${lab.wildcard}/`), 0)
      assert.equal(await status(s, `https://${lab.sharedB}/`), 0)
    })
  },

  async 'names, addresses and ranges mix'() {
    await withSandbox({ network: { denyOut: all, allowOut: [lab.sharedA, '1.1.1.1', '8.8.8.0/24'] } }, async (s) => {
      assert.equal(await status(s, `https://${lab.sharedA}/`), 200)
      assert.equal(await status(s, 'https://1.1.1.1', '-k'), 301)
      assert.equal(await status(s, 'https://8.8.8.8', '-k'), 302)
      assert.equal(await status(s, `https://${lab.sharedB}/`), 0)
    })
  },

  async 'wrong rules are refused in the known words'() {
    await rejects({ network: { allowOut: [lab.sharedA] } }, /you must include 'ALL_TRAFFIC' in deny out to block all other traffic/)
    await rejects({ network: { denyOut: [lab.sharedA] } }, /invalid denied CIDR/)
    await rejects({ network: { denyOut: all, allowOut: ['https://x.test/'] } }, /invalid allowed address/)
    await rejects({ network: { maskRequestHost: 'a b' } }, /mask request host is not valid/)
  },

  async 'a forged hosts file still reaches the real owner of the name'() {
    await withSandbox({ network: { denyOut: all, allowOut: [lab.sharedA] } }, async (s) => {
      const since = await mark()
      await s.commands.run(`echo '${lab.deniedIP} ${lab.sharedA}' | sudo tee -a /etc/hosts`)
      const r = await run(s, `curl -s --max-time 8 https://${lab.sharedA}/`)
      assert.equal(r.exitCode, 0, r.stderr)
      assert.ok(r.stdout.includes(lab.sharedA), r.stdout)
      assert.equal(await seenAddr(since, lab.deniedIP), 0)
    })
  },

  async 'rules can be replaced while it runs'() {
    await withSandbox({}, async (s) => {
      assert.equal(await status(s, 'https://1.1.1.1', '-k'), 301)
      await setNetwork(s, { denyOut: all, allowOut: ['8.8.8.8'] })
      await assertRefused(s, '1.1.1.1')
      assert.equal(await status(s, 'https://8.8.8.8', '-k'), 302)
      await setNetwork(s, { denyOut: all, allowOut: [lab.sharedA] })
      assert.equal(await status(s, `https://${lab.sharedA}/`), 200)
      await assertRefused(s, '8.8.8.8', 8443)
      await setNetwork(s, {})
      assert.equal(await status(s, 'https://1.1.1.1', '-k'), 301)
    })
  },

  async 'a port is public at its host name until its process is killed'() {
    await withSandbox({}, async (s) => {
      const host = s.getHost(3000)
      const proc = await serve(s, 3000)
      const res = await fetch('https://' + host)
      assert.equal(res.status, 200)
      assert.match(await res.text(), /Directory listing for/)
      await proc.kill()
      await until(async () => (await fetch('https://' + host)).status === 502)
      const gone = await (await fetch('https://' + host)).json()
      assert.deepEqual(gone, {
        sandboxId: s.sandboxId,
        message: 'The sandbox is running but port is not open',
        port: 3000,
        code: 502,
      })
    })
  },

  async 'a port bound to the sandbox loopback is public too'() {
    await withSandbox({}, async (s) => {
      await serve(s, 3001, '--bind 127.0.0.1')
      assert.equal((await fetch('https://' + s.getHost(3001))).status, 200)
    })
  },

  async 'the service sees the masked host'() {
    await withSandbox({ network: { maskRequestHost: 'localhost:${PORT}' } }, async (s) => {
      await s.files.write('/tmp/echo.py', `
from http.server import BaseHTTPRequestHandler, HTTPServer
class Echo(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write((self.headers['Host'] + ' ' + self.headers.get('X-Forwarded-Host', '')).encode())
HTTPServer(('', 3000), Echo).serve_forever()
`)
      await s.commands.run('python /tmp/echo.py', { background: true })
      await until(async () => (await connect(s, '127.0.0.1', 3000)).errno === 0)
      const host = s.getHost(3000)
      assert.equal(await (await fetch('https://' + host)).text(), `localhost:3000 ${host}`)
    })
  },

  async 'a private port needs its traffic token'() {
    await withSandbox({ network: { allowPublicTraffic: false } }, async (s) => {
      await serve(s, 3000)
      const url = 'https://' + s.getHost(3000)
      const without = await fetch(url)
      assert.equal(without.status, 403)
      assert.match((await without.json()).message, /Token header 'e2b-traffic-access-token' is missing/)
      const wrong = await fetch(url, { headers: { 'e2b-traffic-access-token': 'x' } })
      assert.equal(wrong.status, 403)
      assert.match((await wrong.json()).message, /is invalid/)
      const right = await fetch(url, { headers: { 'e2b-traffic-access-token': s.trafficAccessToken } })
      assert.equal(right.status, 200)
    })
  },

  async 'a server is asked in the same breath as it is started'() {
    await withSandbox({}, async (s) => {
      let res
      for (let port = 3001; port < 3005 && res?.status !== 200; port++) { // a busy machine may be too slow for it, now and then
        await s.commands.run(`python3 -m http.server ${port}`, { background: true, cwd: '/tmp' })
        res = await fetch('https://' + s.getHost(port))
        await res.text()
      }
      assert.equal(res.status, 200)
    })
  },

  async 'kill ends it once'() {
    const s = await Sandbox.create()
    const host = s.getHost(3000)
    assert.equal(await s.isRunning(), true)
    assert.equal(await Sandbox.kill(s.sandboxId), true)
    assert.equal(await Sandbox.kill(s.sandboxId), false)
    assert.equal(await s.isRunning(), false)
    const res = await fetch('https://' + host)
    assert.equal(res.status, 502)
    assert.deepEqual(await res.json(), { sandboxId: s.sandboxId, message: 'The sandbox was not found', code: 502 })
  },

  async 'the end of its time is the end of it'() {
    const s = await Sandbox.create({ timeoutMs: 2000 })
    await until(async () => !(await s.isRunning()), 20_000)
    const res = await fetch('https://' + s.getHost(3000))
    assert.equal(res.status, 502)
    assert.deepEqual(await res.json(), { sandboxId: s.sandboxId, message: 'The sandbox was not found', code: 502 })
    assert.equal(await Sandbox.kill(s.sandboxId), false)
  },

  async 'files, environment, input and exit codes'() {
    await withSandbox({ envs: { GREETING: 'moin' }, metadata: { run: sdk } }, async (s) => {
      await s.files.write('/home/user/dir/a.txt', 'text')
      assert.equal(await s.files.read('/home/user/dir/a.txt'), 'text')
      assert.deepEqual((await s.files.list('/home/user/dir')).map((e) => e.name), ['a.txt'])
      assert.equal(await s.files.exists('/nowhere'), false)
      assert.equal((await s.commands.run('echo $GREETING; whoami; pwd')).stdout, 'moin\nuser\n/home/user\n')
      assert.equal((await run(s, 'exit 3')).exitCode, 3)
      assert.equal((await s.commands.run('sudo id -u')).stdout, '0\n')
      const info = await s.getInfo()
      assert.equal(info.metadata.run, sdk)
      const page = await Sandbox.list({ query: { metadata: { run: sdk } } }).nextItems()
      assert.ok(page.some((x) => x.sandboxId === s.sandboxId))
      const again = await Sandbox.connect(s.sandboxId)
      assert.equal((await again.commands.run('cat dir/a.txt')).stdout, 'text')
    })
  },

  async 'a server that dies and returns changes nothing for a sandbox'() {
    await withSandbox({ network: { denyOut: all, allowOut: ['1.1.1.1', lab.sharedA] } }, async (s) => {
      await serve(s, 3000)
      // While the server is dead the sandbox keeps trying what is denied, and writes down what it got.
      await s.files.write('/tmp/probe.py', `
import socket, time
end = time.time() + 8
with open('/tmp/probe.log', 'w', buffering=1) as log:
    while time.time() < end:
        for ip, port in (('${lab.deniedIP}', 443), ('${lab.sharedIP}', 443), ('1.1.1.1', 443)):
            s = socket.socket(); s.settimeout(1)
            try: e = s.connect_ex((ip, port))
            except OSError as err: e = err.errno
            s.close()
            log.write(f'{ip} {e}\\n')
        time.sleep(0.1)
    log.write('done\\n')
`)
      const since = await mark()
      await s.commands.run('python3 /tmp/probe.py', { background: true })
      await control('POST', '/server/crash')
      await new Promise((r) => setTimeout(r, 2000))
      await control('POST', '/server/start')
      assert.equal((await s.commands.run('echo back')).stdout, 'back\n')
      assert.equal((await fetch('https://' + s.getHost(3000))).status, 200)
      assert.equal(await status(s, `https://${lab.sharedA}/`), 200)
      assert.equal(await status(s, `https://${lab.sharedB}/`), 0)
      await assertRefused(s, lab.deniedIP, 8443)
      await until(async () => (await s.files.read('/tmp/probe.log')).endsWith('done\n'), 20_000)
      assert.equal(await seenAddr(since, lab.deniedIP), 0)
      const lines = (await s.files.read('/tmp/probe.log')).split('\n')
      assert.ok(lines.filter((l) => l === '1.1.1.1 0').length > 10, 'allowed addresses went on')
    })
  },

  async 'twenty at once, each under its own rules'() {
    const count = 20
    const made = await Promise.all(Array.from({ length: count }, (_, i) =>
      Sandbox.create({ timeoutMs: 180_000, network: { denyOut: all, allowOut: [i % 2 ? '1.1.1.1' : '8.8.8.8'] } })))
    try {
      assert.equal(new Set(made.map((s) => s.sandboxId)).size, count)
      await Promise.all(made.map(async (s, i) => {
        const [yes, no] = i % 2 ? ['1.1.1.1', '8.8.8.8'] : ['8.8.8.8', '1.1.1.1']
        assert.equal((await connect(s, yes, 443)).errno, 0, `sandbox ${i} to ${yes}`)
        assert.equal((await connect(s, no, 443)).errno, ECONNREFUSED, `sandbox ${i} to ${no}`)
      }))
    } finally {
      await Promise.all(made.map((s) => s.kill()))
    }
  },

  async 'one sandbox opens the public url of another, and nothing else of it'() {
    await withSandbox({}, async (server) => {
      await serve(server, 3000)
      const url = 'https://' + server.getHost(3000)
      const ip = (await server.commands.run('hostname -I')).stdout.trim().split(' ')[0]
      await withSandbox({}, async (s) => {
        assert.equal(await status(s, url), 200)
        await assertRefused(s, ip, 3000)
        await assertRefused(s, ip, 49983)
        await assertRefused(s, lab.hostIP, 443)
        await assertRefused(s, lab.hostIP, 22)
      })
      await withSandbox({ allowInternetAccess: false }, async (s) => {
        assert.equal(await status(s, url), 0)
      })
    })
  },
}

// ---- run

let failed = 0
for (const [name, scenario] of Object.entries(scenarios)) {
  if (only.length && !only.some((o) => name.includes(o))) continue
  const began = performance.now()
  const took = () => `${Math.round(performance.now() - began)}`
  try {
    await scenario()
    console.log(`ok ${name} ${took()}`)
  } catch (err) {
    failed++
    console.log(`not ok ${name} ${took()}`)
    console.log(String(err.stack ?? err).replace(/^/gm, '    '))
  }
}
process.exit(failed ? 1 : 0)
