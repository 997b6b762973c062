# SPDX-License-Identifier: Apache-2.0
"""A small CNI runtime: executes a conflist's plugins as libcni does (https://www.cni.dev/docs/spec/, section 4).

ADD runs the chain in order and hands each plugin the result of the one before; DEL and CHECK use the result and the
arguments of the ADD, which are kept in a cache directory, in libcni's own format. An ADD that fails is undone by a DEL,
as containerd does.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

PLUGIN_TIMEOUT_S = 240.0
"""How long one plugin may run; the slowest we run waits 10 s for its daemon."""

_CODE_NO_JSON = 999
"""Our own: the plugin failed without a CNI error on its standard output. The specification leaves 100 up to plugins."""


class CniError(Exception):
    """A plugin's error: its CNI code and message, and which plugin and command it was."""

    def __init__(self, command: str, plugin: str, code: int, msg: str, details: str = "") -> None:
        super().__init__(f"{command} {plugin}: code {code}: {msg}" + (f" ({details})" if details else ""))
        self.command = command
        self.plugin = plugin
        self.code = code
        self.msg = msg
        self.details = details


@dataclass(frozen=True, slots=True)
class _Call:
    """What is the same for every plugin of one operation."""

    command: str
    container_id: str = ""
    netns_path: str = ""
    ifname: str = ""
    cni_args: Mapping[str, str] = field(default_factory=dict)
    capability_args: Mapping[str, Any] = field(default_factory=dict)
    cni_labels: Mapping[str, str] = field(default_factory=dict)

    def environment(self, plugin_dirs: Sequence[Path]) -> dict[str, str]:
        named = {
            "CNI_CONTAINERID": self.container_id,
            "CNI_NETNS": self.netns_path,
            "CNI_IFNAME": self.ifname,
            "CNI_ARGS": ";".join(f"{key}={value}" for key, value in self.cni_args.items()),
        }
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "CNI_COMMAND": self.command,
            "CNI_PATH": ":".join(map(str, plugin_dirs)),
            **{key: value for key, value in named.items() if value},
        }


