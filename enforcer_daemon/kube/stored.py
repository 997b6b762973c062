# SPDX-License-Identifier: Apache-2.0
"""A NetworkPolicy as the bytes that were kept of it: decoded when a pod of its namespace is on the node.

Decoded, a policy takes about ten times as much memory, and a node has pods of few namespaces.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from enforcer_daemon.policy import InvalidObjectError, NetworkPolicy

_Decode = Callable[[Mapping[str, object]], NetworkPolicy]
_StandIn = Callable[[Mapping[str, object]], NetworkPolicy | None]


class StoredPolicy:
    """Equal if namespace, name and bytes are, and to what it decodes to."""

    __slots__ = ("_decode", "_stand_in", "document", "name", "namespace", "policy")

    def __init__(self, key: tuple[str, str], document: bytes, decode: _Decode, stand_in: _StandIn) -> None:
        self.namespace, self.name = key
        self.document = document
        self._decode = decode
        self._stand_in = stand_in
        self.policy: NetworkPolicy | None = None

    def __eq__(self, other: object) -> bool:
        if isinstance(other, NetworkPolicy):
            return self.load() == other
        if not isinstance(other, StoredPolicy):
            return NotImplemented
        return (self.namespace, self.name, self.document) == (other.namespace, other.name, other.document)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"StoredPolicy({self.namespace}/{self.name}, {self.document!r})"

    @property
    def size(self) -> int:
        """Its bytes."""
        return len(self.document)

    def load(self) -> NetworkPolicy:
        """Decode it, unless that was done before; one that cannot be read isolates whom it selects."""
        policy = self.policy
        if policy is None:
            reduced = json.loads(self.document)
            try:
                policy = self._decode(reduced)
            except InvalidObjectError:
                policy = self._stand_in(reduced) or NetworkPolicy(self.namespace, self.name, egress=())
            self.policy = policy
        return policy

    def unload(self) -> None:
        """Keep the bytes alone; `load` decodes again."""
        self.policy = None
