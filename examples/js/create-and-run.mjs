// Creates a sandbox, writes a file into it and runs a program.
//
// It prints:
//   hello from the sandbox
//   exit code 3
import { Sandbox, CommandExitError } from 'e2b'

// The address and the key of the server come from E2B_API_URL, E2B_DOMAIN and
// E2B_API_KEY. The sandbox ends by itself after timeoutMs.
const sandbox = await Sandbox.create({ timeoutMs: 60_000 })
try {
  await sandbox.files.write('/home/user/hello.py', 'print("hello from the sandbox")')
  const result = await sandbox.commands.run('python3 hello.py')
  console.log(result.stdout.trim())

  // A command that fails throws; the error has its exit code and its output.
  try {
    await sandbox.commands.run('exit 3')
  } catch (err) {
    if (!(err instanceof CommandExitError)) throw err
    console.log('exit code', err.exitCode)
  }
} finally {
  await sandbox.kill() // everything in it is gone
}
