// Development servers at their public URLs, in a real browser.
//
//   node devservers.mjs [part of a server's name [part of a situation]]
//
// Prints one row of docs/ingress.md's table for each server and situation, "works" or
// the first step that does not, and exits with 1 if one differs from what is expected
// below. Situations: "plain" is a URL under *.localhost, "mask" the same with
// maskRequestHost localhost:${PORT}, "mask and origin" with http://localhost:${PORT},
// "domain" a URL under a domain of one's own, without or with both masks. Each
// setting that mends a situation is a situation of its own.
import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { promisify } from 'node:util'
import { Sandbox } from '../browser/node_modules/e2b/dist/index.mjs'
import { chromium } from '../browser/node_modules/playwright-core/index.mjs'

const run = promisify(execFile)
const only = process.argv[2] ?? ''
const situation = process.argv[3] ?? ''
const node = '~/bin/node'
const masks = { mask: 'localhost:${PORT}', 'mask and origin': 'http://localhost:${PORT}', 'domain, mask and origin': 'http://localhost:${PORT}' }

// ---- steps that several servers share

/** Opens a page and waits for a text in it. */
const shows = (text, at = '/') => async (page, url) => {
  await page.goto(url + at, { waitUntil: 'domcontentloaded', timeout: 120_000 })
  await page.getByText(text).first().waitFor({ timeout: 40_000 })
}

/** The page must be at the URL's own origin: a redirect elsewhere does not count. */
const redirects = (from, to, text) => async (page, url) => {
  await page.goto(url + from, { timeout: 60_000 })
  assert.equal(page.url(), url + to)
  await page.getByText(text).first().waitFor()
}

/** Fills in the form with the word and presses the button. */
const posts = (at, button) => async (page, url) => {
  await page.goto(url + at, { timeout: 60_000 })
  await page.getByLabel('word').fill('hello')
  await page.getByRole('button', { name: button }).click()
  await page.getByText('said HELLO').first().waitFor()
}

/** A change of a file shows up without a reload by hand. */
const hotReload = (file, text) => async (page, url, s, base) => {
  await page.goto(url, { timeout: 60_000 })
  await page.getByText('first').waitFor()
  const messages = []
  page.on('console', (m) => messages.push(m.text()))
  await page.waitForTimeout(2000) // the socket of the server's client opens
  await s.files.write(base + file, text)
  await page.getByText('second').waitFor().catch((err) => { throw new Error(`${err.message.split('\n')[0]}; console: ${messages.join(' | ').slice(0, 300)}`) })
  await s.files.write(base + file, text.replace('second', 'first'))
}

const message = "export const message = 'second'\n"

// ---- the servers

const python = (args, env = '') => `cd ~/project && ${env} PYTHONPATH=$HOME/packages/site python3 ${args}`
const js = (args) => `cd ~/packages && cp -r ~/project/. . && ${node} ${args}`

// Where pip puts what Jupyter looks for, since it is not in Python's own folders.
const jupyter = 'JUPYTER_PATH=$HOME/packages/site/share/jupyter JUPYTERLAB_DIR=$HOME/packages/site/share/jupyter/lab'

