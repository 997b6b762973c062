# SPDX-License-Identifier: Apache-2.0
"""Any bytes from netlink give values or a DataplaneError."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from enforcer_daemon.dataplane.conntrack import decode_original_source
from enforcer_daemon.dataplane.netlink import decode_attributes, decode_messages, encode_attribute
from enforcer_daemon.errors import DataplaneError


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    with suppress(DataplaneError):
        decode_attributes(data)
    with suppress(DataplaneError):
        list(decode_messages(data))
    with suppress(DataplaneError):
        decode_original_source(data)


@given(st.dictionaries(st.integers(0, 0x3FFF), st.binary(max_size=40)))
def test_what_is_encoded_is_decoded(attributes: dict[int, bytes]) -> None:
    row = b"".join(encode_attribute(kind, value) for kind, value in attributes.items())
    assert decode_attributes(row) == attributes
