import assert from 'node:assert/strict'
import { Sandbox, sdk, test, fresh, lab, until } from './lib.mjs'

const all = ['0.0.0.0/0']
const status = async (s, url) => Number((await s.commands.run(`curl -sk -o /dev/null --max-time 5 -w '%{http_code}' ${url} || true`)).stdout)
const update = { novita: 'setNetwork', e2b: 'updateNetwork' }[sdk]

test(`Sandbox.create sandbox.${update} Sandbox.${update}`, 'rules apply from the first packet and are replaced while it runs', async () => {
  await fresh({ network: { denyOut: all, allowOut: ['1.1.1.1'] } }, async (s) => {
    assert.deepEqual([await status(s, 'https://1.1.1.1'), await status(s, 'https://8.8.8.8')], [301, 0])
    await s[update]({ denyOut: all, allowOut: ['8.8.8.8'] })
    assert.deepEqual([await status(s, 'https://1.1.1.1'), await status(s, 'https://8.8.8.8')], [0, 302])
    await Sandbox[update](s.sandboxId, {})
    assert.deepEqual([await status(s, 'https://1.1.1.1'), await status(s, 'https://8.8.8.8')], [301, 302])
  })
})

test('sandbox.getInfo', 'the rules are told as they were given', async () => {
  await fresh({ network: { denyOut: all, allowOut: [lab.allowed, '1.1.1.1'] } }, async (s) => {
    const info = await s.getInfo()
    assert.deepEqual([info.network.allowOut, info.network.denyOut], [[lab.allowed, '1.1.1.1'], all])
  })
}, { only: 'e2b' })

test('sandbox.trafficAccessToken sandbox.getHost', 'a private port opens with its token', async () => {
  await fresh({ network: { allowPublicTraffic: false } }, async (s) => {
    await s.commands.run('python3 -m http.server 3000', { background: true })
    const get = (headers) => fetch('https://' + s.getHost(3000), { headers }).then((r) => r.status)
    await until(async () => (await get({ 'e2b-traffic-access-token': s.trafficAccessToken })) === 200)
    assert.equal(await get({}), 403)
  })
})
