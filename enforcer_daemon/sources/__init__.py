# SPDX-License-Identifier: Apache-2.0
"""Where policies, namespaces and pods come from."""
