# SPDX-License-Identifier: Apache-2.0
"""Packets by the thousand that no stack would send: dropped with a reason, and the daemon goes on as it was.

Nothing here is left to chance: the seed is fixed, and each burst is evaluated before the next one is sent.
"""

from __future__ import annotations

import json
import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer_daemon.handshake.frames import NONCE_BYTES, PROOF_BYTES, SynAckFrame, encode_syn_ack
from enforcer_daemon.packet.checksum import complement, ones_sum
from enforcer_daemon.packet.tcp import ACK, PSH, SYN, SYN_ACK, build, decode_tcp, with_options_and_payload
from enforcer_daemon.reasons import Reason
from tests.e2e.attack import DB, SERVED_PORT, Attack, attack_from, versions
from tests.e2e.attackers import SYN_OPTIONS, RawClient, Signer, counters_of, identity, read_authority, silenced
from trireme_lab import Lab, Outcome
from trireme_lab.netns import open_socket
from trireme_lab.node import Node

pytestmark = pytest.mark.kernel

SEED = 20_261_122
BURST = 250
"""Packets before the daemon is waited for; its queue has room for 4,096."""
MAX_GROWTH_BYTES = 48 * 1024 * 1024
"""Of the daemon's memory over all tests: remembered refusals, peers and decisions up to their limits."""
ETHERTYPES = {4: 0x0800, 6: 0x86DD}
HEADERS = {4: 20, 6: 40}
MAGIC_BYTES = 4
Maker = Callable[[random.Random, Attack, bytes], bytes]


@pytest.fixture(scope="module", autouse=True)
def the_daemon_goes_on(world: Lab) -> Iterator[None]:
    """After all tests the same daemons run, no bigger than their limits, and serve who may connect."""
    nodes = {name: (node.daemon.pid, memory_of(node)) for name, node in world.nodes.items()}
    yield
    for pod in ("shop/web", "shop/far-web"):
        for version in (4, 6):
            assert world.probe(pod, DB, SERVED_PORT, version).outcome is Outcome.CONNECTED
    for name, (pid, memory) in nodes.items():
        node = world.node(name)
        assert (node.daemon.pid, node.daemon.exit_status) == (pid, None)
        assert memory_of(node) - memory < MAX_GROWTH_BYTES
        assert "internal" not in node.log_text()
        assert "Traceback" not in node.log_text()


