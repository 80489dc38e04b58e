// Gives a sandbox other rules while it runs: first everything to install what it
// needs, then only what untrusted code may reach.
//
// It prints:
//   before: 200
//   after: refused
//   still allowed: 200
import { Sandbox, CommandExitError } from 'e2b'

const sandbox = await Sandbox.create()

async function get(host) {
  try {
    return (await sandbox.commands.run(`curl -s -o /dev/null -w '%{http_code}' https://${host}`)).stdout
  } catch (err) {
    if (!(err instanceof CommandExitError)) throw err
    return 'refused'
  }
}

try {
  console.log('before:', await get('example.com'))

  // When the call returns the new rules are in force. Connections that they do
  // not allow are cut, also those that are open.
  await sandbox.updateNetwork({ denyOut: ['0.0.0.0/0'], allowOut: ['api.github.com'] })

  console.log('after:', await get('example.com'))
  console.log('still allowed:', await get('api.github.com'))
} finally {
  await sandbox.kill()
}
