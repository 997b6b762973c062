# SPDX-License-Identifier: Apache-2.0
"""NetworkPolicy, exactly: Kubernetes objects in, decisions that name their rules out. Pure; no I/O.

decode (manifests to typed objects) -> compile (objects to a snapshot) -> evaluate (flows to decisions).
"""

from enforcer_daemon.policy.address_rules import AddressRule
from enforcer_daemon.policy.compile import PolicySnapshot, compile_snapshot
from enforcer_daemon.policy.decode import decode_network_policy
from enforcer_daemon.policy.decode_pods import decode_namespace, decode_pod, namespace_labels
from enforcer_daemon.policy.evaluate import DirectionPolicy, PodPolicy
from enforcer_daemon.policy.objects import AnyPolicy, Namespace, NetworkPolicy, Pod
from enforcer_daemon.policy.reader import InvalidObjectError

__all__ = [
    "AddressRule",
    "AnyPolicy",
    "DirectionPolicy",
    "InvalidObjectError",
    "Namespace",
    "NetworkPolicy",
    "Pod",
    "PodPolicy",
    "PolicySnapshot",
    "compile_snapshot",
    "decode_namespace",
    "decode_network_policy",
    "decode_pod",
    "namespace_labels",
]
