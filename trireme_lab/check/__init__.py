# SPDX-License-Identifier: Apache-2.0
"""Cases of policies on the wire: their pods with their addresses in a lab, and each TCP probe a real connection.

plan (which cases share a shared, who is where) -> objects (what the daemons read) -> run (apply, dial, compare).
"""
