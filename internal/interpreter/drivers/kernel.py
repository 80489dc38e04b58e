"""The Python kernel: ipykernel, with what a service needs and a notebook does not.

Standard output waits for a reader that is slow instead of losing what it prints;
a cell can have variables of its own in its environment; a kernel that was copied
with its sandbox gets randomness of its own; figures and frames carry their data.
"""
import array
import asyncio
import codecs
import fcntl
import importlib
import os
import select
import site
import sys
import termios
import threading

import zmq
from ipykernel.iostream import OutStream
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp

HERE = os.path.dirname(os.path.abspath(__file__))


class SteadyStream(OutStream):
    """Standard output that waits. OutStream hands text to a thread and forgets
    it, so a loop that prints would fill the memory; and what programs of a cell
    write comes after the cell's end, or never when it is not text."""

    flush_timeout = 24 * 3600
    pending_limit = 1 << 20
    pending = 0

    def __init__(self, *args, **kwargs):
        self._reading = threading.Lock()
        super().__init__(*args, **kwargs)

    def write(self, string):
        n = super().write(string)
        self.pending += len(string)
        if self.pending > self.pending_limit:
            self.pending = 0
            self.flush()
        return n

    def _watch_pipe_fd(self):
        """Reads what is written to the descriptor, by whomever."""
        text = codecs.getincrementaldecoder("utf-8")("replace")
        readable = select.poll()
        readable.register(self._fid, select.POLLIN)
        while self._should_watch:
            readable.poll()
            with self._reading:
                b = os.read(self._fid, 1 << 15)
                if not b:
                    return
                self.write(text.decode(b))

    def catch_up(self):
        """Returns when all that was written to the descriptor is sent."""
        waiting = array.array("i", [1])
        while waiting[0]:
            with self._reading:
                fcntl.ioctl(self._fid, termios.FIONREAD, waiting)
        self.flush()


def reseed():
    """Gives what draws random numbers a state that no copy of this process has."""
    import random

    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "tempfile" in sys.modules:
        sys.modules["tempfile"]._name_sequence = None
    if "ssl" in sys.modules:
        sys.modules["ssl"].RAND_add(os.urandom(64), 64.0)


def change(environment):
    """Sets variables, or removes those that are None; returns how they were."""
    before = {name: os.environ.get(name) for name in environment}
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before


class Kernel(IPythonKernel):
    async def execute_request(self, *args, **kwargs):
        parent = next(a for a in (*args, *kwargs.values()) if isinstance(a, dict))
        facts = parent.get("metadata", {}).get("cordon", {})
        if facts.get("reseed"):
            reseed()
        change(facts.get("sandbox", {}))
        importlib.invalidate_caches()  # what the cell before installed
        before = change(facts.get("cell", {}))
        try:
            result = super().execute_request(*args, **kwargs)
            if asyncio.iscoroutine(result):
                await result
        finally:
            change(before)
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, SteadyStream):
                    stream.catch_up()


class App(IPKernelApp):
    def _bind_socket(self, s, port):
        # A connection has the limits that its socket had when it was bound.
        if s.socket_type in (zmq.PUB, zmq.XPUB):
            s.sndhwm = 100
            # A full queue makes the sender wait: zmq_setsockopt(3), ZMQ_XPUB_NODROP.
            s.setsockopt(zmq.XPUB_NODROP, 1)
        return super()._bind_socket(s, port)

    def initialize(self, argv=None):
        super().initialize(argv)
        sys.path.insert(0, HERE)
        try:
            import cordon_display

            cordon_display.install(self.shell)
        finally:
            sys.path.remove(HERE)


if __name__ == "__main__":
    # As in `python -m`: modules are looked for where the code runs, not here.
    sys.path[0] = ""
    # pip installs here, as a user; a folder that is made later is not looked into.
    os.makedirs(site.getusersitepackages(), exist_ok=True)
    site.addusersitepackages(set())
    app = App.instance(kernel_class=Kernel, outstream_class="__main__.SteadyStream")
    app.initialize(["-f", sys.argv[1], "--InteractiveShell.colors=NoColor", "--HistoryManager.enabled=False"])
    app.start()