def memory_of(node: Node) -> int:
    """Return what the daemon has in memory, bytes."""
    pages = int(Path(f"/proc/{node.daemon.pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# Packets: each maker gives one, of dice, an attack on the server, and a true frame.


def mutated(dice: random.Random, content: bytes, least: int = 0) -> bytes:
    """Change some bytes from `least` on, and sometimes the length."""
    changed = bytearray(content)
    for _ in range(dice.randrange(1, 9)):
        changed[dice.randrange(least, len(changed))] = dice.randrange(256)
    match dice.randrange(4):
        case 0:
            del changed[dice.randrange(least, len(changed)) :]
        case 1:
            changed += dice.randbytes(dice.randrange(1, 200))
    return bytes(changed)


def mutated_syn(dice: random.Random, attack: Attack, frame: bytes) -> bytes:
    return RawClient(attack.wire, *attack.target).segment(SYN, mutated(dice, frame, MAGIC_BYTES), SYN_OPTIONS)


def random_syn(dice: random.Random, attack: Attack, frame: bytes) -> bytes:
    """Any payload, from nothing to a full packet, half of them under the magic."""
    payload = frame[: MAGIC_BYTES * dice.randrange(2)] + dice.randbytes(dice.choice((0, 1, 15, 23, 24, 28, 600, 1300)))
    return RawClient(attack.wire, *attack.target).segment(SYN, payload, SYN_OPTIONS)


def random_segment(dice: random.Random, attack: Attack, frame: bytes) -> bytes:
    """Any flags, options and data."""
    client = RawClient(attack.wire, *attack.target)
    options, payload = dice.randbytes(4 * dice.randrange(11)), dice.randbytes(dice.randrange(100))
    return client.segment(dice.randrange(256), payload, options, offset=dice.randrange(3))


def random_transport(dice: random.Random, attack: Attack, frame: bytes) -> bytes:
    """Any bytes behind the IP header, of any length and protocol."""
    protocol = dice.choice((6, 6, 6, 17, 132, 1, 50, 255, dice.randrange(256)))
    return ip_packet(attack, protocol, dice.randbytes(dice.randrange(80)))


def broken_offset(dice: random.Random, attack: Attack, frame: bytes) -> bytes:
    """A segment whose header says that it is longer or shorter than it is."""
    packet = bytearray(RawClient(attack.wire, *attack.target).segment(SYN, frame[: dice.randrange(60)]))
    packet[HEADERS[attack.wire.version] + 12] = dice.randrange(256)
    return bytes(packet)


def fragment(dice: random.Random, attack: Attack, frame: bytes) -> bytes:
    """A part of a packet, the rest of which never comes; or all of it, in one."""
    syn = RawClient(attack.wire, *attack.target).segment(SYN, frame, SYN_OPTIONS)
    transport = syn[HEADERS[attack.wire.version] :]
    at = 8 * dice.randrange(3)
    part = transport[at : at + 8 * dice.randrange(1, 40)]
    more = dice.randrange(2)
    if dice.random() < 0.25:
        at, part, more = 0, transport, 0
    if attack.wire.version == 6:
        head = struct.pack("!BBHI", 6, 0, at | more, dice.randrange(8))
        return ip_packet(attack, 44, head + part)
    return ip_packet(attack, 6, part, fragment_field=at >> 3 | more << 13, number=dice.randrange(8))


def extended(dice: random.Random, attack: Attack, frame: bytes) -> bytes:
    """IPv6 extension headers, or IPv4 options, of any kind and length before a segment."""
    syn = RawClient(attack.wire, *attack.target).segment(SYN, frame[: dice.randrange(len(frame))])
    transport = syn[HEADERS[attack.wire.version] :]
    if attack.wire.version == 4:
        return ip_packet(attack, 6, transport, options=dice.randbytes(4 * dice.randrange(1, 11)))
    kinds = [dice.choice((0, 43, 44, 51, 60, 135, 139, 140, 59)) for _ in range(dice.randrange(1, 12))]
    chain = b""
    for follower in (*kinds[1:], 6):
        length = dice.choice((0, 0, 0, 1, 4, 255))
        chain += bytes((follower, length)) + dice.randbytes(6 + 8 * (length if length < 5 else 0))
    return ip_packet(attack, kinds[0], chain + transport)


def ip_packet(
    attack: Attack, protocol: int, transport: bytes, *, options: bytes = b"", fragment_field: int = 0, number: int = 0
) -> bytes:
    src, dst = attack.wire.address, attack.listener.ip.packed
    if attack.wire.version == 6:
        return struct.pack("!IHBB", 6 << 28, len(transport), protocol, 64) + src + dst + transport
    length = 20 + len(options)
    head = struct.pack(
        "!BBHHHBBH", 0x40 | length // 4, 0, length + len(transport), number, fragment_field, 64, protocol, 0
    )
    head += src + dst + options
    return head[:10] + complement(ones_sum(head)).to_bytes(2, "big") + head[12:] + transport


MAKERS: tuple[Maker, ...] = (
    mutated_syn, random_syn, random_segment, random_transport, broken_offset, fragment, extended,
)  # fmt: skip


# Bursts.


def send_burst(lab: Lab, version: int, packets: list[bytes]) -> None:
    """Put packets on the server's link as they are, past every check of a sending kernel."""
    (link,) = json.loads(lab.run(DB, "ip", "-json", "link", "show", "eth0"))
    hardware = bytes.fromhex(link["address"].replace(":", ""))
    with open_socket(lab.place("host:near").netns, socket.AF_PACKET, socket.SOCK_DGRAM) as sender:
        for packet in packets:
            sender.sendto(packet, ("eth0", ETHERTYPES[version], 0, 0, hardware))


def await_quiet(lab: Lab, pod: str) -> dict[str, int]:
    """Wait until the pod's enforcer has evaluated what it was sent; return its decisions by reason."""
    seen = counters_of(lab, pod)
    while True:
        time.sleep(0.05)
        latest = counters_of(lab, pod)
        if latest == seen:
            return latest
        seen = latest


@versions
@pytest.mark.parametrize("maker", MAKERS)
def test_packets_to_a_server(world: Lab, port: int, version: int, maker: Maker) -> None:
    dice = random.Random(SEED)
    with attack_from(world, "host:near", port, version) as attack:
        frame = attack.framed(attack.pod_token()).session.frame
        before = await_quiet(world, DB)
        for _ in range(2):
            send_burst(world, version, [maker(dice, attack, frame) for _ in range(BURST)])
            after = await_quiet(world, DB)
        assert after.keys() <= {reason.value for reason in Reason} - {Reason.INTERNAL_ERROR.value}
        assert sum(after.values()) > sum(before.values())
        assert attack.listener.accepted() == []


@versions
def test_answers_to_a_client(world: Lab, port: int, version: int) -> None:
    """Mutated SYN-ACKs: the connection that waits for one does not come about."""
    dice = random.Random(SEED)
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with (
        attack_from(world, "host:near", port, version) as attack,
        silenced(world, "host:near", version),
        world.open_socket("shop/web", family) as client,
    ):
        client.setblocking(False)
        client.connect_ex((str(attack.wire.ip), port))
        syn = attack.wire.await_segment(lambda found: found.flags == SYN and found.dport == port)
        token = Signer.make(read_authority(world), "made-up").token(identity([attack.wire.ip], "made-up"))
        nonce, proof = dice.randbytes(NONCE_BYTES), dice.randbytes(PROOF_BYTES)
        frame = encode_syn_ack(SynAckFrame(nonce, attack.wire.address, port, proof, token.block))
        numbers = dice.getrandbits(32), (syn.seq + 1) & 0xFFFF_FFFF
        bare = decode_tcp(build(syn.dst, syn.src, (syn.dport, syn.sport), numbers, SYN_ACK, 64_240))
        for answer in (frame, *(mutated(dice, frame, MAGIC_BYTES) for _ in range(300))):
            attack.wire.send(with_options_and_payload(bare, SYN_OPTIONS, answer))
        after = await_quiet(world, "shop/web")
        assert {Reason.MALFORMED_FRAME.value, Reason.PROOF_INVALID.value} <= after.keys()
        assert Reason.INTERNAL_ERROR.value not in after
        assert select.select([], [client], [], 0)[1] == []


@versions
def test_what_follows_a_true_syn(world: Lab, port: int, version: int) -> None:
    """Mutated proofs, any options, data and flags on a half-open connection: it does not come about."""
    dice = random.Random(SEED)
    with attack_from(world, "host:near", port, version) as attack:
        client = attack.framed(attack.pod_token())
        client.send_framed_syn()
        option = client.prove(client.await_answer(), read_authority(world))
        for _ in range(300):
            changed = bytearray(option)
            changed[dice.randrange(4, len(changed))] ^= 1 << dice.randrange(8)
            options = bytes(changed) if dice.random() < 0.5 else dice.randbytes(4 * dice.randrange(11))
            flags = dice.choice((ACK, ACK | PSH, ACK | PSH, 0x08, 0x00, 0x29, 0x3F & ~SYN & ~0x04))
            attack.wire.send(client.segment(flags, dice.randbytes(dice.randrange(40)), options, offset=1))
        after = await_quiet(world, DB)
        assert {Reason.PROOF_INVALID.value, Reason.HOLD_QUEUE_FULL.value} <= after.keys()
        assert Reason.INTERNAL_ERROR.value not in after
        assert attack.listener.accepted() == []


def test_sources_without_number(world: Lab, port: int) -> None:
    """Frames from ten thousand forged addresses: what is remembered of each has a bound."""
    dice = random.Random(SEED)
    memory = memory_of(world.node("a"))
    with attack_from(world, "host:near", port) as attack:
        frame = attack.framed(attack.pod_token()).session.frame
        for start in range(0, 10_000, 1_000):
            packets = [
                RawClient(attack.wire, *attack.target, source=ip_address((100 << 24) + start + number)).segment(
                    SYN, mutated(dice, frame, MAGIC_BYTES), SYN_OPTIONS
                )
                for number in range(1_000)
            ]
            send_burst(world, 4, packets)
            await_quiet(world, DB)
        assert attack.listener.accepted() == []
    assert memory_of(world.node("a")) - memory < MAX_GROWTH_BYTES
