# SPDX-License-Identifier: Apache-2.0
"""Why a packet was accepted or dropped: one closed list, each with a text (`triremectl reasons`)."""

from __future__ import annotations

from enum import Enum


class Reason(Enum):
    """The reason of a decision; the value is what logs, counters and `triremectl` show."""

    # Allowed.
    NOT_ISOLATED = "not-isolated"
    POLICY = "policy"
    SELF = "self"
    NODE = "node"
    # Denied by policy.
    INGRESS_DENIED = "ingress-denied"
    EGRESS_DENIED = "egress-denied"
    UNIDENTIFIED_PEER = "unidentified-peer"
    PROTOCOL_NOT_AUTHENTICATED = "protocol-not-authenticated"
    IDENTITY_REQUIRED = "identity-required"
    # Dropped by the guard on the host.
    SPOOFED_SOURCE = "spoofed-source"
    SPOOFED_NEIGHBOUR = "spoofed-neighbor"
    NOT_IP = "not-ip"
    # Dropped by the kernel before the enforcer read it.
    PACKET_RATE = "packet-rate"
    QUEUE_FULL = "queue-full"
    # The peer's bytes are invalid.
    MALFORMED_PACKET = "malformed-packet"
    MALFORMED_FRAME = "malformed-frame"
    FRAME_VERSION = "frame-version"
    CREDENTIAL_INVALID = "credential-invalid"
    CREDENTIAL_UNTRUSTED = "credential-untrusted"
    CREDENTIAL_EXPIRED = "credential-expired"
    CREDENTIAL_MISMATCH = "credential-mismatch"
    TOKEN_MALFORMED = "token-malformed"  # noqa: S105 - a reason, not a secret
    TOKEN_SIGNATURE = "token-signature"  # noqa: S105 - a reason, not a secret
    TOKEN_EXPIRED = "token-expired"  # noqa: S105 - a reason, not a secret
    TOKEN_NOT_YET_VALID = "token-not-yet-valid"  # noqa: S105 - a reason, not a secret
    SOURCE_MISMATCH = "source-mismatch"
    RESPONDER_MISMATCH = "responder-mismatch"
    MISPLACED_POD = "misplaced-pod"
    UNCONFIRMED_POD = "unconfirmed-pod"
    NODE_DENIED = "node-denied"
    OWN_IDENTITY = "own-identity"
    REPLAYED_NONCE = "replayed-nonce"
    PROOF_MISSING = "proof-missing"
    PROOF_INVALID = "proof-invalid"
    # Our own state.
    UNKNOWN_FLOW = "unknown-flow"
    FLOW_TABLE_FULL = "flow-table-full"
    HOLD_QUEUE_FULL = "hold-queue-full"
    VERIFY_RATE = "verify-rate"
    HANDSHAKE_TIMEOUT = "handshake-timeout"
    IDENTITY_TOO_LARGE = "identity-too-large"
    NO_SNAPSHOT = "no-snapshot"
    INTERNAL_ERROR = "internal-error"

    # Members are single objects and key the counters of the hot path; Enum's own hash is that of the name, in Python.
    __hash__ = object.__hash__

    @property
    def text(self) -> str:
        """Explain the reason in a sentence or two: what happened, and what to look at."""
        return _TEXTS[self]


