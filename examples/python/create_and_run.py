# Creates a sandbox, writes a file into it and runs a program.
#
# It prints:
#   hello from the sandbox
#   exit code 3
from e2b import CommandExitException, Sandbox

# The address and the key of the server come from E2B_API_URL, E2B_DOMAIN and
# E2B_API_KEY. The sandbox ends by itself after so many seconds.
sandbox = Sandbox.create(timeout=60)
try:
    sandbox.files.write("/home/user/hello.py", 'print("hello from the sandbox")')
    result = sandbox.commands.run("python3 hello.py")
    print(result.stdout.strip())

    # A command that fails raises; the exception has its exit code and its output.
    try:
        sandbox.commands.run("exit 3")
    except CommandExitException as err:
        print("exit code", err.exit_code)
finally:
    sandbox.kill()  # everything in it is gone
