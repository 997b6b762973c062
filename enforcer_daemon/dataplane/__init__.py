# SPDX-License-Identifier: Apache-2.0
"""The kernel's side: namespaces, rules, queues, raw sockets, conntrack and the guard on the host."""
