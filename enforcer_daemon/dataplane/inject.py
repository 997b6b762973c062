# SPDX-License-Identifier: Apache-2.0
"""Send whole IP packets from a pod's network namespace by raw socket: resets, proofs, repeated answers."""

from __future__ import annotations

import errno
import os
import socket
import struct

from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.errors import NetnsError
from enforcer_daemon.marks import UNTRACKED

_DESTINATION_4 = slice(16, 20)
_DESTINATION_6 = slice(24, 40)


class Injector:
    """The raw sockets of one namespace, each opened when it is first needed; owns a copy of the descriptor.

    `send` never raises: a packet that the kernel refuses is lost as on a wire, and counted in `errors`.
    """

    __slots__ = ("_ifindex", "_netns_fd", "_socks", "errors")

    def __init__(self, netns_fd: int, ifindex: int = 0) -> None:
        self._netns_fd = os.dup(netns_fd)
        self._ifindex = ifindex
        self._socks: dict[tuple[socket.AddressFamily, bool], socket.socket] = {}
        self.errors = 0

    def send(self, packet: bytes, *, is_untracked: bool = False) -> bool:
        """Send one packet, from its own source address; return whether the kernel took it.

        `is_untracked` keeps it out of the namespace's conntrack, as far as our rules are there.
        """
        try:
            self._send(packet, is_untracked)
        except (OSError, NetnsError):
            self.errors += 1
            return False
        return True

    def _send(self, packet: bytes, is_untracked: bool) -> None:
        if self._netns_fd < 0:
            raise OSError(errno.EBADF, "the injector is closed")
        version = packet[0] >> 4 if packet else 0
        if version == 4 and len(packet) >= 20:
            self._socket(socket.AF_INET, is_untracked).sendto(
                packet, (socket.inet_ntop(socket.AF_INET, packet[_DESTINATION_4]), 0)
            )
        elif version == 6 and len(packet) >= 40:
            destination = packet[_DESTINATION_6]
            is_link_local = destination[0] == 0xFE and destination[1] & 0xC0 == 0x80
            scope = self._ifindex if is_link_local else 0
            sock = self._socket(socket.AF_INET6, is_untracked)
            sock.sendto(packet, (socket.inet_ntop(socket.AF_INET6, destination), 0, 0, scope))
        else:
            raise OSError(errno.EINVAL, "not an IP packet")

    def _socket(self, family: socket.AddressFamily, is_untracked: bool) -> socket.socket:
        sock = self._socks.get((family, is_untracked))
        if sock is None:
            sock = open_in(self._netns_fd, lambda: _raw_socket(family, UNTRACKED if is_untracked else 0))
            self._socks[(family, is_untracked)] = sock
        return sock

    def close(self) -> None:
        """Close everything; a second time does nothing."""
        for sock in self._socks.values():
            sock.close()
        self._socks.clear()
        if self._netns_fd >= 0:
            os.close(self._netns_fd)
            self._netns_fd = -1


def _raw_socket(family: socket.AddressFamily, mark: int) -> socket.socket:
    # IPPROTO_RAW includes the header and receives nothing.
    sock = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", mark))
    except OSError:
        sock.close()
        raise
    return sock
