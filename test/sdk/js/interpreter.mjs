// The code-interpreter SDKs, unmodified, against kernels in sandboxes of a live server.
//
//   node interpreter.mjs <novita|e2b> [part of a name...]
//
// Prints "method <name>" for each method that the package adds, and for each test
// "ok <name> [<methods>] <file> <ms>" or "not ok ..." with the error below it.
import assert from 'node:assert/strict'

const sdk = process.argv[2]
const only = process.argv.slice(3)
const { Sandbox } = await import({ novita: 'novita-sandbox/code-interpreter', e2b: '@e2b/code-interpreter' }[sdk])

const sandbox = await Sandbox.create({ timeoutMs: 300_000, envs: { WHOSE: 'the sandbox' } })
const run = (code, opts) => sandbox.runCode(code, opts)
const shows = async (code, want, opts) => {
  const r = await run(code, opts)
  assert.equal(r.error, undefined, r.error?.traceback)
  assert.equal(r.text, want)
  return r
}

const scenarios = {
  async 'output, error output and a result'() {
    const seen = { out: [], err: [], results: [] }
    const r = await run('import sys\nprint("to stdout")\nprint("to stderr", file=sys.stderr)\n"ünï ☃ 🦊"', {
      onStdout: (m) => seen.out.push(m.line), onStderr: (m) => seen.err.push(m.line), onResult: (m) => seen.results.push(m.text),
    })
    assert.deepEqual(r.logs, { stdout: ['to stdout\n'], stderr: ['to stderr\n'] })
    assert.equal(r.text, 'ünï ☃ 🦊')
    assert.ok(r.executionCount >= 1)
    assert.deepEqual(seen, { out: ['to stdout\n'], err: ['to stderr\n'], results: ['ünï ☃ 🦊'] })
  },

  async 'what other programs print is there before the end'() {
    const r = await run('import subprocess\nfor i in range(20): subprocess.run(["echo", str(i)])\nNone')
    assert.equal(r.logs.stdout.join(''), Array.from({ length: 20 }, (_, i) => `${i}\n`).join(''))
  },

  async 'an exception has its name, its value and a traceback'() {
    let told
    const r = await run('def inner():\n    return 1 / 0\ninner()', { onError: (e) => (told = e) })
    assert.equal(r.error.name, 'ZeroDivisionError')
    assert.equal(r.error.value, 'division by zero')
    assert.match(r.error.traceback, /inner\(\)[^]*return 1 \/ 0[^]*ZeroDivisionError: division by zero/)
    assert.equal(told.name, 'ZeroDivisionError')
    assert.equal((await run('input("?")')).error?.name, 'StdinNotImplementedError')
  },

  async 'a figure is a picture and a chart'() {
    const r = await run('import matplotlib.pyplot as plt\nplt.plot([1, 2, 3], [2, 4, 8], label="growth")\nplt.xlabel("Time (s)")\nplt.title("A line")\nplt.show()')
    assert.equal(r.error, undefined, r.error?.traceback)
    const [figure] = r.results
    assert.equal(Buffer.from(figure.png, 'base64').subarray(1, 4).toString(), 'PNG')
    assert.equal(figure.chart.type, 'line')
    assert.equal(figure.chart.title, 'A line')
    assert.equal(figure.chart.x_unit, 's')
    assert.deepEqual(figure.chart.elements, [{ label: 'growth', points: [[1, 2], [2, 4], [3, 8]] }])
    assert.equal(figure.isMainResult, false)
  },

  async 'charts of every kind say what they show'() {
    const r = await run(`
fig, ax = plt.subplots(); ax.bar(["a", "b"], [1, 2], label="g"); plt.show()
fig, ax = plt.subplots(); ax.pie([90, 10], labels=["No", "Yes"]); plt.show()
fig, ax = plt.subplots(); ax.scatter([1, 2], [3, 4], label="s"); plt.show()
fig, ax = plt.subplots(); ax.boxplot([[85, 90, 78, 92, 88], [95, 89, 76, 91, 84, 87]], labels=["A", "B"]); plt.show()
fig, axes = plt.subplots(1, 2); axes[0].plot([1, 2]); axes[1].scatter([1], [2]); fig.suptitle("Both"); plt.show()
fig, ax = plt.subplots(); ax.add_artist(plt.Circle((0, 0), 1)); plt.show()
import datetime
fig, ax = plt.subplots(); ax.plot([datetime.date(2023, 9, 1), datetime.date(2023, 9, 2)], [1, 2]); plt.show()`)
    assert.equal(r.error, undefined, r.error?.traceback)
    const [bar, pie, scatter, box, both, unknown, dates] = r.results.map((x) => x.chart)
    assert.deepEqual([bar.type, bar.elements], ['bar', [{ label: 'a', group: 'g', value: 1 }, { label: 'b', group: 'g', value: 2 }]])
    assert.deepEqual(pie.elements, [{ label: 'No', angle: 324, radius: 1 }, { label: 'Yes', angle: 36, radius: 1 }])
    assert.deepEqual([scatter.type, scatter.elements], ['scatter', [{ label: 's', points: [[1, 3], [2, 4]] }]])
    assert.deepEqual(box.elements[1], { label: 'B', min: 84, first_quartile: 84.75, median: 88, third_quartile: 90.5, max: 95, outliers: [76] })
    assert.deepEqual([both.type, both.title, both.elements.map((e) => e.type)], ['superchart', 'Both', ['line', 'scatter']])
    assert.deepEqual([unknown.type, unknown.elements], ['unknown', []])
    assert.deepEqual([dates.x_scale, dates.elements[0].points[0][0].slice(0, 10)], ['datetime', '2023-09-01'])
  },

  async 'a frame is a table and its data'() {
    const r = await run('import pandas as pd\npd.DataFrame({"n": [1, None, 3], "when": pd.to_datetime(["2020-01-01", None, "2020-01-03"])})')
    assert.equal(r.error, undefined, r.error?.traceback)
    assert.match(r.results[0].html, /<table/)
    assert.deepEqual(r.results[0].data, { n: [1, null, 3], when: ['2020-01-01T00:00:00', null, '2020-01-03T00:00:00'] })
  },

  async 'results of every form'() {
    const r = await run(`
from IPython.display import display, HTML, Markdown, Latex, JSON, SVG, Javascript
display(HTML("<b>h</b>"), Markdown("*m*"), Latex("$x$"), JSON({"j": 1}), Javascript("1"))
class Own:
    def _repr_mimebundle_(self, **_): return {"text/plain": "own", "application/x-own": "more"}
Own()`)
    assert.equal(r.error, undefined, r.error?.traceback)
    const [html, markdown, latex, json, javascript, own] = r.results
    assert.deepEqual([html.html, markdown.markdown, latex.latex, json.json, javascript.javascript], ['<b>h</b>', '*m*', '$x$', { j: 1 }, '1'])
    assert.equal(own.extra['application/x-own'], 'more')
    assert.equal(own.isMainResult, true)
  },

  async 'state lasts from cell to cell, and not from context to context'() {
    await run('kept = 41')
    await shows('kept += 1; kept', '42')
    const context = await sandbox.createCodeContext({ cwd: '/tmp' })
    assert.deepEqual([context.language, context.cwd], ['python', '/tmp'])
    assert.equal((await run('kept', { context })).error?.name, 'NameError')
    await shows('import os; os.getcwd()', '/tmp', { context })
    assert.ok((await sandbox.listCodeContexts()).some((c) => c.id === context.id))
    await run('other = 1', { context })
    await sandbox.restartCodeContext(context)
    assert.equal((await run('other', { context })).error?.name, 'NameError')
    await sandbox.removeCodeContext(context)
    assert.ok(!(await sandbox.listCodeContexts()).some((c) => c.id === context.id))
    await assert.rejects(run('1', { context }), /not found/)
    if (sandbox.deleteCodeContext) {
      const other = await sandbox.createCodeContext()
      await sandbox.deleteCodeContext(other)
      assert.ok(!(await sandbox.listCodeContexts()).some((c) => c.id === other.id))
    }
    await assert.rejects(sandbox.createCodeContext({ cwd: '/nowhere' }), /400/)
  },

  async 'the variables of the sandbox, and of one cell'() {
    for (const [language, get] of [['python', (n) => `import os; os.getenv('${n}', 'none')`], ['javascript', (n) => `process.env.${n} ?? 'none'`]]) {
      await shows(get('WHOSE'), 'the sandbox', { language })
      await shows(get('WHOSE'), 'the cell', { language, envs: { WHOSE: 'the cell' } })
      await shows(get('WHOSE'), 'the sandbox', { language })
      await shows(get('MORE'), 'yes', { language, envs: { MORE: 'yes' } })
      await shows(get('MORE'), 'none', { language })
      await shows(get('E2B_SANDBOX_ID'), sandbox.sandboxId.split('-')[0], { language })
    }
    const r = await run('echo $WHOSE $MORE', { language: 'bash', envs: { MORE: `it's "$x"` } })
    assert.equal(r.logs.stdout.join(''), 'the sandbox it\'s "$x"\n')
  },

  async 'an infinite loop ends with its client, and its kernel goes on'() {
    for (const [language, set, loop, get] of [
      ['python', 'alive = 7', 'while True: pass', 'alive'],
      ['javascript', 'let alive = 7', 'while (true) {}', 'alive'],
    ]) {
      await run(set, { language })
      await assert.rejects(run(loop, { language, timeoutMs: 1000 }), /timed out|timeout|aborted/i)
      const began = Date.now()
      await shows(get, '7', { language })
      assert.ok(Date.now() - began < 10_000, `the next cell took ${Date.now() - began} ms`)
    }
    await run('alive=7', { language: 'bash' })
    await assert.rejects(run('sleep 1000; echo no', { language: 'bash', timeoutMs: 1000 }), /timed out|timeout|aborted/i)
    assert.equal((await run('echo $alive', { language: 'bash' })).logs.stdout.join(''), '7\n')
  },

  async 'a kernel that dies is said to have, and replaced'() {
    const r = await run('import os; os._exit(3)')
    assert.equal(r.error.name, 'KernelEnded')
    await shows('6 * 7', '42')
  },

  async 'two megabytes of output arrive whole'() {
    let size = 0
    const r = await run('for i in range(20000): print("x" * 99)', { onStdout: (m) => { size += m.line.length } })
    assert.equal(r.error, undefined, r.error?.traceback)
    assert.equal(size, 2_000_000)
  },

  async 'JavaScript with modules, await and errors'() {
    const js = { language: 'js' }
    const r = await run("import { readFileSync } from 'fs'\nconsole.log(typeof readFileSync)", js)
    assert.equal(r.error, undefined, r.error?.traceback)
    assert.deepEqual(r.logs.stdout, ['function\n'])
    await shows("await Promise.resolve('Hello')", 'Hello', js)
    await run('const again = 1', js)
    await shows('const again = 2; ({ again })', '{ again: 2 }', js)
    const failed = await run('function f() { throw new TypeError("bad") }\nf()', js)
    assert.deepEqual([failed.error.name, failed.error.value], ['TypeError', 'bad'])
    assert.match(failed.error.traceback, /at f /)
    assert.doesNotMatch(failed.error.traceback, /node:/)
    await shows("const m: string = 'typed'; m", 'typed', { language: 'ts' })
  },

  async 'a shell keeps its variables and its folder'() {
    const bash = { language: 'bash' }
    await run('mkdir -p /tmp/here; cd /tmp/here; v=1', bash)
    assert.equal((await run('pwd; echo $v', bash)).logs.stdout.join(''), '/tmp/here\n1\n')
    const r = await run('echo before; (exit 7)', bash)
    assert.deepEqual([r.logs.stdout.join(''), r.error.value], ['before\n', '7'])
    assert.equal((await run('exit 0', bash)).error, undefined)
    assert.equal((await run('echo new', bash)).logs.stdout.join(''), 'new\n')
  },

  async 'what is not there is refused'() {
    await assert.rejects(run('1', { language: 'cobol' }), /400/)
    await assert.rejects(run('1', { context: { id: 'nowhere' } }), /not found/)
    const url = `https://${sandbox.getHost(49999)}`
    const post = (path, body, headers = {}) => fetch(url + path, { method: 'POST', body: JSON.stringify(body), headers: { 'Content-Type': 'application/json', ...headers } })
    assert.equal((await post('/execute', { code: '1' })).status, 401)
    assert.equal((await post('/execute', { code: '1' }, { 'X-Access-Token': 'wrong' })).status, 401)
    assert.equal((await post('/contexts', {}, { 'X-Access-Token': 'wrong' })).status, 401)
  },

  async 'a pause keeps the kernels'() {
    const s = await Sandbox.create({ timeoutMs: 60_000, allowInternetAccess: false })
    try {
      await s.runCode('kept = [1]')
      await s.runCode('let kept = [2]', { language: 'js' })
      await (s.pause ?? s.betaPause).call(s)
      const again = await Sandbox.connect(s.sandboxId)
      assert.equal((await again.runCode('kept')).text, '[1]')
      assert.equal((await again.runCode('kept', { language: 'js' })).text, '[ 2 ]')
    } finally {
      await s.kill()
    }
  },

  async 'copies of a sandbox keep its state and draw numbers of their own'() {
    const s = await Sandbox.create({ timeoutMs: 60_000 })
    let copies = []
    try {
      await s.runCode('import random; kept = [1]; random.random()')
      const made = s.fork ? await s.fork({ count: 2 }) : await Sandbox.clone(s.sandboxId, { count: 2 })
      copies = (made.sandboxes ?? made).map((c) => c.sandbox ?? c)
      const texts = await Promise.all([s, ...copies].map(async (c) => (await c.runCode('kept.append(2); [kept, random.random()]')).text))
      assert.deepEqual(texts.map((t) => JSON.parse(t)[0]), [[1, 2], [1, 2], [1, 2]])
      assert.equal(new Set(texts.map((t) => JSON.parse(t)[1])).size, 3, texts.join())
    } finally {
      await Promise.all([s, ...copies].map((c) => c.kill()))
    }
  },

  async 'a private sandbox runs its owner\'s code'() {
    const s = await Sandbox.create({ timeoutMs: 60_000, network: { allowPublicTraffic: false } })
    try {
      assert.equal((await s.runCode('1+1')).text, '2')
      const res = await fetch(`https://${s.getHost(49999)}/contexts`)
      assert.equal(res.status, 403)
    } finally {
      await s.kill()
    }
  },

  async 'two sandboxes draw different numbers'() {
    const code = 'import random, numpy; [random.random(), float(numpy.random.rand())]'
    const other = await Sandbox.create({ timeoutMs: 60_000 })
    try {
      const mine = await Sandbox.create({ timeoutMs: 60_000 })
      try {
        const [a, b] = await Promise.all([other, mine].map(async (s) => JSON.parse((await s.runCode(code)).text)))
        assert.notEqual(a[0], b[0])
        assert.notEqual(a[1], b[1])
      } finally {
        await mine.kill()
      }
    } finally {
      await other.kill()
    }
  },
}

