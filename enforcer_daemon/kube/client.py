# SPDX-License-Identifier: Apache-2.0
"""The API server over HTTP, by the official client's asyncio side: credentials, TLS and proxies are its part.

Objects stay raw JSON: its models would refuse a whole list for one bad object, and cost much more.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import yaml

from enforcer_daemon.errors import EnforcerError, SettingsError
from enforcer_daemon.kube.proxies import proxy_for

if TYPE_CHECKING:
    from kubernetes.aio.client import ApiClient

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where kubelet mounts a pod's token, the cluster's authority and the pod's namespace."""
GONE = 410
"""HTTP status of a version that the API server no longer has."""
NOT_FOUND = 404
UNAUTHORIZED = 401
_JSON = "application/json"
_REFRESH_AFTER_S = 5.0
_CONNECT_S = 5.0
_MAX_ERROR_BYTES = 4_096
MAX_LINE_BYTES = 4 * 1024 * 1024
"""One event of a watch; etcd's own bound of an object is 1.5 MiB."""
_UNUSABLE = (OSError, yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError)
"""What the loader of a kubeconfig raises of one that is none."""
_Request = tuple[Any, Any, Any, Any, Any]
"""Method, URL, header, body and form, as the client serializes them."""
_UNREACHABLE = (aiohttp.ClientError, OSError, TimeoutError)


