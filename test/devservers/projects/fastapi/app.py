from fastapi import FastAPI, WebSocket
from fastapi.responses import HTMLResponse

app = FastAPI()


@app.get('/', response_class=HTMLResponse)
def home():
    return '''<p id="out"></p><script>
const s = new WebSocket(location.origin.replace('http', 'ws') + '/ws')
s.onopen = () => s.send('hello'); s.onmessage = (e) => { document.getElementById('out').textContent = e.data }
</script>'''


@app.get('/deep/', response_class=HTMLResponse)
def deep():
    return '<p>deep</p>'


@app.websocket('/ws')
async def echo(ws: WebSocket):
    await ws.accept()
    await ws.send_text('echo ' + await ws.receive_text())
