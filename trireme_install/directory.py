# SPDX-License-Identifier: Apache-2.0
"""net.d on disk: reads it, and carries out the steps of a plan so that nobody's writing is lost.

A file is always complete: it is written under a temporary name beside its place, which no runtime reads, and renamed
(containerd reloads on a rename, not on a creation). In a file that belongs to somebody else the two are *exchanged*
(renameat2), and what comes out is compared with what had been read: if its owner has written it in between, it is put
back, and the plan is made again.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trireme_install.errors import ChangedMeanwhileError, InstallError
from trireme_install.netd import DROP_IN_EXTENSION, EXTENSIONS, MAX_FILE_BYTES, Listing
from trireme_install.plan import Remove, Replace, Step, Write

LOCK_NAME = ".trireme-install.lock"
_TEMPORARY = ".trireme-tmp"
_MAX_FILES = 256
"""Configuration files looked at; runtimes use one."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Be the only installer of this directory; raise InstallError if another one is at work."""
    try:
        descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as err:
        raise InstallError(f"{directory}: cannot be written: {err.strerror}") from err
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise InstallError(f"{directory}: another trireme-install is at work here; end it first") from err
        _remove_temporaries(directory)
        yield
    finally:
        os.close(descriptor)


def read_listing(directory: Path) -> Listing:
    """Read what runtimes would look at; raise InstallError if the directory itself cannot be read."""
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except FileNotFoundError:
        return Listing()
    except OSError as err:
        raise InstallError(f"{directory}: cannot be read: {err.strerror}") from err
    drop_ins = {name: _files(directory / name, (DROP_IN_EXTENSION,)) for name in names if (directory / name).is_dir()}
    return Listing(_files(directory, EXTENSIONS), {name: files for name, files in drop_ins.items() if files})


def carry_out(directory: Path, step: Step) -> None:
    """Do one step; raise ChangedMeanwhileError if the file is no longer what the plan was made from."""
    path = directory / step.path
    try:
        match step:
            case Replace(_, expected, content):
                _replace(path, expected, content)
            case Write(_, content):
                path.parent.mkdir(mode=0o755, exist_ok=True)
                _write_beside(path, content, 0o644).rename(path)
            case Remove():
                path.unlink(missing_ok=True)
                if path.parent != directory:
                    _remove_if_empty(path.parent)
    except OSError as err:
        raise InstallError(f"{path}: cannot be written: {err.strerror}") from err
    _sync(directory)


def _files(directory: Path, extensions: tuple[str, ...]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        paths = sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}  # gone since it was listed
    for path in paths:
        if not path.name.endswith(extensions) or not path.is_file():
            continue
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            continue  # gone since it was listed
        except OSError as err:
            raise InstallError(f"{path}: cannot be read: {err.strerror}") from err
        # A file that is too large for us is one that we cannot read, not one that is absent.
        found[path.name] = data if len(data) <= MAX_FILE_BYTES else b""
        if len(found) > _MAX_FILES:
            raise InstallError(f"{directory}: has more than {_MAX_FILES} configuration files")
    return found


def _replace(path: Path, expected: bytes, content: bytes) -> None:
    """Exchange and compare; what is there may be somebody's newer file, and then goes back."""
    try:
        mode = path.stat().st_mode & 0o777
        target = path.resolve(strict=True)  # an operator's symbolic link stays one
    except FileNotFoundError as err:
        raise ChangedMeanwhileError(f"{path}: is gone") from err
    temporary = _write_beside(target, content, mode)
    try:
        if not _exchange(temporary, target):
            # A file system without the exchange (NFS): the comparison comes first, and a small gap stays.
            if target.read_bytes() != expected:
                raise ChangedMeanwhileError(f"{path}: was written by somebody else")
            temporary.rename(target)
            return
        if temporary.read_bytes() != expected:
            _exchange(temporary, target)
            raise ChangedMeanwhileError(f"{path}: was written by somebody else")
    except FileNotFoundError as err:
        raise ChangedMeanwhileError(f"{path}: is gone") from err
    finally:
        temporary.unlink(missing_ok=True)


def _write_beside(path: Path, content: bytes, mode: int) -> Path:
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        os.fchmod(descriptor, mode)
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return temporary


def _exchange(one: Path, other: Path) -> bool:
    """Swap two files in one step; False where the file system cannot. Raises OSError."""
    if _libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _remove_temporaries(directory: Path) -> None:
    """Remove what an installer that was killed left behind; the lock says that none is at work."""
    for pattern in (f".*{_TEMPORARY}", f"*/.*{_TEMPORARY}"):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError as err:
        if err.errno not in (errno.ENOTEMPTY, errno.ENOENT):
            raise


def _sync(directory: Path) -> None:
    """Have the directory itself on disk, so that a power cut does not bring a former chain back."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
