# SPDX-License-Identifier: Apache-2.0
"""The installer: puts the CNI plugin and its entry in the chain on a node, keeps them there, and takes them away."""
