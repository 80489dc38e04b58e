import assert from 'node:assert/strict'
import { Sandbox, test, fresh, failure } from './lib.mjs'

test('sandbox.createSnapshot Sandbox.create Sandbox.deleteSnapshot', 'sandboxes are made from a snapshot, with its files and processes', async (s) => {
  await s.files.write('/home/user/state', 'one')
  const h = await s.commands.run('sleep 1000', { background: true, timeoutMs: 0 })
  const snap = await s.createSnapshot()
  assert.ok(snap.snapshotId)
  await s.files.write('/home/user/state', 'two')
  try {
    const copy = await Sandbox.create(snap.snapshotId, { timeoutMs: 60_000 })
    try {
      assert.notEqual(copy.sandboxId, s.sandboxId)
      assert.equal(await copy.files.read('/home/user/state'), 'one')
      assert.equal((await copy.commands.run(`kill -0 ${h.pid} && echo alive`)).stdout, 'alive\n')
      assert.equal(await s.files.read('/home/user/state'), 'two', 'the original goes on')
    } finally {
      await copy.kill()
    }
  } finally {
    assert.equal(await Sandbox.deleteSnapshot(snap.snapshotId), true)
  }
  assert.equal(await Sandbox.deleteSnapshot(snap.snapshotId), false)
  await failure(Sandbox.create(snap.snapshotId))
})

test('Sandbox.createSnapshot sandbox.listSnapshots Sandbox.listSnapshots snapshotPaginator.nextItems snapshotPaginator.hasNext snapshotPaginator.nextToken', 'snapshots are listed, a sandbox\'s and all', async (s) => {
  const made = [await Sandbox.createSnapshot(s.sandboxId), await Sandbox.createSnapshot(s.sandboxId)]
  try {
    const own = s.listSnapshots({ limit: 1 })
    const first = await own.nextItems()
    assert.equal(first.length, 1)
    assert.ok(own.hasNext && own.nextToken)
    const all = await Sandbox.listSnapshots().nextItems()
    for (const m of made) assert.ok(all.some((x) => x.snapshotId === m.snapshotId))
  } finally {
    for (const m of made) await Sandbox.deleteSnapshot(m.snapshotId)
  }
})

/** What copies must have of their own, and what they must share. */
async function assertCopies(original, copies) {
  const everyone = [original, ...copies]
  assert.equal(new Set(everyone.map((s) => s.sandboxId)).size, everyone.length)
  const facts = await Promise.all(everyone.map(async (s) => (await s.commands.run('hostname -I; cat /proc/sys/kernel/random/uuid; cat ~/mark')).stdout.split('\n')))
  for (const i of [0, 1]) assert.equal(new Set(facts.map((f) => f[i])).size, everyone.length, facts.map((f) => f[i]).join())
  for (const f of facts) assert.equal(f[2], 'shared')
  await copies[0].files.write('/home/user/mark', 'its own')
  assert.equal(await original.files.read('/home/user/mark'), 'shared')
}

test('sandbox.fork Sandbox.fork', 'copies of a running sandbox, each with an address and randomness of its own', async () => {
  await fresh({}, async (s) => {
    await s.files.write('/home/user/mark', 'shared')
    const outcomes = [...await s.fork({ count: 2 }), ...await Sandbox.fork(s.sandboxId)]
    const copies = outcomes.map((o) => o.sandbox ?? o)
    try {
      assert.equal(copies.length, 3)
      await assertCopies(s, copies)
    } finally {
      await Promise.all(copies.map((c) => c.kill()))
    }
  })
}, { only: 'e2b' })

test('Sandbox.clone', 'clones of a running sandbox, each with an address and randomness of its own', async () => {
  await fresh({}, async (s) => {
    await s.files.write('/home/user/mark', 'shared')
    const result = await Sandbox.clone(s.sandboxId, { count: 2 })
    const copies = result.sandboxes ?? result
    try {
      assert.equal(copies.length, 2)
      await assertCopies(s, copies)
    } finally {
      await Promise.all(copies.map((c) => c.kill()))
    }
  })
}, { only: 'novita' })
