# SPDX-License-Identifier: Apache-2.0
"""Makes version-1.json. It needs to run again only for another version of the protocol: signatures are random.

python -m tests.vectors.handshake.make > tests/vectors/handshake/version-1.json
"""

from __future__ import annotations

import hmac
import json
import sys
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from ipaddress import ip_address
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from enforcer_daemon.handshake import datagrams
from enforcer_daemon.handshake.frames import (
    PROOF_BYTES,
    SYN_ACK_OVERHEAD,
    TYPE_ANSWER,
    TYPE_OFFER,
    SynAckFrame,
    SynFrame,
    encode_block,
    encode_proof,
    encode_syn,
    encode_syn_ack,
    proof_option,
    without_proof,
)
from enforcer_daemon.handshake.leaseframes import LEASE_BYTES, LEASE_PORT, LeaseFlag, LeaseMessage, encode_lease
from enforcer_daemon.handshake.proofs import (
    TCP_LABELS,
    UDP_LABELS,
    frame_hash,
    initiator_proof,
    pair_key,
    responder_proof,
    transcript,
)
from enforcer_daemon.identity.authority import issue_credential, make_authority, node_spiffe_id
from enforcer_daemon.identity.credential import decode_credential
from enforcer_daemon.identity.dictionary import TOKEN_DICTIONARY
from enforcer_daemon.identity.tokens import Claims, encode_token
from enforcer_daemon.model import Identity, PodRef
from enforcer_daemon.packet.udp import UDP_HEADER, build_udp, encode_option

TIME = 1_800_000_000
NOW = datetime.fromtimestamp(TIME, UTC)
AUTHORITY = make_authority("cluster.local", NOW)


def make_side(name: str, address: str, node: str, number: int) -> dict[str, Any]:
    """Make one pod on a node of its own, with keys and nonce of repeated bytes."""
    key = ec.derive_private_key(number, ec.SECP256R1())
    spiffe_id = node_spiffe_id("cluster.local", node)
    certificate = issue_credential(AUTHORITY, key.public_key(), spiffe_id, NOW, timedelta(days=1))
    credential = decode_credential(certificate.public_bytes(Encoding.DER))
    ephemeral = X25519PrivateKey.from_private_bytes(bytes((number,)) * 32)
    public = ephemeral.public_key().public_bytes_raw()
    identity = Identity(PodRef("shop", name), (ip_address(address),), {"app": name}, {"team": "a"}, node)
    token = encode_token(Claims(identity, public, TIME, TIME + 600), bytes((number,)) * 9, credential, key)
    return {
        "claims": {
            "pod": f"shop/{name}", "ips": [address], "labels": {"app": name}, "namespace_labels": {"team": "a"},
            "issued_at": TIME, "expires_at": TIME + 600,
        },
        "ephemeral_private_key": (bytes((number,)) * 32).hex(),
        "ephemeral_public_key": public.hex(),
        "nonce": (bytes((number,)) * 16).hex(),
        "isn": number * 1_000,
        "credential": credential.der.hex(),
        "token": token.hex(),
    }  # fmt: skip


def make() -> dict[str, Any]:
    """Make the whole vector."""
    one, two = make_side("client", "10.1.0.2", "node-1", 1), make_side("server", "10.2.0.2", "node-2", 2)
    two |= {"address": "10.2.0.2", "port": 80}
    raw = {side: {name: bytes.fromhex(value) for name, value in values.items() if name in _BYTES}
           for side, values in (("i", one), ("r", two))}  # fmt: skip
    syn = encode_syn(SynFrame(raw["i"]["nonce"], encode_block(raw["i"]["credential"], raw["i"]["token"])))
    private = X25519PrivateKey.from_private_bytes(raw["i"]["ephemeral_private_key"])
    hashes = frame_hash(raw["i"]["token"]), frame_hash(raw["r"]["token"])
    key = pair_key(private, raw["r"]["ephemeral_public_key"], *hashes)
    covered = transcript((one["isn"], two["isn"]), raw["i"]["nonce"], raw["r"]["nonce"])
    block = encode_block(raw["r"]["credential"], raw["r"]["token"])
    blank = SynAckFrame(raw["r"]["nonce"], ip_address("10.2.0.2").packed, 80, bytes(PROOF_BYTES), block)
    proof_r = responder_proof(key, TCP_LABELS, covered, frame_hash(syn), without_proof(encode_syn_ack(blank)))
    proof_i = initiator_proof(key, TCP_LABELS, covered, proof_r)
    return {
        "version": 1,
        "unix_time": TIME,
        "token_dictionary_sha256": sha256(TOKEN_DICTIONARY).hexdigest(),
        "authority": AUTHORITY.certificate.public_bytes(Encoding.DER).hex(),
        "initiator": one,
        "responder": two,
        "pair_key": key.hex(),
        "syn_frame": syn.hex(),
        "syn_ack_frame": encode_syn_ack(blank._replace(proof=proof_r)).hex(),
        "proof_r": proof_r.hex(),
        "proof_i": proof_i.hex(),
        "proof_option": proof_option(proof_i, is_standalone=False).hex(),
        "standalone_proof_option": proof_option(proof_i, is_standalone=True).hex(),
        "lease": make_lease(raw),
        "datagrams": make_datagrams(key, raw["i"], blank._replace(port=53)),
    }


