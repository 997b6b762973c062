# SPDX-License-Identifier: Apache-2.0
"""Takes everything of ours out of the node, when the product is removed: pods go on, and nobody evaluates them."""

from __future__ import annotations

import os
from collections.abc import Iterable

from enforcer_daemon.daemon.flowstore import FlowStore
from enforcer_daemon.daemon.recovery import Recovery
from enforcer_daemon.daemon.sandbox import Sandbox
from enforcer_daemon.dataplane.backendrecord import BackendRecord
from enforcer_daemon.dataplane.backends import RulesBackend, choose_backend
from enforcer_daemon.dataplane.guard import Guard
from enforcer_daemon.dataplane.takeover import remove_closed_on_node, remove_tables
from enforcer_daemon.errors import DataplaneError, NetnsError
from enforcer_daemon.model import NetnsId
from enforcer_daemon.registration.admin import AdminServer
from enforcer_daemon.registration.registry import Registry
from enforcer_daemon.settings import Settings
from enforcer_daemon.telemetry.logs import Logger


def uninstall(settings: Settings, log: Logger) -> list[str]:
    """Remove the rules of all recorded pods, the records and the guard; give what is left, each with its cause.

    Raise EnforcerError if a daemon runs, which would put everything back, or where the kernel cannot be asked.
    """
    run_dir = settings.registration.run_dir
    with AdminServer(run_dir / "admin.sock", {}):  # Its lock is the daemon's.
        backend = choose_backend(settings.dataplane.rules_backend)
        backends = (backend, *BackendRecord(run_dir).others(backend))
        registry = Registry(run_dir / "endpoints")
        recovery = Recovery(registry, log)
        recovery.load()

        def flow_store(netns: NetnsId) -> FlowStore:
            return FlowStore.of(run_dir, netns, log)

        left = [f"record {aside.path}: {aside.problem}" for aside in registry.set_aside]
        for sandbox in recovery.sandboxes(lambda _: False, flow_store):
            problem = _remove_rules(sandbox, backends)
            if problem:
                left.append(problem)
                continue
            for attachment in sandbox.requests:
                registry.remove(attachment)
            flow_store(sandbox.netns).remove()
            log.info("rules removed", pod=str(sandbox.pod))
        Guard().remove_tables()
        remove_closed_on_node()
    return left


def _remove_rules(sandbox: Sandbox, backends: Iterable[RulesBackend]) -> str:
    try:
        for backend in backends:
            backend.remove(sandbox.netns_fd)
        remove_tables(sandbox.netns_fd)
    except (DataplaneError, NetnsError) as err:
        return f"pod {sandbox.pod}: {err}"
    finally:
        os.close(sandbox.netns_fd)
    return ""
