"""What a command says of its work, by the standard library's `logging` on standard error.

Every module logs to `logging.getLogger(__name__)`. A program that imports the package sets logging up as it likes.
"""

import logging
import os
import sys
from typing import Any, TextIO, cast

from lorafusion.core.schema import LONGEST_LINE, shortened

LEVEL = "LORAFUSION_LOG_LEVEL"  # in the environment: from the command line to the processes that it starts
DETAILED = "%(asctime)s %(name)s: %(message)s"


class _Lines(logging.Formatter):
    """A message in short lines; a warning or an error with that word before it."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        text = text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"
        return text if record.exc_info else "\n".join(shortened(line, LONGEST_LINE) for line in text.split("\n"))


class Lasting:
    """A stream that is there to the end: when a terminal was closed, or a disk is full, it goes on to nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


class _StandardError(logging.Handler):
    """To what is standard error when something is said, not when logging began."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def start_logging(level: int | None = None) -> None:
    """Send this package's messages of a level or above to standard error, and those of the processes that this one
    starts; on DEBUG with time and logger. No closed terminal ends this process from then on. level: by default that of
    the process that started this one, or else INFO."""
    if not isinstance(sys.stderr, Lasting):
        sys.stderr = cast(TextIO, Lasting(sys.stderr))
    inherited = os.environ.get(LEVEL, "")
    level = level or (int(inherited) if inherited.isdecimal() else logging.INFO)
    os.environ[LEVEL] = str(level)
    lines = _Lines(DETAILED if level <= logging.DEBUG else None)
    handler, of_libraries = _StandardError(), _StandardError(logging.WARNING)
    for each in (handler, of_libraries):
        each.setFormatter(lines)
    logger = logging.getLogger("lorafusion")
    logger.setLevel(level)
    logger.handlers = [handler]
    logging.lastResort = of_libraries  # of a library that has no handler of its own
