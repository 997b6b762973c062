# SPDX-License-Identifier: Apache-2.0
"""Log lines meet readers that stop reading, on real pipes and sockets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from enforcer_daemon.telemetry.lines import LineFile, open_lines

LINE = "x" * 999 + "\n"
READ_BYTES = 1 << 20

Ends = tuple[LineFile, Callable[[], bytes]]
"""What is written to, and what reads all that is there."""


@pytest.fixture(params=["pipe", "socket"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    if request.param == "pipe":
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        lines = opened(writer)
        yield lines, lambda: os.read(reader, READ_BYTES)
        lines.close()
        os.close(reader)
        os.close(writer)
    else:
        one, other = socket.socketpair()
        lines = opened(one.fileno())
        yield lines, lambda: other.recv(READ_BYTES, socket.MSG_DONTWAIT)
        lines.close()
        one.close()
        other.close()


def read_all(read: Callable[[], bytes]) -> bytes:
    found = b""
    while True:
        try:
            found += read()
        except BlockingIOError:
            return found


def opened(writer: int) -> LineFile:
    lines = open_lines(writer)
    assert lines is not None
    return lines


def test_what_finds_no_room_is_counted_and_told_when_there_is_room_again(ends: Ends) -> None:
    lines, read = ends
    written = 2_000
    for _ in range(written):
        lines.write(LINE)  # Never waits: the reader has not read anything.
    kept = read_all(read)
    lines.write("next\n")
    *rest, told, last = read_all(read).splitlines()
    whole = (kept + b"".join(line + b"\n" for line in rest)).splitlines()
    assert {len(line) for line in whole} == {len(LINE) - 1}
    assert json.loads(told)["lost"] == written - len(whole) > 0
    assert last == b"next"


def test_a_line_longer_than_the_room_is_written_in_parts(ends: Ends) -> None:
    lines, read = ends
    text = "y" * 3_000_000 + "\n"
    lines.write(text)
    found = b""
    for _ in range(1_000):
        found += read_all(read)
        if found.endswith(b"next\n"):
            break
        lines.write("next\n")
    long, *others = found.decode().splitlines(keepends=True)
    assert long == text
    assert others[-1] == "next\n"


def test_a_reader_that_is_gone_stops_nothing() -> None:
    reader, writer = os.pipe()
    lines = opened(writer)
    os.close(reader)
    for _ in range(2):
        lines.write(LINE)
    lines.close()
    os.close(writer)


def test_a_file_and_a_terminal_are_written_to_as_they_are() -> None:
    with open(os.devnull, "w") as file:  # noqa: PTH123
        assert open_lines(file.fileno()) is None
    ours, theirs = os.openpty()
    assert open_lines(theirs) is None
    os.close(ours)
    os.close(theirs)


def test_a_process_whose_log_is_not_read_goes_on() -> None:
    program = (
        "from enforcer_daemon.settings import LogSettings\n"
        "from enforcer_daemon.telemetry.logs import open_log\n"
        "log = open_log(LogSettings())\n"
        "for number in range(5_000): log.info('a line', number=number)\n"
        "print('done', flush=True)\n"
    )
    reader, writer = os.pipe()
    try:
        found = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=writer, timeout=30, check=True
        )
    finally:
        os.close(writer)
        os.close(reader)
    assert found.stdout == b"done\n"
