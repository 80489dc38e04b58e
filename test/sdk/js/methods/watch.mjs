import assert from 'node:assert/strict'
import { test, until, failure } from './lib.mjs'

let count = 0
async function folder(s) {
  const dir = `/home/user/watch-${++count}`
  await s.files.makeDir(dir)
  return dir
}

test('files.watchDir watchHandle.stop', 'changes in a folder are told, until it is stopped', async (s) => {
  const dir = await folder(s)
  const events = []
  const w = await s.files.watchDir(dir, (e) => events.push(e))
  await s.files.write(dir + '/a', 'x')
  await s.files.rename(dir + '/a', dir + '/b')
  await s.files.remove(dir + '/b')
  await until(() => events.some((e) => e.type === 'remove' && e.name === 'b'))
  for (const [type, name] of [['create', 'a'], ['write', 'a'], ['rename', 'a'], ['create', 'b']]) {
    assert.ok(events.some((e) => e.type === type && e.name === name), `${type} ${name} in ${JSON.stringify(events)}`)
  }
  await w.stop()
  const before = events.length
  await s.files.write(dir + '/c', 'x')
  await new Promise((r) => setTimeout(r, 300))
  assert.equal(events.length, before)
})

test('files.watchDir', 'a recursive watch follows folders made later', async (s) => {
  const dir = await folder(s)
  const events = []
  const w = await s.files.watchDir(dir, (e) => events.push(e), { recursive: true })
  await s.commands.run(`mkdir -p ${dir}/new/deep && echo x > ${dir}/new/deep/f`)
  await until(() => events.some((e) => e.name === 'new/deep/f'))
  await w.stop()
})

test('files.watchDir', 'an entry comes with its event when asked for', async (s) => {
  const dir = await folder(s)
  const events = []
  const w = await s.files.watchDir(dir, (e) => events.push(e), { includeEntry: true })
  await s.files.write(dir + '/f', 'four')
  await until(() => events.some((e) => e.type === 'write' && e.entry?.size === 4))
  await w.stop()
}, { only: 'e2b' })

test('files.watchDir', 'what cannot be watched is said', async (s) => {
  assert.match((await failure(s.files.watchDir('/nowhere', () => {}))).name, /NotFoundError/)
  assert.match((await failure(s.files.watchDir('/etc/hostname', () => {}))).name, /InvalidArgumentError/)
})
