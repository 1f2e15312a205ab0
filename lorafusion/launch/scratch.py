"""The temporary folder of a launcher. One that was killed cannot remove its own; the next launcher on this machine
does."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafusion.launch.lock import Process

NAME = re.compile(r"lorafusion-([0-9a-f]{8})-(\d+)-(\d+)-\w+")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that is there within it. Its name tells whose it is: a process of this kernel, by id and start."""
    process = Process.current()
    for path in Path(tempfile.gettempdir()).glob("lorafusion-*"):
        match = NAME.fullmatch(path.name)
        if match and match[1] == process.place:
            owner = process.model_copy(update={"pid": int(match[2]), "start": int(match[3])})
            if not owner.lives:
                shutil.rmtree(path, ignore_errors=True)  # another user's stays
    prefix = f"lorafusion-{process.place}-{process.pid}-{process.start}-"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
