// The JavaScript kernel. Cells run on the main thread by V8's own rules for
// consoles: await at the top level, let and const declared again. A second
// thread reads the requests, so that it can end a cell that never returns.
//
// A request on descriptor 3 and an answer on descriptor 4 are each a line of JSON.
// Before the answer the request's mark is written to standard output and error,
// between NULs, so that the reader knows that it has all the output.
'use strict'
const { execFileSync } = require('node:child_process')
const fs = require('node:fs')
const { Session } = require('node:inspector')
const { builtinModules, createRequire } = require('node:module')
const path = require('node:path')
const { pathToFileURL } = require('node:url')
const util = require('node:util')
const { Worker } = require('node:worker_threads')

const language = process.argv[2]
const session = new Session()
session.connect()
const post = util.promisify(session.post.bind(session))
const here = () => createRequire(path.join(process.cwd(), 'cell.js'))

// ---- what a cell finds

globalThis.require = Object.assign((name) => here()(name), { resolve: (name) => here().resolve(name) })
globalThis.module = { exports: {} }
globalThis.exports = globalThis.module.exports

/** import(), as from a file in the working directory. */
function importFrom(name) {
  if (builtinModules.includes(name) || /^(node|data|https?|file):/.test(name)) return import(name)
  if (/^\.{0,2}\//.test(name)) return import(pathToFileURL(path.resolve(name)))
  let found
  try {
    found = pathToFileURL(here().resolve(name))
  } catch {
    found = name // packages that only have an entry for import
  }
  return import(found)
}
const importName = '__cordon_import'
Object.defineProperty(globalThis, importName, { value: importFrom })

/** Turns import statements, which only modules have, into import(). */
function withImports(code) {
  if (!/\bimport\b/.test(code)) return code
  let tree
  try {
    const acorn = here()('/usr/share/nodejs/acorn')
    tree = acorn.parse(code, { ecmaVersion: 'latest', sourceType: 'module', allowAwaitOutsideFunction: true })
  } catch {
    return code // V8 says what is wrong with it
  }
  const edits = []
  ;(function walk(node) {
    if (node.type === 'ImportDeclaration') edits.push([node.start, node.end, declaration(node, code)])
    else if (node.type === 'ImportExpression') edits.push([node.start, node.start + 'import'.length, importName])
    for (const child of Object.values(node)) {
      for (const c of Array.isArray(child) ? child : [child]) if (c && typeof c.type === 'string') walk(c)
    }
  })(tree)
  for (const [start, end, text] of edits.sort((a, b) => b[0] - a[0])) code = code.slice(0, start) + text + code.slice(end)
  return code
}

function declaration(node, code) {
  const load = `await ${importName}(${node.source.raw})`
  const names = []
  let whole = ''
  for (const s of node.specifiers) {
    if (s.type === 'ImportNamespaceSpecifier') whole = `const ${s.local.name} = ${load}; `
    else if (s.type === 'ImportDefaultSpecifier') names.push(`default: ${s.local.name}`)
    else names.push(`${code.slice(s.imported.start, s.imported.end)}: ${s.local.name}`)
  }
  const lines = '\n'.repeat(code.slice(node.start, node.end).split('\n').length - 1) // so that errors name the right line
  return (whole + (names.length ? `const { ${names.join(', ')} } = ${load};` : whole ? '' : load + ';')) + lines
}

function fromTypeScript(code) {
  const tsconfig = JSON.stringify({ compilerOptions: { preserveValueImports: true, importsNotUsedAsValues: 'preserve' } })
  try {
    return execFileSync('esbuild', ['--loader=ts', '--target=esnext', '--log-level=error', '--tsconfig-raw=' + tsconfig], {
      input: code, encoding: 'utf8', stdio: ['pipe', 'pipe', 'pipe'], maxBuffer: 1 << 28,
    })
  } catch (err) {
    if (err.code === 'ENOENT') throw new Error('TypeScript needs esbuild, which this template does not have')
    throw new SyntaxError(String(err.stderr || err.message).trim())
  }
}

// ---- results

/** What a value shows: text, or what it says itself as in Deno's notebooks. */
async function shown(value) {
  value = await value
  if (value === undefined) return null
  const own = value !== null && typeof value === 'object' && value[Symbol.for('Jupyter.display')]
  if (typeof own === 'function') return own.call(value)
  return { 'text/plain': util.inspect(value, { maxStringLength: 1 << 22 }) }
}

function failure(err) {
  if (err?.code === 'ERR_INSPECTOR_COMMAND') return interrupted.error // V8 was told to give the cell up
  if (!(err instanceof Error) && !util.types.isNativeError(err)) return { name: 'Error', value: util.inspect(err), traceback: util.inspect(err) }
  const traceback = String(err.stack ?? err).split('\n')
  const ours = traceback.findIndex((l) => /^\s+at .*(Session\.post|node:inspector|node\.cjs)/.test(l))
  return { name: err.name, value: err.message, traceback: (ours < 0 ? traceback : traceback.slice(0, ours)).join('\n') }
}

Object.defineProperty(globalThis, '__cordon', { value: { shown, failure } })

async function call(objectId, method) {
  const r = await post('Runtime.callFunctionOn', {
    objectId, functionDeclaration: `function () { 'use strict'; return __cordon.${method}(this) }`, awaitPromise: true, returnByValue: true,
  })
  if (r.exceptionDetails) throw new Error(r.exceptionDetails.exception?.description ?? r.exceptionDetails.text)
  return r.result.value
}

/** The value of a remote object that has no identity. */
function literal(r) {
  if (r.unserializableValue === undefined) return r.value
  return r.unserializableValue.endsWith('n') ? BigInt(r.unserializableValue.slice(0, -1)) : Number(r.unserializableValue)
}

async function evaluate(code) {
  try {
    if (language === 'typescript') code = fromTypeScript(code)
    const r = await post('Runtime.evaluate', { expression: withImports(code), replMode: true, awaitPromise: true })
    if (r.exceptionDetails) {
      const thrown = r.exceptionDetails.exception
      return { error: thrown?.objectId ? await call(thrown.objectId, 'failure') : failure(literal(thrown ?? {})) }
    }
    return { result: r.result.objectId ? await call(r.result.objectId, 'shown') : await shown(literal(r.result)) }
  } catch (err) {
    return { error: failure(err) }
  } finally {
    await post('Runtime.discardConsoleEntries').catch(() => {})
  }
}

// ---- requests

let running = null

function change(environment) {
  const before = {}
  for (const [name, value] of Object.entries(environment ?? {})) {
    before[name] = process.env[name] ?? null
    if (value === null) delete process.env[name]
    else process.env[name] = value
  }
  return before
}

function answer(cell, outcome) {
  if (running !== cell) return // it was interrupted, and ended later
  running = null
  change(cell.before)
  const mark = `\0${cell.mark}\0`
  process.stdout.write(mark)
  process.stderr.write(mark)
  let line
  try {
    line = JSON.stringify({ mark: cell.mark, ...outcome })
  } catch (err) {
    line = JSON.stringify({ mark: cell.mark, error: failure(err) })
  }
  fs.writeSync(4, line + '\n')
}

async function run(cell) {
  running = cell
  change(cell.sandbox)
  cell.before = change(cell.cell)
  answer(cell, await evaluate(cell.code))
}

// An exit would wait for the sessions to be closed.
process.exit = process.reallyExit = () => process.kill(process.pid, 'SIGKILL')

const interrupted = { error: { name: 'Interrupted', value: 'execution interrupted', traceback: 'Interrupted: execution interrupted' } }

const reader = new Worker(
  `const fs = require('node:fs')
   const { Session } = require('node:inspector')
   const { parentPort } = require('node:worker_threads')
   const main = new Session()
   main.connectToMainThread()
   require('node:readline').createInterface({ input: fs.createReadStream(null, { fd: 3 }) })
     .on('line', (line) => {
       const request = JSON.parse(line)
       if (request.interrupt) main.post('Runtime.terminateExecution', () => {})
       parentPort.postMessage(request)
     })
     .on('close', () => process.kill(process.pid, 'SIGKILL'))`,
  { eval: true },
)
reader.on('message', (request) => {
  if (!request.interrupt) run(request)
  else if (running?.mark === request.interrupt) answer(running, interrupted)
})

// Interrupts come as requests; the signal is for programs that a cell started.
process.on('SIGINT', () => {})
for (const event of ['uncaughtException', 'unhandledRejection']) {
  process.on(event, (err) => console.error('Uncaught', err))
}