/** name: {start: by setting, port, ready, steps, settings: {situation: [setting, base situation]}, fails: {situation: step}} */
const servers = {
  vite: {
    port: 5173,
    start: { '': js('node_modules/vite/bin/vite.js'), allowedHosts: js('node_modules/vite/bin/vite.js --config allowed.config.mjs') },
    steps: { page: shows('first'), 'hot reload': hotReload('/home/user/packages/src/message.js', message) },
    settings: { domain: 'allowedHosts' },
    fails: { domain: 'page' },
  },
  next: {
    port: 3000,
    start: {
      '': js('node_modules/next/dist/bin/next dev'),
      allowedDevOrigins: js('-e "require(\'fs\').copyFileSync(\'allowed.config.mjs\',\'next.config.mjs\')" && ~/bin/node node_modules/next/dist/bin/next dev'),
    },
    steps: {
      page: shows('server part'),
      hydration: async (page, url) => {
        await page.goto(url, { timeout: 120_000 })
        const until = Date.now() + 60_000
        while (!/count [1-9]/.test(await page.locator('#count').innerText())) {
          assert.ok(Date.now() < until, 'the counter does not count')
          await page.locator('#count').click()
          await page.waitForTimeout(500)
        }
      },
      'server action': posts('/', 'shout'),
      'absolute redirect': redirects('/go', '/said/GONE', 'said GONE'),
    },
    settings: { domain: 'allowedDevOrigins' },
    fails: { domain: 'hydration' },
  },
  webpack: {
    port: 8080,
    start: {
      '': js('node_modules/webpack/bin/webpack.js serve --config webpack.config.cjs'),
      webSocketURL: js('node_modules/webpack/bin/webpack.js serve --config socket.config.cjs'),
    },
    steps: { page: shows('first'), 'hot reload': hotReload('/home/user/packages/src/message.js', message) },
    settings: { plain: 'webSocketURL', 'mask and origin': 'webSocketURL', domain: 'webSocketURL' },
    fails: { plain: 'hot reload', mask: 'hot reload', 'mask and origin': 'hot reload', domain: 'page', 'domain, mask and origin': 'hot reload' },
  },
  django: {
    port: 8000,
    start: {
      '': python('app.py runserver'),
      SECURE_PROXY_SSL_HEADER: python('app.py runserver', 'SECURE=1 ALLOWED=1'),
      CSRF_TRUSTED_ORIGINS: python('app.py runserver', 'TRUSTED=1 ALLOWED=1'),
    },
    steps: { page: shows('say'), form: posts('/', 'say'), 'slash redirect': redirects('/deep', '/deep/', 'say') },
    settings: { plain: 'SECURE_PROXY_SSL_HEADER', domain: 'CSRF_TRUSTED_ORIGINS' },
    fails: { plain: 'form', mask: 'form', domain: 'page' },
  },
  flask: {
    port: 5000,
    start: { '': python('-m flask run'), ProxyFix: python('-m flask run', 'PROXYFIX=1') },
    steps: { page: shows('home'), 'slash redirect': redirects('/deep', '/deep/', 'deep'), 'absolute redirect': redirects('/go', '/deep/', 'deep') },
    settings: { mask: 'ProxyFix' },
    fails: {},
  },
  fastapi: {
    port: 8000,
    start: { '': python('-m uvicorn app:app') },
    steps: { 'page and WebSocket': shows('echo hello'), 'slash redirect': redirects('/deep', '/deep/', 'deep') },
    fails: {},
  },
  streamlit: {
    port: 8501,
    start: { '': python('-m streamlit run app.py --server.headless true --browser.gatherUsageStats false --server.fileWatcherType none --global.developmentMode false') },
    steps: {
      page: shows('streamlit is here'),
      input: async (page, url) => {
        await page.goto(url, { timeout: 60_000 })
        await page.getByLabel('word').fill('hello')
        await page.getByLabel('word').press('Enter')
        await page.getByText('said HELLO').waitFor()
      },
      upload: async (page, url) => {
        await page.goto(url, { timeout: 60_000 })
        await page.locator('input[type=file]').setInputFiles({ name: 'a.txt', mimeType: 'text/plain', buffer: Buffer.alloc(4096, 'a') })
        await page.getByText('got 4096 bytes').waitFor()
      },
    },
    fails: { mask: 'page' },
  },
  gradio: {
    port: 7860,
    start: { '': python('app.py', 'GRADIO_ANALYTICS_ENABLED=False') },
    steps: {
      'page and function': async (page, url) => {
        await page.goto(url, { timeout: 60_000 })
        await page.getByLabel('word').fill('hello')
        await page.getByRole('button', { name: 'Submit' }).click()
        const until = Date.now() + 30_000
        while ((await page.getByLabel('out').inputValue()) !== 'said HELLO') {
          assert.ok(Date.now() < until, 'no result')
          await page.waitForTimeout(200)
        }
      },
    },
    fails: { 'mask and origin': 'page and function', 'domain, mask and origin': 'page and function' },
  },
  jupyter: {
    port: 8888,
    start: {
      '': python('-m jupyterlab --no-browser --IdentityProvider.token=word', jupyter),
      '--ip 0.0.0.0': python('-m jupyterlab --no-browser --IdentityProvider.token=word --ip 0.0.0.0', jupyter),
    },
    steps: {
      page: async (page, url) => {
        const answer = await page.goto(url + '/lab?token=word', { timeout: 60_000 })
        assert.equal(answer.status(), 200)
      },
      kernel: async (page, url) => {
        await page.goto(url + '/lab?token=word', { timeout: 60_000 })
        const said = await page.evaluate(async () => {
          const xsrf = document.cookie.match(/_xsrf=([^;]+)/)?.[1] ?? ''
          const made = await fetch('/api/kernels', { method: 'POST', headers: { 'X-XSRFToken': xsrf, 'Content-Type': 'application/json' }, body: '{}' })
          if (made.status !== 201) return `kernel start ${made.status}`
          const { id } = await made.json()
          return new Promise((resolve) => {
            const s = new WebSocket(location.origin.replace('http', 'ws') + `/api/kernels/${id}/channels`)
            s.onopen = () => resolve('open')
            s.onerror = () => resolve('socket refused')
            setTimeout(() => resolve('socket silent'), 60_000)
          })
        })
        assert.equal(said, 'open')
      },
    },
    settings: { plain: '--ip 0.0.0.0', domain: '--ip 0.0.0.0' },
    fails: { plain: 'page', mask: 'kernel', domain: 'page' },
  },
  bokeh: {
    port: 5006,
    start: { '': python('-m bokeh serve app.py') },
    steps: {
      'page and button': async (page, url) => {
        await page.goto(url + '/app', { timeout: 60_000 })
        await page.getByText('bokeh is here').waitFor()
        await page.getByText('press', { exact: true }).click()
        await page.getByText('pressed').waitFor()
      },
    },
    fails: { mask: 'page and button' },
  },
}

