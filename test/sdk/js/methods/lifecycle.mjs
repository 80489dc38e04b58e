import assert from 'node:assert/strict'
import { Sandbox, test, fresh, until, failure } from './lib.mjs'

/** The milliseconds until a sandbox ends. */
const left = async (s) => new Date((await s.getInfo()).endAt) - Date.now()

test('Sandbox.create sandbox.getInfo sandbox.kill', 'a sandbox is made as asked, and told about', async () => {
  await fresh({ timeoutMs: 60_000, metadata: { owner: 'ada', 'a b': 'c&d' }, envs: { A: '1' } }, async (s) => {
    assert.match(s.sandboxId, /^[a-z0-9]+$/)
    const i = await s.getInfo()
    assert.deepEqual([i.sandboxId, i.state, i.metadata], [s.sandboxId, 'running', { owner: 'ada', 'a b': 'c&d' }])
    assert.ok(i.cpuCount > 0 && i.memoryMB > 0)
    const life = i.endAt - i.startedAt
    assert.ok(life > 59_000 && life < 61_500, `lives for ${life} ms`)
  })
})

test('Sandbox.create', 'a template that does not exist is named', async () => {
  assert.match((await failure(Sandbox.create('no-such-template'))).message, /no-such-template/)
})

test('Sandbox.create', 'a wrong key is refused', async () => {
  assert.equal((await failure(Sandbox.create({ apiKey: 'e2b_' + '0'.repeat(40) }))).name, 'AuthenticationError')
})

test('Sandbox.kill sandbox.kill sandbox.isRunning', 'a killed sandbox does not run', async () => {
  const s = await Sandbox.create({ timeoutMs: 60_000 })
  assert.equal(await s.isRunning(), true)
  await s.kill()
  assert.equal(await s.isRunning(), false)
  assert.equal(await Sandbox.kill(s.sandboxId), false)
  await failure(s.commands.run('true'))
  assert.match((await failure(Sandbox.getInfo(s.sandboxId))).name, /NotFoundError/)
})

test('Sandbox.list sandboxPaginator.nextItems sandboxPaginator.hasNext sandboxPaginator.nextToken', 'a list comes page by page, by metadata and state', async () => {
  const mark = `list-${Date.now()}`
  const made = await Promise.all([1, 2, 3].map(() => Sandbox.create({ timeoutMs: 60_000, metadata: { mark } })))
  try {
    const pages = Sandbox.list({ query: { metadata: { mark }, state: ['running'] }, limit: 2 })
    const found = []
    assert.equal(pages.hasNext, true)
    found.push(...await pages.nextItems())
    assert.equal(found.length, 2)
    assert.ok(pages.nextToken)
    found.push(...await pages.nextItems())
    assert.equal(pages.hasNext, false)
    assert.deepEqual(found.map((x) => x.sandboxId).sort(), made.map((s) => s.sandboxId).sort())
    assert.deepEqual(await Sandbox.list({ query: { metadata: { mark }, state: ['paused'] } }).nextItems(), [])
  } finally {
    await Promise.all(made.map((s) => s.kill()))
  }
})

test('Sandbox.getInfo Sandbox.connect Sandbox.kill', 'a sandbox is entered by its ID', async (s) => {
  assert.equal((await Sandbox.getInfo(s.sandboxId)).sandboxId, s.sandboxId)
  const other = await Sandbox.connect(s.sandboxId)
  assert.equal((await other.commands.run('echo here')).stdout, 'here\n')
  assert.match((await failure(Sandbox.connect('i00000000000000000000'))).name, /NotFoundError/)
})

test('sandbox.setTimeout Sandbox.setTimeout', 'the time left is set, and the sandbox ends then', async () => {
  const s = await Sandbox.create({ timeoutMs: 120_000 })
  await s.setTimeout(60_000)
  assert.ok((await left(s)) < 61_000)
  await Sandbox.setTimeout(s.sandboxId, 2_000)
  await until(async () => !(await s.isRunning()), 20_000)
})

test('sandbox.connect Sandbox.connect', 'connecting never shortens a life', async () => {
  await fresh({ timeoutMs: 200_000 }, async (s) => {
    await s.connect({ timeoutMs: 10_000 })
    assert.ok((await left(s)) > 150_000)
    await Sandbox.connect(s.sandboxId, { timeoutMs: 300_000 })
    assert.ok((await left(s)) > 250_000)
  })
})

