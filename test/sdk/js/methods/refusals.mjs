// What is not there yet is refused in a sentence, never half done.
import assert from 'node:assert/strict'
import { exported, sdk, test, failure } from './lib.mjs'

const { Volume, Secret, Template } = exported

/** Asserts that a call ends with a 501 that says what is missing. */
async function refused(call) {
  const err = await failure(Promise.resolve().then(call))
  assert.match(String(err.message), /501|not supported|does not support/, `${err.name}: ${err.message}`)
}

test('', 'volumes', () => refused(() => Volume.create('data')))
test('', 'secrets', () => refused(() => Secret.create({ name: 'k', value: 'v', hosts: ['k.test'] })))
test('', 'template builds', () => refused(() => Template.build(Template().fromImage('debian'), { alias: 'mine' })))
test('sandbox.mountVolume sandbox.unmountVolume Sandbox.mountVolume Sandbox.unmountVolume', 'volumes of a running sandbox', async (s) => {
  await refused(() => s.mountVolume('data', '/data'))
  await refused(() => s.unmountVolume('/data'))
}, { only: 'novita' })
test('sandbox.hotplugMemory Sandbox.hotplugMemory', 'more memory for a running sandbox', (s) => refused(() => s.hotplugMemory(2048)), { only: 'novita' })
test('sandbox.resize Sandbox.resize', 'another size for a running sandbox', (s) => refused(() => s.resize({ memoryMiB: 2048 })), { only: 'novita' })
test('sandbox.getMcpUrl sandbox.getMcpToken', 'a sandbox without the MCP gateway has no token for one', async (s) => {
  assert.match(s.getMcpUrl(), /50005-/)
  assert.match((await failure(s.getMcpToken())).name, /NotFoundError/)
})
