# SPDX-License-Identifier: Apache-2.0
"""What released flows were evaluated by: a number in the flow's conntrack mark stands for peer, address and port.

The kernel keeps the flows, so a restart of the daemon loses none; this table says, when policy changes, whom each flow
is with. A flow that was evaluated by address alone needs no entry: its address and port are in conntrack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import replace

from enforcer_daemon.handshake.session import Grant, Session
from enforcer_daemon.marks import INDEX_MASK, INDEX_SHIFT, MAX_INDEX, NODE, released_mark
from enforcer_daemon.model import EvaluatedFlow, Identity, PodRef
from enforcer_daemon.verdict import Action, Verdict

UNKNOWN = 0
"""Index of flows for which the table had no room: every change ends them."""
BY_ADDRESS = 1
"""Index of flows that were evaluated without an identity."""
FIRST = 2
"""The lowest index that stands for a peer."""


MAX_OF_ONE_PEER = 4_096
"""Entries of one peer pod. Beyond them its flows share one for each direction, address and protocol, of port 0: policy
allows those only where it allows all ports, so a change of policy ends them elsewhere."""
_MAX_SHARED = 64
"""Entries of port 0 of one peer pod, which has few at a time: each change of its labels may add some."""

EvaluatedBy = int | EvaluatedFlow
"""What a flow was allowed by: an index where it is released, else what will have one."""


def evaluated_by(session: Session) -> EvaluatedBy | None:
    """Return what policy allowed a flow by; None if it has allowed nothing yet."""
    allowed = session.allowed_by
    return (allowed & INDEX_MASK) >> INDEX_SHIFT if isinstance(allowed, int) else allowed


def is_by_address(mark: int) -> bool:
    """Tell whether a released flow is the node's, or allowed whoever is at the address."""
    return bool(mark & NODE) or (mark & INDEX_MASK) >> INDEX_SHIFT == BY_ADDRESS


class FlowIndex:
    """The table of one endpoint, up to the bound of the mark. An entry that no flow bears any longer makes room."""

    def __init__(self, known: Iterable[tuple[int, EvaluatedFlow]] = (), highest_in_use: int = 0) -> None:
        """Take over what an earlier daemon knew.

        `highest_in_use` is the highest index in the kernel's marks: an index whose entry was lost must not be given out
        again, or the flows that bear it would be evaluated by another peer.
        """
        self._flows: dict[int, EvaluatedFlow] = dict(known)
        self._numbers = {_content(flow): number for number, flow in self._flows.items()}
        self._next = max(self._flows | {highest_in_use: None, FIRST - 1: None}) + 1
        self.is_complete = len(self._flows) == self._next - FIRST
        """Whether all flows evaluated by an identity have an entry: not after a loss, nor when the table was full."""
        self.fresh: list[tuple[int, EvaluatedFlow]] = []
        """Entries that `take_fresh` has not returned yet."""
        self._ended: set[int] = set()
        self._free: list[int] = []
        self._gaps = set(range(FIRST, self._next)) - self._flows.keys()
        """Numbers without an entry that flows in the kernel may bear."""
        self._round = 0
        self._given: dict[int, int] = {}
        """The rounds in which numbers were given last, of this one and the one before."""
        self._has_lost = False
        """Whether a flow was released without an entry since the last look at the kernel's began."""
        self._of_peer: dict[tuple[str, PodRef], int] = {}
        """How many entries each peer pod has."""
        self._by_address: dict[bytes, set[int]] = {}
        """Indexes of the flows with peers that have a packed address."""
        for number, flow in self._flows.items():
            self._note_addresses(number, flow.peer)
            self._count(flow.peer, 1)

    def knows(self, address: bytes) -> bool:
        """Tell whether any peer with this packed address has been evaluated by its identity."""
        return address in self._by_address

    def _note_addresses(self, number: int, peer: Identity) -> None:
        for ip in peer.ips:
            self._by_address.setdefault(ip.packed, set()).add(number)

    def _forget_addresses(self, number: int, peer: Identity) -> None:
        for ip in peer.ips:
            there = self._by_address.get(ip.packed, set())
            there.discard(number)
            if not there:
                self._by_address.pop(ip.packed, None)

    def __len__(self) -> int:
        return len(self._flows)

    def __iter__(self) -> Iterator[tuple[int, EvaluatedFlow]]:
        return iter(self._flows.items())

    def get(self, number: int) -> EvaluatedFlow | None:
        """Find what an index stands for."""
        return self._flows.get(number)

    def add(self, flow: EvaluatedFlow) -> int:
        """Give the index of flows that are released; UNKNOWN where the table is full."""
        number = self._add(flow)
        if number == UNKNOWN:
            self.is_complete, self._has_lost = False, True
        else:
            self._given[number] = self._round
        return number

    def release(self, grant: Grant) -> Verdict:
        """Return how a flow that has been proven is released, under the index of what policy allowed it by."""
        evaluated, entry = grant.evaluated, grant.entry
        if evaluated is None:
            return grant.verdict
        if entry is not None and self._flows.get(grant.number) is entry:  # As for the last flow of this grant.
            self._given[grant.number] = self._round
            self._ended.discard(grant.number)
            return grant.verdict
        number = self.add(evaluated)
        found = self._flows.get(number)
        grant.number, grant.entry = number, found if found is not None and found.port == evaluated.port else None
        grant.verdict = Verdict(Action.RELEASE, mark=released_mark(number))
        return grant.verdict

    def _add(self, flow: EvaluatedFlow) -> int:
        content = _content(flow)
        number = self._numbers.get(content)
        if number is not None:
            self._ended.discard(number)
        else:
            has = self._of_peer.get(_pod_of(flow.peer), 0)
            if flow.port and has >= MAX_OF_ONE_PEER:
                return self._add(replace(flow, port=0))
            if has >= MAX_OF_ONE_PEER + _MAX_SHARED or (not self._free and self._next > MAX_INDEX):
                return UNKNOWN
            if self._free:
                number = self._free.pop()
            else:
                number, self._next = self._next, self._next + 1
            self._numbers[content] = number
            self._flows[number] = flow
            self.fresh.append((number, flow))
            self._note_addresses(number, flow.peer)
            self._count(flow.peer, 1)
        return number

    def _count(self, peer: Identity, more: int) -> None:
        pod = _pod_of(peer)
        self._of_peer[pod] = self._of_peer.get(pod, 0) + more
        if not self._of_peer[pod]:
            del self._of_peer[pod]

    def begin_look(self) -> None:
        """Take note that the kernel's flows are about to be read, for `unused`."""
        self._round += 1
        self._given = {number: given for number, given in self._given.items() if given >= self._round - 1}
        self._has_lost = False

    def unused(self, in_use: Set[int]) -> list[int]:
        """Return the indexes that no flow bears, after a look at the kernel's; `in_use` are those that some flow does.

        One that was given since the look before this one began counts as borne: its flow may not be there yet.
        """
        known = self._flows.keys()
        self._free += self._gaps - in_use
        self._gaps &= in_use
        if not self._has_lost and UNKNOWN not in in_use and not self._gaps:
            self.is_complete = True
        return [number for number in known - in_use if number not in self._given]

    def free(self, numbers: Iterable[int]) -> None:
        """Remove unused entries; while there is room, the last one with each peer's address stays, for `knows`."""
        for number in numbers:
            flow = self._flows.get(number)
            if flow is None or number in self._given or (self._has_room() and self._is_last(number, flow.peer)):
                continue
            del self._flows[number]
            if self._numbers.get(_content(flow)) == number:
                del self._numbers[_content(flow)]
            self._ended.discard(number)
            self._count(flow.peer, -1)
            self._forget_addresses(number, flow.peer)
            self._free.append(number)

    def _has_room(self) -> bool:
        return len(self._flows) < MAX_INDEX // 2

    def _is_last(self, number: int, peer: Identity) -> bool:
        return any(self._by_address.get(ip.packed) == {number} for ip in peer.ips)

    def of_pod(self, identity: Identity) -> dict[int, EvaluatedFlow]:
        """Return the flows with one pod, under whatever identity it was known, by their index."""
        return {number: flow for number, flow in self._at(identity) if is_of(flow.peer, identity)}

    def of_strangers(self, identity: Identity) -> dict[int, EvaluatedFlow]:
        """Return the flows with other pods that had one of this pod's addresses before, by their index."""
        return {number: flow for number, flow in self._at(identity) if not is_of(flow.peer, identity)}

    def _at(self, identity: Identity) -> Iterator[tuple[int, EvaluatedFlow]]:
        found = set[int]().union(*(self._by_address.get(ip.packed, ()) for ip in identity.ips))
        for number in found - self._ended:
            yield number, self._flows[number]

    def note_ended(self, numbers: Iterable[int]) -> None:
        """Take note that no flow of these indexes is left, since their peer is gone."""
        self._ended.update(numbers)

    def replace_peer(self, numbers: Iterable[int], identity: Identity) -> list[tuple[int, EvaluatedFlow]]:
        """Let flows be those of another identity of the same pod; return the entries, to be kept likewise."""
        changed = [(number, replace(self._flows[number], peer=identity)) for number in numbers]
        for number, flow in changed:
            before = self._flows[number]
            self._forget_addresses(number, before.peer)
            if self._numbers.get(_content(before)) == number:
                del self._numbers[_content(before)]
            self._count(before.peer, -1)
            self._count(identity, 1)
            self._flows[number] = flow
            self._note_addresses(number, identity)
        for number, flow in changed:
            self._numbers.setdefault(_content(flow), number)
        return changed

    def take_fresh(self) -> list[tuple[int, EvaluatedFlow]]:
        """Give the entries since the last call, to be kept for the next daemon."""
        fresh, self.fresh = self.fresh, []
        return fresh


def _pod_of(peer: Identity) -> tuple[str, PodRef]:
    return peer.trust_domain, peer.pod


def is_of(peer: Identity, identity: Identity) -> bool:
    """Tell whether a peer at a pod's address is that pod: by name, and by UID if both state one."""
    is_same_name = (peer.pod, peer.trust_domain) == (identity.pod, identity.trust_domain)
    return is_same_name and (peer.uid == identity.uid or not peer.uid or not identity.uid)


def _content(flow: EvaluatedFlow) -> tuple[object, ...]:
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
