# SPDX-License-Identifier: Apache-2.0
"""What the shipped roles grant an account, as Kubernetes' RBAC reads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from tests.kube.api import Asked


class Grant(NamedTuple):
    """One verb on one resource; `names` empty: whatever the name."""

    verb: str
    group: str
    resource: str
    names: frozenset[str]

    def covers(self, asked: Asked) -> bool:
        is_same = (self.verb, self.group, self.resource) == (asked.verb, asked.group, asked.resource)
        return is_same and (not self.names or asked.name in self.names)


def grants(manifests: Iterable[dict[str, Any]], account: str) -> set[Grant]:
    """Return all that the roles bound to a service account grant."""
    found = [manifest for manifest in manifests if manifest]
    roles = {(role["kind"], role["metadata"]["name"]): role for role in found if role["kind"].endswith("Role")}
    granted = set()
    for binding in found:
        if not binding["kind"].endswith("RoleBinding") or account not in (who["name"] for who in binding["subjects"]):
            continue
        for rule in roles[binding["roleRef"]["kind"], binding["roleRef"]["name"]]["rules"]:
            granted |= {
                Grant(verb, group, resource, frozenset(rule.get("resourceNames", ())))
                for verb in rule["verbs"]
                for group in rule["apiGroups"]
                for resource in rule["resources"]
            }
    return granted
