# SPDX-License-Identifier: Apache-2.0
"""Pods that run on this node without an enforcer: the API server shows them with an address, and no ADD came.

Whatever the cause (the runtime uses another network, the plugin is not in the chain, a runtime class has a directory of
its own), this is the evidence. A pod that had its address when the daemon first saw it may be older than the
installation, and is enforced once it is restarted. One that got its address while the daemon served has passed it by.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from enforcer_daemon.model import PodRef
from enforcer_daemon.policy import Pod

PATIENCE_S = 20.0
"""How long a pod may have an address before its ADD counts as missing, seconds: the two are heard of in any order."""
MAX_NAMED = 100
"""Pods that the status names."""
_PodId = tuple[PodRef, str]


@dataclass(slots=True)
class UnenforcedPods:
    """Compares pods with registrations. For the event loop's thread alone."""

    excluded: Collection[str]
    """Namespaces whose pods nobody enforces."""
    on_passed: Callable[[Pod], None] = lambda _: None
    """Hears of each pod that started past the daemon, once."""
    earlier: list[PodRef] = field(default_factory=list)
    """Pods that had an address when the daemon first saw them."""
    passed: list[PodRef] = field(default_factory=list)
    """Pods that got their address while the daemon served."""
    _seen_without: set[_PodId] = field(default_factory=set)
    _since: dict[_PodId, float] = field(default_factory=dict)
    _told: set[_PodId] = field(default_factory=set)

    def look(self, pods: Iterable[Pod], registered: Collection[_PodId], now: float) -> None:
        """Compare the node's pods with the registered ones; call it about once a second. `now` is monotonic."""
        candidates = {
            (pod.ref, pod.uid): pod
            for pod in pods
            if not (pod.is_on_host_network or pod.is_finished or pod.ref.namespace in self.excluded)
        }
        without_address = {key for key, pod in candidates.items() if not pod.ips}
        self._seen_without = (self._seen_without & candidates.keys()) | without_address
        missing = {key for key in candidates.keys() - without_address if key not in registered}
        self._since = {key: self._since.get(key, now) for key in missing}
        due = sorted(key for key, since in self._since.items() if now - since >= PATIENCE_S)
        self.earlier = [key[0] for key in due if key not in self._seen_without]
        self.passed = [key[0] for key in due if key in self._seen_without]
        self._told &= missing
        for key in due:
            if key in self._seen_without and key not in self._told:
                self._told.add(key)
                self.on_passed(candidates[key])
