# SPDX-License-Identifier: Apache-2.0
"""The messages between the plugin and the daemon: one request and one reply a connection, each a line of JSON.

Both sides use this module, so it imports little: the plugin starts once for every event of every pod. The namespace
of an `add` or a `check` goes along as a file descriptor (SCM_RIGHTS) with the first byte of the line. The deletions
that the plugin leaves on disk are `delete` requests too. The format is described in docs/registration.md.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

VERSION = 1
"""Of the format; a request of another version is answered with code PROTOCOL_MISMATCH."""
MAX_REQUEST_BYTES = 512 * 1024
"""Room for the 1,500 attachments of a very full node in one `collect`."""
MAX_REPLY_BYTES = 64 * 1024
MAX_CONTAINER_ID = 200
"""Characters; runtimes use 64. With an interface name it must fit a file name."""
MAX_IFNAME_BYTES = 15
"""The kernel's bound (IFNAMSIZ less the final zero)."""
MAX_LABELS = 512
"""Labels of one pod. What fits a handshake packet is far less; this limits what the daemon keeps."""
MAX_ADDRESSES = 64
"""Addresses, and host interfaces, of one attachment."""

POD_GONE = 3
UNUSABLE_NETNS = 4
NODE_NETNS = 8
TRY_AGAIN = 11
NOT_READY = 50
PODS_CUT_OFF = 51
FAILED = 101
PROTOCOL_MISMATCH = 102
NOT_ENFORCED = 103

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*", re.ASCII)
_UNFIT_IFNAME = re.compile(r"[/:\s\0]")


class MessageError(Exception):
    """A message that cannot be read; the text names the field."""


class VersionError(MessageError):
    """A message of another version of the format."""


class Attachment(NamedTuple):
    """What the runtime calls one interface of one sandbox."""

    container_id: str
    ifname: str

    @property
    def file_name(self) -> str:
        """Name of this attachment's file; a container id has no @, so no two attachments share one."""
        return f"{self.container_id}@{self.ifname}.json"


class Add(NamedTuple):
    """Enforce this attachment; answered once its rules are in place. Repeating it changes nothing."""

    attachment: Attachment
    netns_path: str
    network: str
    namespace: str
    pod: str
    uid: str
    """K8S_POD_UID; empty if the runtime gave none. A static pod's is its config.hash."""
    labels: dict[str, str]
    """args.cni.labels; empty if the runtime gave none, which says nothing of the pod's labels."""
    ips: tuple[str, ...]
    host_interfaces: tuple[str, ...]
    """Ends of the attachment in the node's namespace, as prevResult names them; without bridges."""
    mtu: int | None


class Delete(NamedTuple):
    """Forget this attachment. One that is not known is forgotten already."""

    attachment: Attachment


class Check(NamedTuple):
    """Make sure that this attachment is enforced in this namespace."""

    attachment: Attachment
    netns_path: str


class Collect(NamedTuple):
    """Forget every attachment of the network that is not listed."""

    network: str
    valid: tuple[Attachment, ...]


class Status(NamedTuple):
    """Say whether an `add` could be served."""


Request = Add | Delete | Check | Collect | Status


class Reply(NamedTuple):
    """The daemon's answer; code 0 is success, any other the CNI code that the plugin reports."""

    code: int = 0
    message: str = ""
    is_retryable: bool = False


def container_id_fault(value: str) -> str | None:
    """Return what is wrong with a container id, None if nothing is."""
    if not _NAME.fullmatch(value):
        return "must begin with a letter or digit and have only letters, digits, '_', '.' and '-'"
    return f"must not have more than {MAX_CONTAINER_ID} characters" if len(value) > MAX_CONTAINER_ID else None


def ifname_fault(value: str) -> str | None:
    """Return what is wrong with an interface name, None if nothing is."""
    if not value or value in (".", "..") or _UNFIT_IFNAME.search(value):
        return "must be the name of a network interface"
    return (
        f"must not have more than {MAX_IFNAME_BYTES} bytes"
        if len(value.encode(errors="surrogatepass")) > MAX_IFNAME_BYTES
        else None
    )


def is_text(value: str) -> bool:
    """Tell text from what JSON can spell and no file name may hold: a zero byte, or half a surrogate pair."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def network_fault(value: str) -> str | None:
    """Return what is wrong with a network's name, None if nothing is."""
    return None if _NAME.fullmatch(value) else "must begin with a letter or digit and have only [A-Za-z0-9_.-]"


def encode_request(request: Request) -> bytes:
    """Turn a request into its line."""
    fields: dict[str, object]
    match request:
        case Add():
            fields = {
                "operation": "add",
                **_encode_attachment(request.attachment),
                "netns": request.netns_path,
                "network": request.network,
                "pod": {"namespace": request.namespace, "name": request.pod, "uid": request.uid},
                "labels": request.labels,
                "ips": request.ips,
                "hostInterfaces": request.host_interfaces,
                "mtu": request.mtu,
            }
        case Delete():
            fields = {"operation": "delete", **_encode_attachment(request.attachment)}
        case Check():
            fields = {"operation": "check", **_encode_attachment(request.attachment), "netns": request.netns_path}
        case Collect():
            valid = [_encode_attachment(attachment) for attachment in request.valid]
            fields = {"operation": "collect", "network": request.network, "valid": valid}
        case Status():
            fields = {"operation": "status"}
    return _encode_line(fields)


