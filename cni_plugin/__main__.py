# SPDX-License-Identifier: Apache-2.0
# pathlib would take longer to import than the call takes:
# ruff: noqa: PTH105, PTH110, PTH123, PTH202
"""The plugin's program: one CNI call, from the environment and standard input to a JSON object and an exit status."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from cni_plugin import client, config, deletions, messages, spec
from cni_plugin.netns import open_netns
from cni_plugin.result import pair_ends, read_prev_result, require_prev_result
from cni_plugin.spec import CniError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import BinaryIO, TextIO

    from cni_plugin.config import Config
    from cni_plugin.spec import Environment

ABOUT = "trireme: a CNI plugin that registers pods with the trireme enforcer; executed by container runtimes, CNI "
SHORT_TIMEOUT_S = 3.0
"""How long DEL, CHECK and GC try to reach the daemon. Kubelet repeats a DEL for ever, so it may not wait long."""
LAST_TIMEOUT_S = 0.2
"""For the attempt of a DEL after it has queued itself."""
STATUS_TIMEOUT_S = 1.0
"""A runtime asks for the status often; an absent daemon is an answer."""
MAX_LOG_BYTES = 1024 * 1024
"""Beyond it the log file is moved to NAME.1."""
DEFAULT_NAMESPACE = "default"
"""Of a container that has labels but no Kubernetes name; its pod name is the container id."""


class _Call:
    """What an error report needs, filled in as far as the input could be read."""

    __slots__ = ("command", "container_id", "log_file", "note", "version")

    def __init__(self, command: str, container_id: str) -> None:
        self.command = command
        self.container_id = container_id
        self.version = spec.LATEST_VERSION
        self.log_file: str | None = None
        self.note = ""
        """What a daemon that is ready still wants to be known."""


def main(env: Mapping[str, str], stdin: BinaryIO, stdout: TextIO, stderr: TextIO) -> int:
    """Carry out one call and return the exit status; nothing but one JSON object goes to `stdout`."""
    call = _Call(env.get("CNI_COMMAND", ""), env.get("CNI_CONTAINERID", ""))
    if not call.command:
        stderr.write(ABOUT + ", ".join(spec.SUPPORTED_VERSIONS) + "\n")
        return 0
    try:
        output = _execute(call, env, stdin)
    except CniError as err:
        _log(call, err.message)
        return _report(err, call, stdout)
    except Exception as err:  # noqa: BLE001 - the runtime must get JSON, whatever happens
        _log_traceback(call)
        return _report(CniError(spec.UNEXPECTED, f"unexpected {type(err).__name__}: {err}"), call, stdout)
    if call.note:
        stderr.write(f"trireme: {call.note}\n")
    if output is not None:
        stdout.write(json.dumps(output) + "\n")
        stdout.flush()
    return 0


def console() -> None:
    """Run as a program."""
    # Runtimes may start us without a standard input; VERSION does not need one.
    with open(0, "rb", closefd=False) if sys.stdin else open(os.devnull, "rb") as stdin:
        status = main(os.environ, stdin, sys.stdout, sys.stderr)
    sys.exit(status)


def _execute(call: _Call, env: Mapping[str, str], stdin: BinaryIO) -> dict[str, object] | None:
    match call.command:
        case "VERSION":
            return spec.version_object()
        case "DEL":
            _delete(call, env, stdin)
            return None
        case "ADD" | "CHECK" | "GC" | "STATUS":
            environment = spec.read_environment(call.command, env)
            tree = config.read_object(config.read_bytes(stdin))
            call.log_file = config.read_log_file(tree)
            call.version = config.read_version(tree, call.command)
            return _ask_daemon(call, environment, config.read_config(tree, call.version))
        case _:
            raise CniError(spec.INVALID_ENVIRONMENT, f"CNI_COMMAND: must be one of {', '.join(spec.COMMANDS)}")


def _ask_daemon(call: _Call, environment: Environment, settings: Config) -> dict[str, object] | None:
    match call.command:
        case "ADD":
            return _add(environment, settings)
        case "CHECK":
            _check(environment, settings)
        case "GC":
            if settings.valid_attachments is not None:
                _request(settings, messages.Collect(settings.network, settings.valid_attachments), SHORT_TIMEOUT_S)
        case _:
            call.note = _request(settings, messages.Status(), STATUS_TIMEOUT_S, unreachable_code=messages.NOT_READY)
    return None


def _add(environment: Environment, settings: Config) -> dict[str, object]:
    tree = require_prev_result(settings.prev_result)
    output = {**tree, "cniVersion": settings.version}
    if _is_passed_through(environment, settings):
        return output
    found = read_prev_result(tree, environment.ifname)
    request = messages.Add(
        attachment=environment.attachment,
        netns_path=environment.netns,
        network=settings.network,
        namespace=environment.namespace or DEFAULT_NAMESPACE,
        pod=environment.pod or environment.container_id,
        uid=environment.uid,
        labels=settings.labels,
        ips=found.ips,
        host_interfaces=pair_ends(found.host_interfaces),
        mtu=found.mtu,
    )
    _request_in(environment.netns, settings, request, settings.add_timeout_s)
    return output


def _check(environment: Environment, settings: Config) -> None:
    require_prev_result(settings.prev_result)
    if not _is_passed_through(environment, settings):
        request = messages.Check(environment.attachment, environment.netns)
        _request_in(environment.netns, settings, request, SHORT_TIMEOUT_S)


def _is_passed_through(environment: Environment, settings: Config) -> bool:
    """Tell a container that is nobody's pod, or a pod of an excluded namespace."""
    if not environment.pod and not settings.labels:
        return True
    return (environment.namespace or DEFAULT_NAMESPACE) in settings.excluded_namespaces


