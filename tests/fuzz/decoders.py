# SPDX-License-Identifier: Apache-2.0
"""Targets of the binary decoders: packets, frames, credentials, tokens, registration messages, netlink."""

from __future__ import annotations

from contextlib import suppress
from itertools import islice
from struct import pack, unpack_from

from cni_plugin import messages
from enforcer_daemon.dataplane.conntrack import decode_original_source
from enforcer_daemon.dataplane.established import decode_flow
from enforcer_daemon.dataplane.netlink import decode_attributes, decode_messages, encode_attribute
from enforcer_daemon.errors import CredentialError, DataplaneError, FrameError, PacketError, TokenError
from enforcer_daemon.handshake.datagrams import STANDALONE_EXID, find_message
from enforcer_daemon.handshake.frames import (
    PROOF_OPTION_BYTES,
    TYPE_ANSWER,
    TYPE_CHALLENGE,
    TYPE_OFFER,
    SynAckFrame,
    SynFrame,
    decode_again,
    decode_block,
    decode_proof,
    decode_syn,
    decode_syn_ack,
    encode_again,
    encode_block,
    encode_proof,
    encode_syn,
    encode_syn_ack,
    find_proof,
    frame_type,
    has_room,
    proof_option,
    without_proof,
)
from enforcer_daemon.handshake.leaseframes import decode_lease, encode_lease, require_mac
from enforcer_daemon.identity.credential import TrustBundle, decode_credential
from enforcer_daemon.identity.tokens import Claims, decode_token, encode_token
from enforcer_daemon.packet.ip import decode_ip
from enforcer_daemon.packet.tcp import (
    Segment,
    announced_mss,
    decode_segment,
    walk_options,
    with_options_and_payload,
    without_fast_open,
)
from enforcer_daemon.packet.transport import decode_datagram
from enforcer_daemon.packet.udp import UDP, UDPDatagram, decode_udp_datagram, find_option, with_option, without_surplus
from enforcer_daemon.registration.registry import decode_record, encode_record
from enforcer_daemon.registration.request import decode_add, encode_add
from tests.unit.identity.certificates import WALL
from tests.unit.identity.test_tokens import CREDENTIAL, KEY, SIGNER, wire_of, wire_of_packed

_BUNDLE = TrustBundle([SIGNER.certificate])
_LEEWAY_S = 30.0


def packet(content: bytes) -> None:
    """Read an IP packet, TCP and others; write segments and datagrams again, unchanged and with a proof."""
    with suppress(PacketError):
        header = decode_ip(content)
        assert len(header.src) == len(header.dst) in (4, 16)
        assert header.offset <= max(header.end, len(content))
        if header.protocol == UDP:
            _check_datagram(decode_udp_datagram(content, header))
        with suppress(PacketError):
            decode_datagram(content, header)
        segment = decode_segment(content, header)
        _check_options(segment)
        if segment.end > len(content):
            return
        again = with_options_and_payload(segment, segment.options, segment.payload)
        assert decode_segment(again, decode_ip(again))[1:] == segment._replace(packet=again)[1:]
        if has_room(segment.options):
            _check_proof(segment)


def _check_datagram(datagram: UDPDatagram) -> None:
    """What is put behind the user data is found there, and without it the datagram is what it was."""
    with suppress(FrameError):
        find_message(datagram)
    if datagram.tail > len(datagram.packet):
        return
    written = with_option(datagram, STANDALONE_EXID, b"content")
    option = find_option(decode_udp_datagram(written, decode_ip(written)))
    assert option is not None
    assert (option.exid, option.content) == (STANDALONE_EXID, b"content")
    bare = without_surplus(datagram)
    assert decode_udp_datagram(bare, decode_ip(bare)).payload == datagram.payload


def _check_options(segment: Segment) -> None:
    options = segment.options
    found = list(walk_options(options))
    assert all(length >= 2 and at + length <= len(options) <= 40 for _, at, length in found)
    mss = announced_mss(options)
    assert mss is None or 0 <= mss <= 0xFFFF
    cleaned = without_fast_open(options)
    assert len(cleaned) == len(options)
    assert without_fast_open(cleaned) == cleaned
    proof = find_proof(options)
    assert proof is None or (len(proof.proof) == 16 and len(proof.rest) == len(options) - PROOF_OPTION_BYTES)


def _check_proof(segment: Segment) -> None:
    """A proof put first is found first, and without it the options are what they were."""
    option = proof_option(bytes(range(16)), is_standalone=False)
    proven = with_options_and_payload(segment, option + segment.options, b"")
    found = find_proof(decode_segment(proven, decode_ip(proven)).options)
    assert found is not None
    assert (found.proof, found.is_standalone, found.rest) == (bytes(range(16)), False, segment.options)


