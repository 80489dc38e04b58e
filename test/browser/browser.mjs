// Real applications in real sandboxes, seen through their public URLs in a real
// browser and by a real gRPC client.
//
//   node browser.mjs [part of a name...]
//
// Prints "ok <name> <ms>" or "not ok <name> <ms>" with the error below it. Pictures
// of what cordon itself shows are left in $SHOTS.
import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { promisify } from 'node:util'
import grpc from '@grpc/grpc-js'
import { Sandbox } from 'e2b'
import { chromium } from 'playwright-core'
import { definition } from './app/chat-service.mjs'

const run = promisify(execFile)
const only = process.argv.slice(2)
const template = 'code-interpreter-v1' // it has Node
const axe = await readFile(new URL('node_modules/axe-core/axe.min.js', import.meta.url), 'utf8')

// ---- helpers

async function until(ok, ms = 30_000) {
  const end = Date.now() + ms
  for (;;) {
    const v = await ok()
    if (v) return v
    if (Date.now() > end) throw new Error(`not true in ${ms} ms: ${ok}`)
    await new Promise((r) => setTimeout(r, 50))
  }
}

/** A sandbox with the applications of app/ and their packages in /home/user/app. */
async function withApp(opts, use) {
  const s = await Sandbox.create(template, { timeoutMs: 300_000, ...opts })
  try {
    const dir = await mkdtemp(path.join(tmpdir(), 'cordon-browser-'))
    try {
      await run('tar', ['-C', new URL('app', import.meta.url).pathname, '-czf', `${dir}/app.tgz`, '.'])
      await s.files.write('/tmp/app.tgz', new Blob([await readFile(`${dir}/app.tgz`)]))
    } finally {
      await rm(dir, { recursive: true })
    }
    await s.commands.run('mkdir -p ~/app && tar -C ~/app -xzf /tmp/app.tgz && rm /tmp/app.tgz')
    return await use(s)
  } finally {
    await s.kill()
  }
}

/** Starts a program of the app and waits until its port answers from outside. */
async function serve(s, cmd, port, headers = {}) {
  const output = []
  const keep = (d) => output.push(d)
  await s.commands.run(cmd, { background: true, cwd: '/home/user/app', timeoutMs: 0, onStdout: keep, onStderr: keep })
  const url = 'https://' + s.getHost(port)
  try {
    await until(async () => (await fetch(url, { headers })).status < 500)
  } catch (err) {
    throw new Error(`${err.message}\n${output.join('')}`)
  }
  return url
}

let browser

/** A page in a window of its own, and everything it complains about. */
async function withPage(opts, use) {
  const context = await browser.newContext(opts)
  const page = await context.newPage()
  page.setDefaultTimeout(20_000)
  page.complaints = []
  page.on('pageerror', (err) => page.complaints.push(String(err)))
  try {
    return await use(page)
  } finally {
    await context.close()
  }
}

/** What axe-core finds against WCAG 2 A and AA. */
async function assertAccessible(page) {
  const violations = await page.evaluate(async (source) => {
    // The page's own policy forbids scripts, the tester's are not the page's.
    // eslint-disable-next-line no-eval
    (0, eval)(source)
    const r = await window.axe.run(document, { runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'best-practice'] })
    return r.violations.map((v) => `${v.id}: ${v.nodes.map((n) => n.html).join(' ')}`)
  }, axe)
  assert.deepEqual(violations, [])
}

async function cordon(...args) {
  const { stdout } = await run(process.env.CORDON, ['--config', process.env.CORDON_CONFIG, ...args])
  return stdout.trim()
}

// ---- scenarios

