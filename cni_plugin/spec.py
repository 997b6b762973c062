# SPDX-License-Identifier: Apache-2.0
"""What the CNI specification fixes: versions, error codes, the environment of a call, the shape of an error.

Source: https://www.cni.dev/docs/spec/ (1.1.0). Codes from 100 on are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cni_plugin import messages

if TYPE_CHECKING:
    from collections.abc import Mapping

SUPPORTED_VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
LATEST_VERSION = SUPPORTED_VERSIONS[-1]
COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION")
FIRST_VERSION_OF = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}
"""Commands that a configuration of a lower version cannot ask for."""

INCOMPATIBLE_VERSION = 1
INVALID_ENVIRONMENT = 4
IO_FAILURE = 5
UNDECODABLE = 6
INVALID_CONFIG = 7
UNEXPECTED = 100

_K8S_POD = ("K8S_POD_NAMESPACE", "K8S_POD_NAME")
_NAMED_ON: dict[str, tuple[str, ...]] = {"ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME")}
_NAMED_ON["CHECK"] = _NAMED_ON["ADD"]
_NAMED_ON["DEL"] = ("CNI_CONTAINERID", "CNI_IFNAME")


class CniError(Exception):
    """An error for the runtime; `code` is the specification's or ours."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Environment(NamedTuple):
    """What a call says of the attachment; a field that its command does not name is empty."""

    container_id: str
    ifname: str
    netns: str
    namespace: str
    """K8S_POD_NAMESPACE; empty, with the pod's name, where the runtime is not Kubernetes'."""
    pod: str
    uid: str

    @property
    def attachment(self) -> messages.Attachment:
        return messages.Attachment(self.container_id, self.ifname)


def read_environment(command: str, env: Mapping[str, str]) -> Environment:
    """Check the call's variables; raise CniError (4) that names the variable."""
    for name in _NAMED_ON.get(command, ()):
        if not env.get(name):
            raise CniError(INVALID_ENVIRONMENT, f"{name}: is missing")
    container_id, ifname = env.get("CNI_CONTAINERID", ""), env.get("CNI_IFNAME", "")
    if container_id and (fault := messages.container_id_fault(container_id)):
        raise CniError(INVALID_ENVIRONMENT, f"CNI_CONTAINERID: {fault}")
    if ifname and (fault := messages.ifname_fault(ifname)):
        raise CniError(INVALID_ENVIRONMENT, f"CNI_IFNAME: {fault}")
    arguments = _read_arguments(env.get("CNI_ARGS", ""))
    namespace, pod = (arguments.get(name, "") for name in _K8S_POD)
    if bool(namespace) != bool(pod):
        # Half a name would send the pod past enforcement as "not Kubernetes'".
        raise CniError(INVALID_ENVIRONMENT, f"CNI_ARGS: {_K8S_POD[bool(namespace)]}: is missing")
    uid = arguments.get("K8S_POD_UID", "")
    return Environment(container_id, ifname, env.get("CNI_NETNS", ""), namespace, pod, uid)


def _read_arguments(text: str) -> dict[str, str]:
    """Read K=V;K=V. Unknown keys are passed over: runtimes send their own with IgnoreUnknown."""
    arguments = {}
    for part in filter(None, text.split(";")):
        key, separator, value = part.partition("=")
        if not separator or not key:
            raise CniError(INVALID_ENVIRONMENT, f"CNI_ARGS: {part[:40]!r} is not KEY=VALUE")
        arguments[key] = value
    return arguments


def error_object(error: CniError, version: str) -> dict[str, object]:
    """Return what goes to standard output. Runtimes show `msg` alone, so it repeats the code."""
    return {"cniVersion": version, "code": error.code, "msg": f"trireme: {error.message} (CNI error {error.code})"}


def version_object() -> dict[str, object]:
    """Return the answer to VERSION."""
    return {"cniVersion": LATEST_VERSION, "supportedVersions": SUPPORTED_VERSIONS}
