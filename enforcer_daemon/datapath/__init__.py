# SPDX-License-Identifier: Apache-2.0
"""The per-packet pipeline of one endpoint: packet, direction and time in, verdict and reports out. Pure; never raises.

`endpoint` takes every packet and is the one place where bad input becomes a drop with a reason; `initiator` and
`responder` are the two sides of the handshake; `judging` asks policy and remembers its answers; `context` holds what
they share.
"""