// ---- run

/** A sandbox with a server's project and packages, from which others are copied. */
async function prepare(name) {
  const s = await Sandbox.create('code-interpreter-v1', { timeoutMs: 3_600_000 })
  const dir = await mkdtemp(path.join(tmpdir(), 'devservers-'))
  try {
    await run('tar', ['-C', new URL(`projects/${name}`, import.meta.url).pathname, '-czf', `${dir}/project.tgz`, '.'])
    for (const [file, to] of [[`${dir}/project.tgz`, 'project'], [`${process.env.PACKAGES}/${name}.tgz`, 'packages'], [`${process.env.PACKAGES}/node.tgz`, 'bin']]) {
      await s.files.write('/tmp/part.tgz', new Blob([await readFile(file)]), { requestTimeoutMs: 300_000 })
      await s.commands.run(`mkdir -p ~/${to} && tar -C ~/${to} -xzf /tmp/part.tgz && rm /tmp/part.tgz`, { timeoutMs: 300_000 })
    }
    return s
  } finally {
    await rm(dir, { recursive: true })
  }
}

/** Starts the server and waits until its port answers on loopback inside. */
async function start(s, server, setting) {
  const output = []
  const keep = (d) => output.push(d)
  const command = await s.commands.run(server.start[setting], { background: true, timeoutMs: 0, onStdout: keep, onStderr: keep })
  const up = await s.commands.run(`for i in $(seq 600); do (echo > /dev/tcp/localhost/${server.port}) 2>/dev/null && exit 0; sleep 0.2; done; exit 1`, { timeoutMs: 150_000 })
    .catch((err) => err)
  if (up.exitCode !== 0) throw new Error(`the server did not start:\n${output.join('').slice(-2000)}`)
  return { command, output }
}

/** Runs the steps of a server and returns "works", or the first step that fails. */
async function steps(s, server, url) {
  for (const [name, step] of Object.entries(server.steps)) {
    const context = await browser.newContext()
    const page = await context.newPage()
    page.setDefaultTimeout(20_000)
    try {
      await step(page, url, s, '')
    } catch (err) {
      return { failed: name, why: String(err.message).split('\n')[0].slice(0, 400) }
    } finally {
      await context.close()
    }
  }
  return { failed: '', why: '' }
}

let browser
let differs = 0
try {
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM, headless: true, env: process.env,
    args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage'],
  })
  for (const [name, server] of Object.entries(servers)) {
    if (!name.includes(only)) continue
    const origin = await prepare(name)
    const snapshot = await origin.createSnapshot()
    await origin.kill()
    const situations = ['plain', 'mask', 'mask and origin', 'domain', 'domain, mask and origin'].map((s) => ({ base: s, setting: '', fails: server.fails[s] ?? '' }))
    for (const [base, setting] of Object.entries(server.settings ?? {})) situations.push({ base, setting, fails: '' })
    for (const { base, setting, fails } of situations) {
      if (!base.includes(situation)) continue
      const opts = { timeoutMs: 900_000, ...(masks[base] ? { network: { maskRequestHost: masks[base] } } : {}) }
      const s = await Sandbox.create(snapshot.snapshotId, opts)
      let got
      let output = []
      try {
        ({ output } = await start(s, server, setting))
        const domain = base.startsWith('domain') ? process.env.OWN_DOMAIN : process.env.LOCAL_DOMAIN
        got = await steps(s, server, `https://${server.port}-${s.sandboxId}.${domain}`)
      } catch (err) {
        got = { failed: 'start', why: err.message }
      } finally {
        await s.kill()
      }
      const as = got.failed === fails
      if (!as) differs++
      console.log(`| ${name} | ${base} | ${setting || '-'} | ${got.failed ? `no ${got.failed}: ${got.why}` : 'works'} |${as ? '' : `  <- expected ${fails ? `no ${fails}` : 'works'}\n${output.join('').slice(-1500)}`}`)
    }
    await Sandbox.deleteSnapshot(snapshot.snapshotId).catch(() => {})
  }
} finally {
  await browser?.close()
}
process.exit(differs ? 1 : 0)
