import assert from 'node:assert/strict'
import { test, failure, lab, fresh } from './lib.mjs'

let count = 0
/** A path nobody used before. */
const place = (name = '') => `/home/user/files-${++count}${name && '/' + name}`

test('files.write files.read', 'text is read as it was written, its folders are made', async (s) => {
  const path = place('a/b/ü 世界.txt')
  const info = await s.files.write(path, 'grüße\n')
  assert.deepEqual([info.path, info.type], [path, 'file'])
  assert.equal(await s.files.read(path), 'grüße\n')
  assert.equal((await s.commands.run(`stat -c '%U %a' '${path}'`)).stdout, 'user 644\n')
})

test('files.write files.read', 'bytes, blobs and streams both ways', async (s) => {
  const path = place('bin')
  const data = Uint8Array.from({ length: 70_000 }, (_, i) => i % 256)
  for (const put of [data.buffer, new Blob([data]), new Blob([data]).stream()]) {
    await s.files.write(path, put)
    assert.deepEqual(new Uint8Array(await s.files.read(path, { format: 'bytes' })), data)
  }
  assert.equal((await s.files.read(path, { format: 'blob' })).size, data.length)
  let read = 0
  for await (const part of await s.files.read(path, { format: 'stream' })) read += part.length
  assert.equal(read, data.length)
})

test('files.write files.read', 'an empty file is a file', async (s) => {
  const path = place('empty')
  await s.files.write(path, '')
  assert.equal(await s.files.read(path), '')
  assert.equal((await s.files.getInfo(path)).size, 0)
})

test('files.write', 'a shorter text replaces a longer one whole', async (s) => {
  const path = place('f')
  await s.files.write(path, 'long long long')
  await s.files.write(path, 'short')
  assert.equal(await s.files.read(path), 'short')
})

test('files.write files.writeFiles', 'several files go up in one request', async (s) => {
  const dir = place()
  const infos = await s.files.write([{ path: `${dir}/a`, data: 'A' }, { path: `${dir}/x/b`, data: 'B' }])
  assert.deepEqual(infos.map((i) => i.path), [`${dir}/a`, `${dir}/x/b`])
  await s.files.writeFiles([{ path: `${dir}/c`, data: 'C' }])
  assert.equal((await s.commands.run(`cat ${dir}/a ${dir}/x/b ${dir}/c`)).stdout, 'ABC')
})

test('files.write files.read', 'a user sees and owns what is theirs', async (s) => {
  await s.files.write('/root/secret', 'x', { user: 'root' })
  assert.equal(await s.files.read('/root/secret', { user: 'root' }), 'x')
  assert.equal(await s.files.read('/root/secret'), 'x') // files are reached with root's rights
  await s.files.write('relative.txt', 'home')
  assert.equal(await s.files.read('/home/user/relative.txt'), 'home')
})

test('files.read', 'a missing file and a folder are told apart', async (s) => {
  assert.match((await failure(s.files.read('/nowhere'))).name, /FileNotFoundError|NotFoundError/)
  assert.match((await failure(s.files.read('/tmp'))).message, /directory/)
})

test('files.list', 'a folder is listed to the depth asked for', async (s) => {
  const dir = place()
  await s.files.write([{ path: `${dir}/a`, data: '1' }, { path: `${dir}/d/b`, data: '22' }, { path: `${dir}/d/e/c`, data: '' }])
  assert.deepEqual((await s.files.list(dir)).map((e) => e.name), ['a', 'd'])
  const deep = await s.files.list(dir, { depth: 2 })
  assert.deepEqual(deep.map((e) => e.path), [`${dir}/a`, `${dir}/d`, `${dir}/d/b`, `${dir}/d/e`])
  assert.deepEqual(deep.map((e) => e.type), ['file', 'dir', 'file', 'dir'])
  assert.equal((await failure(s.files.list('/nowhere'))).name.includes('NotFoundError'), true)
  await failure(s.files.list(dir, { depth: 0 }))
})