def make_lease(raw: dict[str, dict[str, bytes]]) -> dict[str, str]:
    """Make a probe of the client's enforcer and the answer of the server's, and the client's presentation."""
    one, two = raw["i"], raw["r"]
    ids = {side: frame_hash(raw[side]["token"])[:16] for side in "ir"}
    # The token with the lower hash counts as the initiator's.
    (_, first), (_, second) = sorted((frame_hash(side["token"]), side) for side in (one, two))
    private = X25519PrivateKey.from_private_bytes(first["ephemeral_private_key"])
    hashes = frame_hash(first["token"]), frame_hash(second["token"])
    key = hmac.digest(pair_key(private, second["ephemeral_public_key"], *hashes), b"lease key", "sha256")
    probe = LeaseMessage(one["nonce"], bytes(16), ids["i"], ids["r"], LeaseFlag.PROBE)
    answer = LeaseMessage(two["nonce"], one["nonce"], ids["r"], ids["i"], LeaseFlag(0))
    block = encode_block(one["credential"], one["token"])
    shown = probe._replace(flags=LeaseFlag.PROBE | LeaseFlag.PRESENTS, block=block)
    surplus = encode_option(UDP_HEADER, datagrams.STANDALONE_EXID, encode_lease(probe, key))
    ends = ip_address("10.1.0.2").packed, ip_address("10.2.0.2").packed
    return {
        "lease_key": key.hex(),
        "probe": encode_lease(probe, key).hex(),
        "answer": encode_lease(answer, key).hex(),
        "presentation_head": encode_lease(shown, key)[:LEASE_BYTES].hex(),
        "probe_packet": build_udp(*ends, (LEASE_PORT, LEASE_PORT), b"", surplus).hex(),
    }


def make_datagrams(key: bytes, initiator: dict[str, bytes], blank: SynAckFrame) -> dict[str, str]:
    """Make the messages of the same pods for UDP port 53."""
    block = encode_block(initiator["credential"], initiator["token"])
    offer = encode_syn(SynFrame(initiator["nonce"], block), TYPE_OFFER)
    nonces = initiator["nonce"] + blank.nonce
    unproven = without_proof(encode_syn_ack(blank, TYPE_ANSWER))
    proof_r = responder_proof(key, UDP_LABELS, nonces, frame_hash(offer), unproven)
    answer = encode_syn_ack(blank._replace(proof=proof_r), TYPE_ANSWER)
    proof_i = initiator_proof(key, UDP_LABELS, nonces, proof_r)
    message = encode_proof(initiator["nonce"], proof_i)
    surplus = encode_option(UDP_HEADER, datagrams.STANDALONE_EXID, message)
    ends = ip_address("10.1.0.2").packed, blank.address
    return {
        "sha256_offer": sha256(offer).hexdigest(),
        "answer_head": answer[:SYN_ACK_OVERHEAD].hex(),
        "proof_r": proof_r.hex(),
        "proof_i": proof_i.hex(),
        "proof_message": message.hex(),
        "proof_packet": build_udp(*ends, (40_000, 53), b"", surplus).hex(),
    }


_BYTES = ("ephemeral_private_key", "ephemeral_public_key", "nonce", "credential", "token")

if __name__ == "__main__":
    json.dump(make(), sys.stdout, indent=2)
    sys.stdout.write("\n")
