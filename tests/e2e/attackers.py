# SPDX-License-Identifier: Apache-2.0
"""What attackers work with: raw packets from a network namespace, forged or stolen frames, and a witness.

The frames are made with the product's own functions, so that they are wrong in exactly the way that a test wants.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from types import TracebackType

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from enforcer_daemon.handshake import carriers
from enforcer_daemon.handshake.flowkey import FlowKey, Role
from enforcer_daemon.handshake.frames import decode_block, decode_syn_ack, encode_block, is_frame, proof_option
from enforcer_daemon.handshake.limits import HandshakeLimits
from enforcer_daemon.handshake.local import LocalToken, sign_local_token
from enforcer_daemon.handshake.machine import State
from enforcer_daemon.handshake.peers import PeerVerifier
from enforcer_daemon.handshake.session import Session
from enforcer_daemon.identity.authority import Authority, issue_credential, node_spiffe_id
from enforcer_daemon.identity.credential import Credential, TrustBundle, decode_credential
from enforcer_daemon.identity.dictionary import TOKEN_DICTIONARY
from enforcer_daemon.model import Identity, IPAddress, PodRef, Protocol
from enforcer_daemon.packet.tcp import ACK, PSH, RST, SYN, SYN_ACK, Segment, build, decode_tcp, with_options_and_payload
from enforcer_daemon.reasons import Reason
from trireme_lab import Lab
from trireme_lab.netns import open_socket

RAW_PORTS = range(20_000, 30_000)
"""Source ports that attackers use for raw packets; the kernel of their namespace is told to ignore them."""
SYN_OPTIONS = b"\x02\x04\x05\xb4\x01\x01\x04\x02"
"""MSS 1460, SACK permitted."""
TRUST_DOMAIN = "cluster.local"
_ETH_P_ALL = 3
_OUTGOING = 4  # linux/if_packet.h: PACKET_OUTGOING
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_NUMBERS = 0xFFFF_FFFF
_raw_ports = itertools.cycle(RAW_PORTS)


# Identities: stolen, forged, or made by who holds the cluster's authority.


def read_authority(lab: Lab) -> Authority:
    """Read the key of the lab's authority: what an attacker would need to be a node."""
    certificate = x509.load_pem_x509_certificate((lab.directory / "ca.pem").read_bytes())
    key = load_pem_private_key((lab.directory / "ca-key.pem").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return Authority(certificate, key)


@dataclass(frozen=True, slots=True)
class Signer:
    """A node that exists for its signatures alone."""

    key: ec.EllipticCurvePrivateKey
    credential: Credential

    @classmethod
    def make(
        cls, authority: Authority, node: str, age: timedelta = timedelta(0), lifetime: timedelta = timedelta(hours=1)
    ) -> Signer:
        """Make a node with a credential that was issued `age` ago."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = node_spiffe_id(TRUST_DOMAIN, node)
        issued = datetime.now(UTC) - age
        certificate = issue_credential(authority, key.public_key(), name, issued, lifetime)
        return cls(key, decode_credential(certificate.public_bytes(Encoding.DER)))

    def token(self, identity: Identity, age_s: float = 0.0) -> LocalToken:
        """Sign a token that was issued so long ago, for ten minutes."""
        now = time.time() - age_s
        ephemeral = X25519PrivateKey.generate()
        return sign_local_token(identity, self.credential, self.key, ephemeral, os.urandom(9), (now, now + 600))


def identity(addresses: Sequence[IPAddress], node: str, pod: str = "shop/web", app: str = "web") -> Identity:
    """State a pod; the default is one that the server's policy admits."""
    namespace, _, name = pod.partition("/")
    return Identity(
        PodRef(namespace, name), tuple(addresses), {"app": app}, {"kubernetes.io/metadata.name": namespace}, node
    )


def with_changed_labels(block: bytes, old: bytes, new: bytes) -> bytes:
    """Change bytes of a token's claims, and keep its signature."""
    credential, token = decode_block(block)
    header_length, body_length = struct.unpack_from("!HH", token)
    header, rest = token[4 : 4 + header_length], token[4 + header_length :]
    claims = zlib.decompressobj(-15, TOKEN_DICTIONARY).decompress(rest[:body_length])
    assert old in claims
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, TOKEN_DICTIONARY)
    body = deflate.compress(claims.replace(old, new)) + deflate.flush()
    forged = struct.pack("!HH", len(header), len(body)) + header + body + rest[body_length:]
    return encode_block(credential, forged)


# Packets.


