"""Renames that never replace, and exchanges: the two steps that make publication atomic."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_RENAMEX_SWAP, _RENAMEX_EXCL = 2, 4
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}


def rename_new(source: Path, target: Path) -> None:
    """Move a directory to a name that must not exist; FileExistsError when it does."""
    if _flagged(source, target, _RENAME_NOREPLACE, _RENAMEX_EXCL):
        return
    # A file system without the flag: rename() refuses a target that is not empty, and an empty one is told apart here.
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def exchange(first: Path, second: Path) -> None:
    """Swap two existing names in one step; OSError where the file system can't."""
    if not _flagged(first, second, _RENAME_EXCHANGE, _RENAMEX_SWAP):
        raise OSError(errno.ENOTSUP, "this file system can't exchange two names", str(second))


def _flagged(source: Path, target: Path, linux_flag: int, mac_flag: int) -> bool:
    """True when the kernel did it, False when it does not know how; OSError otherwise."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, there = os.fsencode(source), os.fsencode(target)
    if sys.platform == "darwin":
        result = libc.renamex_np(here, there, mac_flag)
    elif hasattr(libc, "renameat2"):
        result = libc.renameat2(_AT_FDCWD, here, _AT_FDCWD, there, linux_flag)
    else:
        return False
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(target))
