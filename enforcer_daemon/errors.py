# SPDX-License-Identifier: Apache-2.0
"""The errors of the enforcer, one tree; each branch says whose fault it is.

Packet, token and handshake errors are the peer's; policy errors are the author's of an object; netns and dataplane
errors are this node's; registration errors are the caller's, or say that he should try again.
"""

from __future__ import annotations

from enforcer_daemon.reasons import Reason


class EnforcerError(Exception):
    """Any error that the enforcer raises on purpose."""


class PacketError(EnforcerError):
    """Bytes that are not the packet they claim to be (fault of the sender)."""


class PeerError(EnforcerError):
    """A peer's frame, credential, token or proof that does not hold; `reason` is what an operator looks up."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason = reason
        self.detail = detail


class FrameError(PeerError):
    """A handshake frame that is not well formed."""


class CredentialError(PeerError):
    """A node's credential that no trusted authority stands behind."""


class TokenError(PeerError):
    """An identity token that does not verify."""


class ProofError(PeerError):
    """A proof that is absent, or made under another key."""


class PolicyError(EnforcerError):
    """An object that Kubernetes would refuse (fault of its author).

    `field` is the path in the object, as Kubernetes writes it: spec.ingress[0].from[0].ipBlock.cidr.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class SettingsError(EnforcerError):
    """A setting that is unknown, of the wrong type or out of range; the message names it."""


class NetnsError(EnforcerError):
    """A network namespace that cannot be opened or entered."""


class DataplaneError(EnforcerError):
    """Rules, queues or sockets that the kernel refused."""


class IdentityTooLargeError(EnforcerError):
    """An identity that fits no handshake packet of its interface, with sizes and the largest labels in the message."""


class RegistrationError(EnforcerError):
    """A registration that was refused; `code` is the CNI error code that the plugin reports (docs/registration.md)."""

    def __init__(self, code: int, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable
