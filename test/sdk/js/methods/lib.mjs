// What the areas of methods.mjs share: a registry of tests, each with the SDK
// methods it shows to work, and a sandbox of each area's own.
export const sdk = process.argv[2]
export const { Sandbox, ...exported } = await import({ novita: 'novita-sandbox', e2b: 'e2b' }[sdk])
export const lab = JSON.parse(process.env.LAB)

export const tests = []

/**
 * Adds a test. `methods` are the names it shows, space-separated, as
 * `files.write` or `Sandbox.create`; `only` names the SDK that has them.
 */
export function test(methods, name, run, { only } = {}) {
  if (only && only !== sdk) return
  tests.push({ methods: methods.split(' '), name, run })
}

/** An area's tests get the same sandbox; a test that needs another makes it by `fresh`. */
export async function fresh(opts, use) {
  const sandbox = await Sandbox.create({ timeoutMs: 120_000, ...opts })
  try {
    return await use(sandbox)
  } finally {
    await sandbox.kill()
  }
}

export async function until(ok, ms = 15_000) {
  const end = Date.now() + ms
  for (;;) {
    const v = await ok()
    if (v) return v
    if (Date.now() > end) throw new Error(`not true in ${ms} ms: ${ok}`)
    await new Promise((r) => setTimeout(r, 50))
  }
}

/** The error a promise ends with; none is a failure. */
export async function failure(promise) {
  try {
    await promise
  } catch (err) {
    return err
  }
  throw new Error('no error')
}

/**
 * The public methods and getters of what a user holds, as `files.write`. What
 * TypeScript declares private or protected, and what a constructor sets, is not
 * public.
 */
export function inventory(named, hidden) {
  const found = new Set()
  for (const [prefix, holder] of Object.entries(named)) {
    for (let o = typeof holder === 'function' ? holder : Object.getPrototypeOf(holder); o && o !== Object.prototype && o !== Function.prototype; o = Object.getPrototypeOf(o)) {
      for (const key of Object.getOwnPropertyNames(o)) {
        const what = Object.getOwnPropertyDescriptor(o, key)
        if (typeof what.value !== 'function' && !what.get) continue
        if (key.startsWith('_') || key === 'constructor' || hidden.has(key)) continue
        found.add(`${prefix}.${key}`)
      }
    }
  }
  return [...found].sort()
}
