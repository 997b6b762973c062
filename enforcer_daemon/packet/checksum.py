# SPDX-License-Identifier: Apache-2.0
"""The Internet checksum (RFC 1071), summed in C: a big-endian integer modulo 0xFFFF is the ones' complement sum."""


def ones_sum(chunk: bytes) -> int:
    """Sum 16-bit words, 0 to 0xFFFE; an odd last byte counts as the high half of a word."""
    if len(chunk) & 1:
        return (int.from_bytes(chunk, "big") << 8) % 0xFFFF
    return int.from_bytes(chunk, "big") % 0xFFFF


def complement(total: int) -> int:
    """Turn the sum of all words into the checksum field."""
    return 0xFFFF - total % 0xFFFF
