// A page with a WebSocket and server-sent events, and the server of both.
import { createHash } from 'node:crypto'
import { createServer } from 'node:http'

const page = `<!doctype html><html lang="en"><title>live</title><ul id="events"></ul><p id="echo"></p><script>
  const ws = new WebSocket(location.origin.replace('http', 'ws') + '/ws')
  ws.onopen = () => ws.send('from the page')
  ws.onmessage = (m) => { document.querySelector('#echo').textContent = m.data }
  ws.onclose = () => { document.querySelector('#echo').textContent += ' closed' }
  new EventSource('/events').onmessage = (e) => {
    document.querySelector('#events').append(Object.assign(document.createElement('li'), { textContent: e.data }))
  }
</script>`

const server = createServer((req, res) => {
  if (req.url === '/events') {
    res.writeHead(200, { 'content-type': 'text/event-stream' })
    let n = 0
    const timer = setInterval(() => res.write(`data: ${++n}\n\n`), 100)
    req.on('close', () => clearInterval(timer))
    return
  }
  if (req.url.startsWith('/headers')) {
    res.writeHead(200, { 'content-type': 'application/json' })
    res.end(JSON.stringify({ url: req.url, headers: req.headers }))
    return
  }
  res.writeHead(200, { 'content-type': 'text/html' })
  res.end(page)
})

// The server's half of RFC 6455, for text of less than 126 bytes.
server.on('upgrade', (req, socket) => {
  const accept = createHash('sha1').update(req.headers['sec-websocket-key'] + '258EAFA5-E914-47DA-95CA-C5AB0DC85B11').digest('base64')
  socket.write(`HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: ${accept}\r\n\r\n`)
  socket.on('error', () => {})
  socket.on('data', (frame) => {
    if ((frame[0] & 15) !== 1) return
    const mask = frame.subarray(2, 6)
    const text = Buffer.from(frame.subarray(6, 6 + (frame[1] & 127)).map((b, i) => b ^ mask[i & 3]))
    const reply = Buffer.concat([Buffer.from('echo: '), text])
    socket.write(Buffer.concat([Buffer.from([0x81, reply.length]), reply]))
  })
})
server.listen(Number(process.argv[2]))
