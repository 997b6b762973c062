# SPDX-License-Identifier: Apache-2.0
"""What the signer asks of the API server: single objects, by path."""

from __future__ import annotations

import json
from typing import Any, Protocol

from enforcer_daemon.kube.client import NOT_FOUND, ApiError

Manifest = dict[str, Any]
CONFLICT = 409
"""HTTP status: the object was changed, or made, by somebody else meanwhile."""
_SILENCE_S = 30.0
_MERGE_PATCH = "application/merge-patch+json"


class Requests(Protocol):
    """The part of a connection to the API server that is used here."""

    async def get(self, path: str, query: dict[str, str], silence_s: float) -> bytes: ...

    async def send(self, method: str, path: str, body: bytes, silence_s: float, content_type: str = ...) -> bytes: ...


class Cluster:
    """Objects of the cluster, as they are now. All methods raise ApiError."""

    def __init__(self, api: Requests) -> None:
        self._api = api

    async def find(self, path: str) -> Manifest | None:
        """Return an object; None if there is none."""
        try:
            return _decoded(await self._api.get(path, {}, _SILENCE_S))
        except ApiError as err:
            if err.status == NOT_FOUND:
                return None
            raise

    async def create(self, path: str, manifest: Manifest) -> Manifest:
        """Create an object; raise ApiError with status CONFLICT where it is there already."""
        return _decoded(await self._api.send("POST", path, json.dumps(manifest).encode(), _SILENCE_S))

    async def replace(self, path: str, manifest: Manifest) -> Manifest:
        """Replace an object, if it still has the manifest's version; else raise ApiError with status CONFLICT."""
        return _decoded(await self._api.send("PUT", path, json.dumps(manifest).encode(), _SILENCE_S))

    async def patch(self, path: str, patch: Manifest) -> Manifest:
        """Change an object by a JSON merge patch (RFC 7386), if it still has the patch's version; else CONFLICT."""
        body = json.dumps(patch).encode()
        return _decoded(await self._api.send("PATCH", path, body, _SILENCE_S, _MERGE_PATCH))


def _decoded(body: bytes) -> Manifest:
    try:
        tree = json.loads(body)
    except ValueError as err:
        raise ApiError(f"an answer cannot be read: {err}") from err
    if not isinstance(tree, dict):
        raise ApiError("an answer is no object")
    return tree
