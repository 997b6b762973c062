# SPDX-License-Identifier: Apache-2.0
"""The enforcer daemon: holds NetworkPolicy between pods by who they are."""
