# SPDX-License-Identifier: Apache-2.0
"""The servers of all pods and hosts: one thread that accepts, says who answers, and echoes.

Only the sockets live in the pods' network namespaces, so a pod costs no process.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable

from enforcer_daemon.model import IPAddress, Protocol
from trireme_lab.errors import LabError
from trireme_lab.netns import in_netns

_BACKLOG = 1024
_CHUNK_BYTES = 65_536
_MAX_PENDING_BYTES = 4 * _CHUNK_BYTES
"""Unsent echo of one connection; beyond it the server stops reading."""

MAX_HEARD = 65_536
"""Datagrams that are remembered, of all servers together."""

_log = logging.getLogger(__name__)


class Servers:
    """Listens wherever it is told. Thread-safe; sockets of one owner are closed by `close_owner`."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ, self._drain_wakes)
        self._calls: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._listeners: dict[str, list[socket.socket]] = {}
        self._heard: deque[bytes] = deque(maxlen=MAX_HEARD)
        self._is_closing = False
        self._thread = threading.Thread(target=self._serve, name="lab-servers", daemon=True)
        self._thread.start()

    def listen(self, owner: str, netns: str, address: IPAddress, port: int, protocol: Protocol) -> None:
        """Answer on the address as `owner`; returns when the socket listens."""
        sock = in_netns(netns, lambda: _bound_socket(address, port, protocol))
        banner = f"{owner}\n".encode()

        def accept() -> None:
            self._accept(sock, banner)

        def answer() -> None:
            self._answer(sock, banner)

        with self._lock:
            self._listeners.setdefault(owner, []).append(sock)
        ready = accept if protocol is Protocol.TCP else answer
        self._call(lambda: self._register(sock, ready))

    def heard(self) -> frozenset[bytes]:
        """Return what the last MAX_HEARD datagrams said that reached any server, answered or not."""
        done = threading.Event()
        heard: list[frozenset[bytes]] = []

        def copy() -> None:
            heard.append(frozenset(self._heard))
            done.set()

        self._call(copy)
        if not done.wait(timeout=5.0):
            raise LabError("the lab's servers do not answer")
        return heard[0]

    def close_owner(self, owner: str) -> None:
        """Stop listening as `owner` (open connections go on until their peers close them)."""
        with self._lock:
            sockets = self._listeners.pop(owner, [])
        done = threading.Event()

        def close() -> None:
            for sock in sockets:
                self._discard(sock)
            done.set()

        self._call(close)
        done.wait(timeout=5.0)

    def close(self) -> None:
        """Close every socket and end the thread."""
        self._is_closing = True
        self._call(lambda: None)
        self._thread.join(timeout=5.0)
        self._wake_sender.close()

    def _call(self, action: Callable[[], None]) -> None:
        with self._lock:
            self._calls.append(action)
        self._wake_sender.send(b".")

    def _register(self, sock: socket.socket, ready: Callable[[], None]) -> None:
        self._selector.register(sock, selectors.EVENT_READ, ready)

    def _serve(self) -> None:
        while not self._is_closing:
            for key, _ in self._selector.select():
                if key.fd in self._selector.get_map():  # not closed by an earlier event of this turn
                    key.data()
        self._drain_wakes()  # A server that was asked for just before the end has a socket, too.
        for key in list(self._selector.get_map().values()):
            self._discard(key.fileobj)  # type: ignore[arg-type]  # only sockets are registered
        self._selector.close()

    def _drain_wakes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_receiver.recv(4096)
        with self._lock:
            calls, self._calls = self._calls, []
        for call in calls:
            call()

    def _discard(self, sock: socket.socket) -> None:
        with contextlib.suppress(KeyError, ValueError):  # closed and unregistered before
            self._selector.unregister(sock)
        sock.close()

    def _answer(self, sock: socket.socket, banner: bytes) -> None:
        with contextlib.suppress(OSError):  # as for any datagram, nobody is told of a lost answer
            question, peer = sock.recvfrom(_CHUNK_BYTES)
            self._heard.append(question)
            sock.sendto(banner, peer)

    def _accept(self, listener: socket.socket, banner: bytes) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as err:  # the peer was gone before accept(), or descriptors ran out
            _log.debug("accept: %s", err)
            return
        connection.setblocking(False)
        pending = bytearray(banner)

        def serve() -> None:
            self._echo(connection, pending)

        self._selector.register(connection, selectors.EVENT_READ, serve)
        self._flush(connection, pending)

    def _echo(self, connection: socket.socket, pending: bytearray) -> None:
        if len(pending) < _MAX_PENDING_BYTES:
            try:
                received = connection.recv(_CHUNK_BYTES)
            except BlockingIOError:
                received = None
            except OSError:
                received = b""
            if received == b"":
                self._discard(connection)
                return
            pending += received or b""
        self._flush(connection, pending)

    def _flush(self, connection: socket.socket, pending: bytearray) -> None:
        try:
            while pending:
                del pending[: connection.send(pending)]
        except BlockingIOError:
            pass
        except OSError:
            self._discard(connection)
            return
        wanted = selectors.EVENT_READ if len(pending) < _MAX_PENDING_BYTES else 0
        wanted |= selectors.EVENT_WRITE if pending else 0
        self._selector.modify(connection, wanted, self._selector.get_key(connection).data)


def _bound_socket(address: IPAddress, port: int, protocol: Protocol) -> socket.socket:
    is_tcp = protocol is Protocol.TCP
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM if is_tcp else socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setblocking(False)
        sock.bind((str(address), port))
        if is_tcp:
            sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock
