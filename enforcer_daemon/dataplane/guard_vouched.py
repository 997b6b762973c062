# SPDX-License-Identifier: Apache-2.0
"""Which packets of an isolated pod pass the guard because another enforcer decides on them.

A frame (our magic behind a SYN, or a UDP message without data) is a claim that the pod's enforcer made, and to copy it
costs a pod with CAP_NET_RAW nothing. So it counts only towards an enforcer that asks for the proof: towards pod
networks, by the destination after translation, never towards the node itself. It counts only for pods whose rules name
pods, since the enforcers of others send none. This module is the one place that makes this choice: a tag that only the
enforcer's own hook can set would replace it here.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from itertools import cycle

from enforcer_daemon.dataplane.guard_live import SENT_LIVE
from enforcer_daemon.dataplane.guard_rules import FIRST_SYN, INTO_ENFORCED, STANDALONE_MESSAGE, network_sets
from enforcer_daemon.dataplane.guard_virtual import INTO_NODE_PORTS, INTO_VIRTUAL
from enforcer_daemon.handshake.frames import MAGIC
from enforcer_daemon.model import IPNetwork
from enforcer_daemon.packet.tcp import TCP_MAX_HEADER, TCP_MIN_HEADER

NODE_PORTS = "30000-32767"
"""Where Kubernetes puts node ports unless told otherwise (kube-apiserver, --service-node-port-range), for the networks
that the settings name. Another node translates its node ports itself; below and above this range are its own services.
"""
_INTO_CONFIGURED_NODE_PORTS = tuple(
    f"{family} daddr @virtual{version} th dport {NODE_PORTS}" for family, version in (("ip", 4), ("ip6", 6))
)
_INTO_CONFIGURED_VIRTUAL = ("ip daddr @virtual4", "ip6 daddr @virtual6")
_STANDALONE, _VOUCHED = "standalone", "vouched"
# A broadcast would reach those that have no enforcer. Enforcers send no message behind extension headers, and the rules
# of a pod do not look for one there.
_ONE = ("fib daddr type != broadcast", "")
_STANDALONE_MESSAGES = (f"{_ONE[0]} {STANDALONE_MESSAGE}", f"ip6 nexthdr udp {STANDALONE_MESSAGE}")
NOT_CLAIMED = (
    "pods whose egress rules name pods can send raw SYNs to every address of the enforced networks, without an answer",
    "isolated pods can send raw UDP messages without data to every address of the enforced networks",
)
"""What forms cannot tell, and a tag could; for operators."""


def skeleton(table: str, networks: Iterable[IPNetwork], pod_networks: Iterable[IPNetwork]) -> list[str]:
    """Make the chains that accept by the translated destination; `networks` are all that frames are sent to."""
    lines = framed_chain(table, pod_networks) + network_sets(table, "virtual", networks)
    # Of each pair one is for IPv4, one for IPv6, as of the messages.
    places = (*INTO_ENFORCED, *INTO_NODE_PORTS, *_INTO_CONFIGURED_NODE_PORTS)
    chains = {
        # An empty datagram to an application that has no enforcer. Enforcers of pods that only answer send some, too.
        _STANDALONE: [
            f"{into} {message} accept" for into, message in zip(INTO_ENFORCED, _STANDALONE_MESSAGES, strict=True)
        ],
        _VOUCHED: [
            *(f"{into} {one} {FIRST_SYN} jump framed" for into, one in zip(places, cycle(_ONE), strict=False)),
            *(f"{into} {message} accept" for into, message in zip(places, cycle(_STANDALONE_MESSAGES), strict=False)),
            *(
                f"{into} meta l4proto {{ tcp, udp }} ct state established ct direction original accept"
                for into in places
            ),
            # Of an established connection, too, which the node's conntrack lost.
            *(f"tcp flags & syn == 0 {live} accept" for live in SENT_LIVE),
        ],
    }
    for chain, rules in chains.items():
        lines.append(f"add chain {table} {chain}")
        lines += [f"add rule {table} {chain} {rule}" for rule in rules]
    return lines


def vouched(*, by_identity: bool) -> str:
    """Write the rule that accepts; in a chain of the input hook, where packets are for the node, it never does."""
    return f"oif != 0 jump {_VOUCHED if by_identity else _STANDALONE}"


def framed_chain(table: str, networks: Iterable[IPNetwork]) -> list[str]:
    """Make the sets of networks that a SYN with a frame may go to, and the chain that accepts such a SYN.

    The frame's magic stands right after the TCP header, whose length is looked at first: older kernels cannot address
    the payload. Whether the frame holds is decided in the pod that it goes to.
    """
    lines = [*network_sets(table, "enforced", networks), f"add chain {table} framed"]
    for length in range(TCP_MIN_HEADER, TCP_MAX_HEADER + 1, 4):
        lines.append(f"add rule {table} framed tcp doff {length // 4} @th,{length * 8},32 0x{MAGIC.hex()} accept")
    return lines


def framed_syns(*, by_identity: bool) -> list[str]:
    """Write the rules that let SYNs with a frame pass before translation, in a table that has `virtual_sets`.

    A pod whose rules name addresses alone sends frames to virtual addresses: the pods behind may have an allowed one.
    """
    places = (*INTO_ENFORCED, *INTO_VIRTUAL) if by_identity else (*_INTO_CONFIGURED_VIRTUAL, *INTO_VIRTUAL)
    return [f"{match} {FIRST_SYN} jump framed" for match in places]


def virtual_sets(table: str, networks: Iterable[IPNetwork], pod_networks: Container[IPNetwork]) -> list[str]:
    """Make the sets of those of the networks that no pods are in."""
    return network_sets(table, "virtual", (network for network in networks if network not in pod_networks))
