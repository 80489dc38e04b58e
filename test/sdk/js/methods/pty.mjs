import assert from 'node:assert/strict'
import { test, until, failure } from './lib.mjs'

const bytes = (text) => new TextEncoder().encode(text)

/** A terminal and what it has shown. */
async function terminal(s, opts = {}) {
  const seen = { text: '' }
  const decoder = new TextDecoder()
  const onData = (d) => { seen.text += decoder.decode(d, { stream: true }) }
  const handle = await s.pty.create({ cols: 80, rows: 24, onData, timeoutMs: 60_000, ...opts })
  return { seen, onData, handle, pid: handle.pid }
}

test('pty.create pty.sendInput', 'a terminal shows what a typed command prints', async (s) => {
  const t = await terminal(s, { envs: { ABC: 'xyz' }, cwd: '/tmp' })
  await s.pty.sendInput(t.pid, bytes('echo [$ABC] [$TERM] $(pwd)\n'))
  await until(() => t.seen.text.includes('[xyz] [xterm-256color] /tmp'))
  await s.pty.sendInput(t.pid, bytes('exit\n'))
  assert.equal((await t.handle.wait()).exitCode, 0)
})

test('pty.resize', 'a resized terminal tells its programs', async (s) => {
  const t = await terminal(s)
  await s.pty.sendInput(t.pid, bytes('tput cols; tput lines\n'))
  await until(() => /80\r\n24\r\n/.test(t.seen.text))
  await s.pty.resize(t.pid, { cols: 101, rows: 33 })
  await s.pty.sendInput(t.pid, bytes('tput cols; tput lines\n'))
  await until(() => /101\r\n33\r\n/.test(t.seen.text))
  await s.pty.kill(t.pid)
})

test('pty.kill', 'a killed terminal is gone', async (s) => {
  const t = await terminal(s)
  assert.equal(await s.pty.kill(t.pid), true)
  assert.equal((await failure(t.handle.wait())).name, 'CommandExitError')
  assert.equal(await s.pty.kill(t.pid), false)
})

test('pty.connect', 'a terminal is left and entered again', async (s) => {
  const t = await terminal(s)
  await s.pty.sendInput(t.pid, bytes('KEPT=42\n'))
  await t.handle.disconnect()
  let text = ''
  const again = await s.pty.connect(t.pid, { onData: (d) => { text += new TextDecoder().decode(d) } })
  await s.pty.sendInput(again.pid, bytes('echo "<$KEPT>"\n'))
  await until(() => text.includes('<42>'))
  await s.pty.sendInput(again.pid, bytes('exit 4\n'))
  assert.equal((await failure(again.wait())).exitCode, 4)
})

test('pty.sendInput', 'control-C interrupts what runs in it', async (s) => {
  const t = await terminal(s)
  await s.pty.sendInput(t.pid, bytes('sleep 100\n'))
  await until(() => t.seen.text.includes('sleep 100'))
  await new Promise((r) => setTimeout(r, 300))
  await s.pty.sendInput(t.pid, new Uint8Array([3]))
  await s.pty.sendInput(t.pid, bytes('echo free-$((20+22))\n'))
  await until(() => t.seen.text.includes('free-42'))
  await s.pty.kill(t.pid)
})
