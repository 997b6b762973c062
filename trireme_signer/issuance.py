# SPDX-License-Identifier: Apache-2.0
"""Whether a node gets the certificate that it asks for. Pure: Kubernetes objects in, the key to sign or a refusal out.

What is trusted: what the API server writes into the request about who sent it (username and extra, which come from the
token of a pod and replace whatever the sender wrote), and the objects that the API server holds. Nothing else.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from enforcer_daemon.identity.authority import node_spiffe_id
from enforcer_daemon.identity.request import read_request

_BOUND = "authentication.kubernetes.io/"
USAGES = ("digital signature",)
"""What the key of a node's certificate may be used for, in the words of certificates.k8s.io/v1."""


class RefusedError(Exception):
    """Why a request is not granted: a CamelCase reason for the request's condition, and a sentence."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class Grant:
    """Who may ask, and for what."""

    signer_name: str
    trust_domain: str
    namespace: str
    """Of the DaemonSet, its service account and its pods."""
    service_account: str
    daemon_set: str
    max_lifetime_s: int
    """The longest certificate that is signed, seconds."""


@dataclass(frozen=True, slots=True)
class Requester:
    """The pod that sent a request, as the API server knows it by the pod's token."""

    pod: str
    pod_uid: str
    node: str
    node_uid: str


@dataclass(frozen=True, slots=True)
class Witnesses:
    """The objects that must bear a requester out; None: there is no such object."""

    pod: Mapping[str, Any] | None
    node: Mapping[str, Any] | None
    daemon_set: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Granted:
    """What to sign."""

    key: ec.EllipticCurvePublicKey
    spiffe_id: str
    lifetime_s: int


def identify(request: Mapping[str, Any], grant: Grant) -> Requester:
    """Return which pod sent a CertificateSigningRequest; raise RefusedError unless it can be one of ours."""
    spec = request["spec"]
    wanted = f"system:serviceaccount:{grant.namespace}:{grant.service_account}"
    if spec.get("username") != wanted:
        raise RefusedError("WrongAccount", f"sent by {spec.get('username')!r:.200}, only {wanted} may ask")
    bound = spec.get("extra") or {}
    return Requester(*(_bound(bound, name) for name in ("pod-name", "pod-uid", "node-name", "node-uid")))


def _bound(extra: Mapping[str, Any], name: str) -> str:
    values = extra.get(_BOUND + name)
    if not isinstance(values, list) or len(values) != 1 or not values[0] or not isinstance(values[0], str):
        raise RefusedError(
            "NotBoundToPod", f"the sender's token is bound to no pod on a node: {_BOUND}{name} is missing"
        )
    return values[0]


def evaluate(request: Mapping[str, Any], requester: Requester, witnesses: Witnesses, grant: Grant) -> Granted:
    """Return what to sign; raise RefusedError unless the request is exactly what the daemon on that node asks for."""
    _check_pod(requester, witnesses, grant)
    _check_node(requester, witnesses)
    spec = request["spec"]
    if sorted(spec.get("usages") or ()) != sorted(USAGES):
        raise RefusedError("WrongUsages", f"usages must be {', '.join(USAGES)}, they are {spec.get('usages')!r:.200}")
    lifetime = spec.get("expirationSeconds")
    if type(lifetime) is not int or not 0 < lifetime <= grant.max_lifetime_s:
        raise RefusedError(
            "WrongLifetime", f"expirationSeconds must be 1 to {grant.max_lifetime_s}, it is {lifetime!r:.40}"
        )
    spiffe_id = node_spiffe_id(grant.trust_domain, requester.node)
    try:
        pem = base64.b64decode(spec.get("request") or "", validate=True)
        return Granted(read_request(pem, spiffe_id), spiffe_id, lifetime)
    except (ValueError, TypeError, binascii.Error) as err:
        raise RefusedError("WrongRequest", str(err)) from err


def _check_pod(requester: Requester, witnesses: Witnesses, grant: Grant) -> None:
    name = f"{grant.namespace}/{requester.pod}"
    pod, daemon_set = witnesses.pod, witnesses.daemon_set
    if pod is None or _uid(pod) != requester.pod_uid:
        raise RefusedError("UnknownPod", f"there is no pod {name} with UID {requester.pod_uid}")
    spec, phase = pod.get("spec") or {}, (pod.get("status") or {}).get("phase")
    if spec.get("nodeName") != requester.node:
        raise RefusedError("WrongNode", f"pod {name} runs on node {spec.get('nodeName')!r:.200}, not {requester.node}")
    if spec.get("serviceAccountName") != grant.service_account:
        raise RefusedError("WrongAccount", f"pod {name} has service account {spec.get('serviceAccountName')!r:.200}")
    if phase in ("Succeeded", "Failed"):
        raise RefusedError("UnknownPod", f"pod {name} has ended ({phase})")
    if daemon_set is None:
        raise RefusedError("UnknownDaemonSet", f"there is no DaemonSet {grant.namespace}/{grant.daemon_set}")
    owners = [owner for owner in pod["metadata"].get("ownerReferences") or () if owner.get("controller")]
    if [(owner.get("kind"), owner.get("uid")) for owner in owners] != [("DaemonSet", _uid(daemon_set))]:
        raise RefusedError("WrongOwner", f"pod {name} is not one of DaemonSet {grant.namespace}/{grant.daemon_set}")


def _check_node(requester: Requester, witnesses: Witnesses) -> None:
    if witnesses.node is None or _uid(witnesses.node) != requester.node_uid:
        raise RefusedError("UnknownNode", f"there is no node {requester.node} with UID {requester.node_uid}")


def _uid(kubernetes_object: Mapping[str, Any]) -> str | None:
    uid = kubernetes_object.get("metadata", {}).get("uid")
    return uid if isinstance(uid, str) and uid else None
