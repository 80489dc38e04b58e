// What a program in a sandbox and its files look like from outside, with an
// unmodified SDK against a live server.
//
//   node inside.mjs <novita|e2b> [name...]
//
// Prints one line a scenario, as scenarios.mjs does.
import assert from 'node:assert/strict'
import https from 'node:https'

const sdk = process.argv[2]
const only = process.argv.slice(3)
const { Sandbox } = await import({ novita: 'novita-sandbox', e2b: 'e2b' }[sdk])

async function withSandbox(use) {
  const sandbox = await Sandbox.create({ timeoutMs: 120_000 })
  try {
    return await use(sandbox)
  } finally {
    await sandbox.kill()
  }
}

/** Runs a command; a non-zero exit is a result here, not an exception. */
async function run(sandbox, cmd) {
  try {
    return await sandbox.commands.run(cmd)
  } catch (err) {
    if (err.exitCode === undefined) throw err
    return err
  }
}

async function until(ok, ms = 20_000) {
  const end = Date.now() + ms
  while (!(await ok())) {
    if (Date.now() > end) throw new Error('not true in time')
    await new Promise((r) => setTimeout(r, 50))
  }
}

/** Posts a part of a form to a URL and breaks off. */
function breakOff(url, part) {
  return new Promise((resolve) => {
    const head = '--b\r\nContent-Disposition: form-data; name="file"; filename="k"\r\n\r\n'
    const req = https.request(url, {
      method: 'POST',
      headers: { 'Content-Type': 'multipart/form-data; boundary=b', 'Content-Length': 5 << 20 },
    })
    req.on('error', resolve)
    req.write(head + part, () => setTimeout(() => req.destroy(), 300))
  })
}

