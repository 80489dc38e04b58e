# Pauses a sandbox with a program in it, and lets it go on later.
#
# It prints:
#   paused
#   the program counted on: True
from e2b import Sandbox

sandbox = Sandbox.create()
try:
    # A program that counts in its memory and writes the number down.
    sandbox.commands.run("n=0; while sleep 0.1; do n=$((n+1)); echo $n > /tmp/n; done", background=True)

    def count(s):
        return int(s.commands.run("sleep 1; cat /tmp/n").stdout)

    before = count(sandbox)

    # Memory, files and processes go to disk. A paused sandbox uses no CPU and no memory.
    sandbox.pause()
    print(Sandbox.get_info(sandbox.sandbox_id).state.value)

    # Hours later, in another program: its ID is enough.
    again = Sandbox.connect(sandbox.sandbox_id)
    print("the program counted on:", count(again) > before)
finally:
    sandbox.kill()
