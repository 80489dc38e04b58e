import { message } from './message.js'
document.getElementById('out').textContent = message
import.meta.hot?.accept('./message.js', (m) => { document.getElementById('out').textContent = m.message })
