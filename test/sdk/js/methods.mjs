// Every public method of an unmodified SDK against a live server.
//
//   node methods.mjs <novita|e2b> [part of a test's name or method...]
//
// Prints "method <name>" for each method the SDK has, and for each test
// "ok <name> [<methods>] <file> <ms>" or "not ok ..." with the error below it.
import { Sandbox, sdk, tests, inventory } from './methods/lib.mjs'

const areas = ['commands', 'pty', 'files', 'watch', 'git', 'lifecycle', 'network', 'snapshots', 'refusals']
const only = process.argv.slice(3)

// Protected and private in the packages' declarations.
const hidden = new Set(['resolveApiOpts', 'fileUrl', 'createSandbox', 'connectSandbox', 'forkSandbox', 'cloneSandboxes', 'resetSandbox', 'getFullInfo',
  'resolveOpts', 'boundOpts', 'defaultTemplate', 'defaultMcpTemplate', 'defaultSandboxTimeoutMs', 'start', 'checkHealth', 'handleEvents', 'flushDecoders', 'iterateEvents',
  'runGit', 'runShell', 'getRemoteUrl', 'resolveRemoteName', 'withRemoteCredentials', 'hasUpstream', 'updatePagination', 'supportsStdinClose',
  'writeOctetStream', 'writeMultipart'])

let failed = 0

async function one(t, area, sandbox) {
  const began = performance.now()
  const line = () => `${t.name} [${t.methods.join(' ')}] js/methods/${area}.mjs ${Math.round(performance.now() - began)}`
  try {
    await t.run(sandbox)
    console.log(`ok ${line()}`)
  } catch (err) {
    failed++
    console.log(`not ok ${line()}`)
    console.log(String(err.stack ?? err).replace(/^/gm, '    '))
  }
}

const wanted = (t) => !only.length || only.some((o) => t.name.includes(o) || t.methods.some((m) => m.includes(o)))

for (const area of areas) {
  tests.length = 0
  await import(`./methods/${area}.mjs`)
  const chosen = tests.filter(wanted)
  if (!chosen.length) continue
  const sandbox = await Sandbox.create({ timeoutMs: 300_000 })
  try {
    for (const t of chosen) await one(t, area, sandbox)
    if (area !== 'commands' || only.length) continue
    const handle = await sandbox.commands.run('true', { background: true })
    const watch = await sandbox.files.watchDir('/tmp', () => {})
    const holders = {
      Sandbox, sandbox, commands: sandbox.commands, commandHandle: handle, pty: sandbox.pty, files: sandbox.files, watchHandle: watch,
      git: sandbox.git, sandboxPaginator: Sandbox.list(), snapshotPaginator: Sandbox.listSnapshots(),
    }
    for (const m of inventory(holders, hidden)) console.log(`method ${m}`)
    await watch.stop()
  } finally {
    await sandbox.kill()
  }
}
process.exit(failed ? 1 : 0)
