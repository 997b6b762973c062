# SPDX-License-Identifier: Apache-2.0
"""What the daemon tells its operators: logs, counters, and the denials of each endpoint."""