class Wire:
    """Raw packets at one place, in and out, past its kernel's TCP. A context manager."""

    def __init__(self, lab: Lab, place: str, version: int = 4) -> None:
        self.version = version
        self.ip = lab.place(place).address(version)
        self.address = self.ip.packed
        netns = lab.place(place).netns
        self._sniffer = open_socket(netns, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
        try:
            self._sniffer.bind(("eth0", _ETH_P_ALL))
            self._sender = open_socket(netns, _FAMILIES[version], socket.SOCK_RAW, socket.IPPROTO_RAW)
        except OSError:
            self._sniffer.close()
            raise

    def __enter__(self) -> Wire:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sniffer.close()
        self._sender.close()

    def send(self, packet: bytes) -> None:
        """Send a whole IP packet, whatever it says of its source."""
        destination = packet[16:20] if packet[0] >> 4 == 4 else packet[24:40]
        self._sender.sendto(packet, (str(ip_address(destination)), 0))

    def await_segment(self, matches: Callable[[Segment], bool], timeout_s: float = 3.0) -> Segment:
        """Return the first TCP segment, in or out, that matches; fail where none comes."""
        segment = self.find_segment(matches, timeout_s)
        assert segment is not None, f"no such segment within {timeout_s} s"
        return segment

    def find_segment(self, matches: Callable[[Segment], bool], timeout_s: float) -> Segment | None:
        """Return the first TCP segment, in or out, that matches; None if none comes in that time."""
        deadline = time.monotonic() + timeout_s
        protocol_at, version = (9, 4) if self.version == 4 else (6, 6)
        while (left := deadline - time.monotonic()) > 0:
            self._sniffer.settimeout(left)
            try:
                packet = self._sniffer.recv(65_536)
            except TimeoutError:
                break
            if packet[0] >> 4 == version and packet[protocol_at] == socket.IPPROTO_TCP:
                segment = decode_tcp(packet)
                if matches(segment):
                    return segment
        return None


def ignore_raw_ports(lab: Lab, place: str) -> None:
    """Keep the place's kernel from answering for RAW_PORTS: it would reset what it did not open."""
    ports = f"{RAW_PORTS.start}:{RAW_PORTS.stop - 1}"
    for tool in ("iptables", "ip6tables"):
        lab.run(place, tool, "-t", "raw", "-A", "PREROUTING", "-p", "tcp", "--dport", ports, "-j", "DROP")


@contextmanager
def stripped(lab: Lab, pod: str) -> Iterator[None]:
    """Do what a pod with CAP_NET_ADMIN can do: take away every rule of its network namespace. CNI CHECK repairs it."""
    lab.run(pod, "nft", "flush", "ruleset")
    for tool in ("iptables-legacy", "ip6tables-legacy"):
        for table in ("raw", "mangle", "filter"):
            lab.run(pod, tool, "-t", table, "-F")
    try:
        yield
    finally:
        lab.check_pod(pod)


def grow_old(lab: Lab) -> None:
    """Let no pod's address be fresh any longer: the pods' enforcers then see what the guard would drop before them."""
    sets = (f"{name}{version}" for name in ("fresh_tcp", "fresh_udp") for version in (4, 6))
    command = "; ".join(f"flush set inet trireme_guard {name}" for name in sets)
    for name, node in lab.nodes.items():
        if node.has_enforcer:
            lab.run(f"node:{name}", "nft", command)


@contextmanager
def silenced(lab: Lab, place: str, version: int) -> Iterator[None]:
    """Let a place's kernel hear nothing for a while, so that it does not speak up where its address is used."""
    tool = "iptables" if version == 4 else "ip6tables"
    lab.run(place, tool, "-t", "raw", "-I", "PREROUTING", "-p", "tcp", "-j", "DROP")
    try:
        yield
    finally:
        lab.run(place, tool, "-t", "raw", "-D", "PREROUTING", "-p", "tcp", "-j", "DROP")


class RawClient:
    """One TCP connection as an attacker opens it: by hand, packet after packet."""

    def __init__(self, wire: Wire, target: IPAddress, port: int, source: IPAddress | None = None) -> None:
        self._wire = wire
        self.source = wire.address if source is None else source.packed
        self.target = target.packed
        self.ports = next(_raw_ports), port
        self.isn = random.getrandbits(32)
        self.isn_r = 0

    def segment(self, flags: int, payload: bytes = b"", options: bytes = b"", offset: int = 0) -> bytes:
        """Make a segment of this connection, `offset` bytes behind the SYN."""
        numbers = (self.isn + offset) & _NUMBERS, (self.isn_r + 1) & _NUMBERS if flags & ACK else 0
        bare = build(self.source, self.target, self.ports, numbers, flags, 64_240)
        return with_options_and_payload(decode_tcp(bare), options, payload)

    def send_syn(self, payload: bytes = b"", options: bytes = SYN_OPTIONS) -> None:
        self._wire.send(self.segment(SYN, payload, options))

    def find_answer(self, timeout_s: float = 3.0) -> Segment | None:
        """Wait for the SYN-ACK."""
        answer = self._wire.find_segment(self._is_answer, timeout_s)
        if answer is not None:
            self.isn_r = answer.seq
        return answer

    def await_answer(self) -> Segment:
        answer = self.find_answer()
        assert answer is not None, "no SYN-ACK"
        return answer

    def send_ack(self, payload: bytes = b"", options: bytes = b"") -> None:
        """Go on after the SYN-ACK."""
        self._wire.send(self.segment(ACK | PSH if payload else ACK, payload, options, offset=1))

    def await_reset(self) -> Segment:
        ports = self.ports[::-1]
        return self._wire.await_segment(lambda found: (found.sport, found.dport) == ports and bool(found.flags & RST))

    def _is_answer(self, found: Segment) -> bool:
        is_ours = (found.sport, found.dport) == self.ports[::-1] and found.src == self.target
        return is_ours and found.flags & SYN_ACK == SYN_ACK and found.ack == (self.isn + 1) & _NUMBERS


class FramedClient(RawClient):
    """A RawClient that speaks the handshake with a token of its own."""

    def __init__(
        self, wire: Wire, target: IPAddress, port: int, token: LocalToken, source: IPAddress | None = None
    ) -> None:
        super().__init__(wire, target, port, source)
        key = FlowKey(b"", b"", 0, 0, Protocol.TCP, Role.INITIATOR)
        self.session = Session(key, carriers.TCP, token, State.OPENING, 0.0)
        self.session.offer(os.urandom(16), self.isn)

    def send_framed_syn(self, options: bytes = SYN_OPTIONS) -> None:
        self.send_syn(self.session.frame, options)

    def prove(self, answer: Segment, authority: Authority) -> bytes:
        """Verify the SYN-ACK as an enforcer would, and give the option with the right proof."""
        payload = answer.payload
        assert is_frame(payload)
        frame = decode_syn_ack(payload)
        verifier = PeerVerifier(TrustBundle([authority.certificate]), HandshakeLimits())
        peer = verifier.verify(frame.block, answer.src, 0.0, time.time())
        self.session.verify_answer(payload, frame, answer.seq, peer)
        return proof_option(self.session.proof, is_standalone=False)


# The witness: what the server's application and its enforcer saw.


class Listener:
    """A server's application: what it accepted or received. A context manager."""

    def __init__(self, lab: Lab, place: str, port: int, version: int = 4, kind: int = socket.SOCK_STREAM) -> None:
        self.ip = lab.place(place).address(version)
        self.port = port
        self.socket = lab.open_socket(place, _FAMILIES[version], kind)
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.setblocking(False)
            self.socket.bind((str(self.ip), port))
            if kind == socket.SOCK_STREAM:
                self.socket.listen(64)
        except OSError:
            self.socket.close()
            raise
        self._accepted: list[socket.socket] = []

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in (*self._accepted, self.socket):
            connection.close()

    def accept(self, timeout_s: float = 3.0) -> socket.socket:
        """Wait for a connection that is expected; it is closed with the listener."""
        self.socket.settimeout(timeout_s)
        try:
            connection, _ = self.socket.accept()
        finally:
            self.socket.setblocking(False)
        self._accepted.append(connection)
        connection.settimeout(timeout_s)
        return connection

    def accepted(self) -> list[object]:
        """Return who has reached accept() since it was last asked."""
        peers: list[object] = []
        while True:
            try:
                connection, peer = self.socket.accept()
            except BlockingIOError:
                return peers
            self._accepted.append(connection)
            peers.append(peer)

    def received(self) -> list[bytes]:
        """Return the datagrams that arrived since it was last asked."""
        datagrams: list[bytes] = []
        while True:
            try:
                datagrams.append(self.socket.recv(65_536))
            except BlockingIOError:
                return datagrams


def endpoint_of(lab: Lab, pod: str) -> Mapping[str, object]:
    """Return what the pod's enforcer says of it."""
    answer = lab.pod_node(pod).admin("endpoints", pod=pod)
    assert isinstance(answer, list)
    assert len(answer) == 1
    assert isinstance(answer[0], dict)
    return answer[0]


def counters_of(lab: Lab, pod: str) -> dict[str, int]:
    """Return the pod's decisions by reason."""
    counters = endpoint_of(lab, pod)["counters"]
    assert isinstance(counters, dict)
    return counters


def await_denial(
    lab: Lab, pod: str, reason: Reason, port: int | None, *, address: IPAddress | None = None, timeout_s: float = 3.0
) -> None:
    """Wait until the pod's enforcer has counted and remembered a denial for the reason; fail where it does not.

    `port` is the dialed one, None for any; without an address any peer's will do.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        endpoint = endpoint_of(lab, pod)
        counters, recent = endpoint["counters"], endpoint["recent_denials"]
        assert isinstance(counters, dict)
        assert isinstance(recent, list)
        there = [denial for denial in recent if port in (None, denial["port"])]
        for denial in there:
            if denial["reason"] == reason.value and address in (None, ip_address(denial["address"])):
                assert counters[reason.value] >= 1
                return
        assert time.monotonic() < deadline, f"no denial for {reason.value} at port {port}, only {there}"
        time.sleep(0.01)
