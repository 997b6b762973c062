# SPDX-License-Identifier: Apache-2.0
"""Many UDP probes at once, from one thread.

A denied datagram has no answer, so nothing tells when to stop waiting. What is asked together is also waited for
together: where something is let through, its answer comes in milliseconds, so silence of them all for `quiet_s` ends
the wait. Whoever expects more answers than came asks again, with more patience.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from trireme_lab.netns import open_socket
from trireme_lab.probe import MAX_BANNER_BYTES, UDP_RESEND_S, Outcome, Probe, ProbeResult


@dataclass(slots=True)
class _Question:
    """A probe under way."""

    probe: Probe
    payload: bytes
    sock: socket.socket
    started: float
    before: float
    result: ProbeResult | None = None

    def end(self, outcome: Outcome, banner: str = "") -> None:
        self.result = ProbeResult(outcome, banner, time.monotonic() - self.before, self.started)


def ask_all(probes: Sequence[Probe], payloads: Sequence[bytes], quiet_s: float) -> list[ProbeResult]:
    """Send every probe's payload at once, and wait for the answers; results in the order of the probes.

    Ends when all are answered, when nobody was for `quiet_s`, or after the longest timeout among the probes. Raises
    LabError where a namespace is missing.
    """
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        questions = []
        for probe, payload in zip(probes, payloads, strict=True):
            family = socket.AF_INET if probe.address.version == 4 else socket.AF_INET6
            sock = stack.enter_context(open_socket(probe.netns, family, socket.SOCK_DGRAM))
            sock.setblocking(False)
            question = _Question(probe, payload, sock, time.time(), time.monotonic())
            questions.append(question)
            if _connect(question):
                selector.register(sock, selectors.EVENT_READ, question)
        _send(questions)
        _wait(selector, questions, quiet_s)
        for question in questions:
            if question.result is None:
                question.end(Outcome.TIMED_OUT)
    return [question.result for question in questions if question.result is not None]


def _connect(question: _Question) -> bool:
    probe = question.probe
    try:
        if probe.source is not None:
            question.sock.bind((str(probe.source), 0))
        question.sock.connect((str(probe.address), probe.port))
    except OSError:
        question.end(Outcome.UNREACHABLE)
    return question.result is None


def _send(questions: Sequence[_Question]) -> None:
    """Send what is not answered yet; an error of a socket is found when it is read."""
    for question in questions:
        if question.result is None:
            with contextlib.suppress(OSError):
                question.sock.send(question.payload)


def _wait(selector: selectors.BaseSelector, questions: Sequence[_Question], quiet_s: float) -> None:
    last = resent = time.monotonic()
    deadline = last + max((question.probe.timeout_s for question in questions), default=0.0)
    while selector.get_map() and (now := time.monotonic()) < min(deadline, last + quiet_s):
        if now - resent >= UDP_RESEND_S:
            _send(questions)
            resent = now
        for key, _ in selector.select(min(deadline, last + quiet_s, resent + UDP_RESEND_S) - now):
            _read(key.data)
            if key.data.result is not None:
                selector.unregister(key.fileobj)
                last = time.monotonic()


def _read(question: _Question) -> None:
    try:
        banner = question.sock.recv(MAX_BANNER_BYTES)
    except BlockingIOError:  # a datagram with a wrong checksum wakes the reader, too
        return
    except ConnectionRefusedError:
        question.end(Outcome.REFUSED)
    except OSError:
        question.end(Outcome.UNREACHABLE)
    else:
        if banner:  # an empty datagram is an enforcer's to another, sent where none listens
            question.end(Outcome.CONNECTED, banner.decode("utf-8", "replace").strip())
