# SPDX-License-Identifier: Apache-2.0
"""A sidecar proxy as service meshes put it into a pod: all TCP of the pod is redirected to it, both ways."""

from __future__ import annotations

import ctypes
import select
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from types import TracebackType

from tests.e2e.operation_world import FAMILIES
from trireme_lab import Lab
from trireme_lab.netns import in_netns

_UID = 1337
"""The user whose connections are not redirected again."""
OUTBOUND_PORT, INBOUND_PORT = 15001, 15006
_ORIGINAL_DST = {socket.AF_INET: (socket.SOL_IP, 80, 16), socket.AF_INET6: (socket.IPPROTO_IPV6, 80, 28)}
_PIECE_BYTES = 65_536
_TIMEOUT_S = 30.0
_libc = ctypes.CDLL(None)


class Sidecar:
    """Rules in a pod and the proxy that they lead to, for one IP version. A context manager."""

    def __init__(self, lab: Lab, pod: str, version: int, *, listens: bool = True) -> None:
        """With `listens` false nobody is there to be redirected to, as while the proxy starts."""
        self._lab = lab
        self._pod = pod
        self._version = version
        self._listens = listens
        self._stack = ExitStack()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Sidecar:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self) -> None:
        tool = "iptables" if self._version == 4 else "ip6tables"
        loopback = "127.0.0.1/32" if self._version == 4 else "::1/128"
        redirect = "-j", "REDIRECT", "--to-ports"
        rules = (
            ("PREROUTING", "-p", "tcp", *redirect, str(INBOUND_PORT)),
            ("OUTPUT", "-p", "tcp", "-m", "owner", "--uid-owner", str(_UID), "-j", "RETURN"),
            ("OUTPUT", "-p", "tcp", "!", "-d", loopback, *redirect, str(OUTBOUND_PORT)),
        )
        if self._listens:
            stop, stopped = socket.socketpair()
            self._stack.callback(self._join)
            self._stack.enter_context(stopped)
            for port in (OUTBOUND_PORT, INBOUND_PORT):
                listener = self._stack.enter_context(self._socket())
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("0.0.0.0" if self._version == 4 else "::", port))  # noqa: S104 - in the pod alone
                listener.listen(64)
                self._run(partial(self._accept, listener, stopped))
            for thread in self._threads:
                self._stack.callback(thread.join)
            self._stack.callback(stop.close)
        for rule in rules:
            self._lab.run(self._pod, tool, "-t", "nat", "-A", *rule)
            self._stack.callback(self._lab.run, self._pod, tool, "-t", "nat", "-D", *rule)

    def _run(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join(_TIMEOUT_S)

    def _socket(self) -> socket.socket:
        def make() -> socket.socket:
            _libc.setfsuid(_UID)  # Of this thread alone, which ends with the errand.
            return socket.socket(FAMILIES[self._version], socket.SOCK_STREAM)

        return in_netns(self._lab.place(self._pod).netns, make)

    def _accept(self, listener: socket.socket, stopped: socket.socket) -> None:
        while stopped not in select.select([listener, stopped], [], [])[0]:
            downstream, _ = listener.accept()
            self._run(lambda downstream=downstream: self._serve(downstream))  # type: ignore[misc]

    def _serve(self, downstream: socket.socket) -> None:
        with downstream, self._socket() as upstream, suppress(OSError):
            for end in (downstream, upstream):
                end.settimeout(_TIMEOUT_S)
            upstream.connect(_original_destination(downstream))
            back = threading.Thread(target=_pump, args=(upstream, downstream))
            back.start()
            _pump(downstream, upstream)
            back.join()


def _original_destination(sock: socket.socket) -> tuple[str, int]:
    """Ask where a redirected connection was going (linux/netfilter_ipv4.h, SO_ORIGINAL_DST)."""
    level, option, size = _ORIGINAL_DST[sock.family]
    address = sock.getsockopt(level, option, size)
    (port,) = struct.unpack_from("!H", address, 2)
    return socket.inet_ntop(sock.family, address[4:8] if size == 16 else address[8:24]), port


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(_PIECE_BYTES):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)
