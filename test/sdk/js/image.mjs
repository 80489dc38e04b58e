// What the ENV, USER and WORKDIR of an OCI image are in its sandboxes, with an
// unmodified SDK.
//
//   node image.mjs <novita|e2b> [part of a name...]
//
// Prints "ok <name> <ms>" or "not ok <name> <ms>" with the error below it.
import assert from 'node:assert/strict'

const sdk = process.argv[2]
const only = process.argv.slice(3)
const { Sandbox } = await import({ novita: 'novita-sandbox', e2b: 'e2b' }[sdk])
const sandbox = await Sandbox.create('settings', { timeoutMs: 120_000 })
const run = async (cmd, opts) => (await sandbox.commands.run(cmd, opts)).stdout

const scenarios = {
  async 'a command finds programs by the PATH of the image'() {
    assert.equal(await run('hi'), 'hi from the tool\n')
    assert.equal(await run('echo $PATH'), '/opt/tool/bin:/bin:/opt/more\n')
    assert.equal(await run('echo $GREETING $LANG'), 'a b C\n')
  },
  async 'a PATH given for one command holds'() {
    assert.equal(await run('echo $PATH $GREETING', { envs: { PATH: '/bin:/mine', GREETING: 'yours' } }), '/bin:/mine:/opt/more yours\n')
  },
  async 'a terminal has the PATH of the image'() {
    let seen = ''
    const pty = await sandbox.pty.create({ cols: 80, rows: 24, timeoutMs: 30_000, onData: (d) => { seen += new TextDecoder().decode(d) } })
    await sandbox.pty.sendInput(pty.pid, new TextEncoder().encode('hi; id -u; id -g; exit\n'))
    await pty.wait()
    assert.match(seen, /hi from the tool\r\n1001\r\n0\r\n/)
  },
  async 'a command runs as the user of the image in its directory, and writes there'() {
    assert.equal(await run('id -u; id -g; echo $PWD; echo mine > made && cat made'), '1001\n0\n/data\nmine\n')
    await sandbox.files.write('/data/by-sdk', 'text')
    assert.equal(await run('cat by-sdk; echo more >> by-sdk; cat by-sdk'), 'texttextmore\n')
    assert.equal(await run('id -u', { user: 'root' }), '0\n')
  },
}

let failed = 0
for (const [name, scenario] of Object.entries(scenarios)) {
  if (only.length && !only.some((o) => name.includes(o))) continue
  const began = performance.now()
  try {
    await scenario()
    console.log(`ok ${name} ${Math.round(performance.now() - began)}`)
  } catch (err) {
    failed++
    console.log(`not ok ${name} ${Math.round(performance.now() - began)}`)
    console.log(String(err.stack ?? err).replace(/^/gm, '    '))
  }
}
await sandbox.kill()
process.exit(failed ? 1 : 0)
