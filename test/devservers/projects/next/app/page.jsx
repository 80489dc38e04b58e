import Counter from './counter'
import { shout } from './actions'
export default function Page() {
  return <main><p>server part</p><Counter /><form action={shout}><input name="word" aria-label="word" /><button>shout</button></form></main>
}
