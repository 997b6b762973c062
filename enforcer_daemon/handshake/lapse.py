# SPDX-License-Identifier: Apache-2.0
"""How long a released flow may outlive an identity of which nothing is heard any more (docs/protocol.md, Leases)."""

from __future__ import annotations

UDP_LAPSE_S = 120.0
"""Silence after which the UDP flows with a peer lapse, seconds."""
TCP_LAPSE_S = 600.0
"""Silence after which the TCP connections with a peer lapse, seconds: a node may reboot within it."""
