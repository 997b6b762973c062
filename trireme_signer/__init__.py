# SPDX-License-Identifier: Apache-2.0
"""Signs the certificates of a cluster's nodes, for the enforcer's own DaemonSet and nobody else."""
