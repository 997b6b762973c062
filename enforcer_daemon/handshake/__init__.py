# SPDX-License-Identifier: Apache-2.0
"""The handshake between enforcers: frames, proofs, verified peers, and the state machine of a flow. Sans I/O."""
