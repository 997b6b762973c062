# SPDX-License-Identifier: Apache-2.0
"""The one certificate authority that all nodes of a lab trust."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from enforcer_daemon.identity.authority import make_authority


def write_authority(directory: Path, trust_domain: str) -> tuple[Path, Path]:
    """Make an authority and return the files of its certificate and its key (0600)."""
    authority = make_authority(trust_domain, datetime.now(UTC))
    certificate, key = directory / "ca.pem", directory / "ca-key.pem"
    certificate.write_bytes(authority.certificate.public_bytes(serialization.Encoding.PEM))
    key.touch(mode=0o600)
    key.write_bytes(
        authority.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return certificate, key
