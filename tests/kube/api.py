# SPDX-License-Identifier: Apache-2.0
"""A small API server for tests, over real HTTP: list with pages, watch with bookmarks and 410, create, get, replace,
patch, delete, subresources, of the kinds in `tests/kube/objects.py` (pods, policies, CSRs, events, leases and others).

    with FakeApi() as api:                       # a thread of its own; FakeApi(sock) listens on a bound socket, which
        api.put(manifest)                        # may live in another network namespace
        kubeconfig = api.write_kubeconfig(tmp_path / "kubeconfig")
        api.patch("Pod", "shop", "web", {"metadata": {"labels": {"app": "db"}}})
        api.delete("Pod", "shop", "web")
        api.get("Lease", "kube-system", "node-1")   # what the program under test stored
        with api.away(): ...                     # connections are cut and refused
        api.compact()                            # next watch from an old version is 410 Gone; open watches end with it
        api.bookmark()
        api.faults = lambda request: 500 if request.path.endswith("/pods") else None
        api.delays_s["networkpolicies"] = 2.0    # slow lists
        api.requests                             # (method, path with query) of everything that was asked

Methods can be called from any thread. Objects are not validated, and names of what is served are closed: another path
is 404. A CSR is approved and signed by the test: replace it, or `api.patch("CertificateSigningRequest", "", name, …)`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import yaml
from aiohttp import web

from tests.kube.objects import (
    KINDS,
    ApiError,
    Event,
    Key,
    Kind,
    Manifest,
    Objects,
    Selector,
    expired,
    key_of,
    kind_of,
    pairs,
)

_KEPT_REQUESTS = 10_000
_Result = TypeVar("_Result")
_Item = TypeVar("_Item")


class Asked(NamedTuple):
    """A request, in the words of RBAC."""

    token: str
    verb: str
    group: str
    resource: str
    """With the subresource, if there is one."""
    name: str
    """Empty if all objects of a kind are meant, or one that is still to be named."""


class FakeApi:
    """One cluster's API server. A context manager."""

    def __init__(self, sock: socket.socket | None = None, tls: ssl.SSLContext | None = None) -> None:
        """Listen on a free loopback port, or on a socket bound to a port by number, which is then the server's."""
        self.objects = Objects()
        self.requests: deque[tuple[str, str]] = deque(maxlen=_KEPT_REQUESTS)
        self.asked: set[Asked] = set()
        """What was asked, as an authorizer sees it."""
        self.sent_objects = 0
        """Objects that went out in lists and watches."""
        self.faults: Callable[[web.Request], int | None] = lambda _: None
        """Gives the status with which to refuse a request, None to serve it."""
        self.delays_s: dict[str, float] = {}
        """How long a list waits, by plural."""
        self.unserved: set[Kind] = {("certificates.k8s.io/v1", "clustertrustbundles")}
        """Kinds that this version of Kubernetes does not have; asked for, they are 404."""
        self.token: str | None = None
        """Bearer token that requests must carry; None: any."""
        self.users: dict[str, Manifest] = {}
        """By bearer token or sender's address: username and extra, which replace what a CSR's sender wrote there."""
        self._tls = tls
        self._sock = sock or _loopback()
        self.address = self._sock.getsockname()[:2]
        self._watches: set[_Watch] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake API server", daemon=True)
        self._runner: web.AppRunner | None = None

    # Life.

    def __enter__(self) -> FakeApi:
        self.objects.listeners.append(self._publish)
        self._thread.start()
        self._await(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._await(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._sock.close()

    @property
    def url(self) -> str:
        host, port = self.address
        return f"{'http' if self._tls is None else 'https'}://{f'[{host}]' if ':' in host else host}:{port}"

    def write_kubeconfig(self, path: Path, token: str = "test") -> Path:  # noqa: S107 - no secret
        """Write a kubeconfig that leads here."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    @contextmanager
    def away(self) -> Iterator[None]:
        """Cut all connections and refuse new ones during the block."""
        self._await(self._stop())
        try:
            yield
        finally:
            self._await(self._start())

    async def _start(self) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        # A copy: closing the server closes its socket, and the port must stay ours.
        await web.SockSite(self._runner, self._sock.dup(), ssl_context=self._tls).start()

    async def _stop(self) -> None:
        for watch in list(self._watches):
            watch.end()
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await self._end_connections(runner)
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # No longer listening: the kernel refuses.

    async def _end_connections(self, runner: web.AppRunner) -> None:
        """Cut what is connected, and what the loop was about to accept; what waits to be sent is not waited for."""
        server = runner.server
        connected = [connection.transport for connection in server.connections] if server is not None else []
        await runner.cleanup()
        for _ in range(3):
            for transport in connected:
                if isinstance(transport, asyncio.Transport):
                    transport.abort()
            await asyncio.sleep(0)
            connected = [connection.transport for connection in server.connections] if server is not None else []

    def _await(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def _call(self, function: Callable[[], _Result]) -> _Result:
        async def run() -> _Result:
            return function()

        result: _Result = self._await(run())
        return result

    def _each(self, items: Iterable[_Item], function: Callable[[_Item], None]) -> None:
        def call() -> None:
            for item in list(items):
                function(item)

        self._call(call)

    # What a test does with the cluster.

    def put(self, *manifests: Mapping[str, Any]) -> None:
        """Create objects, or replace those that exist."""
        self._each(manifests, self._put)

    def load(self, manifests: Iterable[Mapping[str, Any]]) -> None:
        """Create many objects before anybody watches, without a history of them."""

        def load() -> None:
            for manifest in manifests:
                self._put(manifest)
            self.objects.history.clear()
            self.objects.compacted = self.objects.version

        self._call(load)

    def get(self, kind: str, namespace: str, name: str) -> Manifest:
        """Return an object as it is stored; raise ApiError."""
        return self._call(lambda: self.objects.get(_plural(kind), (namespace, name)))

    def all(self, kind: str) -> list[Manifest]:
        """Return all objects of a kind."""
        return self._call(lambda: [found for _, found in self.objects.matching(_plural(kind), Selector())])

    def patch(self, kind: str, namespace: str, name: str, patch: Mapping[str, Any]) -> None:
        """Change an object as a JSON merge patch does."""
        self._call(lambda: self.objects.merge(_plural(kind), (namespace, name), patch))

    def delete(self, kind: str, namespace: str, name: str) -> None:
        """Remove an object; raise ApiError."""
        self._call(lambda: self.objects.delete(_plural(kind), (namespace, name)))

    def compact(self) -> None:
        """Forget old versions; open watches are told 410 and end."""

        def compact() -> None:
            self.objects.compact()
            for watch in list(self._watches):
                watch.send("ERROR", expired(self.objects.version).as_status())
                watch.end()

        self._call(compact)

    def bookmark(self) -> None:
        """Send a bookmark on every open watch that asked for them."""
        self._each(self._watches, lambda watch: watch.bookmark(self.objects.version))

    def hang_up(self) -> None:
        """End every watch, as a server does after timeoutSeconds; new ones are served."""
        self._each(self._watches, lambda watch: watch.end())

    def send_raw(self, plural: str, line: bytes) -> None:
        """Send a line of one's own on the watches of a resource."""

        def send(watch: _Watch) -> None:
            if watch.kind[1] == plural:
                watch.lines.put_nowait(line)

        self._each(self._watches, send)

    def watched(self) -> list[str]:
        """Return the plurals that are watched now."""
        return self._call(lambda: sorted(watch.kind[1] for watch in self._watches))

    def _put(self, manifest: Mapping[str, Any]) -> None:
        kind, key = kind_of(manifest), key_of(manifest)
        if key in self.objects.kinds[kind]:
            self.objects.replace(kind, key, manifest)
        else:
            self.objects.create(kind, key[0], manifest)

    # HTTP.

    def _publish(self, event: Event) -> None:
        for watch in self._watches:
            watch.take(event)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        try:
            if (code := self.faults(request)) is not None:
                raise ApiError(code, "Fault", "the test wants it so")
            if self.token is not None and _token_of(request) != self.token:
                raise ApiError(401, "Unauthorized", "Unauthorized")
            if (found := _discovery(request.path, self.unserved)) is not None:
                return web.json_response(found)
            kind, namespace, name, subresource = _route(request.path)
            if kind in self.unserved:
                raise ApiError(404, "NotFound", "the server could not find the requested resource")
            self.asked.add(_asked(request, kind, name, subresource))
            if name:
                return web.json_response(await self._one(request, kind, (namespace, name), subresource))
            if request.query.get("watch") in ("true", "1"):
                return await self._watch(request, kind, namespace)
            if request.method == "POST":
                return web.json_response(self._create(request, kind, namespace, await request.json()), status=201)
            return web.json_response(await self._list(request, kind, namespace))
        except ApiError as fault:
            return web.json_response(fault.as_status(), status=fault.code)

    def _create(self, request: web.Request, kind: Kind, namespace: str, body: Manifest) -> Manifest:
        if kind[1] == "certificatesigningrequests":
            token = _token_of(request)
            user = self.users.get(token) or self.users.get(request.remote or "", {})
            body["spec"] = {**body["spec"], "username": "", "extra": {}, **user}
        return self.objects.create(kind, namespace, body)

    async def _one(self, request: web.Request, kind: Kind, key: Key, subresource: str) -> Manifest:
        match request.method:
            case "GET":
                return self.objects.get(kind, key)
            case "DELETE":
                return self.objects.delete(kind, key)
            case "PUT" | "PATCH" as method:
                body = await request.json()
                if subresource:  # Only the status is changed by a subresource, whatever else is in the body.
                    version = body.get("metadata", {}).get("resourceVersion")
                    patch = {"status": body.get("status"), "metadata": {"resourceVersion": version} if version else {}}
                    return self.objects.merge(kind, key, patch)
                return (self.objects.replace if method == "PUT" else self.objects.merge)(kind, key, body)
        raise ApiError(405, "MethodNotAllowed", request.method)

    async def _list(self, request: web.Request, kind: Kind, namespace: str) -> Manifest:
        started = self._loop.time()
        # A test may shorten it meanwhile.
        while self._loop.time() - started < self.delays_s.get(kind[1], 0.0):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        found = self.objects.matching(kind, Selector.of(namespace, request.query))
        version, start = self.objects.version, 0
        if token := request.query.get("continue"):
            version, start = map(int, token.split("-"))
            if version < self.objects.compacted:
                raise expired(version)
        limit = int(request.query.get("limit", "0")) or len(found)
        page, rest = found[start : start + limit], found[start + limit :]
        metadata = {"resourceVersion": str(version)}
        if rest:
            metadata |= {"continue": f"{version}-{start + limit}", "remainingItemCount": str(len(rest))}
        self.sent_objects += len(page)
        # The items of a list carry no type of their own.
        items = [{k: v for k, v in item.items() if k not in ("apiVersion", "kind")} for _, item in page]
        return {"apiVersion": kind[0], "kind": f"{KINDS[kind]}List", "metadata": metadata, "items": items}

    async def _watch(self, request: web.Request, kind: Kind, namespace: str) -> web.StreamResponse:
        watch = _Watch(self, kind, Selector.of(namespace, request.query), "allowWatchBookmarks" in request.query)
        version = int(request.query.get("resourceVersion") or self.objects.version)
        for event in self.objects.since(version):
            watch.take(event)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        self._watches.add(watch)
        try:
            await response.prepare(request)
            deadline = float(request.query.get("timeoutSeconds", "600"))
            with suppress(TimeoutError):
                async with asyncio.timeout(deadline):
                    while (line := await watch.lines.get()) is not None:
                        await response.write(line)
        except ConnectionError:
            pass  # The client has gone.
        finally:
            self._watches.discard(watch)
        return response


class _Watch:
    """One client's watch: lines that wait to be sent; None ends it."""

    def __init__(self, api: FakeApi, kind: Kind, selector: Selector, has_bookmarks: bool) -> None:
        self.kind = kind
        self.lines: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._api = api
        self._selector = selector
        self._has_bookmarks = has_bookmarks

    def take(self, event: Event) -> None:
        """Send an event, as the selector sees it: what leaves it is deleted, what enters it is added."""
        if event.kind != self.kind:
            return
        was_in = event.before is not None and self._selector.matches(event.before)
        is_in = event.type != "DELETED" and self._selector.matches(event.object)
        if is_in or was_in:
            self._api.sent_objects += 1
            self.send("DELETED" if not is_in else "MODIFIED" if was_in else "ADDED", event.object)

    def send(self, type_: str, thing: Manifest) -> None:
        self.lines.put_nowait(json.dumps({"type": type_, "object": thing}).encode() + b"\n")

    def bookmark(self, version: int) -> None:
        if self._has_bookmarks:
            metadata = {"resourceVersion": str(version)}
            self.send("BOOKMARK", {"apiVersion": self.kind[0], "kind": KINDS[self.kind], "metadata": metadata})

    def end(self) -> None:
        self.lines.put_nowait(None)


def _asked(request: web.Request, kind: Kind, name: str, subresource: str) -> Asked:
    token = _token_of(request)
    verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}.get(request.method, "get")
    if request.method == "GET" and not name:
        verb = "watch" if "watch" in request.query else "list"
        # A list of the one object of this name is granted by its name.
        name = dict(pairs(request.query.get("fieldSelector", ""))).get("metadata.name", "")
    group = kind[0].rpartition("/")[0]
    return Asked(token, verb, group, "/".join(filter(None, (kind[1], subresource))), name)


def _token_of(request: web.Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else ""


def _discovery(path: str, unserved: set[Kind]) -> Manifest | None:
    """Return what is served of a group's version, where that is what is asked for."""
    parts = path.strip("/").split("/")
    kinds = KINDS.keys() - unserved if len(parts) == 3 else set()
    served = sorted(plural for version, plural in kinds if version == "/".join(parts[1:]))
    return {"kind": "APIResourceList", "resources": [{"name": plural} for plural in served]} if served else None


def _route(path: str) -> tuple[Kind, str, str, str]:
    """Return kind, namespace, name and subresource of a path."""
    parts = path.strip("/").split("/")
    version, rest = ("v1", parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
    namespace = ""
    if len(rest) > 2 and rest[0] == "namespaces" and (version, rest[2]) in KINDS:
        namespace, rest = rest[1], rest[2:]
    kind = version, rest[0] if rest else ""
    if kind not in KINDS or len(rest) > 3:
        raise ApiError(404, "NotFound", "the server could not find the requested resource")
    return kind, namespace, *(*rest[1:], "", "")[:2]  # type: ignore[return-value]


def _plural(kind: str) -> Kind:
    """Find a kind by its name; an Event is one of events.k8s.io."""
    return next(key for key in reversed(KINDS) if KINDS[key] == kind)


def _loopback() -> socket.socket:
    """Bind a free port by its number: the kernel then keeps it for the socket also while that does not listen."""
    with socket.socket() as first:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        first.bind(("127.0.0.1", 0))
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(first.getsockname())
    return sock