class ApiError(EnforcerError):
    """The API server did not answer, or not with what was asked for; `status` is 0 where it did not answer."""

    def __init__(self, message: str, status: int = 0, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class _Content(NamedTuple):
    """What is sent, and what is to be done with it."""

    method: str = "GET"
    body: object = None
    type: str = _JSON


_NOTHING = _Content()


class _Session:
    """A client with its credentials; one that was replaced is closed when its last answer is over."""

    def __init__(self, client: ApiClient) -> None:
        self.client = client
        self.answers = 0
        self.is_replaced = False

    async def close(self) -> None:
        await self.client.close()  # type: ignore[no-untyped-call]

    async def close_if_idle(self) -> None:
        if self.is_replaced and not self.answers:
            await self.close()


class ClusterApi:
    """A connection to the API server. Open it on the running loop; close it there."""

    def __init__(self, kubeconfig: Path | None, scratch: Path) -> None:
        """Connect as `kubeconfig` says; None: as the pod's service account.

        Keep key material that a kubeconfig holds inline in `scratch`, a directory of our own (0700).
        """
        self._kubeconfig = kubeconfig
        self._scratch = scratch
        self._session: _Session | None = None
        self._opened_at = 0.0
        self._opening = asyncio.Lock()

    async def open(self) -> None:
        """Read the credentials; raise SettingsError if they cannot be used."""
        # Some hundreds of modules, which nobody need wait for whose policies come from a directory.
        from kubernetes.aio.client import ApiClient, Configuration
        from kubernetes.aio.config import ConfigException, load_kube_config
        from kubernetes.aio.config.incluster_config import InClusterConfigLoader

        configuration = Configuration()
        try:
            if self._kubeconfig is None:
                token, authority = SERVICE_ACCOUNT / "token", SERVICE_ACCOUNT / "ca.crt"
                # The loader reads the token anew each minute: kubelet replaces it long before it ends.
                InClusterConfigLoader(str(token), str(authority)).load_and_set(configuration)  # type: ignore[no-untyped-call]
            else:
                shutil.rmtree(self._scratch, ignore_errors=True)
                self._scratch.mkdir(mode=0o700, parents=True)
                await load_kube_config(  # type: ignore[no-untyped-call]
                    str(self._kubeconfig),
                    client_configuration=configuration,
                    temp_file_path=str(self._scratch),
                )
            # A kubeconfig's proxy-url counts before the environment, as for kubectl.
            configuration.proxy = configuration.proxy or proxy_for(str(configuration.host), os.environ)
            configuration.client_session_kwargs = {"trust_env": False}  # aiohttp reads NO_PROXY as Python does.
            client = ApiClient(configuration)
        except ConfigException as err:
            where = "null, and this is no pod with a service account: " if self._kubeconfig is None else ""
            raise SettingsError(f"kubernetes.kubeconfig: {where}{err}") from err
        except _UNUSABLE as err:
            raise SettingsError(f"kubernetes.kubeconfig: cannot be used: {err}") from err
        before, self._session = self._session, _Session(client)
        self._opened_at = time.monotonic()
        if before is not None:
            before.is_replaced = True
            await before.close_if_idle()

    async def refresh(self) -> None:
        """Read the credentials anew after a refusal (401), but not for each of the watches that were refused."""
        async with self._opening:
            if time.monotonic() - self._opened_at > _REFRESH_AFTER_S:
                await self.open()

    async def close(self) -> None:
        """End all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    @property
    def client(self) -> ApiClient:
        """The official client, for those of its parts that need it; raise ApiError before it is opened."""
        if self._session is None:
            raise ApiError("the API client is closed")
        return self._session.client

    @property
    def server(self) -> str:
        """Where the API server is."""
        return "" if self._session is None else str(self._session.client.configuration.host)

    async def get(self, path: str, query: Mapping[str, str], silence_s: float) -> bytes:
        """Return the body of an answer; raise ApiError."""
        async with self._answer(path, query, silence_s) as response:
            return await response.read()

    async def send(self, method: str, path: str, body: bytes, silence_s: float, content_type: str = _JSON) -> bytes:
        """Send a JSON object, and give the body of the answer; raise ApiError."""
        async with self._answer(path, {}, silence_s, _Content(method, json.loads(body), content_type)) as response:
            return await response.read()

    async def lines(self, path: str, query: Mapping[str, str], silence_s: float) -> AsyncIterator[bytes]:
        """Yield the lines of an answer as they come, until the server ends it or has said nothing for so long.

        The first is empty and comes at once when the server has agreed. Raises ApiError. A silence is none: of a kind
        that never changes a server may have nothing to say, and whether it is still there shows when it is asked again.
        """
        async with self._answer(path, query, silence_s) as response:
            yield b""
            rest = b""
            async for piece in _until_silence(response):
                *whole, rest = (rest + piece).split(b"\n")
                for line in whole:
                    yield line
                if len(rest) > MAX_LINE_BYTES:
                    raise ApiError(f"an event has more than {MAX_LINE_BYTES} bytes")

    @asynccontextmanager
    async def _answer(
        self, path: str, query: Mapping[str, str], silence_s: float, content: _Content = _NOTHING
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        session = self._session
        if session is None:
            raise ApiError("the API client is closed")
        session.answers += 1
        try:
            request = await session.client.param_serialize(
                content.method,
                path,
                query_params=list(query.items()),
                header_params={"Content-Type": content.type},
                body=content.body,
                auth_settings=["BearerToken"],
            )
            async with _ask(session.client, request, silence_s) as response:
                yield response
        except _UNREACHABLE as err:
            raise ApiError(f"the API server does not answer: {err or type(err).__name__}") from err
        finally:
            session.answers -= 1
            await session.close_if_idle()


async def _until_silence(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    with suppress(aiohttp.SocketTimeoutError):
        async for piece in response.content.iter_any():
            yield piece


@asynccontextmanager
async def _ask(client: ApiClient, request: _Request, silence_s: float) -> AsyncIterator[aiohttp.ClientResponse]:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=silence_s)
    response = (await client.call_api(*request, _request_timeout=timeout)).response
    try:
        if response.status >= 400:
            raise await _refusal(response)
        yield response
    finally:
        response.close()


async def _refusal(response: aiohttp.ClientResponse) -> ApiError:
    body = await response.content.read(_MAX_ERROR_BYTES)
    try:
        message = str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        message = body.decode(errors="replace")[:200]
    after = response.headers.get("Retry-After", "")
    return ApiError(f"HTTP {response.status}: {message}", response.status, float(after) if after.isdecimal() else 0.0)
