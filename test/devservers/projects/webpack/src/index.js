import { message } from './message.js'
document.body.append(Object.assign(document.createElement('p'), { id: 'out', textContent: message }))
