# SPDX-License-Identifier: Apache-2.0
"""One connection attempt from one place to one address, and what came of it.

Allowed is what conformance suites call allowed: connect() returned (for UDP: an answer came). The banner is waited for
as well, so that a connection that is cut or starved after connect() is seen as the fault it is.
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass
from enum import Enum

from enforcer_daemon.model import IPAddress, Protocol
from trireme_lab.netns import open_socket

MAX_BANNER_BYTES = 256
UDP_RESEND_S = 1.0
"""A datagram may be lost: it is sent again as long as nobody answers."""
_IP_BIND_ADDRESS_NO_PORT = 24
"""linux/in.h: the port is chosen at connect(), where it need not differ from those of other connections."""


class Outcome(Enum):
    """What the application that dialed sees."""

    CONNECTED = "connected"
    REFUSED = "refused"
    TIMED_OUT = "timed out"
    RESET = "reset"
    UNREACHABLE = "unreachable"
    """The network has no way there: a fault of the world, not a verdict."""
    SILENT = "connected, then nothing"
    """connect() returned, but no banner followed: neither a clean allow nor a denial."""

    @property
    def is_allowed(self) -> bool:
        return self is Outcome.CONNECTED

    @property
    def is_denied(self) -> bool:
        return self in (Outcome.REFUSED, Outcome.TIMED_OUT, Outcome.RESET)


@dataclass(frozen=True, slots=True)
class Probe:
    """From which network namespace to dial what, and how long to wait."""

    netns: str
    address: IPAddress
    port: int
    protocol: Protocol = Protocol.TCP
    timeout_s: float = 3.0
    source: IPAddress | None = None
    """Dial from this address of the place; None: the kernel chooses."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What came of a probe."""

    outcome: Outcome
    banner: str = ""
    """What the answering server calls itself."""
    seconds: float = 0.0
    started: float = 0.0
    """Wall clock, seconds since the epoch: to find what daemons said about it."""


def run_probe(probe: Probe) -> ProbeResult:
    """Dial once and return what happened; raise LabError if there is no such namespace."""
    family = socket.AF_INET if probe.address.version == 4 else socket.AF_INET6
    is_tcp = probe.protocol is Protocol.TCP
    started, before = time.time(), time.monotonic()
    with open_socket(probe.netns, family, socket.SOCK_STREAM if is_tcp else socket.SOCK_DGRAM) as sock:
        outcome, banner = (_dial_tcp if is_tcp else _ask_udp)(sock, probe)
    return ProbeResult(outcome, banner, time.monotonic() - before, started)


def _dial_tcp(sock: socket.socket, probe: Probe) -> tuple[Outcome, str]:
    sock.settimeout(probe.timeout_s)
    try:
        if probe.source is not None:
            sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((str(probe.source), 0))
        sock.connect((str(probe.address), probe.port))
    except TimeoutError:
        return Outcome.TIMED_OUT, ""
    except ConnectionRefusedError:
        return Outcome.REFUSED, ""
    except (ConnectionResetError, ConnectionAbortedError):
        return Outcome.RESET, ""
    except OSError:
        return Outcome.UNREACHABLE, ""
    banner = b""
    with contextlib.suppress(OSError):  # what has arrived until then decides
        while not banner.endswith(b"\n") and len(banner) < MAX_BANNER_BYTES:
            received = sock.recv(MAX_BANNER_BYTES)
            if not received:
                break
            banner += received
    return (Outcome.CONNECTED if banner else Outcome.SILENT), banner.decode("utf-8", "replace").strip()


def _ask_udp(sock: socket.socket, probe: Probe) -> tuple[Outcome, str]:
    deadline = time.monotonic() + probe.timeout_s
    try:
        if probe.source is not None:
            sock.bind((str(probe.source), 0))
        sock.connect((str(probe.address), probe.port))
        while (now := time.monotonic()) < deadline:
            with contextlib.suppress(PermissionError):  # a rule of the pod's own namespace dropped it
                sock.send(b"?")
            if banner := _answer(sock, min(deadline, now + UDP_RESEND_S)):
                return Outcome.CONNECTED, banner.decode("utf-8", "replace").strip()
    except ConnectionRefusedError:
        return Outcome.REFUSED, ""
    except OSError:
        return Outcome.UNREACHABLE, ""
    return Outcome.TIMED_OUT, ""


def _answer(sock: socket.socket, deadline: float) -> bytes:
    """Wait for a datagram; an empty one is no answer: enforcers send such to each other, also where none listens."""
    while (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
        with contextlib.suppress(TimeoutError):
            if banner := sock.recv(MAX_BANNER_BYTES):
                return banner
    return b""
