# SPDX-License-Identifier: Apache-2.0
"""Writes the seed corpus anew, one small file for each form that a decoder knows: `python -m tests.fuzz.seeds`."""

from __future__ import annotations

import json
from ipaddress import ip_address
from pathlib import Path
from struct import pack

from cni_plugin import messages
from enforcer_daemon.dataplane.netlink import encode_attribute
from enforcer_daemon.handshake.datagrams import PIGGYBACKED_EXID
from enforcer_daemon.handshake.frames import (
    SynAckFrame,
    SynFrame,
    encode_block,
    encode_syn,
    encode_syn_ack,
    proof_option,
)
from enforcer_daemon.identity.tokens import encode_token
from enforcer_daemon.model import NetnsId
from enforcer_daemon.packet.tcp import ACK, SYN, build, decode_tcp, with_options_and_payload
from enforcer_daemon.packet.udp import build_udp, encode_option
from enforcer_daemon.registration.registry import Record, encode_record
from enforcer_daemon.registration.request import decode_add
from tests.unit.datapath.pair import SYN_OPTIONS, TIMESTAMPS
from tests.unit.identity.certificates import der
from tests.unit.identity.test_tokens import CLAIMS, CREDENTIAL, KEY, TREE, wire_of

FOLDER = Path(__file__).parent / "corpus"
V4 = bytes((10, 1, 0, 2)), bytes((10, 2, 0, 2))
V6 = ip_address("fd00::2").packed, ip_address("fd00::3").packed
BLOCK = encode_block(b"credential", b"token")
SYN_FRAME = encode_syn(SynFrame(bytes(16), BLOCK))
SYN_ACK_FRAME = encode_syn_ack(SynAckFrame(bytes(16), V4[1], 80, bytes(16), BLOCK))


def packets() -> dict[str, bytes]:
    """One of each header."""
    syn = build(*V4, (40_000, 80), (1, 0), SYN, 64_240, SYN_OPTIONS)
    syn6 = build(*V6, (40_000, 80), (1, 0), SYN, 64_240, SYN_OPTIONS + b"\x22\x0a" + bytes(8) + b"\x01\x01")
    extended = syn6[:4] + (len(syn6) - 40 + 16).to_bytes(2, "big") + b"\0" + syn6[7:40]
    extended += b"\x3c\0\1\4\0\0\0\0" + b"\x06\0\1\4\0\0\0\0" + syn6[40:]
    udp = b"\x45\0\0\x20\0\0\x40\0\x40\x11\0\0" + V4[0] + V4[1] + pack("!HHHH", 53, 53, 12, 0) + b"data"
    proof = proof_option(bytes(range(16)), is_standalone=True)
    return {
        "syn": syn,
        "syn-frame": with_options_and_payload(decode_tcp(syn), SYN_OPTIONS, SYN_FRAME),
        "proof": build(*V4, (40_000, 80), (2, 2), ACK, 502, TIMESTAMPS + proof),
        "syn-v6": syn6,
        "extension-headers": extended,
        "udp": udp,
        "udp-message": build_udp(*V6, (40_000, 53), b"odd", encode_option(11, PIGGYBACKED_EXID, SYN_FRAME)),
        "icmp": b"\x45\0\0\x1c\0\0\0\0\x40\x01\0\0" + V4[0] + V4[1] + b"\x08\0\0\0\0\0\0\0",
    }


def requests() -> dict[str, bytes]:
    """One of each operation, a reply and a record."""
    attachment = messages.Attachment("c1", "eth0")
    add = messages.Add(
        attachment, "/var/run/netns/x", "net", "shop", "web-0", "u", {"app": "web"}, ("10.1.0.2",), ("veth0",), 1500
    )
    all_requests = {
        "add": add,
        "delete": messages.Delete(attachment),
        "check": messages.Check(attachment, "/var/run/netns/x"),
        "collect": messages.Collect("net", (attachment,)),
        "status": messages.Status(),
    }
    lines = {name: messages.encode_request(request) for name, request in all_requests.items()}  # type: ignore[arg-type]
    record = encode_record(Record(decode_add(add), NetnsId(4, 4_026_531_840)))
    return {**lines, "reply": messages.encode_reply(messages.Reply(11, "again", True)), "record": record}


def netlinks() -> dict[str, bytes]:
    """A dump with a conntrack entry of each family, and an error."""

    def entry(family: int, source: bytes, destination: bytes, kinds: tuple[int, int]) -> bytes:
        addresses = encode_attribute(kinds[0], source) + encode_attribute(kinds[1], destination)
        ports = encode_attribute(1, b"\6") + encode_attribute(2, b"\x9c\x40") + encode_attribute(3, b"\0\x50")
        both = encode_attribute(0x8001, addresses) + encode_attribute(0x8002, ports)
        mark = encode_attribute(8, pack("!I", 0x8000_1000))
        return pack("=BBH", family, 0, 0) + encode_attribute(0x8001, both) + encode_attribute(0x8002, both) + mark

    def message(kind: int, body: bytes) -> bytes:
        return pack("=IHHII", 16 + len(body), kind, 2, 1, 0) + body + bytes(-len(body) % 4)

    four, six = entry(2, *V4, (1, 2)), entry(10, *V6, (3, 4))
    return {
        "entry": four,
        "entry-v6": six,
        "dump": message(0x0100, four) + message(0x0100, six) + message(3, bytes(4)),
        "error": message(2, pack("=i", -2) + bytes(16)),
    }