test('sandbox.pause Sandbox.pause Sandbox.connect sandbox.connect', 'a paused sandbox goes on where it stopped', async () => {
  await fresh({ metadata: { paused: 'yes' }, envs: { E: 'kept' } }, async (s) => {
    await s.files.write('/home/user/f', 'file')
    const h = await s.commands.run('sleep 1000', { background: true, timeoutMs: 0 })
    assert.notEqual(await s.pause(), false)
    assert.equal((await Sandbox.getInfo(s.sandboxId)).state, 'paused')
    assert.equal(await Sandbox.pause(s.sandboxId), false, 'paused already')
    const again = await Sandbox.connect(s.sandboxId)
    assert.equal(again.sandboxId, s.sandboxId)
    assert.equal(await again.files.read('/home/user/f'), 'file')
    assert.equal((await again.commands.run('echo $E')).stdout, 'kept\n')
    assert.ok((await again.commands.list()).some((p) => p.pid === h.pid), 'the process lives')
    await s.connect()
    assert.equal((await s.commands.run(`kill -0 ${h.pid} && echo alive`)).stdout, 'alive\n')
  })
})

test('sandbox.betaPause Sandbox.betaPause', 'the older names of pause work', async () => {
  await fresh({}, async (s) => {
    assert.notEqual(await s.betaPause(), false)
    assert.equal(await Sandbox.betaPause(s.sandboxId), false)
    await s.connect()
  })
})

test('Sandbox.betaCreate', 'auto-pause keeps a sandbox whose time is over', async () => {
  const s = await Sandbox.betaCreate({ timeoutMs: 2_000, autoPause: true })
  try {
    await until(async () => (await Sandbox.getInfo(s.sandboxId)).state === 'paused', 20_000)
  } finally {
    await Sandbox.kill(s.sandboxId)
  }
}, { only: 'novita' })

test('Sandbox.create', 'lifecycle onTimeout pause keeps a sandbox, a request wakes it', async () => {
  const s = await Sandbox.create({ timeoutMs: 3_000, lifecycle: { onTimeout: 'pause', autoResume: true } })
  try {
    await s.commands.run('python3 -m http.server 8000', { background: true, timeoutMs: 0 })
    await until(async () => (await Sandbox.getInfo(s.sandboxId)).state === 'paused', 20_000)
    const res = await fetch('https://' + s.getHost(8000))
    assert.equal(res.status, 200)
    assert.equal((await Sandbox.getInfo(s.sandboxId)).state, 'running')
  } finally {
    await Sandbox.kill(s.sandboxId)
  }
})

test('sandbox.getMetrics Sandbox.getMetrics', 'use of the machine is measured over time', async (s) => {
  await s.commands.run('head -c 20000000 /dev/zero | md5sum')
  const all = await until(async () => {
    const m = await s.getMetrics()
    return m.length && m
  }, 30_000)
  const m = all.at(-1)
  assert.ok(m.cpuCount > 0 && m.cpuUsedPct >= 0 && m.memUsed > 0 && m.memTotal > m.memUsed && m.diskTotal > 0, JSON.stringify(m))
  assert.ok(Math.abs(new Date(m.timestamp) - Date.now()) < 60_000)
  const none = await Sandbox.getMetrics(s.sandboxId, { start: new Date(Date.now() - 3600_000 * 24 * 2), end: new Date(Date.now() - 3600_000 * 24) })
  assert.deepEqual(none, [])
})

test('sandbox.getHost', 'a port has a host name', async (s) => {
  assert.match(s.getHost(3000), new RegExp(`^3000-${s.sandboxId}\\.`))
})

test('Sandbox.getQuota', 'limits and use are told', async () => {
  const q = await Sandbox.getQuota()
  assert.ok(q.limit.concurrentInstances >= q.usage.concurrentInstances && q.usage.concurrentInstances >= 1, JSON.stringify(q))
}, { only: 'novita' })

test('Sandbox.getEvents', 'what happened to a sandbox is listed', async () => {
  const s = await Sandbox.create({ timeoutMs: 60_000 })
  await s.kill()
  const { items } = await Sandbox.getEvents({ sandboxId: s.sandboxId, orderAsc: true })
  const names = items.filter((e) => e.sandboxId === s.sandboxId || e.sandboxID === s.sandboxId).map((e) => e.eventName)
  assert.ok(names.length >= 2 && /create/.test(names[0]) && /kill/.test(names.at(-1)), names.join())
}, { only: 'novita' })

test('sandbox.reset Sandbox.reset', 'a reset sandbox starts over under its own name', async () => {
  await fresh({ envs: { E: 'kept' } }, async (s) => {
    await s.files.write('/home/user/gone', 'x')
    assert.equal(await s.reset({ resume: true }), true)
    await until(() => s.isRunning())
    assert.equal(await s.files.exists('/home/user/gone'), false)
    assert.equal((await s.commands.run('echo $E')).stdout, 'kept\n')
    assert.equal(await Sandbox.reset(s.sandboxId, { resume: true }), true)
  })
}, { only: 'novita' })