// What else than runCode a scenario shows.
const alsoShows = {
  'state lasts from cell to cell, and not from context to context': ['createCodeContext', 'listCodeContexts', 'restartCodeContext', 'removeCodeContext', 'deleteCodeContext'],
}

// Private in the packages' declarations.
const hidden = ['constructor', 'jupyterUrl', 'getJupyterRequestUrl', 'includeDiagnostics', 'jupyterHeaders', 'handleRequestError']

for (const m of Object.getOwnPropertyNames(Sandbox.prototype)) if (!hidden.includes(m)) console.log(`method code.${m}`)

let failed = 0
try {
  for (const [name, scenario] of Object.entries(scenarios)) {
    if (only.length && !only.some((o) => name.includes(o))) continue
    const began = performance.now()
    const methods = (alsoShows[name] ?? ['runCode']).map((m) => `code.${m}`).join(' ')
    const line = () => `${name} [${methods}] js/interpreter.mjs ${Math.round(performance.now() - began)}`
    try {
      await scenario()
      console.log(`ok ${line()}`)
    } catch (err) {
      failed++
      console.log(`not ok ${line()}`)
      console.log(String(err.stack ?? err).replace(/^/gm, '    '))
    }
  }
} finally {
  await sandbox.kill()
}
process.exit(failed ? 1 : 0)
