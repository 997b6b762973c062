# SPDX-License-Identifier: Apache-2.0
"""Packets as bytes and as values: IPv4 and IPv6 headers, TCP segments and their options, checksums. Pure."""
