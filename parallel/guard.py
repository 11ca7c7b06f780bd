"""Guards: one small process beside each training process, so that the loss of one ends all, with a line that says why.

JAX ends the survivors of a lost process by a C++ abort that names a number at best, within milliseconds when the first
process is the lost one; no Python code of the process itself runs then. So what is launched is a guard: it forks the
training process, and sees its end whatever it was. Guards are linked to the guard of process 0 over TCP. They import
neither JAX nor NumPy, so that no long computation keeps them from answering, and their children die with them.
"""

import contextlib
import ctypes
import math
import mmap
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from parallel.links import GRACE_SECONDS, SILENCE_SECONDS, Links, Members, close_links

EXIT_LOST = 76
"""Exit code of a process that was stopped because another one was lost or had failed."""
HEARTBEAT_SECONDS = 2.0
ENDING_SECONDS = 60.0
"""Once one process has ended well, the others end within so many seconds."""
CLOSED = "its connection closed"
SIGNAL_MEANS = {
    "SIGKILL": " (out of memory?)",
    "SIGABRT": " (where JAX did that, its last lines tell what it lost contact with)",
}
PR_SET_PDEATHSIG = 1
STEP = struct.Struct("q")


@dataclass(frozen=True)
class Stop:
    """The run ends: because of which process, in words, and how long the others may still work."""

    process: int
    text: str
    grace: float = 0.0