def frame(content: bytes) -> None:
    """Read frames and identity blocks; what was read is written as the same bytes."""
    with suppress(FrameError):
        syn = decode_syn(content)
        assert encode_syn(syn) == content
        _check_block(syn)
    with suppress(FrameError):
        answer = decode_syn_ack(content)
        assert encode_syn_ack(answer) == content
        assert len(answer.address) in (4, 16)
        assert len(without_proof(content)) == len(content) - 16
        _check_block(answer)
    with suppress(FrameError):
        assert encode_proof(*decode_proof(content)) == content
    with suppress(FrameError):
        assert encode_again(decode_again(content)) == content
    with suppress(FrameError):
        lease = decode_lease(content)
        with_mac = encode_lease(lease, b"key")
        assert decode_lease(with_mac)._replace(mac=lease.mac) == lease
        require_mac(with_mac, b"key")
    for kind in (TYPE_OFFER, TYPE_ANSWER, TYPE_CHALLENGE):
        with suppress(FrameError):
            assert frame_type(content) != kind or decode_syn(content, kind).block == content[24:]
    with suppress(FrameError):
        assert encode_block(*decode_block(content)) == content
    find_proof(content[:40])


def _check_block(found: SynFrame | SynAckFrame) -> None:
    assert encode_block(*decode_block(found.block)) == found.block


def credential(content: bytes) -> None:
    """Read a certificate, and a good one with some of its bytes changed; the bundle vouches for the good one alone."""
    for der in (content, patched(CREDENTIAL.der, content)):
        with suppress(CredentialError):
            found = decode_credential(der)
            _BUNDLE.verify(found, WALL, _LEEWAY_S)
            # What was signed lies before the signature: nothing of it can have changed.
            assert found.certificate.tbs_certificate_bytes == CREDENTIAL.certificate.tbs_certificate_bytes


def patched(base: bytes, script: bytes) -> bytes:
    """Change bytes: each three of the script are a place and what it is overwritten with."""
    changed = bytearray(base)
    for at in range(0, min(len(script) - 2, 48), 3):
        place, value = unpack_from("!HB", script, at)
        changed[place % len(base)] = value
    return bytes(changed)


def token(content: bytes) -> None:
    """Read a token: the bytes themselves, or, by the first of them, signed as a payload before or after inflating."""
    kind, rest = content[:1], content[1:]
    wire = wire_of(rest) if kind == b"{" else wire_of_packed(rest) if kind == b"z" else content
    with suppress(TokenError):
        claims = decode_token(wire, CREDENTIAL, WALL, _LEEWAY_S)
        assert len(claims.ephemeral_key) == 32
        _check_claims(claims)


def _check_claims(claims: Claims) -> None:
    """A peer's words end in logs and messages, which are UTF-8."""
    for text in (*claims.identity.labels, *claims.identity.labels.values(), str(claims.identity.pod)):
        text.encode()
    assert all(1 <= port.number <= 65_535 for port in claims.identity.named_ports)
    again = decode_token(encode_token(claims, b"n", CREDENTIAL, KEY), CREDENTIAL, WALL, _LEEWAY_S)
    for field in ("pod", "ips", "labels", "namespace_labels", "service_account", "named_ports"):
        assert getattr(again.identity, field) == getattr(claims.identity, field)


def message(content: bytes) -> None:
    """Read a line of the registration socket as a request, a reply and a record of the registry."""
    with suppress(messages.MessageError):
        request = messages.decode_request(content)
        assert messages.decode_request(messages.encode_request(request)) == request
        if isinstance(request, messages.Add):
            add = decode_add(request)
            assert decode_add(encode_add(add)) == add
    with suppress(messages.MessageError):
        reply = messages.decode_reply(content)
        assert messages.decode_reply(messages.encode_reply(reply)) == reply
    with suppress(messages.MessageError):
        record = decode_record(content)
        assert decode_record(encode_record(record)) == record


def netlink(content: bytes) -> None:
    """Read a datagram of messages, their attributes, and conntrack entries."""
    bodies = [content]
    with suppress(DataplaneError):
        bodies += [found.body for found in islice(decode_messages(content), 64)]
    for body in bodies:
        with suppress(DataplaneError):
            attributes = decode_attributes(body)
            again = b"".join(encode_attribute(kind, value) for kind, value in attributes.items())
            assert decode_attributes(again) == attributes
        with suppress(DataplaneError):
            decode_original_source(body)
        with suppress(DataplaneError):
            flow = decode_flow(body)
            assert flow is None or pack("!HHB", flow.source_port, flow.destination_port, flow.protocol)
