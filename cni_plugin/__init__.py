# SPDX-License-Identifier: Apache-2.0
"""The CNI plugin: registers a pod's network namespace with the enforcer daemon. Standard library only."""
