# SPDX-License-Identifier: Apache-2.0
"""Who signs for whom: authorities, node credentials, the trust bundle, and the identity tokens of pods."""
