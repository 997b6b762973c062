# SPDX-License-Identifier: Apache-2.0
"""What an attacker floods a pod with: packets of each kind that the datapath must look at, all different."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from enforcer_daemon.handshake.frames import MAGIC, SynFrame, encode_block, encode_syn
from enforcer_daemon.handshake.local import sign_local_token
from enforcer_daemon.identity.authority import Authority, issue_credential, node_spiffe_id
from enforcer_daemon.identity.credential import decode_credential
from enforcer_daemon.model import Identity, PodRef
from enforcer_daemon.packet.checksum import complement, ones_sum
from enforcer_daemon.packet.tcp import ACK, PSH, SYN, build, decode_tcp, with_payload

PACKETS = 4_096
"""Different packets of one flood; they are sent again and again."""
_TOKENS = 512
_MSS = b"\x02\x04\x05\xb4"
_UDP = 17


@dataclass(frozen=True, slots=True)
class Attacker:
    """Who sends, to whom, and what he could get hold of."""

    address: bytes
    target: bytes
    port: int
    authority: Authority
    """Of the cluster: the attacker's own pod has good tokens; here they are made, so that there are many."""
    label: str
    """Value of the label `role` in those tokens."""

    def syn(self, number: int, payload: bytes) -> bytes:
        """Make a SYN from a port of its own."""
        bare = build(self.address, self.target, (1_024 + number, self.port), (number * 7_919, 0), SYN, 64_240, _MSS)
        return with_payload(decode_tcp(bare), payload)

    def segment(self, number: int, flags: int, payload: bytes) -> bytes:
        """Make a segment of a connection that nobody opened."""
        numbers = number * 7_919, number * 104_729 & 0xFFFF_FFFF
        bare = build(self.address, self.target, (1_024 + number, self.port), numbers, flags, 64_240)
        return with_payload(decode_tcp(bare), payload)

    def blocks(self, count: int) -> Iterator[bytes]:
        """Make good identity blocks, each with a pod of its own, all at the attacker's address."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = issue_credential(
            self.authority, key.public_key(), node_spiffe_id("cluster.local", "flood"), datetime.now(UTC),
            timedelta(hours=1),
        )  # fmt: skip
        credential = decode_credential(certificate.public_bytes(Encoding.DER))
        validity = time.time(), time.time() + 600.0
        for number in range(count):
            identity = Identity(
                PodRef("bench", f"flood-{number}"), (ip_address(self.address),), {"role": self.label}, {}, "flood"
            )
            token = sign_local_token(identity, credential, key, X25519PrivateKey.generate(), os.urandom(9), validity)
            yield token.block


def plain_syns(attacker: Attacker) -> list[bytes]:
    """SYNs without an identity, with data."""
    return [attacker.syn(number, b"x" * 16) for number in range(PACKETS)]


def garbage_frames(attacker: Attacker) -> list[bytes]:
    """SYNs that only begin like ours."""
    return [attacker.syn(number, MAGIC + os.urandom(500)) for number in range(PACKETS)]


def bad_credentials(attacker: Attacker) -> list[bytes]:
    """Well-formed frames with something instead of a certificate, always another."""
    return [
        attacker.syn(number, encode_syn(SynFrame(os.urandom(16), encode_block(os.urandom(400), os.urandom(200)))))
        for number in range(PACKETS)
    ]


def bad_signatures(attacker: Attacker) -> list[bytes]:
    """A good credential, good claims, and a signature that is always another."""
    (block,) = attacker.blocks(1)
    return [
        attacker.syn(number, encode_syn(SynFrame(os.urandom(16), block[:-8] + os.urandom(8))))
        for number in range(PACKETS)
    ]


def replays(attacker: Attacker) -> list[bytes]:
    """A few recorded SYNs, again and again, each on its own ports and on others'."""
    (block,) = attacker.blocks(1)
    frames = [encode_syn(SynFrame(os.urandom(16), block)) for _ in range(16)]
    return [attacker.syn(number % 64, frames[number % 16]) for number in range(PACKETS)]


def half_open(attacker: Attacker) -> list[bytes]:
    """Good SYNs of one pod that never goes on."""
    (block,) = attacker.blocks(1)
    return [attacker.syn(number, encode_syn(SynFrame(os.urandom(16), block))) for number in range(PACKETS)]


def token_churn(attacker: Attacker) -> list[bytes]:
    """Good SYNs with many identities."""
    blocks = list(attacker.blocks(_TOKENS))
    return [
        attacker.syn(number, encode_syn(SynFrame(os.urandom(16), blocks[number % _TOKENS])))
        for number in range(PACKETS)
    ]


def unknown_acks(attacker: Attacker) -> list[bytes]:
    """ACKs of no connection."""
    return [attacker.segment(number, ACK, b"") for number in range(PACKETS)]


def unknown_data(attacker: Attacker) -> list[bytes]:
    """Data of no connection, which is answered."""
    return [attacker.segment(number, ACK | PSH, b"data") for number in range(PACKETS)]


def datagrams(attacker: Attacker) -> list[bytes]:
    """UDP to and from any port."""
    packets = []
    for number in range(PACKETS):
        udp = struct.pack("!HHHH", 1_024 + number, 2_000 + number, 24, 0) + os.urandom(16)
        head = struct.pack("!BBHHHBBH", 0x45, 0, 44, number, 0x4000, 64, _UDP, 0) + attacker.address + attacker.target
        packets.append(head[:10] + complement(ones_sum(head)).to_bytes(2, "big") + head[12:] + udp)
    return packets


Flood = Callable[[Attacker], list[bytes]]
FLOODS: tuple[Flood, ...] = (
    plain_syns,
    garbage_frames,
    bad_credentials,
    bad_signatures,
    replays,
    half_open,
    token_churn,
    unknown_acks,
    unknown_data,
    datagrams,
)