const scenarios = {
  async 'a Vite development server with hot reload'() {
    await withApp({ network: { maskRequestHost: 'localhost:${PORT}' } }, async (s) => {
      const url = await serve(s, 'node node_modules/vite/bin/vite.js --host 0.0.0.0 --port 5173', 5173)
      await withPage({}, async (page) => {
        await page.goto(url)
        await page.getByText('first').waitFor()
        await page.evaluate(() => { window.notReloaded = true })
        await s.files.write('/home/user/app/src/message.js', "export const message = 'second'\n")
        await page.getByText('second').waitFor()
        assert.equal(await page.evaluate(() => window.notReloaded), true, 'the module was replaced, the page was not loaded again')
        assert.deepEqual(page.complaints, [])
      })
    })
  },

  async 'a page with a WebSocket and server-sent events'() {
    await withApp({}, async (s) => {
      const url = await serve(s, 'node live.mjs 3000', 3000)
      await withPage({}, async (page) => {
        const socket = page.waitForEvent('websocket')
        await page.goto(url)
        await page.getByText('echo: from the page').waitFor()
        assert.equal((await socket).url(), url.replace('https', 'wss') + '/ws')
        await page.locator('#events li').nth(4).waitFor()
        assert.equal(await page.evaluate(() => performance.getEntriesByType('navigation')[0].nextHopProtocol), 'h2')
        await s.kill()
        await page.getByText('closed').waitFor() // a killed sandbox takes its sockets along
      })
    })
  },

  async 'a private URL is entered through a signed link'() {
    await withApp({ network: { allowPublicTraffic: false } }, async (s) => {
      const url = await serve(s, 'node live.mjs 3000', 3000, { 'e2b-traffic-access-token': s.trafficAccessToken })
      const link = await cordon('url', '--signed', '--ttl', '1h', s.sandboxId, '3000')
      await withPage({}, async (page) => {
        assert.equal((await page.goto(url)).status(), 403)
        assert.equal((await page.goto(link)).status(), 200)
        assert.equal(page.url(), url + '/', 'the signature is not in the address bar')
        await page.getByText('echo: from the page').waitFor() // the WebSocket passes by the cookie
        await page.locator('#events li').nth(2).waitFor()
        const seen = await page.evaluate(async () => (await fetch('/headers?a=%2F;b')).json())
        assert.equal(seen.url, '/headers?a=%2F;b')
        assert.equal(seen.headers.cookie, undefined, 'the service does not see the cookie')
      })
      await withPage({}, async (page) => {
        await page.goto(`https://${process.env.OTHER_SITE}/`)
        await page.evaluate((src) => {
          document.body.innerHTML = ''
          document.body.append(Object.assign(document.createElement('iframe'), { src, title: 'embedded' }))
        }, link)
        await page.frameLocator('iframe').getByText('echo: from the page').waitFor() // another site embeds it
      })
      assert.equal((await fetch(link.replace(/.$/, (c) => (c === 'A' ? 'B' : 'A')), { redirect: 'manual' })).status, 403)
    })
  },

  async 'the error pages, light and dark, on a wide and a narrow screen'() {
    const gone = await Sandbox.create({ timeoutMs: 60_000 })
    await gone.kill()
    await withApp({ network: { allowPublicTraffic: false } }, async (secured) => {
      await withApp({}, async (s) => {
        const pages = {
          'not-found': ['https://' + gone.getHost(3000), 502, 'not found'],
          'port-closed': ['https://' + s.getHost(3999), 502, 'port is not open'],
          'private': ['https://' + secured.getHost(3000), 403, 'token'],
          'bad-host': [`https://0-${s.sandboxId}.${s.sandboxDomain}`, 400, ''],
        }
        for (const [name, [url, status, text]] of Object.entries(pages)) {
          for (const colorScheme of ['light', 'dark']) {
            await withPage({ colorScheme, viewport: colorScheme === 'light' ? { width: 1000, height: 640 } : { width: 390, height: 640 } }, async (page) => {
              assert.equal((await page.goto(url)).status(), status, url)
              assert.match((await page.locator('main').innerText()).toLowerCase(), new RegExp(text))
              await page.screenshot({ path: `${process.env.SHOTS}/${name}-${colorScheme}.png` })
              await assertAccessible(page)
              assert.equal(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), true, 'nothing sticks out')
              assert.deepEqual(page.complaints, [])
            })
          }
          const json = await (await fetch(url)).json()
          assert.equal(json.code, status)
          assert.match(json.message.toLowerCase(), new RegExp(text))
        }
      })
    })
  },

  async 'a gRPC client and service talk in both directions of a stream'() {
    await withApp({}, async (s) => {
      await s.commands.run('node chat.mjs 50051', { background: true, cwd: '/home/user/app', timeoutMs: 0 })
      const Client = grpc.makeGenericClientConstructor(definition, 'Chat')
      const client = new Client(s.getHost(50051) + (s.getHost(50051).includes(':') ? '' : ':443'), grpc.credentials.createSsl(await readFile(process.env.NODE_EXTRA_CA_CERTS)))
      try {
        await until(async () => {
          const call = client.talk()
          return new Promise((resolve) => {
            call.on('error', () => resolve(false))
            call.on('data', () => { call.end(); resolve(true) })
            call.write({ text: 'up?' })
          })
        })
        const call = client.talk()
        const got = []
        let status
        call.on('status', (st) => { status = st })
        for (const text of ['one', 'two', 'three']) {
          const answer = new Promise((resolve, reject) => { call.once('data', resolve); call.once('error', reject) })
          call.write({ text })
          got.push((await answer).text) // each answer before the next question: nothing is held back
        }
        call.end()
        await until(() => status)
        assert.deepEqual(got, ['ONE', 'TWO', 'THREE'])
        assert.equal(status.code, grpc.status.OK)
        assert.deepEqual(status.metadata.get('count'), ['told'])
      } finally {
        client.close()
      }
    })
  },

  async 'a Jupyter notebook runs a cell'() {
    if (!process.env.NOTEBOOK) return
    const s = await Sandbox.create(template, { timeoutMs: 300_000 })
    try {
      await s.files.write('/tmp/notebook.tgz', new Blob([await readFile(process.env.NOTEBOOK)]))
      await s.commands.run('mkdir -p ~/app/nb && tar -C ~/app/nb -xzf /tmp/notebook.tgz', { timeoutMs: 120_000 })
      const url = await serve(s, 'PYTHONPATH=~/app/nb python3 -m notebook --ip=0.0.0.0 --port=8888 --no-browser --NotebookApp.token=word --NotebookApp.allow_remote_access=True', 8888)
      await withPage({}, async (page) => {
        await page.goto(url + '/tree?token=word')
        await page.evaluate(async () => {
          const xsrf = document.cookie.match(/_xsrf=([^;]+)/)?.[1] ?? ''
          await fetch('/api/contents/cell.ipynb', { method: 'PUT', headers: { 'X-XSRFToken': xsrf }, body: JSON.stringify({
            type: 'notebook', content: { cells: [{ cell_type: 'code', source: 'print(6 * 7)', metadata: {}, outputs: [], execution_count: null }],
              metadata: { kernelspec: { name: 'python3', display_name: 'Python 3' } }, nbformat: 4, nbformat_minor: 4 } }) })
        })
        await page.goto(url + '/notebooks/cell.ipynb')
        await page.locator('.kernel_idle_icon, #kernel_indicator_icon.kernel_idle_icon').first().waitFor({ timeout: 60_000 })
        await page.locator('.CodeMirror').first().click()
        await page.keyboard.press('Control+Enter')
        await page.locator('.output_stdout', { hasText: '42' }).waitFor({ timeout: 60_000 })
      })
    } finally {
      await s.kill()
    }
  },
}

// ---- run

let failed = 0
try {
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM, headless: true, env: process.env,
    args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage'],
  })
  for (const [name, scenario] of Object.entries(scenarios)) {
    if (only.length && !only.some((o) => name.includes(o))) continue
    const began = performance.now()
    const took = () => Math.round(performance.now() - began)
    try {
      await scenario()
      console.log(`ok ${name} ${took()}`)
    } catch (err) {
      failed++
      console.log(`not ok ${name} ${took()}`)
      console.log(String(err.stack ?? err).replace(/^/gm, '    '))
    }
  }
} finally {
  await browser?.close()
}
process.exit(failed ? 1 : 0)
