# SPDX-License-Identifier: Apache-2.0
"""The records of enforced attachments, one file each, for a daemon that starts anew to adopt.

They live under /run, as network namespaces do: neither outlives a reboot, so nothing is synced to a disk. A record that
cannot be read is set aside under another name and reported; the pod's rules are still in the kernel, and the daemon
finds such pods by their namespaces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cni_plugin import messages
from enforcer_daemon.errors import RegistrationError
from enforcer_daemon.model import AttachmentId, NetnsId
from enforcer_daemon.registration.request import AddRequest, decode_add, encode_add, encode_attachment
from enforcer_daemon.replacement import DRAFT_SUFFIX, replace_file

VERSION = 1
MAX_RECORDS = 4096
"""Attachments of one node; kubelet's own bound is 110 pods, the largest we know of is 1,000."""
MAX_RECORD_BYTES = messages.MAX_REQUEST_BYTES + 1024
SET_ASIDE = ".unreadable"
"""Appended to the name of a file that is no record."""

_MAX_STAT = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Record:
    """An attachment that is enforced."""

    request: AddRequest
    netns: NetnsId
    """Which namespace it was: a path can be mounted again on another one."""

    @property
    def attachment(self) -> AttachmentId:
        return self.request.attachment


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file among the records that is none; `path` is where it was set aside."""

    path: Path
    problem: str


class Registry:
    """The records in memory, each change on disk first. One daemon alone uses a directory (the socket's lock)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._records: dict[AttachmentId, Record] = {}
        self._set_aside: dict[str, Unreadable] = {}

    @property
    def records(self) -> Mapping[AttachmentId, Record]:
        """Every record; a view, which follows the changes."""
        return MappingProxyType(self._records)

    @property
    def set_aside(self) -> tuple[Unreadable, ...]:
        """What is no record, also of earlier starts: pods that may be cut off, until their attachment is deleted."""
        return tuple(self._set_aside.values())

    def load(self) -> tuple[Unreadable, ...]:
        """Read the directory, which is made if it is absent; return what was set aside. Raises OSError."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._records.clear()
        self._set_aside.clear()
        unreadable = []
        for path in sorted(self._directory.iterdir()):
            if path.suffix == DRAFT_SUFFIX:  # of a daemon that died while it wrote; the plugin was never answered
                path.unlink()
            elif path.suffix == SET_ASIDE:
                self._set_aside[path.stem] = Unreadable(path, "set aside at an earlier start")
            elif path.suffix == ".json":
                try:
                    record = _read(path)
                except (OSError, messages.MessageError) as err:
                    unreadable.append(_set_aside(path, str(err)))
                    self._set_aside[path.name] = unreadable[-1]
                else:
                    self._records[record.attachment] = record
        return tuple(unreadable)

    def put(self, record: Record) -> None:
        """Keep the record, in place of an earlier one of its attachment. Raises RegistrationError."""
        if record.attachment not in self._records and len(self._records) >= MAX_RECORDS:
            raise RegistrationError(messages.FAILED, f"the node has {MAX_RECORDS} attachments already")
        path = self._path(record.attachment)
        try:
            self._forget_set_aside(path)
            replace_file(path, encode_record(record), is_durable=False)
        except OSError as err:
            raise RegistrationError(messages.FAILED, f"{path}: cannot be written: {err.strerror}") from err
        self._records[record.attachment] = record

    def remove(self, attachment: AttachmentId) -> None:
        """Drop the record, if there is one. Raises RegistrationError."""
        path = self._path(attachment)
        try:
            path.unlink(missing_ok=True)
            self._forget_set_aside(path)
        except OSError as err:
            raise RegistrationError(messages.FAILED, f"{path}: cannot be removed: {err.strerror}") from err
        self._records.pop(attachment, None)

    def _forget_set_aside(self, path: Path) -> None:
        """The attachment that a file was of is recorded anew, or gone."""
        found = self._set_aside.get(path.name)
        if found is not None:
            found.path.unlink(missing_ok=True)
            del self._set_aside[path.name]

    def _path(self, attachment: AttachmentId) -> Path:
        return self._directory / encode_attachment(attachment).file_name


def encode_record(record: Record) -> bytes:
    """Turn the record into its file."""
    tree = {
        "version": VERSION,
        "netns": {"device": record.netns.device, "inode": record.netns.inode},
        "request": json.loads(messages.encode_request(encode_add(record.request))),
    }
    return json.dumps(tree, indent=1).encode() + b"\n"


def decode_record(data: bytes) -> Record:
    """Read a record's file; raise MessageError that names the field."""
    try:
        fields = messages.Fields(json.loads(data))
    except (ValueError, RecursionError) as err:
        raise messages.MessageError(f"record: is not JSON: {err}") from err
    fields.integer("version", VERSION, VERSION)
    netns = messages.Fields(fields.take("netns"), "netns.")
    netns_id = NetnsId(netns.integer("device", 0, _MAX_STAT), netns.integer("inode", 0, _MAX_STAT))
    netns.close()
    message = messages.decode_request(json.dumps(fields.take("request")).encode())
    fields.close()
    if not isinstance(message, messages.Add):
        raise messages.MessageError("request.operation: must be add")
    return Record(decode_add(message), netns_id)


def _read(path: Path) -> Record:
    if path.stat().st_size > MAX_RECORD_BYTES:
        raise messages.MessageError(f"record: has more than {MAX_RECORD_BYTES} bytes")
    record = decode_record(path.read_bytes())
    if encode_attachment(record.attachment).file_name != path.name:
        raise messages.MessageError(f"request: is of {record.attachment}, in the file of another attachment")
    return record


def _set_aside(path: Path, problem: str) -> Unreadable:
    aside = path.with_name(path.name + SET_ASIDE)
    try:
        path.rename(aside)
    except OSError as err:
        return Unreadable(path, f"{problem}; and cannot be set aside: {err.strerror}")
    return Unreadable(aside, problem)
