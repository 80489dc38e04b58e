// Pauses a sandbox with a program in it, and lets it go on later.
//
// It prints:
//   paused
//   the program counted on: true
import { Sandbox } from 'e2b'

const sandbox = await Sandbox.create()
try {
  // A program that counts in its memory and writes the number down.
  await sandbox.commands.run('n=0; while sleep 0.1; do n=$((n+1)); echo $n > /tmp/n; done', { background: true })
  const count = async (s) => Number((await s.commands.run('sleep 1; cat /tmp/n')).stdout)
  const before = await count(sandbox)

  // Memory, files and processes go to disk. A paused sandbox uses no CPU and no memory.
  await sandbox.pause()
  console.log((await Sandbox.getInfo(sandbox.sandboxId)).state)

  // Hours later, in another program: its ID is enough.
  const again = await Sandbox.connect(sandbox.sandboxId)
  console.log('the program counted on:', (await count(again)) > before)
} finally {
  await sandbox.kill()
}