test('files.getInfo', 'a file\'s facts are the file system\'s', async (s) => {
  const path = place('f')
  await s.files.write(path, 'hello')
  await s.commands.run(`chmod 751 ${path}; ln -s ${path} ${path}.link`)
  const i = await s.files.getInfo(path)
  assert.deepEqual([i.name, i.type, i.path, i.size, i.mode, i.permissions, i.owner, i.group],
    ['f', 'file', path, 5, 0o751, '-rwxr-x--x', 'user', 'user'])
  assert.ok(Math.abs(i.modifiedTime - Date.now()) < 60_000)
  assert.equal((await s.files.getInfo(path + '.link')).symlinkTarget, path)
  assert.match((await failure(s.files.getInfo('/nowhere'))).name, /NotFoundError/)
})

test('files.exists', 'what is there exists, what is not does not', async (s) => {
  assert.equal(await s.files.exists('/tmp'), true)
  assert.equal(await s.files.exists('/tmp/none'), false)
})

test('files.makeDir', 'a folder is made once, with its parents', async (s) => {
  const dir = place('x/y')
  assert.equal(await s.files.makeDir(dir), true)
  assert.equal(await s.files.makeDir(dir), false)
  assert.equal((await s.commands.run(`stat -c '%U %F' ${dir}`)).stdout, 'user directory\n')
  await s.files.write(dir + '/f', '')
  await failure(s.files.makeDir(dir + '/f'))
})

test('files.rename', 'a file and a folder are moved', async (s) => {
  const dir = place()
  await s.files.write(dir + '/a', 'A')
  const moved = await s.files.rename(dir + '/a', dir + '/new/b')
  assert.deepEqual([moved.name, moved.path], ['b', dir + '/new/b'])
  assert.equal(await s.files.read(dir + '/new/b'), 'A')
  assert.equal(await s.files.exists(dir + '/a'), false)
  await s.files.rename(dir + '/new', dir + '/other')
  assert.equal(await s.files.exists(dir + '/other/b'), true)
  assert.match((await failure(s.files.rename(dir + '/none', dir + '/x'))).name, /NotFoundError/)
})

test('files.remove', 'files and whole folders go, what is gone stays gone', async (s) => {
  const dir = place()
  await s.files.write(dir + '/d/f', '')
  await s.files.remove(dir)
  assert.equal(await s.files.exists(dir), false)
  await s.files.remove(dir)
})

test('files.write files.getInfo', 'metadata stays with the file', async (s) => {
  const path = place('f')
  const written = await s.files.write(path, 'x', { metadata: { purpose: 'test' } })
  assert.deepEqual(written.metadata, { purpose: 'test' })
  assert.deepEqual((await s.files.getInfo(path)).metadata, { purpose: 'test' })
}, { only: 'e2b' })

test('files.write', 'a compressed upload arrives unpacked', async (s) => {
  const path = place('f')
  await s.files.write(path, 'again and '.repeat(1000), { gzip: true })
  assert.equal((await s.files.read(path)).length, 10_000)
}, { only: 'e2b' })


test('sandbox.downloadUrl sandbox.uploadUrl', 'signed links work until they expire', async (s) => {
  const path = place('up.txt')
  const up = await s.uploadUrl(path, { useSignatureExpiration: 60 })
  const form = new FormData()
  form.append('file', new Blob(['by link']), 'up.txt')
  assert.equal((await fetch(up, { method: 'POST', body: form })).status, 200)
  const down = await s.downloadUrl(path, { useSignatureExpiration: 60 })
  assert.equal(await (await fetch(down)).text(), 'by link')
  const forged = down.replace(/path=[^&]+/, 'path=' + encodeURIComponent('/etc/passwd'))
  assert.equal((await fetch(forged)).status, 401)
  const brief = await s.downloadUrl(path, { useSignatureExpiration: 1 })
  await new Promise((r) => setTimeout(r, 2100))
  assert.equal((await fetch(brief)).status, 401)
})
