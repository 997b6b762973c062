# SPDX-License-Identifier: Apache-2.0
"""What released flows were judged by: a number in the flow's conntrack mark stands for peer, address and port.

The kernel keeps the flows, so a restart of the daemon loses none; this table says, when policy changes, whom each flow
is with. A flow that was judged by address alone needs no entry: its address and port are in conntrack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.marks import INDEX_MASK, INDEX_SHIFT, MAX_INDEX, NODE
from enforcer_daemon.model import Direction, Identity, IPAddress, Protocol

UNKNOWN = 0
"""Index of flows for which the table had no room: every change ends them."""
BY_ADDRESS = 1
"""Index of flows that were judged without an identity."""
FIRST = 2
"""The lowest index that stands for a peer."""


@dataclass(frozen=True, slots=True)
class JudgedFlow:
    """What the flows of one index have in common."""

    direction: Direction
    """EGRESS where the pod opened the flow."""
    peer: Identity
    address: IPAddress
    """Of the peer, as it was judged: behind a Service conntrack has another."""
    port: int
    """The responder's own."""
    protocol: Protocol


def is_by_address(mark: int) -> bool:
    """Tell whether a released flow is the node's, or allowed whoever is at the address."""
    return bool(mark & NODE) or (mark & INDEX_MASK) >> INDEX_SHIFT == BY_ADDRESS


class FlowIndex:
    """The table of one endpoint. It only grows, up to the bound of the mark; a restart of the pod empties it."""

    def __init__(self, known: Iterable[tuple[int, JudgedFlow]] = (), highest_in_use: int = 0) -> None:
        """Take over what an earlier daemon knew.

        `highest_in_use` is the highest index in the kernel's marks: an index whose entry was lost must not be given out
        again, or the flows that bear it would be judged by another peer.
        """
        self._flows: dict[int, JudgedFlow] = dict(known)
        self._numbers = {_content(flow): number for number, flow in self._flows.items()}
        self._next = max(self._flows | {highest_in_use: None, FIRST - 1: None}) + 1
        self.is_complete = len(self._flows) == self._next - FIRST
        """Whether all flows judged by an identity have an entry: not after a loss, nor when the table was full."""
        self._fresh: list[tuple[int, JudgedFlow]] = []
        self._ended: set[int] = set()
        self._by_address: dict[bytes, set[int]] = {}
        """Indexes of the flows with peers that have a packed address."""
        for number, flow in self._flows.items():
            self._note_addresses(number, flow.peer)

    def knows(self, address: bytes) -> bool:
        """Tell whether any peer with this packed address has been judged by its identity."""
        return address in self._by_address

    def _note_addresses(self, number: int, peer: Identity) -> None:
        for ip in peer.ips:
            self._by_address.setdefault(ip.packed, set()).add(number)

    def __len__(self) -> int:
        return len(self._flows)

    def __iter__(self) -> Iterator[tuple[int, JudgedFlow]]:
        return iter(self._flows.items())

    def get(self, number: int) -> JudgedFlow | None:
        """Find what an index stands for."""
        return self._flows.get(number)

    def number(self, direction: Direction, peer: Peer, address: IPAddress, port: int, protocol: Protocol) -> int:
        """Give the index of a flow with a peer; UNKNOWN where the table is full."""
        flow = JudgedFlow(direction, peer.identity, address, port, protocol)
        content = _content(flow)
        number = self._numbers.get(content)
        if number is not None:
            self._ended.discard(number)
        else:
            if self._next > MAX_INDEX:
                self.is_complete = False
                return UNKNOWN
            number, self._next = self._next, self._next + 1
            self._numbers[content] = number
            self._flows[number] = flow
            self._fresh.append((number, flow))
            self._note_addresses(number, peer.identity)
        return number

    def of_pod(self, identity: Identity) -> dict[int, JudgedFlow]:
        """Return the flows with one pod, under whatever identity it was known, by their index."""
        return {number: flow for number, flow in self._at(identity) if _is_of(flow.peer, identity)}

    def of_strangers(self, identity: Identity) -> dict[int, JudgedFlow]:
        """Return the flows with other pods that had one of this pod's addresses before, by their index."""
        return {number: flow for number, flow in self._at(identity) if not _is_of(flow.peer, identity)}

    def _at(self, identity: Identity) -> Iterator[tuple[int, JudgedFlow]]:
        found = set[int]().union(*(self._by_address.get(ip.packed, ()) for ip in identity.ips))
        for number in found - self._ended:
            yield number, self._flows[number]

    def note_ended(self, numbers: Iterable[int]) -> None:
        """Take note that no flow of these indexes is left, since their peer is gone."""
        self._ended.update(numbers)

    def replace_peer(self, numbers: Iterable[int], identity: Identity) -> list[tuple[int, JudgedFlow]]:
        """Let flows be those of another identity of the same pod; return the entries, to be kept likewise."""
        changed = [(number, replace(self._flows[number], peer=identity)) for number in numbers]
        for number, flow in changed:
            self._numbers.pop(_content(self._flows[number]), None)
            self._flows[number] = flow
            self._note_addresses(number, identity)
        for number, flow in changed:
            self._numbers.setdefault(_content(flow), number)
        return changed

    @property
    def has_fresh(self) -> bool:
        """Whether there are entries that `take_fresh` has not given yet."""
        return bool(self._fresh)

    def take_fresh(self) -> list[tuple[int, JudgedFlow]]:
        """Give the entries since the last call, to be kept for the next daemon."""
        fresh, self._fresh = self._fresh, []
        return fresh


def _is_of(peer: Identity, identity: Identity) -> bool:
    """Tell whether a peer at a pod's address is that pod: by name, and by UID if both state one."""
    is_same_name = (peer.pod, peer.trust_domain) == (identity.pod, identity.trust_domain)
    return is_same_name and (peer.uid == identity.uid or not peer.uid or not identity.uid)


def _content(flow: JudgedFlow) -> tuple[object, ...]:
    """A new token of the same identity must find the same entry."""
    peer = flow.peer
    return (
        flow.direction,
        flow.address,
        flow.port,
        flow.protocol,
        peer.trust_domain,
        peer.pod,
        peer.service_account,
        tuple(sorted(peer.labels.items())),
        tuple(sorted(peer.namespace_labels.items())),
        peer.named_ports,
    )