POLICY = """apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: a, namespace: shop, labels: {x: y}}
spec:
  podSelector:
    matchLabels: {app: web}
    matchExpressions: [{key: tier, operator: In, values: [a, b]}, {key: x, operator: DoesNotExist}]
  policyTypes: [Ingress, Egress]
  ingress:
  - from:
    - &p {podSelector: {}, namespaceSelector: {matchLabels: {team: a}}}
    - *p
    - ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}
    ports: [{protocol: TCP, port: 80, endPort: 90}, {port: http}]
  egress: [{}]
"""
PODS = """kind: Pod
apiVersion: v1
metadata: {name: web-0, labels: {app: web}}
spec: {containers: [{name: c, image: i, ports: [{name: http, containerPort: 80}]}]}
status: {phase: Running, podIP: 10.1.0.2}
---
kind: Namespace
apiVersion: v1
metadata: {name: shop, <<: {labels: {team: a}}}
"""
SETTINGS = """node: n
trustDomain: cluster.local
stateDir: /var/lib/trireme
policyDir: /etc/p
denyWith: reset
credentials: {caCertificate: /a, caKey: /b, trustBundle: null, certificateLifetimeSeconds: 86400,
  tokenLifetimeSeconds: 600.0, clockLeewaySeconds: 1e1}
networks: {enforced: [10.0.0.0/8, 'fd00::/16'], virtual: [10.96.0.0/12], masquerade: [10.0.0.1]}
registration: {runDir: /run/trireme, excludedNamespaces: [kube-system]}
dataplane: {rulesBackend: nft, synRateLimitPerSource: 0x1000}
log: {level: info}
"""
EXCHANGES = {
    "whole": bytes((0, 0, 1, 5)),
    "full-options": bytes((0, 0, 3, 5, 8, 3, 0, 1, 0, 1, 4, 0, 0, 0, 0)),
    "data-first": bytes((0, 0, 0, 3, 3, 0, 1, 1, 2, 8, 9, 1)),
    "changed-syn": bytes((0, 0, 0, 0, 4, 0, 0, 1, 0, 50, 7, 0)),
    "changed-answer": bytes((0, 0, 0, 2, 4, 0, 1, 1, 0, 110, 9, 0)),
    "replayed": bytes((0, 0, 0, 5, 4, 2, 0, 0, 0, 4, 1, 1, 0, 3)),
    "spliced": bytes((0, 0, 1, 5, 0, 1, 1, 5, 6, 0, 3, 1, 0)),
    "policy-change": bytes((0, 0, 3, 3, 10, 0, 10, 1, 8, 9, 3)),
    "forged": bytes((0, 0, 0, 2, 11, 0, 0)) + b"not the proof :)",
    "forged-standalone": bytes((0, 0, 0, 2, 11, 0, 3)) + b"not the proof :)",
    "raw": bytes((7, 0, 30)) + build(*V4, (40_000, 80), (1, 0), SYN, 9)[:30],
}
DATAGRAMS = {
    "whole": bytes((0, 0, 5)),
    "send-that-is-cut": bytes((1, 0, 1, 2, 1, 0, 1, 2, 6, 3, 0, 6, 3, 0, 3, 0, 6, 3, 0)),
    "held-then-late": bytes((1, 0, 3, 1, 7, 1, 7, 2, 7, 3, 6, 3, 0)),
    "lost-answer": bytes((1, 0, 1, 0, 6, 3, 0, 3, 0, 6, 5, 0, 7, 1, 6, 3, 0)),
    "replies": bytes((0, 0, 5, 2, 0, 3, 0, 2, 1, 3, 0)),
    "policy-change": bytes((0, 0, 3, 8, 1, 1, 0, 1, 0, 8, 0, 7, 4)),
    "state-lost": bytes((9, 0, 6, 3, 0, 3, 0, 6, 3, 0)),
    "replayed": bytes((0, 0, 5, 7, 4, 10, 1, 11, 0, 1, 11, 1, 1, 11, 2, 0)),
    "crossed": bytes((0, 0, 5, 13, 0, 1, 1, 1, 1, 13, 0, 0, 1, 0, 1)),
    "forged-proof": bytes((1, 0, 1, 0, 6, 3, 0, 3, 0, 6, 3, 0, 14, 0, 0, 1, 1, 14, 0, 0, 0, 1)),
    "changed-answer": bytes((18, 0, 0, 50, 0, 6, 3, 0)),
    "raw": bytes((17, 1, 40)) + build_udp(*V4, (40_000, 53), b"data")[:40],
    "any-message": bytes((16, 40)) + encode_syn(SynFrame(bytes(16), b""))[:40] + bytes((0, 1, 1)),
}


def corpus() -> dict[str, dict[str, bytes]]:
    """All seeds, by target and name."""
    objects = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a", "labels": {"a": "b"}}}]
    return {
        "packet": packets(),
        "frame": {"syn": SYN_FRAME, "syn-ack": SYN_ACK_FRAME, "block": BLOCK},
        "credential": {"node": CREDENTIAL.der, "names": der("spiffe://a/node/b", "spiffe://c/node/d"), "none": der()},
        "token": {
            "token": encode_token(CLAIMS, b"n", CREDENTIAL, KEY),
            "claims": b"{" + json.dumps(TREE).encode(),
            "ports": b"{" + json.dumps({**TREE, "ports": [["http", 80, 6]], "labels": {"a": "b"}}).encode(),
            "deflated": b"z" + wire_of(b"{}")[-80:-64],
        },
        "message": requests(),
        "netlink": netlinks(),
        "policy": {
            "policy": POLICY.encode(),
            "pods": PODS.encode(),
            "list": json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}).encode(),
        },
        "settings": {"every-key": SETTINGS.encode(), "least": b"node: n\n", "twice": b"node: n\nnode: m\n"},
        "exchange": EXCHANGES,
        "datagrams": DATAGRAMS,
    }


def main() -> None:
    """Write the files that are not there; each run would sign others."""
    for target, files in corpus().items():
        folder = FOLDER / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if not (folder / name).exists():
                (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
