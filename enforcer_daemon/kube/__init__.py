# SPDX-License-Identifier: Apache-2.0
"""Policies, namespaces, this node's pods and networks from the Kubernetes API."""
