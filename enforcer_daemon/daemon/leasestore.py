# SPDX-License-Identifier: Apache-2.0
"""Pairs whose lease messages have come through, on disk beside the flow index, for the next daemon.

Without it, silence of a peer that died while no daemon ran would count as a path that never carried a lease message,
and each restart would give a dead peer its whole time again. What is kept is how long a peer was silent, not when it
was heard: the time while no daemon ran does not count.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping

from enforcer_daemon.daemon.flowstore import FlowStore
from enforcer_daemon.handshake.leasepairs import MAX_PAIRS, PairKey
from enforcer_daemon.model import PodRef
from enforcer_daemon.replacement import replace_file


class LeaseStore:
    """The file of one endpoint."""

    def __init__(self, flows: FlowStore) -> None:
        self._path = flows.lease_path
        self._log = flows.log
        self._saved: dict[PairKey, float] = {}

    def load(self) -> dict[PairKey, float]:
        """Read what an earlier daemon wrote; what is absent or unreadable is empty."""
        try:
            rows = json.loads(self._path.read_bytes())
            self._saved = {
                (str(domain), PodRef(str(namespace), str(name)), ipaddress.ip_address(address).packed): float(silence)
                for domain, namespace, name, address, silence in rows[:MAX_PAIRS]
            }
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError) as err:
            self._log.error("leases unreadable; silence of peers ends no flow", path=str(self._path), error=str(err))
        return dict(self._saved)

    def save(self, pairs: Mapping[PairKey, float]) -> None:
        """Write the pairs and the silence of each, if they are others than before."""
        present = dict(pairs)
        if present == self._saved:
            return
        rows = [
            [domain, pod.namespace, pod.name, str(ipaddress.ip_address(address)), silence]
            for (domain, pod, address), silence in sorted(present.items())
        ]
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(self._path, json.dumps(rows).encode(), is_durable=False)
        except OSError as err:
            self._log.error("leases not written", path=str(self._path), error=str(err))
        else:
            self._saved = present
