"""Every moment at which a program that changes files can be killed or find the disk full, one after another."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

# What changes a name on the disk. Files are written under names that nobody reads, and then replace others.
CHANGES = [(Path, "replace"), (Path, "rename"), (Path, "unlink"), (Path, "rmdir"), (shutil, "rmtree"), (os, "truncate")]
WRITES = [(Path, "replace")]


class Killed(BaseException):
    """What stands for SIGKILL: nothing is changed any more after it."""


@contextmanager
def fault_at(moment: int, error: BaseException | None = None) -> Iterator[list[int]]:
    """Within it the change of that number, from 1, and all after it do not happen: this process is killed, or with an
    `OSError` the disk is full, so that only what writes fails. The list has the number of changes that were tried."""
    tried: list[int] = []

    def guarded(original):
        def change(*arguments, **options):
            tried.append(1)
            if len(tried) >= moment:
                raise error or Killed
            return original(*arguments, **options)

        return change

    changes = CHANGES if error is None else WRITES
    patches = [patch.object(owner, name, guarded(getattr(owner, name))) for owner, name in changes]
    for one in patches:
        one.start()
    try:
        yield tried
    finally:
        for one in patches:
            one.stop()


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