const scenarios = {
  async 'an upload that breaks off leaves the old file whole'() {
    await withSandbox(async (s) => {
      await s.files.write('k', 'a'.repeat(5 << 20))
      await breakOff(await s.uploadUrl('k'), 'b'.repeat(3 << 20))
      await new Promise((r) => setTimeout(r, 500))
      const got = await s.files.read('k')
      assert.equal(got.length, 5 << 20)
      assert.ok(!got.includes('b'))
      assert.deepEqual((await s.files.list('.')).map((e) => e.name).filter((n) => n.includes('cordon')), [])
    })
  },

  async 'output is cut between characters'() {
    await withSandbox(async (s) => {
      for (const [to, key] of [['stdout', 'stdout'], ['stderr', 'stderr']]) {
        const pieces = []
        const r = await s.commands.run(`python3 -c "import sys; print('漢'*100000, file=sys.${to})"`, {
          onStdout: (p) => void pieces.push(p),
          onStderr: (p) => void pieces.push(p),
        })
        assert.equal([...r[key]].length, 100001, to)
        assert.ok(!r[key].includes('\ufffd'), to)
        assert.ok(!pieces.join('').includes('\ufffd'), to)
        const slow = await s.commands.run(
          `python3 -c "import sys, time; [(sys.${to}.buffer.write(bytes([b])), sys.${to}.flush(), time.sleep(0.05)) for b in '漢é🙂'.encode()]"`,
        )
        assert.equal(slow[key], '漢é🙂', to)
      }
      assert.equal((await s.commands.run(`printf 'a\\346'`)).stdout, 'a\ufffd')
    })
  },

  async 'a command ends when its first process does'() {
    await withSandbox(async (s) => {
      let began = performance.now()
      const r = await s.commands.run('sleep 300 & echo ok')
      assert.equal(r.stdout, 'ok\n')
      assert.ok(performance.now() - began < 1500, `it took ${performance.now() - began} ms`)
      assert.equal((await s.commands.run('pgrep -c sleep')).stdout, '1\n')

      const pty = await s.pty.create({ cols: 80, rows: 24, onData: () => {} })
      await s.pty.sendInput(pty.pid, new TextEncoder().encode('sleep 300 &\n'))
      await s.pty.sendInput(pty.pid, new TextEncoder().encode('exit 7\n'))
      await until(async () => (await run(s, `kill -0 ${pty.pid}`)).exitCode !== 0)
      began = performance.now()
      const end = await pty.wait().catch((err) => err)
      assert.equal(end.exitCode, 7)
      assert.ok(performance.now() - began < 1500, `it took ${performance.now() - began} ms`)
    })
  },

  async 'killing a terminal ends its session, not a daemon'() {
    await withSandbox(async (s) => {
      const pty = await s.pty.create({ cols: 80, rows: 24, onData: () => {} })
      const type = (text) => s.pty.sendInput(pty.pid, new TextEncoder().encode(text + '\n'))
      await type('setsid sleep 500 </dev/null >/dev/null 2>&1 &')
      await type('python3 -m http.server 8080')
      await until(async () => (await run(s, 'curl -s -o /dev/null http://127.0.0.1:8080/')).exitCode === 0)
      assert.ok(await pty.kill())
      const r = await run(s, 'sleep 0.5; curl -s -o /dev/null http://127.0.0.1:8080/')
      assert.equal(r.exitCode, 7)
      const again = await s.commands.run('python3 -m http.server 8080', { background: true })
      await until(async () => (await run(s, 'curl -s -o /dev/null http://127.0.0.1:8080/')).exitCode === 0)
      assert.ok(await again.kill())
      assert.equal((await s.commands.run("pgrep -cf 'sleep 500'")).stdout.trim() >= 1, true)
    })
  },

  async 'files go where the user has no rights, and become his'() {
    await withSandbox(async (s) => {
      for (const path of ['/app/x.txt', '/workspace/deep/x.txt', '/data/x', '/etc/x', '/opt/x']) {
        await s.files.write(path, 'one')
        await s.files.write(path, 'two')
        assert.equal(await s.files.read(path), 'two')
        assert.equal((await run(s, `stat -c %U ${path} && echo more >>${path}`)).stdout, 'user\n')
      }
      assert.equal(await s.files.makeDir('/srv/a/b'), true)
      assert.equal((await run(s, 'stat -c %U /srv/a /srv/a/b')).stdout, 'user\nuser\n')
      await s.files.rename('/app/x.txt', '/srv/y')
      await s.files.remove('/srv/y')
      assert.match(await s.files.read('/etc/shadow'), /root:/)

      const events = []
      const watch = await s.files.watchDir('/app', (e) => void events.push(e))
      await s.files.write('/app/new', 'small')
      await until(() => events.length >= 3)
      await new Promise((r) => setTimeout(r, 300))
      await watch.stop()
      assert.deepEqual(events.map((e) => `${e.type} ${e.name}`), ['create new', 'chmod new', 'write new'])
    })
  },

  async 'a download has its name'() {
    await withSandbox(async (s) => {
      for (const [name, want] of [['report.pdf', 'inline; filename="report.pdf"'], ['Übersicht.pdf', `inline; filename="_bersicht.pdf"; filename*=UTF-8''%C3%9Cbersicht.pdf`]]) {
        await s.files.write(name, 'x')
        const res = await fetch(await s.downloadUrl(name))
        assert.equal(res.headers.get('content-disposition'), want)
        assert.equal(await res.text(), 'x')
      }
    })
  },

  async 'a server keeps its address over a pause'() {
    await withSandbox(async (s) => {
      const own = (await s.commands.run('hostname -I')).stdout.trim().split(' ')[0]
      await s.commands.run(`python3 -m http.server 8080 --bind ${own}`, { background: true })
      const works = async () => (await fetch(`https://${s.getHost(8080)}/`).catch(() => ({}))).status === 200
      await until(works)
      await (s.pause ?? s.betaPause).call(s)
      const other = await Sandbox.create({ timeoutMs: 60_000 }) // may get its place in the network
      await s.connect()
      await until(works)
      assert.equal((await run(s, `curl -sf -o /dev/null http://${own}:8080/`)).exitCode, 0)
      await other.kill()
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
