"""How the guards of a run find each other, and what they talk over: TCP from each to the guard of process 0."""

import contextlib
import json
import socket
import time
from dataclasses import asdict, dataclass
from typing import Any

from parallel.launch import Launch, LaunchError

START_SECONDS = 300.0
"""So long processes wait for each other at the start."""
HELLO_SECONDS = 5.0
"""A process that connects says at once who it is."""
SILENCE_SECONDS = 20.0
"""A guard that says nothing for so long is lost; less than JAX's own limit (`distributed.HEARTBEAT_TIMEOUT`)."""
GRACE_SECONDS = 5.0
"""So long a guard waits for others to read its last words, and they let a process end that has failed as well."""
Message = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """A process of the run, as people find it."""

    process: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.process} (host {self.host}, pid {self.pid})"


class Link:
    """Messages to and from another guard: JSON, one a line."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        self.socket = connection
        self.heard = time.monotonic()
        self._pending = b""

    def send(self, message: Message) -> None:
        """Sends, unless the other side is gone; that shows when reading."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> list[Message] | None:
        """Messages that have come; None when the other side has closed."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._pending = (self._pending + data).split(b"\n")
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            return None


def close_links(links: list[Link], limit: float = GRACE_SECONDS) -> None:
    """Closes links when the other sides have read everything and closed too, or after so many seconds."""
    end = time.monotonic() + limit
    for link in links:
        with contextlib.suppress(OSError):
            link.socket.shutdown(socket.SHUT_WR)
    for link in links:
        while link.receive() is not None and time.monotonic() < end:
            time.sleep(0.02)
        link.socket.close()


Links = dict[int, Link]
Members = dict[int, Member]


def meet(launch: Launch, member: Member, seconds: float = START_SECONDS) -> tuple[Links, Members]:
    """Waits until all processes are there: links from process 0 to all others, or from this one to process 0.

    Raises:
      LaunchError: some did not come, two have one number, or they disagree on how many they are.
    """
    return _gather(launch, member, seconds) if launch.index == 0 else _join(launch, member, seconds)


def _gather(launch: Launch, member: Member, seconds: float) -> tuple[Links, Members]:
    links: Links = {}
    members = {0: member}
    end = time.monotonic() + seconds
    with _listen(launch.port + 1, launch.count) as server:
        while len(members) < launch.count:
            server.settimeout(max(end - time.monotonic(), 0.01))
            try:
                link = Link(server.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(k) for k in range(launch.count) if k not in members)
                error = (
                    f"after {seconds:.0f} s {len(members)} of {launch.count} processes are there; missing: {missing}. "
                    f"They must reach {launch.host}, ports {launch.port} and {launch.port + 1}"
                )
                raise _refused(error, list(links.values())) from None
            hello = _next(link, HELLO_SECONDS)
            if hello is None or "hello" not in hello:
                link.socket.close()
                continue
            other = Member(**hello["hello"])
            if hello["count"] != launch.count:
                error = f"{other} was told of {hello['count']} processes, process 0 of {launch.count}"
                raise _refused(error, [*links.values(), link])
            if other.process in members:
                error = f"{members[other.process]} and {other} have one number; give each its own --process_id"
                raise _refused(error, [*links.values(), link])
            links[other.process], members[other.process] = link, other
    for link in links.values():
        link.send({"go": asdict(member)})
        link.heard = time.monotonic()
    return links, members


def _refused(text: str, links: list[Link]) -> LaunchError:
    for link in links:
        link.send({"refused": text})
    close_links(links, 1.0)
    return LaunchError(text)


def _listen(port: int, count: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=count, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=count)
    except OSError as error:
        raise LaunchError(
            f"port {port} of this host cannot be opened ({error.strerror}): another run may use it; choose another "
            "one by --coordinator_address"
        ) from error


def _join(launch: Launch, member: Member, seconds: float) -> tuple[Links, Members]:
    end = time.monotonic() + seconds
    while True:
        try:
            link = Link(socket.create_connection((launch.host, launch.port + 1), timeout=SILENCE_SECONDS))
            break
        except OSError as error:
            if time.monotonic() > end:
                raise LaunchError(
                    f"process 0 does not answer at {launch.host}:{launch.port + 1} after {seconds:.0f} s ({error}); "
                    f"is it started, and is that its address (--coordinator_address)?"
                ) from error
            time.sleep(0.2)
    link.send({"hello": asdict(member), "count": launch.count})
    answer = _next(link, seconds + HELLO_SECONDS)
    if answer is None or "go" not in answer:
        link.socket.close()
        reason = "it ended, or says nothing" if answer is None else answer.get("refused", "it speaks another language")
        raise LaunchError(f"process 0 at {launch.host} did not start the run: {reason}")
    return {0: link}, {0: Member(**answer["go"]), launch.index: member}


def _next(link: Link, seconds: float) -> Message | None:
    """The next message; None when the other side has closed, or says nothing for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        messages = link.receive()
        if messages is None:
            return None
        if messages:
            return messages[0]
        time.sleep(0.01)
    return None
