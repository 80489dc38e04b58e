// Shows what a sandbox tried to reach and which rule decided.
//
// It prints:
//   deny dns example.org by dns
import { Sandbox } from 'e2b'

const sandbox = await Sandbox.create({ network: { denyOut: ['0.0.0.0/0'], allowOut: ['example.com'] } })
try {
  await sandbox.commands.run('curl -s https://example.com')
  await sandbox.commands.run('curl -s https://example.org || true') // || true: it will fail

  // The SDKs have no call for the flow log; it is one GET. "cordon flows <id>"
  // prints the same. Without ?verdict=deny it has what was allowed as well.
  const url = `${process.env.E2B_API_URL}/sandboxes/${sandbox.sandboxId}/network/events?verdict=deny`
  const res = await fetch(url, { headers: { 'X-API-KEY': process.env.E2B_API_KEY } })
  for (const e of await res.json()) {
    console.log(e.verdict, e.protocol, e.name || e.destination, 'by', e.rule.id)
  }
} finally {
  await sandbox.kill()
}
