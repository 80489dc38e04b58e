import assert from 'node:assert/strict'
import { test, fresh, until, failure } from './lib.mjs'

test('commands.run', 'a command answers with its output, error output and exit code', async (s) => {
  const r = await s.commands.run('echo out; echo err >&2')
  assert.deepEqual([r.stdout, r.stderr, r.exitCode], ['out\n', 'err\n', 0])
})

test('commands.run', 'a failing command is an error with everything in it', async (s) => {
  const err = await failure(s.commands.run('echo out; echo err >&2; exit 7'))
  assert.equal(err.name, 'CommandExitError')
  assert.deepEqual([err.exitCode, err.stdout, err.stderr], [7, 'out\n', 'err\n'])
})

test('commands.run', 'output arrives in order while the command runs', async (s) => {
  const lines = []
  const first = Promise.withResolvers ? Promise.withResolvers() : {}
  if (!first.promise) first.promise = new Promise((resolve) => (first.resolve = resolve))
  let ended = false
  const run = s.commands.run('echo one; sleep 1; echo two', { onStdout: (d) => { lines.push(d); first.resolve(ended) } }).then(() => (ended = true))
  assert.equal(await first.promise, false, 'the first line came before the end')
  await run
  assert.equal(lines.join(''), 'one\ntwo\n')
})

test('commands.run', 'environment, folder and user are the caller\'s', async (s) => {
  const r = await s.commands.run('echo $A; pwd; whoami', { envs: { A: 'x y' }, cwd: '/tmp', user: 'root' })
  assert.equal(r.stdout, 'x y\n/tmp\nroot\n')
})

test('commands.run', 'a folder that does not exist is named', async (s) => {
  assert.match((await failure(s.commands.run('pwd', { cwd: '/nowhere' }))).message, /cwd '\/nowhere' does not exist/)
})

test('commands.run', 'an unknown user is refused', async (s) => {
  assert.match((await failure(s.commands.run('id', { user: 'nobody-here' }))).message, /invalid username: 'nobody-here'/)
})

test('commands.run', 'a command past its time is ended', async (s) => {
  const began = Date.now()
  const err = await failure(s.commands.run('sleep 60', { timeoutMs: 1000 }))
  assert.equal(err.name, 'TimeoutError')
  assert.ok(Date.now() - began < 20_000)
  await until(async () => !(await s.commands.list()).some((p) => p.args.join(' ').includes('sleep 60')))
})

test('commands.run', 'megabytes of output arrive whole', async (s) => {
  const r = await s.commands.run('head -c 5000000 /dev/zero | tr "\\0" x')
  assert.equal(r.stdout.length, 5_000_000)
})

test('commands.run', 'text in every script survives', async (s) => {
  const text = 'grüße 世界 🙂'
  assert.equal((await s.commands.run(`echo '${text}'`)).stdout, text + '\n')
})

test('commands.run commandHandle.wait commandHandle.stdout commandHandle.stderr commandHandle.exitCode commandHandle.error', 'a background command is waited for', async (s) => {
  const h = await s.commands.run('echo out; echo err >&2; sleep 0.3; exit 3', { background: true })
  assert.ok(h.pid > 0)
  assert.equal(h.exitCode, undefined)
  const err = await failure(h.wait())
  assert.equal(err.exitCode, 3)
  assert.deepEqual([h.exitCode, h.stdout, h.stderr], [3, 'out\n', 'err\n'])
  assert.match(h.error, /exit status 3/)
})

test('commands.list', 'running commands are listed with what they are', async (s) => {
  const h = await s.commands.run('sleep 30', { background: true, cwd: '/tmp', envs: { MARK: 'yes' } })
  const [p] = (await s.commands.list()).filter((x) => x.pid === h.pid)
  assert.equal(p.cmd, '/bin/bash')
  assert.deepEqual(p.args, ['-l', '-c', 'sleep 30'])
  assert.deepEqual([p.cwd, p.envs.MARK], ['/tmp', 'yes'])
  await h.kill()
  await until(async () => !(await s.commands.list()).some((x) => x.pid === h.pid))
})

test('commands.kill commandHandle.kill', 'a killed command ends at once, and is killed once', async (s) => {
  const h = await s.commands.run('sleep 30', { background: true })
  assert.equal(await s.commands.kill(h.pid), true)
  const err = await failure(h.wait())
  assert.equal(err.exitCode, -1)
  assert.match(err.message, /signal: killed/)
  assert.equal(await s.commands.kill(h.pid), false)
  assert.equal(await h.kill(), false)
  const gone = await s.commands.run(`kill -0 ${h.pid}`).catch((e) => e)
  assert.notEqual(gone.exitCode, 0, 'the process is gone, seen from inside')
})

test('commands.sendStdin commands.closeStdin', 'input reaches the command until it is closed', async (s) => {
  const h = await s.commands.run('cat; echo end', { background: true, stdin: true })
  await s.commands.sendStdin(h.pid, 'one\n')
  await s.commands.sendStdin(h.pid, new TextEncoder().encode('zwei ü\n'))
  await until(() => h.stdout.includes('zwei'))
  await s.commands.closeStdin(h.pid)
  assert.equal((await h.wait()).stdout, 'one\nzwei ü\nend\n')
})

test('commandHandle.sendStdin commandHandle.closeStdin', 'a handle sends and closes input', async (s) => {
  const h = await s.commands.run('cat', { background: true, stdin: true })
  await h.sendStdin('hello')
  await h.closeStdin()
  assert.equal((await h.wait()).stdout, 'hello')
}, { only: 'e2b' })

test('commands.sendStdin', 'a command without input says so', async (s) => {
  const h = await s.commands.run('sleep 5', { background: true })
  assert.match((await failure(s.commands.sendStdin(h.pid, 'x'))).message, /stdin not enabled or closed/)
  await h.kill()
})

test('commands.connect commandHandle.disconnect commandHandle.pid', 'a command goes on without its client, and another connects to it', async (s) => {
  const h = await s.commands.run('for i in $(seq 40); do echo $i; sleep 0.05; done', { background: true })
  await until(() => h.stdout.includes('2\n'))
  await h.disconnect()
  const again = await s.commands.connect(h.pid)
  assert.equal(again.pid, h.pid)
  const r = await again.wait()
  assert.equal(r.exitCode, 0)
  assert.match(r.stdout, /40\n$/)
})

test('commands.connect', 'the exit of a command that ended is still told', async (s) => {
  const h = await s.commands.run('exit 0', { background: true })
  await h.wait()
  assert.equal((await (await s.commands.connect(h.pid)).wait()).exitCode, 0)
})

test('commands.connect', 'an unknown process is not found', async (s) => {
  assert.match((await failure(s.commands.connect(999_999))).name, /NotFoundError/)
})

test('commands.run', 'a child that keeps the output open does not keep a killed command', async (s) => {
  const h = await s.commands.run('sleep 20 & sleep 20', { background: true })
  const began = Date.now()
  await h.kill()
  await failure(h.wait())
  assert.ok(Date.now() - began < 10_000)
})

test('commands.run', 'the environment of the sandbox is every command\'s', async () => {
  await fresh({ envs: { TEAM: 'blue' } }, async (s) => {
    assert.equal((await s.commands.run('echo $TEAM $E2B_SANDBOX')).stdout, 'blue true\n')
    assert.equal((await s.commands.run('echo $TEAM', { envs: { TEAM: 'red' } })).stdout, 'red\n')
  })
})
