# SPDX-License-Identifier: Apache-2.0
"""The operators' socket, from the client's call to the command and back."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from enforcer_daemon.registration import admin
from enforcer_daemon.registration.admin import AdminError, AdminServer
from tests.unit.registration.live_server import serving
from triremectl import admin_client
from triremectl.admin_client import call


async def echo(arguments: dict[str, Any]) -> object:
    return arguments


async def fail(arguments: dict[str, Any]) -> object:
    raise AdminError(f"pod: {arguments['pod']} is not on this node")


async def unfit(arguments: dict[str, Any]) -> object:
    return {"set": {1}}


async def huge(arguments: dict[str, Any]) -> object:
    return "x" * 1000


@pytest.fixture
def served(run_dir: Path) -> Iterator[Path]:
    commands = {"echo": echo, "fail": fail, "unfit": unfit, "huge": huge}
    with serving(AdminServer(run_dir / "admin.sock", commands)):
        yield run_dir
        assert call(run_dir, "echo") == {}


def test_a_command_gets_its_arguments_and_returns_its_result(served: Path) -> None:
    assert call(served, "echo", pod="shop/web-0", limit=3) == {"pod": "shop/web-0", "limit": 3}


def test_a_commands_error_reaches_the_operator(served: Path) -> None:
    with pytest.raises(admin_client.AdminError, match=r"^pod: shop/web-0 is not on this node$"):
        call(served, "fail", pod="shop/web-0")


@pytest.mark.parametrize(("command", "kind"), [("fail", "KeyError"), ("unfit", "TypeError")])
def test_a_fault_in_a_command_is_told_and_survived(served: Path, command: str, kind: str) -> None:
    with pytest.raises(admin_client.AdminError, match=kind):
        call(served, command)


def test_a_result_is_bounded(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "MAX_REPLY_BYTES", 100)
    with pytest.raises(admin_client.AdminError, match="at most 100"):
        call(served, "huge")


def test_an_unknown_command_names_those_there_are(served: Path) -> None:
    with pytest.raises(admin_client.AdminError, match="echo, fail, huge, unfit"):
        call(served, "reboot")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"\n", b"not JSON"),
        (b"[" * 30_000 + b"\n", b"not JSON"),
        (b"[]\n", b"must be a JSON object"),
        (b'{"command":"echo"}\n', b"version: must be 1"),
        (b'{"version":1,"command":["echo"]}\n', b"command: must be one of"),
        (b"x" * 70_000, b"more than 65536 bytes"),
    ],
)
def test_what_is_no_request_is_refused(served: Path, line: bytes, text: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(served / "admin.sock"))
        connection.sendall(line)
        assert text in connection.makefile("rb").readline()


def test_an_operator_is_told_that_no_enforcer_runs(run_dir: Path) -> None:
    with pytest.raises(admin_client.AdminError, match="Is the enforcer running"):
        call(run_dir, "status")
    run_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(run_dir / "admin.sock"))
    with pytest.raises(admin_client.AdminError, match="is not running"):
        call(run_dir, "status")