class Child:
    """The training process: forked at once, it waits until `go`, and dies when the guard does."""

    def __init__(self) -> None:
        gate, self._gate = os.pipe()
        self._saved = mmap.mmap(-1, STEP.size)
        self.saved(-1)
        guard = os.getpid()
        self.pid = os.fork()
        self.inside = self.pid == 0
        """Whether this is the training process itself."""
        self.code: int | None = None
        """Exit code, or the signal as a negative number, once it has ended."""
        if self.inside:
            os.close(self._gate)
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if not os.read(gate, 1) or os.getppid() != guard:
                os._exit(EXIT_LOST)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the guard, which asks politely
        os.close(gate)

    def saved(self, step: int) -> None:
        """Called inside: tells the guard which step the run would resume from."""
        STEP.pack_into(self._saved, 0, step)

    @property
    def resume_step(self) -> int | None:
        """The step that the run would resume from, as far as the training process has told."""
        step = STEP.unpack_from(self._saved)[0]
        return None if step < 0 else step

    def go(self) -> None:
        """Lets the training process begin."""
        os.write(self._gate, b"g")

    def ended(self) -> bool:
        """Whether the training process has ended; `code` says how."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def end(self, grace: float) -> None:
        """Waits so many seconds for the training process to end by itself, then kills it."""
        limit = time.monotonic() + grace
        while not self.ended() and time.monotonic() < limit:
            time.sleep(0.02)
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def exit_code(self) -> int:
        """The code that a shell would show."""
        assert self.code is not None
        return self.code if self.code >= 0 else 128 - self.code


class Guard:
    """Watches over one training process and its links."""

    def __init__(self, index: int, child: Child, links: Links, members: Members):
        self._index = index
        self._child = child
        self._links = links
        self._members = members
        self._done: set[int] = set()
        """Processes that ended well."""
        self._ending = math.inf
        """By when all must have ended."""
        self._interrupts = 0

    def run(self) -> int:
        """Returns the exit code of the training process, or `EXIT_LOST` when it had to be stopped."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        with selectors.DefaultSelector() as selector, _woken_by_child(selector):
            for process, link in self._links.items():
                selector.register(link.socket, selectors.EVENT_READ, process)
            self._child.go()
            stop = self._watch(selector)
        if stop is not None:
            return self._stopped(stop)
        close_links(list(self._links.values()))
        return self._child.exit_code

    def _ask(self, number: int, frame: object) -> None:
        """SIGTERM and Ctrl-C ask the training process to save and end; a second Ctrl-C ends it at once."""
        self._interrupts += number == signal.SIGINT
        if not self._child.ended():
            os.kill(self._child.pid, signal.SIGKILL if self._interrupts > 1 else signal.SIGTERM)

    def _watch(self, selector: selectors.BaseSelector) -> Stop | None:
        """Waits until this process, and for process 0 all others, ended well; or says why the run stops before."""
        beat = time.monotonic()
        while self._index not in self._done or self._links.keys() - self._done - {0}:
            for key, _ in selector.select(HEARTBEAT_SECONDS / 4):
                if key.data is None:
                    key.fileobj.recv(1 << 10)  # type: ignore[union-attr]
                elif stop := self._hear(key.data, selector):
                    return stop
            if self._index not in self._done and self._child.ended() and (stop := self._own_end()):
                return stop
            now = time.monotonic()
            if now - beat >= HEARTBEAT_SECONDS:
                beat = now
                for link in self._links.values():
                    link.send({})
            for process in self._links.keys() - self._done:
                if now - self._links[process].heard > SILENCE_SECONDS:
                    return self._lost(process, f"not heard of for {SILENCE_SECONDS:.0f} s")
                if now > self._ending:
                    return self._lost(process, f"it did not end within {ENDING_SECONDS:.0f} s of the others")
        return None

    def _hear(self, process: int, selector: selectors.BaseSelector) -> Stop | None:
        """Reads what another guard says."""
        messages = self._links[process].receive()
        for message in messages or []:
            if "stop" in message:
                return Stop(**message["stop"])
            if message.get("end") == 0:
                self._finished(process)
            elif "end" in message:
                return self._failed(process, message["end"])
        if messages is None:
            if process not in self._done:
                return self._lost(process, CLOSED)
            link = self._links.pop(process)
            selector.unregister(link.socket)
            link.socket.close()
        return None

    def _own_end(self) -> Stop | None:
        """Tells the others of the end of the training process."""
        assert self._child.code is not None
        if self._index != 0:
            self._links[0].send({"end": self._child.code})
        if self._child.code:
            return self._failed(self._index, self._child.code)
        self._finished(self._index)
        return None

    def _finished(self, process: int) -> None:
        self._done.add(process)
        self._ending = min(self._ending, time.monotonic() + ENDING_SECONDS)

    def _lost(self, process: int, why: str) -> Stop:
        return Stop(process, f"{self._members[process]} is lost: {why}")

    def _failed(self, process: int, code: int) -> Stop:
        if code > 0:
            text = f"{self._members[process]} ended with exit code {code}, as its own output explains"
            return Stop(process, text, GRACE_SECONDS)
        name = signal.Signals(-code).name
        return self._lost(process, f"ended by {name}{SIGNAL_MEANS.get(name, '')}")

    def _stopped(self, stop: Stop) -> int:
        """Ends the training process and says why; returns this process's exit code."""
        if stop.process == self._index != 0:
            stop = self._cause(stop)
        if self._index == 0:
            for link in self._links.values():
                link.send({"stop": asdict(stop)})
        close_links(list(self._links.values()))
        self._child.end(stop.grace)
        explained = self._child.exit_code < 128 and (stop.process == self._index or stop.grace > 0)
        if not explained:
            step = self._child.resume_step
            again = "; no checkpoint is saved yet" if step is None else f" to resume from step {step}"
            text = f"error: {stop.text}; this run stops; start all processes again{again}"
            print(text, file=sys.stderr, flush=True)
        return self._child.exit_code if explained or stop.process == self._index else EXIT_LOST

    def _cause(self, stop: Stop) -> Stop:
        """Why this training process failed: what process 0's guard says, which may know of an earlier failure."""
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end:
            messages = self._links[0].receive()
            for message in messages or []:
                if "stop" in message:
                    return Stop(**message["stop"])
            if messages is None:
                return self._lost(0, CLOSED)
            time.sleep(0.02)
        return stop


@contextlib.contextmanager
def _woken_by_child(selector: selectors.BaseSelector) -> Iterator[None]:
    """The end of a child wakes the selector."""
    read, write = socket.socketpair()
    for end in (read, write):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    selector.register(read, selectors.EVENT_READ)
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        read.close()
        write.close()
