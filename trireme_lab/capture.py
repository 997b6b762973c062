# SPDX-License-Identifier: Apache-2.0
"""Packets as they are on a link of the lab."""

from __future__ import annotations

import select
import socket
import threading
from types import TracebackType

from trireme_lab.netns import open_socket

_ETH_P_ALL = 3
_ETHERNET_HEADER_BYTES = 14
_ETHERTYPES_IP = (b"\x08\x00", b"\x86\xdd")
_BUFFER_BYTES = 8 * 1024 * 1024
MAX_PACKETS = 100_000


class Capture:
    """Records IP packets of one interface, both ways, from construction to `close`. A context manager."""

    def __init__(self, netns: str, ifname: str) -> None:
        """Start to record; raise OSError if there is no such namespace or interface."""
        self._packets: list[bytes] = []
        self._stop_receiver, self._stop_sender = socket.socketpair()
        self._socket = open_socket(netns, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            self._socket.bind((ifname, _ETH_P_ALL))
        except OSError:
            for sock in (self._socket, self._stop_receiver, self._stop_sender):
                sock.close()
            raise
        self._thread = threading.Thread(target=self._record, name=f"capture-{netns}", daemon=True)
        self._thread.start()

    def packets(self) -> list[bytes]:
        """Return the IP packets so far, without their Ethernet headers (at most MAX_PACKETS)."""
        return list(self._packets)

    def close(self) -> list[bytes]:
        """Stop, and return all packets. What was sent before is recorded."""
        self._stop_sender.close()
        self._thread.join(timeout=5.0)
        return self.packets()

    def __enter__(self) -> Capture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _record(self) -> None:
        with self._socket, self._stop_receiver:
            while True:
                readable, _, _ = select.select([self._socket, self._stop_receiver], [], [])
                if self._socket not in readable:
                    return  # told to stop, and nothing is left
                frame = self._socket.recv(65_550)
                if frame[12:14] in _ETHERTYPES_IP and len(self._packets) < MAX_PACKETS:
                    self._packets.append(frame[_ETHERNET_HEADER_BYTES:])
