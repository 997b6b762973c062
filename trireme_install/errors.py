# SPDX-License-Identifier: Apache-2.0
"""What can go wrong while installing; messages are for the person who runs the installer."""


class InstallError(Exception):
    """The installation cannot go on."""


class UnreadableFileError(InstallError):
    """A configuration file that a runtime would refuse too."""


class ChangedMeanwhileError(InstallError):
    """Somebody else wrote the file between our reading and our writing; nothing is lost, and it is read again."""
