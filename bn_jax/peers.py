"""Lines of JSON between the processes of one run, beside the devices: a star around process 0.

Process 0 listens; the others find its port through the coordination service of `jax.distributed`
and keep one TCP connection to it. The kernel closes a connection when its process dies, however it
dies, so a death is seen at once; what hangs is seen by its silence. Nothing here ever blocks for
longer than it is told to.
"""

import contextlib
import json
import secrets
import selectors
import socket
from typing import Any

_LARGEST = 1 << 16  # bytes of one line; more is no line of ours
_PATIENCE = 60  # seconds for process 0 to say where it listens, and to be reached


class Wire:
    """One connection: `send` and `receive` return at once; `open` turns False when it is gone."""

    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        self.socket, self.open = sock, True
        self.process: int | None = None  # who is at the other end, once it has said so
        self._buffer = b""

    def send(self, **message: Any) -> None:
        """Sends one line. What a stopped process does not take is lost: it is silent anyway."""
        with contextlib.suppress(OSError):
            self.socket.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """The lines that have arrived."""
        try:
            data = self.socket.recv(_LARGEST)
            self.open = bool(data)
            self._buffer += data
        except BlockingIOError:
            pass
        except OSError:
            self.open = False
        *lines, self._buffer = self._buffer.split(b"\n")
        found = []
        for line in lines:
            try:
                found.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                self.open = False
        self.open = self.open and len(self._buffer) < _LARGEST
        return found

    def close(self) -> None:
        """Ends the connection."""
        self.open = False
        self.socket.close()


class Star:
    """This process's connections to the others: all of them on process 0, else the one to it.

    Args:
      client: the key-value store of the coordination service.
      process, processes: this process and how many there are.
      coordinator: HOST:PORT of the coordination service, which is on process 0's host.
      key: where in the store process 0 writes its port.

    Raises:
      OSError: process 0 cannot be reached.
    """

    def __init__(self, client: Any, process: int, processes: int, coordinator: str, key: str):
        self.wires: dict[int, Wire] = {}  # by process
        self._strangers: list[Wire] = []  # have not yet said who they are
        self._server: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._process, self._processes = process, processes
        if process == 0:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
            self._server.setblocking(False)
            self._selector.register(self._server, selectors.EVENT_READ)
            self._token = secrets.token_hex(16)
            client.key_value_set(key, f"{self._server.getsockname()[1]} {self._token}")
            return
        port, self._token = client.blocking_key_value_get(key, 1000 * _PATIENCE).split()
        host = coordinator.rpartition(":")[0].strip("[]")
        wire = Wire(socket.create_connection((host, int(port)), timeout=_PATIENCE))
        wire.process = 0
        self.wires[0] = wire
        self._selector.register(wire.socket, selectors.EVENT_READ)
        wire.send(token=self._token, process=process)

    def send(self, **message: Any) -> None:
        """One line to every process that is connected with this one."""
        for wire in list(self.wires.values()):  # the sender may be another thread
            wire.send(**message)

    def poll(self, seconds: float) -> list[tuple[int, dict[str, Any] | None]]:
        """What has arrived within `seconds`: (process, line), or (process, None) for one whose
        connection is gone."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._server:
                self._accept()
        found: list[tuple[int, dict[str, Any] | None]] = []
        for wire in self._strangers[:]:
            found += self._introduced(wire)
        for process, wire in list(self.wires.items()):
            found += [(process, line) for line in wire.receive()]
            if not wire.open:
                found.append((process, None))
                self._drop(wire)
                del self.wires[process]
        return found

    def _accept(self) -> None:
        assert self._server is not None
        with contextlib.suppress(OSError):
            wire = Wire(self._server.accept()[0])
            self._strangers.append(wire)
            self._selector.register(wire.socket, selectors.EVENT_READ)

    def _introduced(self, wire: Wire) -> list[tuple[int, dict[str, Any] | None]]:
        """The lines of a new connection, if it knows the run's token; else it is closed."""
        lines = wire.receive()
        if not lines and wire.open:
            return []
        self._strangers.remove(wire)
        first = lines[0] if lines else {}
        process = int(first.get("process", 0))
        expected = set(range(1, self._processes)) - self.wires.keys()
        if first.get("token") != self._token or process not in expected:
            self._drop(wire)
            return []
        wire.process = process
        self.wires[process] = wire
        return [(process, line) for line in lines[1:]]

    def _drop(self, wire: Wire) -> None:
        self._selector.unregister(wire.socket)
        wire.close()
