# SPDX-License-Identifier: Apache-2.0
"""Registration of pods by the CNI plugin, the records that outlive the daemon, and the operators' socket."""
