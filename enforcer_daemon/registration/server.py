# SPDX-License-Identifier: Apache-2.0
"""The plugin's socket: decodes registrations at the edge, and answers when they are carried out, not before."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Protocol
from weakref import WeakValueDictionary

import structlog

from cni_plugin import messages
from enforcer_daemon.errors import EnforcerError, RegistrationError
from enforcer_daemon.model import AttachmentId
from enforcer_daemon.registration.descriptors import Descriptors, identify_netns
from enforcer_daemon.registration.line_server import Limits, LineServer
from enforcer_daemon.registration.request import AddRequest, decode_add, decode_attachment

LIMITS = Limits(request_bytes=messages.MAX_REQUEST_BYTES)

_log = structlog.get_logger(__name__)


class Availability(Enum):
    """Whether a registration could be served; the value is the code that STATUS reports."""

    READY = 0
    NOT_READY = messages.NOT_READY
    PODS_CUT_OFF = messages.PODS_CUT_OFF
    """Not ready, and running pods may have lost connections too."""


@dataclass(frozen=True, slots=True)
class Readiness:
    """The daemon's own judgement of itself."""

    availability: Availability
    detail: str = ""
    """For the operator: what is missing; where it is ready, what is not as it should be although."""


class Registrar(Protocol):
    """Carries registrations out. Calls for one attachment never overlap; those for different ones do.

    Each raises RegistrationError (docs/registration.md has the codes); any other error of the enforcer is reported as
    permanent. All can be repeated: a caller that lost the answer asks again.
    """

    async def add(self, request: AddRequest, netns_fd: int) -> None:
        """Return once the pod is enforced. Owns the descriptor from the call on, also if it raises."""
        ...

    async def delete(self, attachment: AttachmentId) -> None:
        """Forget the attachment; one that is unknown is forgotten already."""
        ...

    async def check(self, attachment: AttachmentId, netns_fd: int) -> None:
        """Return if the attachment is enforced in this namespace, or is so again. Owns the descriptor as `add` does."""
        ...

    async def collect(self, network: str, valid: frozenset[AttachmentId]) -> None:
        """Forget the network's attachments that are not valid."""
        ...

    def readiness(self) -> Readiness:
        """Return whether an `add` could be served now."""
        ...


class RegistrationServer:
    """Serves one Registrar. Open as a context manager, then `serve()` until cancelled."""

    def __init__(self, path: Path, registrar: Registrar, limits: Limits = LIMITS) -> None:
        self._registrar = registrar
        self._server = LineServer(path, self, limits)
        self._turns: WeakValueDictionary[AttachmentId, asyncio.Lock] = WeakValueDictionary()

    def __enter__(self) -> RegistrationServer:
        self._server.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.__exit__(kind, value, traceback)

    async def serve(self) -> None:
        """Answer plugins until cancelled."""
        await self._server.serve()

    async def answer(self, line: bytes, descriptors: Descriptors) -> bytes:
        """Carry out one request; whatever goes wrong becomes the plugin's error, so the pod does not start."""
        try:
            note = await self._carry_out(messages.decode_request(line), descriptors)
        except messages.MessageError as err:
            reply = messages.Reply(messages.PROTOCOL_MISMATCH, f"the enforcer cannot read the request: {err}")
        except RegistrationError as err:
            reply = messages.Reply(err.code, err.message, err.retryable)
        except EnforcerError as err:
            reply = messages.Reply(messages.FAILED, str(err))
        except Exception as err:  # noqa: BLE001 - one pod's fault must not end the server; it is logged and told
            _log.exception("registration failed")
            reply = messages.Reply(
                messages.FAILED, f"internal error of the enforcer ({type(err).__name__}); see its log"
            )
        else:
            reply = messages.Reply(message=note)
        if reply.code:
            _log.info("registration refused", code=reply.code, problem=reply.message, retryable=reply.is_retryable)
        return messages.encode_reply(reply)

    def refuse(self, problem: str) -> bytes:
        """Say that what came is no request."""
        return messages.encode_reply(messages.Reply(messages.PROTOCOL_MISMATCH, f"the request: {problem}"))

    async def _carry_out(self, request: messages.Request, descriptors: Descriptors) -> str:
        """Carry a request out; give what the caller may want to know although it is done."""
        if len(descriptors) and not isinstance(request, messages.Add | messages.Check):
            raise messages.MessageError("the request brings a file descriptor, and its operation takes none")
        match request:
            case messages.Add():
                add = decode_add(request)
                identify_netns(descriptors.only())
                async with self._turn(add.attachment):
                    await self._registrar.add(add, descriptors.take())
            case messages.Delete():
                attachment = decode_attachment(request.attachment)
                async with self._turn(attachment):
                    await self._registrar.delete(attachment)
            case messages.Check():
                attachment = decode_attachment(request.attachment)
                identify_netns(descriptors.only())
                async with self._turn(attachment):
                    await self._registrar.check(attachment, descriptors.take())
            case messages.Collect():
                await self._registrar.collect(request.network, frozenset(map(decode_attachment, request.valid)))
            case messages.Status():
                return _require_ready(self._registrar.readiness())
        return ""

    @contextlib.asynccontextmanager
    async def _turn(self, attachment: AttachmentId) -> AsyncIterator[None]:
        """Keep a DEL behind the ADD that its runtime gave up waiting for."""
        turn = self._turns.setdefault(attachment, asyncio.Lock())
        async with turn:
            yield


def _require_ready(readiness: Readiness) -> str:
    if readiness.availability is not Availability.READY:
        detail = readiness.detail or "the enforcer is not ready"
        raise RegistrationError(readiness.availability.value, detail)
    return readiness.detail