class CniRuntime:
    """Runs one network's chain. `exec_prefix` puts the plugins into a node: ("ip", "netns", "exec", NODE)."""

    def __init__(
        self,
        conflist: Mapping[str, Any],
        plugin_dirs: Sequence[Path],
        cache_dir: Path,
        exec_prefix: Sequence[str] = (),
    ) -> None:
        self._conflist = conflist
        self._plugin_dirs = tuple(plugin_dirs)
        self._cache_dir = cache_dir
        self._exec_prefix = tuple(exec_prefix)
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)

    def add(
        self,
        container_id: str,
        netns_path: str | Path,
        ifname: str = "eth0",
        cni_args: Mapping[str, str] | None = None,
        capability_args: Mapping[str, Any] | None = None,
        cni_labels: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Attach the namespace and return the chain's result; on an error undo what was done and raise CniError."""
        call = _Call(
            "ADD", container_id, str(netns_path), ifname, cni_args or {}, capability_args or {}, cni_labels or {}
        )
        result: dict[str, Any] | None = None
        try:
            for plugin in self._conflist["plugins"]:
                result = self._execute(plugin, call, {} if result is None else {"prevResult": result})
        except CniError as err:
            self._undo(call, err)
            raise
        if result is None:
            raise CniError("ADD", "", _CODE_NO_JSON, "the conflist has no plugins")
        self._remember(call, result)
        return result

    def delete(self, container_id: str, ifname: str = "eth0", *, netns_path: str | Path | None = None) -> None:
        """Detach, plugins in reverse order. Without a cached ADD the plugins still run, with the little that is known.

        `netns_path` overrides the one of the ADD: "" is what runtimes pass once the namespace is gone.
        """
        call, extra = self._recall("DEL", container_id, ifname, netns_path)
        for plugin in reversed(self._conflist["plugins"]):
            self._execute(plugin, call, extra)
        self._cache_file(container_id, ifname).unlink(missing_ok=True)

    def check(self, container_id: str, ifname: str = "eth0", *, netns_path: str | Path | None = None) -> None:
        """Ask every plugin whether the attachment is still as its ADD made it."""
        call, extra = self._recall("CHECK", container_id, ifname, netns_path)
        for plugin in self._conflist["plugins"]:
            self._execute(plugin, call, extra)

    def gc(self, valid: Sequence[tuple[str, str]]) -> None:
        """Tell every plugin that only these (container id, ifname) are left (from cniVersion 1.1.0 on)."""
        attachments = [{"containerID": container_id, "ifname": ifname} for container_id, ifname in valid]
        for plugin in self._conflist["plugins"]:
            self._execute(plugin, _Call("GC"), {"cni.dev/valid-attachments": attachments})

    def status(self) -> None:
        """Ask every plugin whether it could serve an ADD (from cniVersion 1.1.0 on)."""
        for plugin in self._conflist["plugins"]:
            self._execute(plugin, _Call("STATUS"), {})

    def _undo(self, call: _Call, err: CniError) -> None:
        try:
            for plugin in reversed(self._conflist["plugins"]):
                self._execute(plugin, replace(call, command="DEL"), {})
        except CniError as undo_err:
            err.add_note(f"undoing it failed too: {undo_err}")

    def _cache_file(self, container_id: str, ifname: str) -> Path:
        return self._cache_dir / "results" / f"{self._conflist['name']}-{container_id}-{ifname}"

    def _remember(self, call: _Call, result: Mapping[str, Any]) -> None:
        """Write what libcni writes (cachedInfo in its libcni/api.go), and the labels, which it does not know."""
        entry = {
            "kind": "cniCacheV1",
            "containerId": call.container_id,
            "config": base64.b64encode(json.dumps(self._conflist).encode()).decode(),
            "ifName": call.ifname,
            "networkName": self._conflist["name"],
            "netns": call.netns_path,
            "cniArgs": [[key, value] for key, value in call.cni_args.items()],
            "capabilityArgs": dict(call.capability_args),
            "result": result,
            "trireme.io/labels": dict(call.cni_labels),
        }
        path = self._cache_file(call.container_id, call.ifname)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_text(json.dumps(entry), encoding="utf-8")

    def _recall(
        self, command: str, container_id: str, ifname: str, netns_path: str | Path | None
    ) -> tuple[_Call, dict[str, Any]]:
        cached = self._cache_file(container_id, ifname)
        entry = json.loads(cached.read_text(encoding="utf-8")) if cached.exists() else {}
        call = _Call(
            command,
            container_id,
            str(entry.get("netns", "") if netns_path is None else netns_path),
            ifname,
            dict(entry.get("cniArgs", ())),
            entry.get("capabilityArgs", {}),
            entry.get("trireme.io/labels", {}),
        )
        return call, {"prevResult": entry["result"]} if entry else {}

    def _execute(self, plugin: Mapping[str, Any], call: _Call, extra: Mapping[str, Any]) -> dict[str, Any]:
        """Run one plugin; return the JSON object on its standard output, {} for none."""
        try:
            done = subprocess.run(
                [*self._exec_prefix, str(self._find(plugin["type"], call.command))],
                input=json.dumps(self._configuration(plugin, call, extra)).encode(),
                env=call.environment(self._plugin_dirs),
                capture_output=True,
                timeout=PLUGIN_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as err:
            raise CniError(call.command, plugin["type"], _CODE_NO_JSON, f"no end in {PLUGIN_TIMEOUT_S:g} s") from err
        output = done.stdout.decode(errors="replace").strip()
        try:
            answer = json.loads(output) if output else {}
        except ValueError:
            answer = None
        if done.returncode == 0 and isinstance(answer, dict):
            return answer
        stderr = done.stderr.decode(errors="replace").strip()
        if not isinstance(answer, dict) or "code" not in answer:
            message = f"exit status {done.returncode}, standard output {output!r}"
            raise CniError(call.command, plugin["type"], _CODE_NO_JSON, message, stderr)
        details = " ".join(filter(None, (answer.get("details", ""), stderr)))
        raise CniError(call.command, plugin["type"], answer["code"], answer.get("msg", ""), details)

    def _find(self, name: str, command: str) -> Path:
        for directory in self._plugin_dirs:
            if os.access(directory / name, os.X_OK):
                return directory / name
        places = ":".join(map(str, self._plugin_dirs))
        hint = "" if name == "trireme" else " (Debian has the reference plugins in containernetworking-plugins)"
        raise CniError(command, name, _CODE_NO_JSON, f"no such plugin in {places}{hint}")

    def _configuration(self, plugin: Mapping[str, Any], call: _Call, extra: Mapping[str, Any]) -> dict[str, Any]:
        """Derive what one plugin reads (specification, "Deriving execution configuration")."""
        configuration = {
            **plugin,
            "cniVersion": self._conflist["cniVersion"],
            "name": self._conflist["name"],
            **extra,
        }
        declared = configuration.pop("capabilities", {})
        if runtime := {key: value for key, value in call.capability_args.items() if declared.get(key)}:
            configuration["runtimeConfig"] = runtime
        if call.cni_labels:
            labels = [{"key": key, "value": value} for key, value in call.cni_labels.items()]
            own = configuration.get("args", {})
            configuration["args"] = {**own, "cni": {**own.get("cni", {}), "labels": labels}}
        return configuration