def _request_in(netns: str, settings: Config, request: messages.Request, timeout_s: float) -> None:
    descriptor = open_netns(netns)
    try:
        _request(settings, request, timeout_s, descriptor)
    finally:
        os.close(descriptor)


def _request(
    settings: Config,
    request: messages.Request,
    timeout_s: float,
    netns_fd: int | None = None,
    unreachable_code: int = messages.TRY_AGAIN,
) -> str:
    """Have the daemon carry out the request; give its note.

    Raise CniError with the daemon's code, or with ours where it is silent.
    """
    try:
        reply = client.call(settings.run_dir, request, timeout_s, netns_fd)
    except client.UnreachableError as err:
        raise CniError(unreachable_code, f"the enforcer was not ready within {timeout_s:g} s: {err}") from err
    except client.ProtocolError as err:
        raise CniError(messages.PROTOCOL_MISMATCH, str(err)) from err
    if reply.code:
        raise CniError(reply.code, reply.message)
    return reply.message


def _delete(call: _Call, env: Mapping[str, str], stdin: BinaryIO) -> None:
    """Forget the attachment, now or once the daemon is back.

    A DEL that fails keeps its pod Terminating for ever, and would skip the DEL of the plugins before us: beyond the two
    names without which nothing can be looked for, every fault is logged and passed over.
    """
    for name in ("CNI_CONTAINERID", "CNI_IFNAME"):
        if not env.get(name):
            raise CniError(spec.INVALID_ENVIRONMENT, f"{name}: is missing")
    try:
        tree = _lenient_config(stdin)
        call.log_file = config.read_log_file(tree)
        environment = spec.read_environment("DEL", {name: env[name] for name in ("CNI_CONTAINERID", "CNI_IFNAME")})
        _delete_or_queue(call, config.read_run_dir(tree), environment.attachment)
    except CniError as err:
        _log(call, err.message)  # a name that no ADD can have had
    except Exception:  # noqa: BLE001 - see above
        _log_traceback(call)


def _lenient_config(stdin: BinaryIO) -> dict[str, object]:
    try:
        return config.read_object(config.read_bytes(stdin))
    except CniError:
        return {}  # the directory is then the default one


def _delete_or_queue(call: _Call, run_dir: str, attachment: messages.Attachment) -> None:
    request = messages.Delete(attachment)
    try:
        reply = client.call(run_dir, request, SHORT_TIMEOUT_S)
    except client.UnreachableError as err:
        queued = deletions.enqueue(run_dir, attachment)
        _log(call, f"queued as {queued}: {err}")
        # A daemon that emptied the queue a moment before we wrote is met by one more attempt.
        try:
            reply = client.call(run_dir, request, LAST_TIMEOUT_S)
        except client.UnreachableError:
            return
        deletions.remove(queued)
    if reply.code:
        _log(call, f"the enforcer refused: {reply.message} (CNI error {reply.code})")


def _report(err: CniError, call: _Call, stdout: TextIO) -> int:
    stdout.write(json.dumps(spec.error_object(err, call.version)) + "\n")
    stdout.flush()
    return 1


def _log_traceback(call: _Call) -> None:
    import traceback  # only where something is wrong

    _log(call, traceback.format_exc())


def _log(call: _Call, text: str) -> None:
    if call.log_file is None:
        return
    import time

    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        if os.path.exists(call.log_file) and os.path.getsize(call.log_file) > MAX_LOG_BYTES:
            os.replace(call.log_file, call.log_file + ".1")
        with open(call.log_file, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{moment} {call.command} {call.container_id or '-'} {text.rstrip()}\n")
    except OSError:
        return  # the pod matters more than its log line


if __name__ == "__main__":
    console()
