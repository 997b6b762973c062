# SPDX-License-Identifier: Apache-2.0
"""Send whole IP packets from a pod's network namespace by raw socket: resets, proofs, repeated answers."""

from __future__ import annotations

import errno
import os
import socket

from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.errors import NetnsError

_DESTINATION_4 = slice(16, 20)
_DESTINATION_6 = slice(24, 40)


class Injector:
    """The raw sockets of one namespace, each opened when it is first needed; owns a copy of the descriptor.

    `send` never raises: a packet that the kernel refuses is lost as on a wire, and counted in `errors`.
    """

    __slots__ = ("_ifindex", "_netns_fd", "_sock4", "_sock6", "errors")

    def __init__(self, netns_fd: int, ifindex: int = 0) -> None:
        self._netns_fd = os.dup(netns_fd)
        self._ifindex = ifindex
        self._sock4: socket.socket | None = None
        self._sock6: socket.socket | None = None
        self.errors = 0

    def send(self, packet: bytes) -> bool:
        """Send one packet, from its own source address; return whether the kernel took it."""
        try:
            self._send(packet)
        except (OSError, NetnsError):
            self.errors += 1
            return False
        return True

    def _send(self, packet: bytes) -> None:
        if self._netns_fd < 0:
            raise OSError(errno.EBADF, "the injector is closed")
        version = packet[0] >> 4 if packet else 0
        if version == 4 and len(packet) >= 20:
            if self._sock4 is None:
                # IPPROTO_RAW includes the header and receives nothing.
                self._sock4 = open_in(self._netns_fd, lambda: _raw_socket(socket.AF_INET))
            self._sock4.sendto(packet, (socket.inet_ntop(socket.AF_INET, packet[_DESTINATION_4]), 0))
        elif version == 6 and len(packet) >= 40:
            if self._sock6 is None:
                self._sock6 = open_in(self._netns_fd, lambda: _raw_socket(socket.AF_INET6))
            destination = packet[_DESTINATION_6]
            is_link_local = destination[0] == 0xFE and destination[1] & 0xC0 == 0x80
            scope = self._ifindex if is_link_local else 0
            self._sock6.sendto(packet, (socket.inet_ntop(socket.AF_INET6, destination), 0, 0, scope))
        else:
            raise OSError(errno.EINVAL, "not an IP packet")

    def close(self) -> None:
        """Close everything; a second time does nothing."""
        for sock in (self._sock4, self._sock6):
            if sock is not None:
                sock.close()
        self._sock4 = self._sock6 = None
        if self._netns_fd >= 0:
            os.close(self._netns_fd)
            self._netns_fd = -1


def _raw_socket(family: socket.AddressFamily) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
    sock.setblocking(False)
    return sock
