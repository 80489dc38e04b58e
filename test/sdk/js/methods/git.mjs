import assert from 'node:assert/strict'
import { test, failure } from './lib.mjs'

let count = 0
/** A repository with one commit on main, and an empty bare one as its origin. */
async function repository(s) {
  const base = `/home/user/git-${++count}`
  await s.commands.run(`git init -q --bare ${base}/origin.git -b main`)
  const path = base + '/work'
  await s.git.init(path, { initialBranch: 'main' })
  await s.git.configureUser('Ada', 'ada@example.com', { scope: 'local', path })
  await s.files.write(path + '/a.txt', 'one\n')
  await s.git.add(path)
  await s.git.commit(path, 'first')
  return { path, origin: base + '/origin.git', base }
}

test('git.init git.add git.commit git.configureUser', 'a repository is made and has a commit', async (s) => {
  const { path } = await repository(s)
  assert.equal((await s.commands.run(`git -C ${path} log --format='%an %s'`)).stdout, 'Ada first\n')
})

test('git.status', 'the state of files is told', async (s) => {
  const { path } = await repository(s)
  assert.equal((await s.git.status(path)).isClean, true)
  await s.files.write([{ path: path + '/a.txt', data: 'two\n' }, { path: path + '/new.txt', data: '' }])
  const st = await s.git.status(path)
  assert.deepEqual([st.currentBranch, st.isClean, st.hasUntracked], ['main', false, true])
  assert.deepEqual(st.fileStatus.map((f) => f.name).sort(), ['a.txt', 'new.txt'])
})

test('git.branches git.createBranch git.checkoutBranch git.deleteBranch', 'branches come and go', async (s) => {
  const { path } = await repository(s)
  await s.git.createBranch(path, 'side')
  await s.git.checkoutBranch(path, 'main')
  const b = await s.git.branches(path)
  assert.deepEqual([b.currentBranch, [...b.branches].sort()], ['main', ['main', 'side']])
  await s.git.deleteBranch(path, 'side')
  assert.deepEqual((await s.git.branches(path)).branches, ['main'])
})

test('git.remoteAdd git.remoteGet git.push git.clone git.pull', 'work goes to a remote, to a clone and back', async (s) => {
  const { path, origin, base } = await repository(s)
  await s.git.remoteAdd(path, 'origin', origin)
  assert.equal(await s.git.remoteGet(path, 'origin'), origin)
  assert.equal(await s.git.remoteGet(path, 'none'), undefined)
  await s.git.push(path, { remote: 'origin', branch: 'main', setUpstream: true })
  await s.git.clone('file://' + origin, { path: base + '/clone' })
  assert.equal(await s.files.read(base + '/clone/a.txt'), 'one\n')
  await s.files.write(path + '/a.txt', 'two\n')
  await s.git.add(path, { files: ['a.txt'] })
  await s.git.commit(path, 'second')
  await s.git.push(path)
  await s.git.pull(base + '/clone')
  assert.equal(await s.files.read(base + '/clone/a.txt'), 'two\n')
})

test('git.reset git.restore', 'changes are taken back', async (s) => {
  const { path } = await repository(s)
  await s.files.write(path + '/a.txt', 'spoilt\n')
  await s.git.add(path)
  await s.git.reset(path, { mode: 'mixed', target: 'HEAD' })
  assert.equal((await s.git.status(path)).hasStaged, false)
  await s.git.restore(path, { paths: ['a.txt'] })
  assert.equal(await s.files.read(path + '/a.txt'), 'one\n')
})

test('git.setConfig git.getConfig', 'settings are kept where they are put', async (s) => {
  const { path } = await repository(s)
  await s.git.setConfig('core.editor', 'true', { scope: 'local', path })
  assert.equal(await s.git.getConfig('core.editor', { scope: 'local', path }), 'true')
  assert.equal(await s.git.getConfig('core.none', { scope: 'local', path }), undefined)
})

test('git.dangerouslyAuthenticate', 'credentials are stored for the host named', async (s) => {
  await s.git.dangerouslyAuthenticate({ username: 'ada', password: 'word', host: 'git.test', protocol: 'https' })
  assert.match((await s.commands.run('cat ~/.git-credentials')).stdout, /https:\/\/ada:word@git\.test/)
})

test('git.clone', 'a repository that is not there is an error', async (s) => {
  await failure(s.git.clone('file:///home/user/none.git'))
})
