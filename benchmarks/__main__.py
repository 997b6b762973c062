# SPDX-License-Identifier: Apache-2.0
"""Run every benchmark: `make bench`."""

from __future__ import annotations

from benchmarks import changes, cluster, connections, decisions, dns, floods, netlink, tenants

if __name__ == "__main__":
    connections.main([])
    print()
    dns.main()
    print()
    decisions.main()
    print()
    changes.main()
    print()
    floods.main()
    print()
    cluster.main()
    print()
    tenants.main()
    print()
    netlink.main()
