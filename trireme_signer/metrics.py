# SPDX-License-Identifier: Apache-2.0
"""The signer's metrics, in the process's registry."""

from __future__ import annotations

import prometheus_client

REQUESTS = prometheus_client.Counter(
    "trireme_signer_requests", "CertificateSigningRequests decided, by outcome.", ["outcome"]
)
LEADER = prometheus_client.Gauge("trireme_signer_leader", "Whether this replica is the leader, which signs.")


def serve(port: int) -> None:
    """Serve the metrics over HTTP, in a thread."""
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    prometheus_client.start_http_server(port)
