// Creates a sandbox that reaches two hosts and nothing else.
//
// It prints:
//   example.com: 200
//   api.github.com: 200
//   example.org: refused
import { Sandbox, CommandExitError } from 'e2b'

const sandbox = await Sandbox.create({
  network: {
    denyOut: ['0.0.0.0/0'], // nothing at all ...
    allowOut: ['example.com', '*.github.com'], // ... but these names, on ports 80 and 443
  },
})
try {
  for (const host of ['example.com', 'api.github.com', 'example.org']) {
    try {
      const result = await sandbox.commands.run(`curl -s -o /dev/null -w '%{http_code}' https://${host}`)
      console.log(`${host}: ${result.stdout}`)
    } catch (err) {
      if (!(err instanceof CommandExitError)) throw err
      // curl did not even get an address: other names are not resolved.
      console.log(`${host}: refused`)
    }
  }
} finally {
  await sandbox.kill()
}
