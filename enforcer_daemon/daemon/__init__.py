# SPDX-License-Identifier: Apache-2.0
"""The composition root: what the daemon is made of, and in which order it starts, changes and stops.

`run` builds everything and keeps it going; `endpoints` is what the registration socket and the policy source act on;
`endpoint` joins one pod's kernel side to its datapath; `node` holds what all endpoints share; `status` answers
operators.
"""
