# SPDX-License-Identifier: Apache-2.0
"""What enforcement costs, as ratios to no enforcement in the same run (docs/performance.md)."""
