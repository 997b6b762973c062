# SPDX-License-Identifier: Apache-2.0
"""The datapath of one endpoint: packet, direction and time in, one Output out. Pure; never raises.

`endpoint` takes every packet, timer and change, and is the one place where bad input becomes a drop with a reason;
`engine` is the handshake of both roles, `tcp` and `udp` carry it; `decisions` asks policy; `context` is what all share.
"""