_TEXTS: dict[Reason, str] = {
    Reason.NOT_ISOLATED: "No NetworkPolicy selects the pod for this direction, so everything is allowed in it.",
    Reason.POLICY: "A rule of the named NetworkPolicy allows the flow.",
    Reason.SELF: "A pod may always reach itself.",
    Reason.NODE: "The pod's own node may always reach it (kubelet probes).",
    Reason.INGRESS_DENIED: "The receiving pod is isolated for ingress, and no rule allows this peer on this port.",
    Reason.EGRESS_DENIED: "The sending pod is isolated for egress, and no rule allows this peer on this port.",
    Reason.UNIDENTIFIED_PEER: "The peer showed no identity, so only ipBlock rules and rules without peers can allow "
    "it, and none does. Is the peer a pod without an enforcer, or outside the enforced networks?",
    Reason.PROTOCOL_NOT_AUTHENTICATED: "The pod is isolated, the protocol carries no identity, and no rule by address "
    "allows it.",
    Reason.IDENTITY_REQUIRED: "The peer's address is inside the enforced networks, it showed no identity, and "
    "networks.requireIdentity is set.",
    Reason.SPOOFED_SOURCE: "The packet's source is not its sender's address: it is a pod's, and came from another "
    "link than the pod's own, or it is the node's, and came from elsewhere.",
    Reason.SPOOFED_NEIGHBOUR: "A pod claimed an address that is not its own (ARP, neighbor discovery), or acted as a "
    "router.",
    Reason.NOT_IP: "A pod sent a frame that is neither IP nor ARP, or that has a VLAN tag.",
    Reason.PACKET_RATE: "Packets exceeded the rate of one source, or of all sources of a pod together "
    "(dataplane.synRateLimitPerSource): a flood, or a source that many clients share.",
    Reason.QUEUE_FULL: "The enforcer was too slow: the pod's queue or its buffer was full (4,096 packets, 4 MiB). "
    "Does it get enough CPU?",
    Reason.MALFORMED_PACKET: "The packet's headers contradict its length or each other.",
    Reason.MALFORMED_FRAME: "The handshake packet carries a frame that cannot be read.",
    Reason.FRAME_VERSION: "The peer's enforcer uses another version of the protocol.",
    Reason.CREDENTIAL_INVALID: "The peer node's certificate cannot be read, or is not a node's certificate.",
    Reason.CREDENTIAL_UNTRUSTED: "No authority in the trust bundle signed the peer node's certificate.",
    Reason.CREDENTIAL_EXPIRED: "The peer node's certificate has expired or is not valid yet. Compare the nodes' "
    "clocks.",
    Reason.CREDENTIAL_MISMATCH: "The token was made for another node than the certificate in the same packet.",
    Reason.TOKEN_MALFORMED: "The token cannot be read, or a claim is missing or of the wrong type.",
    Reason.TOKEN_SIGNATURE: "The token's signature is wrong: the token was changed, or another key signed it.",
    Reason.TOKEN_EXPIRED: "The token has expired. Compare the nodes' clocks.",
    Reason.TOKEN_NOT_YET_VALID: "The token was issued in the future. Compare the nodes' clocks.",
    Reason.SOURCE_MISMATCH: "The packet's source is not an address of the token's pod: a relay, or a masquerade that "
    "is not configured.",
    Reason.RESPONDER_MISMATCH: "The pod that answered is not at the dialed address, and that address is not virtual.",
    Reason.MISPLACED_POD: "The cluster does not have the token's pod on the node that signed for it.",
    Reason.UNCONFIRMED_POD: "The pod waits until it is looked up in the cluster, because its node showed pods of that "
    "namespace that the cluster does not have, or more new pods than can be looked up. The next attempt may pass.",
    Reason.NODE_DENIED: "The peer's node claimed pods that are not its own, and is denied for some time. Its key may "
    "be stolen.",
    Reason.OWN_IDENTITY: "The pod's own token came back to it from another place: a reflection.",
    Reason.REPLAYED_NONCE: "The handshake was seen before on another connection: a replay.",
    Reason.PROOF_MISSING: "The connection continued without the proof that its peer holds the keys of its token.",
    Reason.PROOF_INVALID: "The proof was made with other keys, or for another handshake.",
    Reason.UNKNOWN_FLOW: "The packet belongs to no connection that was allowed: conntrack was flushed, or the pod is "
    "new or relabeled.",
    Reason.FLOW_TABLE_FULL: "The pod has too many half-open flows, in total or with this peer: its oldest one was "
    "evicted.",
    Reason.HOLD_QUEUE_FULL: "Too many packets wait for proofs: of one connection, of one peer, or of the whole pod.",
    Reason.VERIFY_RATE: "Too many new tokens in a short time, from one source or from all sources of the same rank.",
    Reason.HANDSHAKE_TIMEOUT: "The handshake was not completed in time.",
    Reason.IDENTITY_TOO_LARGE: "The pod's identity does not fit a handshake packet; see its labels.",
    Reason.NO_SNAPSHOT: "The policies have not been read yet.",
    Reason.INTERNAL_ERROR: "The enforcer failed on this packet and dropped it. Please report the log line.",
}