def decode_request(line: bytes) -> Request:
    """Read a request; raise VersionError, or MessageError that names the field."""
    fields = _decode_line(line)
    operation = fields.text("operation")
    request: Request
    match operation:
        case "add":
            request = _decode_add(fields)
        case "delete":
            request = Delete(_decode_attachment(fields))
        case "check":
            request = Check(_decode_attachment(fields), _required(fields, "netns"))
        case "collect":
            listed = [Fields(entry, f"valid[{i}].") for i, entry in enumerate(fields.list("valid", None))]
            valid = tuple(_closed(entry, _decode_attachment(entry)) for entry in listed)
            request = Collect(_checked(fields, "network", network_fault), valid)
        case "status":
            request = Status()
        case _:
            raise MessageError("operation: must be add, delete, check, collect or status")
    fields.close()
    return request


def encode_reply(reply: Reply) -> bytes:
    """Turn a reply into its line."""
    return _encode_line({"code": reply.code, "message": reply.message, "retryable": reply.is_retryable})


def decode_reply(line: bytes) -> Reply:
    """Read a reply; raise VersionError, or MessageError that names the field."""
    fields = _decode_line(line)
    reply = Reply(fields.integer("code", 0, 999), fields.text("message"), fields.boolean("retryable"))
    fields.close()
    return reply


class Fields:
    """An object of a message, read field by field; every error names the field, and close() refuses what is left."""

    __slots__ = ("_left", "_prefix")

    def __init__(self, value: object, prefix: str = "") -> None:
        if not isinstance(value, dict):
            raise MessageError(f"{prefix.rstrip('.') or 'message'}: must be an object")
        self._left = dict(value)
        self._prefix = prefix

    def take(self, name: str) -> object:
        """Return the field's value, whatever it is."""
        try:
            return self._left.pop(name)
        except KeyError:
            raise MessageError(f"{self._prefix}{name}: is missing") from None

    def text(self, name: str) -> str:
        """Return a string."""
        return _text(self.take(name), self._prefix + name)

    def integer(self, name: str, least: int, most: int) -> int:
        """Return an integer in a range."""
        value = self.take(name)
        if type(value) is not int or not least <= value <= most:
            raise MessageError(f"{self._prefix}{name}: must be an integer from {least} to {most}")
        return value

    def boolean(self, name: str) -> bool:
        """Return true or false."""
        value = self.take(name)
        if not isinstance(value, bool):
            raise MessageError(f"{self._prefix}{name}: must be true or false")
        return value

    def list(self, name: str, most: int | None) -> list[object]:
        """Return a list of at most so many values; None: the message's own size is bound enough."""
        value = self.take(name)
        if not isinstance(value, list) or (most is not None and len(value) > most):
            raise MessageError(f"{self._prefix}{name}: must be a list" + (f" of at most {most}" if most else ""))
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """Return a list of at most so many strings."""
        return tuple(_text(item, f"{self._prefix}{name}[{i}]") for i, item in enumerate(self.list(name, most)))

    def mapping(self, name: str, most: int) -> dict[str, str]:
        """Return an object of at most so many strings."""
        value = self.take(name)
        if not isinstance(value, dict) or len(value) > most:
            raise MessageError(f"{self._prefix}{name}: must be an object of at most {most} strings")
        path = f"{self._prefix}{name}"
        return {_text(key, f"{path} (a key)"): _text(item, f"{path}.{key}") for key, item in value.items()}

    def close(self) -> None:
        """Raise MessageError for a field that nobody read."""
        for name in self._left:
            raise MessageError(f"{self._prefix}{name}: unknown field")


def _decode_add(fields: Fields) -> Add:
    pod = Fields(fields.take("pod"), "pod.")
    namespace, name, uid = _required(pod, "namespace"), _required(pod, "name"), pod.text("uid")
    pod.close()
    mtu = None if (value := fields.take("mtu")) is None else Fields({"mtu": value}).integer("mtu", 68, 65_536)
    return Add(
        attachment=_decode_attachment(fields),
        netns_path=_required(fields, "netns"),
        network=_checked(fields, "network", network_fault),
        namespace=namespace,
        pod=name,
        uid=uid,
        labels=fields.mapping("labels", MAX_LABELS),
        ips=fields.texts("ips", MAX_ADDRESSES),
        host_interfaces=fields.texts("hostInterfaces", MAX_ADDRESSES),
        mtu=mtu,
    )


def _encode_attachment(attachment: Attachment) -> dict[str, object]:
    return {"containerId": attachment.container_id, "ifname": attachment.ifname}


def _decode_attachment(fields: Fields) -> Attachment:
    return Attachment(_checked(fields, "containerId", container_id_fault), _checked(fields, "ifname", ifname_fault))


def _closed(fields: Fields, value: Attachment) -> Attachment:
    fields.close()
    return value


def _required(fields: Fields, name: str) -> str:
    return _checked(fields, name, lambda value: None if value else "must not be empty")


def _checked(fields: Fields, name: str, fault: Callable[[str], str | None]) -> str:
    value = fields.text(name)
    if problem := fault(value):
        raise MessageError(f"{name}: {problem}")
    return value


def _text(value: object, path: str) -> str:
    if not isinstance(value, str):
        raise MessageError(f"{path}: must be a string")
    if not is_text(value):
        raise MessageError(f"{path}: must be text")
    return value


def _encode_line(fields: dict[str, object]) -> bytes:
    return json.dumps({"version": VERSION, **fields}, separators=(",", ":")).encode() + b"\n"


def _decode_line(line: bytes) -> Fields:
    try:
        fields = Fields(json.loads(line))
    except (ValueError, RecursionError) as err:
        raise MessageError(f"message: is not JSON: {err}") from err
    version = fields.take("version")
    if type(version) is not int or version != VERSION:
        raise VersionError(f"version: is {str(version)[:20]}, this side speaks {VERSION}")
    return fields
